"""Scans the zoo's models, once a seed; writes a run record of each, tables, and how the threshold was calibrated.

    python benchmarks/scan_zoo.py run --out benchmarks/results/scan
    python benchmarks/scan_zoo.py baseline benchmarks/results/scan --seed 0
    python benchmarks/scan_zoo.py table benchmarks/results/scan --into docs/results.md --summary-into README.md
    python benchmarks/scan_zoo.py calibrate benchmarks/results/scan --into docs/results.md

A scan gets the model and the clean images alone. Neural Cleanse runs on the suspect model, as published, and on the
exposed one; the true trigger is looked at once, when all are done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from publish import commit, replace_between
from scan_tables import calibration, render, summary
from torch import Tensor
from zoo_models import chosen_cards

import debackdoor as db
from debackdoor.attacks import load_trigger
from debackdoor.bench.memory import PeakMemory
from debackdoor.case import Case, open_case
from debackdoor.defenses import RNP
from debackdoor.detectors.neural_cleanse import Anomalies, neural_cleanse
from debackdoor.detectors.trigger import success_rate
from debackdoor.files import atomic_write_text
from debackdoor.models import load_model
from debackdoor.runtime import resolve_device, versions
from debackdoor.scan import scan_case
from debackdoor.types import RecoveredTrigger, ScanReport
from debackdoor.zoo import CLEAN, Card, trigger_of, weights_of

PATCHES = ("badnets", "trojan", "cl", "awp")
"""The attacks whose triggers cover a part of the image that does not depend on it."""

FARTHEST = 8
"""Masks are also compared after a shift of up to so many pixels: training shifts images, and with them the trigger."""

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    names: Annotated[list[str] | None, typer.Argument(help="models of the zoo; by default all")] = None,
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="of the clean images and the searches")] = None,
    limit: Annotated[int, typer.Option(help="clean images")] = 500,
) -> None:
    """One record a model and seed; finished ones are skipped."""
    out.mkdir(parents=True, exist_ok=True)
    for card, seed in product(chosen_cards(zoo, names), seeds or [0]):
        target = out / f"{card.name}-seed{seed}-n{limit}.json"
        if not target.exists():
            record = measure(card, zoo, seed, limit)
            atomic_write_text(target, json.dumps(record, indent=1) + "\n")
            typer.echo(f"{card.name} seed {seed}: {record['verdict']}, {record['score']:.2f}, {record['seconds']} s")


@app.command()
def baseline(
    records: Annotated[Path, typer.Argument(help="folder of records of scans")],
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="of the records")] = None,
) -> None:
    """Runs Neural Cleanse where a record has none, and adds it to that."""
    cards = {card.name: card for card in chosen_cards(zoo, None)}
    for path in sorted(records.glob("*.json")):
        record = json.loads(path.read_text())
        if record["seed"] in (seeds or [0]) and not record["neural_cleanse"]:
            found = cleanse(cards[record["model"]], zoo, record["seed"], record["clean_images"])
            triggers = {**record["triggers"], **found.pop("triggers")}
            atomic_write_text(path, json.dumps({**record, **found, "triggers": triggers}, indent=1) + "\n")
            typer.echo(f"{path.stem}: {found['neural_cleanse']['original']['index']:.1f}")


def measure(card: Card, zoo: Path, seed: int, limit: int) -> dict[str, Any]:
    """Scans one model."""
    memory, started = PeakMemory(resolve_device()), time.perf_counter()
    case = _open(card, zoo, seed, limit)
    exposure = case.expose()
    report = scan_case(case, exposure, case.evidence(exposure))
    return record_of(report, card, zoo, case, time.perf_counter() - started, memory.record())


def _open(card: Card, zoo: Path, seed: int, limit: int) -> Case:
    clean = db.load_clean(card.dataset, limit=limit, seed=seed)
    return open_case(load_model(weights_of(zoo, card.name), card.arch), clean, RNP(seed=seed))


def record_of(
    report: ScanReport, card: Card, zoo: Path, case: Case, seconds: float, peak: Mapping[str, int | None]
) -> dict[str, Any]:
    """What the scan found, compared with the true trigger; ``peak`` is the memory it took."""
    recovered = {"scan": report.trigger} if report.trigger is not None else {}
    return {
        "schema": "debackdoor/scan-bench/1",
        "model": card.name,
        "attack": card.attack,
        "dataset": card.dataset,
        "arch": card.arch,
        "target": card.target,
        "mode": card.mode,
        "seed": case.method.seed,
        "clean_images": len(case.clean),
        "verdict": report.verdict,
        "message": report.message,
        "score": report.score,
        "all_to_all": report.all_to_all,
        "suspects": [{"label": suspect.label, "reasons": list(suspect.reasons)} for suspect in report.suspects],
        "evidence": dict(report.evidence),
        "neural_cleanse": {},
        "triggers": _triggers(recovered, case, card, zoo),
        "seconds": round(seconds, 1),
        **peak,
        "sha256": card.sha256,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "error": None,
    }


def cleanse(card: Card, zoo: Path, seed: int, limit: int) -> dict[str, Any]:
    """What Neural Cleanse finds with the suspect model and with its exposed copy, for a record."""
    case, cleansed, recovered = _open(card, zoo, seed, limit), {}, {}
    exposed = case.unlearn(case.suspect).model
    for which, judge in {"original": case.suspect, "exposed": exposed}.items():
        found = neural_cleanse(judge.requires_grad_(False), case.fit, case.holdout, case.classes, seed=seed)
        cleansed[which] = {"index": found.index, "label": found.label, "l1": [item.l1 for item in found.triggers]}
        recovered[f"neural-cleanse-{which}"] = _towards(found, card)
    triggers = _triggers(recovered, case, card, zoo)
    return {"neural_cleanse": cleansed, "triggers": triggers, "baseline_commit": commit()}


def _towards(found: Anomalies, card: Card) -> RecoveredTrigger:
    """The trigger towards the true target, so that a wrong guess of the label does not count twice."""
    return found.triggers[found.label if card.target is None else card.target]


def _triggers(recovered: dict[str, RecoveredTrigger], case: Case, card: Card, zoo: Path) -> dict[str, dict[str, Any]]:
    """What recovered triggers do to the suspect model, and how far their masks are the true ones."""
    if card.attack == CLEAN:
        return {}
    attack, holdout, found = load_trigger(trigger_of(zoo, card.name)), case.holdout, {}
    true = ((attack.apply(holdout.x) - holdout.x).abs().amax((0, 1)) > 1e-3).cpu()  # a recovered mask is there, too
    for name, trigger in recovered.items():
        row: dict[str, Any] = {"label": trigger.label, "l1": trigger.l1}
        row["success_rate"] = success_rate(case.suspect, trigger, holdout)
        if card.attack in PATCHES and card.target == trigger.label:
            mask = trigger.mask[0] > trigger.mask.max() / 2
            row |= {"iou": overlap(mask, true), "shifted_iou": best_overlap(mask, true)}
        found[name] = row
    return found


def overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union of two bool masks (H, W); 0 where both are empty."""
    return int((one & other).sum()) / max(1, int((one | other).sum()))


