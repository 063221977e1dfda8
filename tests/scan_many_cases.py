"""What the tests of scan-many share: a registry of small models, a stand-in for the scan, results made by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jsonschema import Draft202012Validator
from safetensors.torch import save_file
from torch import nn

import report_cases
from debackdoor.bench.executors import Outcome
from debackdoor.bench.manifest import Entry, read_manifest
from debackdoor.bench.scan_many import scan_many
from debackdoor.bench.scan_store import Result, Settings
from debackdoor.errors import in_one_line
from debackdoor.report import load_schema
from debackdoor.types import VERDICTS, CleanSet, ScanReport

MODULE = import_module("debackdoor.bench.scan_many")

NETWORKS = """
import os, signal, time
from pathlib import Path
from torch import nn

def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )

def wait(num_classes):
    while not Path(__file__).with_name("go").exists():
        time.sleep(0.02)
    return make(num_classes)

def die(num_classes):
    with open(Path(__file__).with_name("deaths"), "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)

def leave(num_classes):
    raise SystemExit(3)
"""


class Registry:
    """A folder with ``nets/net.py``, ``clean.npz``, models and a manifest of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "nets").mkdir()
        (folder / "nets" / "net.py").write_text(NETWORKS)
        x, y = self.images()
        np.savez(folder / "clean.npz", x=x.permute(0, 2, 3, 1).mul(255).byte().numpy(), y=y.numpy())

    @staticmethod
    def images() -> tuple[torch.Tensor, torch.Tensor]:
        """Sixty dark and bright images of 8x8 pixels, labels 0 and 1."""
        y = torch.arange(60) % 2
        x = 0.4 * torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.6 * y[:, None, None, None]
        return x, y

    def model(self, name: str, verdict: str = "clean") -> str:
        """A checkpoint with random weights, the last of which names the verdict that :class:`StandIn` gives it."""
        weights = _weights(len(name))
        weights["4.bias"] = torch.tensor([float(VERDICTS.index(verdict)), 0.0])
        save_file(weights, self.folder / f"{name}.safetensors")
        return f"{name}.safetensors"

    def broken(self, name: str) -> str:
        """A checkpoint that was cut off."""
        whole = self.folder / self.model(name)
        whole.write_bytes(whole.read_bytes()[:-40])
        return f"{name}.safetensors"

    def trained(self, name: str) -> str:
        """One that tells dark from bright."""
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        )
        model.load_state_dict(_weights(0))
        x, y = self.images()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        save_file(model.state_dict(), self.folder / f"{name}.safetensors")
        return f"{name}.safetensors"

    def manifest(self, rows: Sequence[Mapping[str, object]], name: str = "models.csv") -> Path:
        """Rows that lack an architecture or clean images get those of the registry."""
        rows = [{"arch": "nets/net.py:make", "clean": "clean.npz", **row} for row in rows]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with open(self.folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        return self.folder / name

    def entries(self, paths: Sequence[str]) -> tuple[Entry, ...]:
        return read_manifest(self.manifest([{"path": path} for path in paths]))

    def record(self, name: str) -> Any:
        """The record of a scan, if it is as its schema says."""
        record = json.loads((self.out / "records" / f"{name}.json").read_text())
        Draft202012Validator(load_schema("scan")).validate(record)
        return record

    def error(self, name: str) -> Any:
        return json.loads((self.out / "errors" / f"{name}.json").read_text())

    def files(self) -> set[str]:
        """The records below the folder of results."""
        return {str(path.relative_to(self.out)) for path in self.out.rglob("*.json")}


class StandIn:
    """Takes the place of the scan: the last layer's first bias says which verdict comes out."""

    def __init__(self) -> None:
        self.scans: list[dict[str, Any]] = []

    def __call__(self, model: nn.Module, clean: CleanSet, **options: Any) -> ScanReport:
        self.scans.append({"images": len(clean), **options})
        network = model if isinstance(model, nn.Sequential) else model.network
        return report_cases.report(VERDICTS[int(network[4].bias[0])], 2, ranking=report_cases.ranking(2, 4))


def serial(work: Callable[[Any], None], items: Sequence[Any], **_: object) -> Iterator[Outcome[Any]]:
    """Takes the place of the executors: one item after the other, in this process."""
    for item in items:
        try:
            work(item)
        except (Exception, SystemExit) as error:
            yield Outcome(item, in_one_line(error))
        else:
            yield Outcome(item, None)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(MODULE, "scan", made)
    monkeypatch.setattr(MODULE, "execute", serial)
    MODULE._clean.cache_clear()
    return made


def run(registry: Registry, entries: Sequence[Entry], retry_failed: bool = False, **settings: Any) -> dict[str, Result]:
    found = scan_many(entries, registry.out, Settings(**settings), retry_failed=retry_failed)
    return {result.name: result for result in found}


def result(name: str, verdict: str | None = "clean", **entries: Any) -> Result:
    """A result made by hand."""
    fields: dict[str, Any] = {
        "name": name,
        "path": f"models/{name}.safetensors",
        "arch": "resnet18",
        "verdict": verdict,
        "score": None if verdict is None else {"backdoored": 2.56, "suspicious": 0.91, "clean": 0.38}.get(verdict, 0.0),
        "suspect_labels": (3,) if verdict in ("backdoored", "suspicious") else (),
        "message": None if verdict is None else report_cases.report(verdict).message,
        "seconds": 12.34,
        "error": None if verdict is not None else f"models/{name}.safetensors: expected a checkpoint, got none",
        "sha256": "a3" * 32,
    }
    return Result(**fields | entries)


def _weights(seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(
            nn.Sequential(
                nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
            ).state_dict()
        )
