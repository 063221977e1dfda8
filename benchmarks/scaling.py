"""What a scan and a repair cost as one thing grows: clean images, parameters (and channels), or classes.

    python benchmarks/scaling.py run --models victims --out benchmarks/results/scaling
    python benchmarks/scaling.py workers --out benchmarks/results/scaling
    python benchmarks/scaling.py table benchmarks/results/scaling --into docs/scaling.md
    python benchmarks/scaling.py draw benchmarks/results/scaling --out docs/figures

Nothing else should run meanwhile. Networks are trained once, with a Blend backdoor, and kept in the folder of
``--models``. Beside the seconds every record counts the images that went through the network, which do not depend on
the machine.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar

import scaling_tables
import torch
import typer
from publish import commit, replace_between
from speed_cases import training_of, victim_of
from torch import Tensor, nn

import debackdoor as db
from debackdoor.allocator import keep_freed_memory
from debackdoor.attacks.resume import weights_hash
from debackdoor.bench.executors import Executor, execute
from debackdoor.channels import count_channels, find_channels
from debackdoor.data import load_dataset
from debackdoor.files import atomic_write_text
from debackdoor.runtime import generator, versions
from debackdoor.types import CleanSet

SCHEMA = "debackdoor/scaling/1"

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        grows: what is varied.
        width: of the ResNet-18.
        classes: how many of GTSRB's the network knows; 0 for CIFAR-10's ten.
        images: clean images.
    """

    grows: str
    width: int = 16
    classes: int = 0
    images: int = 500

    @property
    def name(self) -> str:
        data = f"gtsrb{self.classes}" if self.classes else "cifar10"
        return f"{data}-w{self.width}-n{self.images}"


EPOCHS = {32: 6, 64: 6}
"""Passes over the training images, by width, where they are others than ``--epochs``."""

POINTS = [
    *(Point("images", images=count) for count in (100, 500, 1000, 2000)),
    *(Point("parameters", width=width) for width in (8, 16, 32, 64)),
    *(Point("classes", classes=count, images=430) for count in (5, 10, 20, 43)),
]


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    models: Annotated[Path, typer.Option(help="folder of the trained networks")] = Path("victims"),
    grows: Annotated[list[str] | None, typer.Option(help="images, parameters or classes; by default each")] = None,
    train_on: Annotated[int, typer.Option(help="images that networks are trained on")] = 20_000,
    epochs: Annotated[int, typer.Option(help="passes over them")] = 10,
) -> None:
    """One record a point; finished ones are skipped."""
    out.mkdir(parents=True, exist_ok=True)
    for point in POINTS:
        target = out / f"{point.grows}-{point.name}.json"
        if target.exists() or point.grows not in (grows or [point.grows]):
            continue
        passes = EPOCHS.get(point.width, epochs)
        record = {"schema": SCHEMA, **asdict(point), **_measure(point, models, train_on, passes)}
        record |= {"threads": torch.get_num_threads(), "versions": versions(), "commit": commit()}
        atomic_write_text(target, json.dumps(record, indent=1) + "\n")
        typer.echo(f"{target.stem}: scan {record['scan']['seconds']:.0f} s, repair {record['repair']['seconds']:.0f} s")


class Counting(nn.Module):
    """A network that counts the images that go through it; copies of it count together."""

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        self.seen["forward"] += len(x)
        out: Tensor = self.inner(x)
        if out.requires_grad:
            out.register_hook(self._backward)
        return out

    @classmethod
    def _backward(cls, gradient: Tensor) -> None:
        cls.seen["backward"] += len(gradient)


def _measure(point: Point, models: Path, train_on: int, epochs: int) -> dict[str, Any]:
    train, arch = _images(point), f"resnet18-w{point.width}"
    if point.classes:
        name, few = f"gtsrb{point.classes}-w{point.width}", _some(train, train_on, seed=0)
    else:  # the networks that speed.py trains
        name, few = arch, load_dataset("cifar10", "train", train_on)
    model, _ = victim_of(name, arch, few, models, epochs)
    clean = _some(train, point.images, seed=1)
    found: dict[str, Any] = {
        **training_of(name, models),
        "victim": weights_hash(model),
        "parameters": sum(value.numel() for value in model.parameters()),
        "channels": count_channels(find_channels(model, clean.x[:2])),
    }
    for name, action in (("scan", db.scan), ("repair", db.repair)):
        counting = Counting(model).eval()
        Counting.seen.clear()
        started = time.perf_counter()
        result: Any = action(counting, clean)
        seconds = time.perf_counter() - started
        told = result.verdict if name == "scan" else ("repaired" if result.changed else "unchanged")
        found[name] = {"seconds": seconds, "images": dict(Counting.seen), "result": told}
    return found