def best_overlap(mask: Tensor, true: Tensor) -> float:
    """The largest intersection over union after a shift of the mask by at most ``FARTHEST`` pixels each way."""
    shifts = range(-FARTHEST, FARTHEST + 1)
    padded = torch.nn.functional.pad(mask, [FARTHEST] * 4)
    height, width = true.shape
    return max(
        overlap(padded[FARTHEST + y : FARTHEST + y + height, FARTHEST + x : FARTHEST + x + width], true)
        for y, x in product(shifts, shifts)
    )


def _read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _put(text: str, into: Path | None, marker: str) -> None:
    if into is None:
        typer.echo(text)
    else:
        replace_between(into, marker, text)


@app.command()
def table(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    into: Annotated[Path | None, typer.Option(help="page whose table between the markers is replaced")] = None,
    summary_into: Annotated[Path | None, typer.Option(help="page that gets the summary alone")] = None,
) -> None:
    """A Markdown table: verdict, score and label of every model, Neural Cleanse beside it, and AUROCs."""
    rows = _read(records)
    _put(render(rows), into, records.name)
    if summary_into is not None:
        _put(summary(rows), summary_into, f"{records.name}-summary")


@app.command()
def calibrate(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    into: Annotated[Path | None, typer.Option(help="page whose table between the markers is replaced")] = None,
) -> None:
    """The threshold on the score, chosen without each network in turn and tried on it."""
    _put(calibration(_read(records)), into, f"{records.name}-calibration")


if __name__ == "__main__":
    app()
