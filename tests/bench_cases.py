"""What the tests of the bench share: records made by hand, and what stands in for measuring."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from debackdoor.bench.cells import Cell
from debackdoor.bench.measure import Settings
from debackdoor.bench.methods import METHODS
from debackdoor.bench.records import as_read
from debackdoor.zoo import read_card

SECONDS = ("seconds", "cpu_seconds", "peak_memory_mib")
"""What differs from one run to the next."""


def fake(folder: Path, settings: Settings, cell: Cell) -> dict[str, Any]:
    """Stands in for ``measure``; fails while ``fails-SEED`` exists, is killed as often as ``kills-SEED`` is long."""
    kills = folder / f"kills-{cell.seed}"
    if kills.exists() and (left := kills.read_text()):
        kills.write_text(left[1:])
        os.kill(os.getpid(), signal.SIGKILL)
    if (folder / f"fails-{cell.seed}").exists():
        raise RuntimeError("it did not work")
    card = read_card(settings.zoo / f"{cell.model}.json")
    return record(cell.model, cell.defense, 0.9, seed=cell.seed, images=cell.clean_images, sha256=card.sha256)


def record(
    model: str,
    defense: str,
    der: float | None,
    *,
    seed: int = 0,
    images: int = 500,
    lost: float = 0.02,
    success: float = 0.1,
    seconds: float = 10.0,
    memory: int = 1000,
    blind: bool = True,
    error: str | None = None,
    sha256: str = "",
) -> dict[str, Any]:
    """A record with these numbers; without a DER that of a clean model, and with an error one of nothing measured."""
    clean = der is None and error is None
    after = None if clean or error else success
    parameters = METHODS[defense].parameters if defense in METHODS else {}
    return {
        "schema": "debackdoor/bench/1",
        "model": model,
        "attack": "clean" if clean else "badnets",
        "dataset": "digits",
        "arch": "net",
        "sha256": sha256,
        "defense": defense,
        "defense_parameters": as_read(parameters),
        "blind": blind,
        "seed": seed,
        "clean_images": images,
        "clean_accuracy": {"before": None, "after": None} if error else {"before": 0.9, "after": 0.9 - lost},
        "attack_success_rate": {"before": None if after is None else 1.0, "after": after},
        "robust_accuracy": {"before": None if after is None else 0.0, "after": None if after is None else 0.8},
        "der": None if error else der,
        "seconds": None if error else seconds,
        "peak_memory_mib": None if error else memory,
        "changed": None if error else True,
        "error": error,
    }