def _images(point: Point) -> CleanSet:
    if not point.classes:
        return load_dataset("cifar10")
    data = load_dataset("gtsrb")
    chosen = data.subset((data.y < point.classes).nonzero()[:, 0])
    return replace(chosen, class_names=data.class_names[: point.classes])


def _some(data: CleanSet, count: int, seed: int) -> CleanSet:
    return data.subset(torch.randperm(len(data), generator=generator(seed))[:count])


@app.command()
def workers(
    out: Annotated[Path, typer.Option(help="folder for the record")],
    model: Annotated[Path, typer.Option(help="checkpoint that is scanned over and over")] = Path(
        "zoo/slim/vgg11-clean.safetensors"
    ),
    arch: Annotated[str, typer.Option(help="its network")] = "vgg11-w12",
    copies: Annotated[int, typer.Option(help="how many scans")] = 6,
    tasks: Annotated[int, typer.Option(help="how many empty tasks")] = 100,
) -> None:
    """Times empty tasks and ``scan-many`` with 1 and 2 workers of both executors."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    record = {"schema": SCHEMA, "tasks": tasks, "scans": copies, "rows": rows, "versions": versions()}
    executors: tuple[Executor, ...] = ("local", "ray")
    for executor, count in product(executors, (1, 2)):
        row: dict[str, Any] = {"executor": executor, "workers": count, **_empty_tasks(executor, count, tasks)}
        row["scan_many_seconds"] = _scan_many(executor, count, model, arch, copies)
        typer.echo(row)
        rows.append(row)
        atomic_write_text(out / "workers.json", json.dumps(record | {"commit": commit()}, indent=1) + "\n")


def _empty_tasks(executor: Executor, workers: int, tasks: int) -> dict[str, float]:
    """Seconds until the first of many tasks that do nothing has come back, and for each of the others."""
    started = time.perf_counter()
    times = [time.perf_counter() for _ in execute(time.sleep, [0.0] * tasks, executor=executor, workers=workers)]
    return {"start_seconds": times[0] - started, "task_seconds": (times[-1] - times[0]) / (tasks - 1)}


def _scan_many(executor: str, workers: int, model: Path, arch: str, copies: int) -> float:
    """Seconds of the whole command."""
    with TemporaryDirectory() as folder:
        manifest = Path(folder) / "models.csv"
        rows = [f"{Path(folder) / f'{number}.safetensors'},{arch},10,cifar10" for number in range(copies)]
        for number in range(copies):
            shutil.copy(model, Path(folder) / f"{number}.safetensors")
        manifest.write_text("\n".join(["path,arch,num_classes,clean", *rows]) + "\n")
        command = ["debackdoor", "scan-many", str(manifest), "--out", str(Path(folder) / "out")]
        command += ["--executor", executor, "--workers", str(workers), "--quiet"]
        started = time.perf_counter()
        status = subprocess.run(command, check=False).returncode
        if status not in (0, 1):
            raise typer.BadParameter(f"expected a scan of {model}, got exit code {status}; check --model and --arch")
        return time.perf_counter() - started


@app.command()
def table(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    into: Annotated[Path | None, typer.Option(help="page whose tables between the markers are replaced")] = None,
) -> None:
    """Markdown tables: the points, the laws, many models, and the executors."""
    rows = [json.loads(path.read_text()) for path in sorted(records.glob("*-*.json"))]
    workers = records / "workers.json"
    found = json.loads(workers.read_text()) if workers.exists() else None
    for name, text in scaling_tables.render(rows, found).items():
        if into is None:
            typer.echo(text + "\n")
        else:
            replace_between(into, name, text)


@app.command()
def draw(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    out: Annotated[Path, typer.Option(help="folder for the figure")],
) -> None:
    """Seconds of scans and repairs against what grows, with the lines fitted."""
    rows = [json.loads(path.read_text()) for path in sorted(records.glob("*-*.json"))]
    scaling_tables.draw(rows, out / "scaling.png")


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    app()
