"""Repairs the zoo's models, once a seed; writes a run record of each repair and tables of all.

    python benchmarks/repair_zoo.py run --out benchmarks/results/repair
    python benchmarks/repair_zoo.py table benchmarks/results/repair --into docs/results.md --summary-into README.md
    python benchmarks/repair_zoo.py compare benchmarks/results/{repair,ablations} --into docs/results.md

The repair gets the model and the clean images alone; the trigger is used once, on the finished model, and once more
after that was fine-tuned by its new owner. ``ablate_zoo.py`` leaves parts of the repair out; other defences are
measured by ``debackdoor bench``.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from publish import commit, replace_between
from repair_tables import by_images, checked, compare_defenses, render, row, summary
from torch import nn
from zoo_models import chosen_cards

import debackdoor as db
from debackdoor.attacks import load_trigger
from debackdoor.bench.memory import PeakMemory
from debackdoor.defenses import FineTuning
from debackdoor.evaluation import Evaluation, accuracy, defence_effectiveness, evaluate
from debackdoor.files import atomic_write_text
from debackdoor.models import load_model
from debackdoor.repair import BUDGET
from debackdoor.runtime import device_name, resolve_device, versions
from debackdoor.types import CleanSet, RepairResult
from debackdoor.zoo import CLEAN, Card, list_cards, trigger_of, weights_of

IMAGES = 500
"""Clean images that a repair gets where nothing else is said."""

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    names: Annotated[list[str] | None, typer.Argument(help="models of the zoo; by default all")] = None,
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="of the clean images and the repair")] = None,
    limit: Annotated[int, typer.Option(help="clean images")] = IMAGES,
) -> None:
    """One record a model and seed; finished ones are skipped."""
    out.mkdir(parents=True, exist_ok=True)
    for card, seed in product(chosen_cards(zoo, names), seeds or [0]):
        target = out / f"{card.name}-seed{seed}-n{limit}.json"
        if not target.exists():
            record = measure(card, zoo, seed, limit)
            atomic_write_text(target, json.dumps(record, indent=1) + "\n")
            typer.echo(row([record]))


def measure(card: Card, zoo: Path, seed: int, limit: int) -> dict[str, Any]:
    """Repairs one model and measures it before and after."""
    clean = db.load_clean(card.dataset, limit=limit, seed=seed)
    model = load_model(weights_of(zoo, card.name), card.arch)
    memory, started = PeakMemory(resolve_device()), time.perf_counter()
    result = db.repair(model, clean, seed=seed)
    seconds = time.perf_counter() - started
    return record_of(result, card, zoo, "repair", seed, clean.to(resolve_device()), seconds, memory.record())


def record_of(
    result: RepairResult,
    card: Card,
    zoo: Path,
    defense: str,
    seed: int,
    clean: CleanSet,
    seconds: float,
    peak: Mapping[str, int | None],
) -> dict[str, Any]:
    """What the repair did to the model, measured with the trigger on the device of ``clean``."""
    models = {"after": result.model.to(clean.x.device)}
    if defense == "repair" and result.changed:
        tuned = FineTuning(lr=0.01, epochs=20, seed=seed)(models["after"], clean)
        models["fine_tuned"] = tuned.model
    rates = {"before": _rates_before(card.name, zoo)}
    rates |= {when: _rates(found, card, zoo) for when, found in models.items()}
    before, after = rates["before"], rates["after"]
    return {
        "schema": "debackdoor/bench/1",
        "model": card.name,
        "attack": card.attack,
        "dataset": card.dataset,
        "arch": card.arch,
        "target": card.target,
        "mode": card.mode,
        "defense": defense,
        "defense_parameters": {"budget": BUDGET},
        "blind": True,
        "seed": seed,
        "clean_images": len(clean),
        **{
            rate: {when: getattr(found, rate, None) for when, found in rates.items()}
            for rate in ("clean_accuracy", "attack_success_rate", "robust_accuracy")
        },
        "der": _der(before, after),
        "seconds": round(seconds, 1),
        **peak,
        "changed": result.changed,
        "channels_pruned": len(result.plan),
        "steps": [asdict(step) for step in result.steps],
        "verification": None if result.verification is None else asdict(result.verification),
        "sha256": card.sha256,
        "versions": versions(),
        "device": device_name(clean.x.device),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "error": None,
    }


@dataclass(frozen=True)
class CleanRates:
    """What there is to measure of a model without a backdoor."""

    clean_accuracy: float


def _der(before: Evaluation | CleanRates, after: Evaluation | CleanRates) -> float | None:
    if isinstance(before, Evaluation) and isinstance(after, Evaluation):
        return defence_effectiveness(before, after)
    return None


@functools.cache
def _rates_before(name: str, zoo: Path) -> Evaluation | CleanRates:
    card = next(card for card in list_cards(zoo) if card.name == name)
    return _rates(load_model(weights_of(zoo, name), card.arch), card, zoo)


def _rates(model: nn.Module, card: Card, zoo: Path) -> Evaluation | CleanRates:
    test = db.load_clean(card.dataset, limit=None, split="test")
    if card.attack == CLEAN:
        return CleanRates(accuracy(model, test))
    return evaluate(model, test, load_trigger(trigger_of(zoo, card.name)))


@app.command()
def table(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    into: Annotated[Path | None, typer.Option(help="page whose table between the markers is replaced")] = None,
    summary_into: Annotated[Path | None, typer.Option(help="page that gets the summary alone")] = None,
) -> None:
    """Markdown tables: the models, means over the seeds with their range, and what they come to by number of images."""
    rows = [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]
    usual = [record for record in rows if record["clean_images"] == IMAGES]
    if into is None:
        typer.echo(f"{render(usual)}\n\n{by_images(rows)}")
    else:
        replace_between(into, records.name, render(usual))
        replace_between(into, f"{records.name}-images", by_images(rows))
    if summary_into is not None:
        replace_between(summary_into, f"{records.name}-summary", summary(usual))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="folders of records")],
    into: Annotated[Path | None, typer.Option(help="page whose table between the markers is replaced")] = None,
    marker: Annotated[str, typer.Option(help="the markers' name")] = "compare",
    defenses: Annotated[list[str] | None, typer.Option("--defense", help="by default all that have records")] = None,
) -> None:
    """A Markdown table of all defences side by side, on the models and seeds that all of them were tried on."""
    rows = [json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("*.json"))]
    rows = [record for record in rows if record["defense"] in (defenses or [record["defense"]])]
    if into is None:
        typer.echo(compare_defenses(rows))
    else:
        replace_between(into, marker, compare_defenses(rows))


@app.command()
def checks(
    records: Annotated[Path, typer.Argument(help="folder of records of ablate_zoo.py --check")],
    into: Annotated[Path | None, typer.Option(help="page whose table between the markers is replaced")] = None,
) -> None:
    """A Markdown table of what the repair's own check says of repairs that lack a part."""
    text = checked([json.loads(path.read_text()) for path in sorted(records.glob("*.json"))])
    if into is None:
        typer.echo(text)
    else:
        replace_between(into, "checks", text)


if __name__ == "__main__":
    app()
