"""Repairs the zoo's models with one ingredient of the repair left out at a time; writes a run record of each.

    python benchmarks/ablate_zoo.py --out benchmarks/results/ablations
    python benchmarks/repair_zoo.py compare benchmarks/results/{repair,ablations} --into docs/results.md \\
        --marker ablations
    python benchmarks/ablate_zoo.py cl --without all --without triggers --check --out benchmarks/results/checks
    python benchmarks/repair_zoo.py checks benchmarks/results/checks --into docs/results.md

A model is exposed and examined once for all of its repairs. What they end with is not examined again, since that
changes nothing of it, but with ``--check``, which shows whether a repair's own check tells the repairs that failed.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import repair_zoo
import typer
from zoo_models import chosen_cards

import debackdoor as db
from debackdoor.bench.memory import PeakMemory
from debackdoor.case import Case, open_case
from debackdoor.defenses.lesson import RelearnSettings
from debackdoor.defenses.relearn import relearn
from debackdoor.defenses.rnp import RNP, Exposure
from debackdoor.detectors.evidence import Evidence
from debackdoor.files import atomic_write_text
from debackdoor.models import load_model
from debackdoor.repair import verify
from debackdoor.runtime import resolve_device
from debackdoor.types import RepairResult
from debackdoor.zoo import CLEAN, Card, weights_of

BUDGET = 0.02
"""The default of ``debackdoor repair``."""

WITHOUT = ("pruning", "triggers", "answers", "relearning")
"""What can be left out: pruning, the triggers that are unlearned, the pruned model's answers as a lesson, or all of
relearning."""

ALL = "all"
"""No repair: the suspect model as it is, for the check alone."""


def run(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    names: Annotated[list[str] | None, typer.Argument(help="models of the zoo; by default all with a backdoor")] = None,
    without: Annotated[
        list[str] | None, typer.Option(help=f"out of {', '.join(WITHOUT)}, by default each of these, and {ALL}")
    ] = None,
    check: Annotated[bool, typer.Option(help="also make the repair's own check")] = False,
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="of the clean images and the repair")] = None,
    limit: Annotated[int, typer.Option(help="clean images")] = 500,
) -> None:
    """One record a model, ingredient and seed; finished ones are skipped."""
    known = (*WITHOUT, ALL)
    unknown = sorted(set(without or []) - set(known))
    if unknown:
        raise typer.BadParameter(f"--without: expected {', '.join(known)}, got {', '.join(unknown)}; correct it")
    out.mkdir(parents=True, exist_ok=True)
    cards = [card for card in chosen_cards(zoo, names) if card.attack != CLEAN]
    for card, seed in product(cards, seeds or [0]):
        targets = {part: out / f"repair-without-{part}-{card.name}-seed{seed}-n{limit}.json" for part in known}
        left = {part: path for part, path in targets.items() if part in (without or WITHOUT) and not path.exists()}
        if left:
            _measure(card, zoo, seed, limit, left, check)


def _measure(card: Card, zoo: Path, seed: int, limit: int, targets: dict[str, Path], check: bool) -> None:
    clean = db.load_clean(card.dataset, limit=limit, seed=seed)
    started = time.perf_counter()
    case = open_case(load_model(weights_of(zoo, card.name), card.arch), clean, RNP(seed=seed))
    exposure = case.expose()
    evidence = case.evidence(exposure)
    looked = time.perf_counter() - started
    for part, target in targets.items():
        memory, started = PeakMemory(resolve_device()), time.perf_counter()
        result = _repair(case, exposure, evidence, part)
        seconds, used = looked + time.perf_counter() - started, memory.record()
        if check:
            with case.within_memory():
                result = replace(result, verification=verify(case, exposure, evidence, result.model))
        record = repair_zoo.record_of(result, card, zoo, f"repair-without-{part}", seed, case.clean, seconds, used)
        atomic_write_text(target, json.dumps(record, indent=1) + "\n")
        typer.echo(f"without {part} {repair_zoo.row([record])}")


def _repair(case: Case, exposure: Exposure, evidence: Evidence, without: str) -> RepairResult:
    """What the repair comes to without one of its ingredients; a model that nothing speaks against is left alone."""
    method = replace(case.method, budget=BUDGET / 2)
    prunes = evidence.exposed and without not in ("pruning", ALL)
    plan = method.choose(case.suspect, exposure, case.clean) if prunes else ()
    result = method.remove(case.suspect, exposure, plan, case.holdout)
    if not evidence.exposed or without in ("relearning", ALL):
        return result
    learned = relearn(
        case.suspect,
        exposure.layers,
        plan,
        case.fit,
        case.holdout,
        BUDGET,
        () if without == "triggers" else evidence.aims,
        () if without == "triggers" else evidence.stamps,
        RelearnSettings(answers=0.0) if without == "answers" else None,
        seed=method.seed,
        precision=method.precision,
        pruned=result.model,
    )
    return result if learned.model is None else replace(result, model=learned.model, changed=True)


if __name__ == "__main__":
    typer.run(run)
