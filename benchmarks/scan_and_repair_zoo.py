"""Scans and repairs the zoo's models, once a seed, and looks at each only once for both; writes their run records.

    python benchmarks/scan_and_repair_zoo.py --scans benchmarks/results/scan --repairs benchmarks/results/repair \\
        --samples benchmarks/results/samples

The records are those of ``scan_zoo.py run``, ``repair_zoo.py run`` and, where a folder for them is given,
``sample_zoo.py run --detector repair-shift``. What a scan and a repair both begin with is in the seconds of each, and
once in those of both together, which stand in the repair's records.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any

import repair_zoo
import sample_zoo
import scan_zoo
import typer
from zoo_models import chosen_cards

import debackdoor as db
from debackdoor.bench.memory import PeakMemory
from debackdoor.case import open_case
from debackdoor.defenses import RNP
from debackdoor.detectors.shift import REPAIR_SHIFT
from debackdoor.files import atomic_write_text
from debackdoor.models import load_model
from debackdoor.repair import repair_case
from debackdoor.runtime import resolve_device
from debackdoor.scan import scan_case
from debackdoor.zoo import CLEAN, Card, weights_of


def run(
    scans: Annotated[Path, typer.Option(help="folder for the scans' records")],
    repairs: Annotated[Path, typer.Option(help="folder for the repairs' records")],
    samples: Annotated[Path | None, typer.Option(help="folder for the records of sample detection")] = None,
    names: Annotated[list[str] | None, typer.Argument(help="models of the zoo; by default all")] = None,
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="of the clean images and the searches")] = None,
    limit: Annotated[int, typer.Option(help="clean images")] = 500,
) -> None:
    """Two or three records a model and seed; those that are there stay as they are."""
    folders = [scans, repairs, *([samples] if samples is not None else [])]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for card, seed in product(chosen_cards(zoo, names), seeds or [0]):
        targets = [folder / f"{card.name}-seed{seed}-n{limit}.json" for folder in folders]
        wanted = targets if card.attack != CLEAN else targets[:2]
        if not all(target.exists() for target in wanted):
            _measure(card, zoo, seed, limit, *targets)


def _measure(
    card: Card, zoo: Path, seed: int, limit: int, scan_to: Path, repair_to: Path, samples_to: Path | None = None
) -> None:
    clean = db.load_clean(card.dataset, limit=limit, seed=seed)
    model = load_model(weights_of(zoo, card.name), card.arch)
    memory, times = PeakMemory(resolve_device()), [time.perf_counter()]
    case = open_case(model, clean, RNP(seed=seed))
    exposure = case.expose()
    evidence = case.evidence(exposure)
    times.append(time.perf_counter())
    first_look = memory.record()
    report = scan_case(case, exposure, evidence)
    times.append(time.perf_counter())
    scan_peak, memory = memory.record(), PeakMemory(resolve_device())
    result = repair_case(case, exposure, evidence)
    times.append(time.perf_counter())
    repair_peak = {name: _most(first_look[name], value) for name, value in memory.record().items()}
    shared, scanning, repairing = (after - before for before, after in pairwise(times))
    scanned = scan_zoo.record_of(report, card, zoo, case, shared + scanning, scan_peak)
    _write_new(scan_to, scanned)
    repaired = repair_zoo.record_of(result, card, zoo, "repair", seed, case.clean, shared + repairing, repair_peak)
    both = {"scan_seconds": scanned["seconds"], "seconds": round(shared + scanning + repairing, 1)}
    _write_new(repair_to, repaired | {"with_scan": both})
    if samples_to is not None and card.attack != CLEAN and not samples_to.exists():
        judges = {"repaired": [result.model] if result.changed else []}
        sample_zoo.add_to(samples_to, sample_zoo.record_of(card, zoo, case, [REPAIR_SHIFT], judges))
    typer.echo(f"{report.verdict} {report.score:.2f} {scanned['seconds']} s {repair_zoo.row([repaired])}")


def _most(one: int | None, other: int | None) -> int | None:
    """The larger one; None where there is no such memory."""
    return None if one is None or other is None else max(one, other)


def _write_new(path: Path, record: dict[str, Any]) -> None:
    """What is there may hold baselines that took longer."""
    if not path.exists():
        atomic_write_text(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(run)
