"""Scans and repairs the zoo's models, once a seed, and looks at each only once for both; writes their run records.

    python benchmarks/scan_and_repair_zoo.py --scans benchmarks/results/scan --repairs benchmarks/results/repair

The records are those of ``scan_zoo.py run`` and ``repair_zoo.py run``, with the time of what both begin
with in the seconds of each.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated

import repair_zoo
import scan_zoo
import typer

import debackdoor as db
from debackdoor.case import open_case
from debackdoor.defenses import RNP
from debackdoor.files import atomic_write_text
from debackdoor.models import load_model
from debackdoor.repair import repair_case
from debackdoor.scan import scan_case
from debackdoor.zoo import Card, list_cards, weights_of


def run(
    scans: Annotated[Path, typer.Option(help="folder for the scans' records")],
    repairs: Annotated[Path, typer.Option(help="folder for the repairs' records")],
    names: Annotated[list[str] | None, typer.Argument(help="models of the zoo; by default all")] = None,
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="of the clean images and the searches")] = None,
    limit: Annotated[int, typer.Option(help="clean images")] = 500,
) -> None:
    """Two records a model and seed; those that have both are skipped."""
    for folder in (scans, repairs):
        folder.mkdir(parents=True, exist_ok=True)
    cards = [card for card in list_cards(zoo) if not names or card.name in names]
    for card, seed in product(cards, seeds or [0]):
        targets = [folder / f"{card.name}-seed{seed}-n{limit}.json" for folder in (scans, repairs)]
        if not all(target.exists() for target in targets):
            _measure(card, zoo, seed, limit, *targets)


def _measure(card: Card, zoo: Path, seed: int, limit: int, scan_to: Path, repair_to: Path) -> None:
    clean = db.load_clean(card.dataset, limit=limit, seed=seed)
    model = load_model(weights_of(zoo, card.name), card.arch)
    times = [time.perf_counter()]
    case = open_case(model, clean, RNP(seed=seed))
    exposure = case.expose()
    evidence = case.evidence(exposure)
    times.append(time.perf_counter())
    report = scan_case(case, exposure, evidence)
    times.append(time.perf_counter())
    result = repair_case(case, exposure, evidence)
    times.append(time.perf_counter())
    shared, scanning, repairing = (after - before for before, after in pairwise(times))
    scanned = scan_zoo.record_of(report, card, zoo, case, shared + scanning)
    atomic_write_text(scan_to, json.dumps(scanned, indent=1) + "\n")
    repaired = repair_zoo.record_of(result, card, zoo, "repair", seed, clean, shared + repairing)
    atomic_write_text(repair_to, json.dumps(repaired, indent=1) + "\n")
    typer.echo(f"{report.verdict} {report.score:.2f} {scanned['seconds']} s {repair_zoo.row([repaired])}")


if __name__ == "__main__":
    typer.run(run)
