"""Finds triggered images with the zoo's backdoored models, once a seed; writes a run record of each and a table of all.

    python benchmarks/sample_zoo.py run --out benchmarks/results/samples
    python benchmarks/sample_zoo.py run --detector spectral --triggered 25 --out benchmarks/results/samples-few
    python benchmarks/sample_zoo.py table benchmarks/results/samples --into docs/results.md \\
        --summary-into README.md

Every detector gets the model, clean training images that nothing was taught on, and a pile of test images, of which
some carry the trigger; once with the suspect model and once with the exposed one. A record that lacks a detector gets
it added. Triggered images of an all-to-one backdoor are of other classes than its target; whether the trigger succeeds
on them is not asked.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from publish import commit, replace_between
from sample_tables import WAYS, Record, render, row, summary
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from zoo_models import chosen_cards

import debackdoor as db
from debackdoor.attacks import load_trigger
from debackdoor.attacks.base import ALL_TO_ONE
from debackdoor.case import Case, open_case
from debackdoor.defenses import RNP
from debackdoor.detect import DETECTORS, clean_threshold, expose_several, repaired_model
from debackdoor.detectors.cognitive_distillation import CognitiveDistillation
from debackdoor.detectors.samples import ExposedMargin, smallest
from debackdoor.detectors.shift import REPAIR_SHIFT, repair_shift
from debackdoor.files import atomic_write_text
from debackdoor.models import load_model
from debackdoor.models.forward import predict
from debackdoor.runtime import generator, versions
from debackdoor.zoo import CLEAN, Card, trigger_of, weights_of

FALSE_POSITIVES = 0.01
"""The share of the clean images that a threshold is set to flag."""
SLOW = {CognitiveDistillation.name: 0.4}
"""Detectors that get the first images of the pile only, and how large a share."""

BY_DETECTOR = ("images", "aurocs", "true_positive_rates", "false_positive_rates", "seconds", "commits")
"""What a record tells of every detector."""

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="folder for the records")],
    names: Annotated[list[str] | None, typer.Argument(help="models of the zoo; by default all with a backdoor")] = None,
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    detectors: Annotated[list[str] | None, typer.Option("--detector", help=f"out of {', '.join(WAYS)}")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="of the images and all methods")] = None,
    limit: Annotated[int, typer.Option(help="clean images")] = 500,
    clean_tests: Annotated[int, typer.Option(help="images without trigger in the pile")] = 250,
    triggered: Annotated[int, typer.Option(help="images with it")] = 250,
) -> None:
    """One record a model and seed; finished ones are skipped."""
    if unknown := set(detectors or ()) - set(WAYS):
        raise typer.BadParameter(f"expected detectors out of {', '.join(WAYS)}, got {', '.join(sorted(unknown))}")
    out.mkdir(parents=True, exist_ok=True)
    cards = [card for card in chosen_cards(zoo, names) if card.attack != CLEAN]
    for card, seed in product(cards, seeds or [0]):
        target = out / f"{card.name}-seed{seed}-n{limit}.json"
        before = json.loads(target.read_text()) if target.exists() else {}
        missing = [name for name in detectors or WAYS if name not in before.get("aurocs", {})]
        if missing:
            record = add_to(target, measure(card, zoo, missing, seed, limit, (clean_tests, triggered)))
            typer.echo(row(card.name, [record], list(record["aurocs"])))


def add_to(path: Path, added: Record) -> Record:
    """Writes a record, beside the detectors that the one in this place has: what is told by detector is told of all."""
    before = json.loads(path.read_text()) if path.exists() else {}
    by_detector = {name: {**before.get(name, {}), **added[name]} for name in BY_DETECTOR}
    if before and before["sha256"] != added["sha256"]:
        raise typer.BadParameter(f"{path}: expected the record of the same model, got another's; move it away")
    record = {**added, **before, **by_detector}
    atomic_write_text(path, json.dumps(record, indent=1) + "\n")
    return record


def measure(
    card: Card, zoo: Path, detectors: Sequence[str], seed: int, limit: int, sizes: tuple[int, int]
) -> dict[str, Any]:
    """Lets every detector judge one pile, with one model and with what unlearning makes of it."""
    clean = db.load_clean(card.dataset, limit=limit, seed=seed)
    case = open_case(load_model(weights_of(zoo, card.name), card.arch), clean, RNP(seed=seed))
    wanted = {which for name in detectors for which in WAYS[name]}
    return record_of(card, zoo, case, detectors, _judges(case, wanted), sizes)


def record_of(
    card: Card,
    zoo: Path,
    case: Case,
    detectors: Sequence[str],
    judges: Mapping[str, Sequence[nn.Module]],
    sizes: tuple[int, int] = (250, 250),
) -> dict[str, Any]:
    """What the detectors make of one pile, with the models that each of them is tried with."""
    pile = draw_pile(card, zoo, case.method.seed, sizes).to(case.clean.x.device)
    succeeded = predict(case.suspect, pile.triggered).argmax(1) == pile.wanted
    found: dict[str, dict[str, Any]] = {name: defaultdict(dict) for name in BY_DETECTOR}
    for name in detectors:
        part = pile.beginning(SLOW.get(name, 1.0))
        found["images"][name] = {"clean": len(part.clean), "triggered": len(part.triggered)}
        found["commits"][name] = commit()
        for which in WAYS[name]:
            for what, value in _judge(name, case, judges[which], part).items():
                found[what][name][which] = value
    return {
        "schema": "debackdoor/samples/2",
        "model": card.name,
        "attack": card.attack,
        "dataset": card.dataset,
        "arch": card.arch,
        "target": card.target,
        "mode": card.mode,
        "seed": case.method.seed,
        "clean_images": len(case.clean),
        "holdout_images": len(case.holdout),
        "triggers_that_succeed": int(succeeded.sum()) / len(succeeded),
        "false_positives_aimed_at": FALSE_POSITIVES,
        **found,
        "sha256": card.sha256,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "error": None,
    }


def _judges(case: Case, wanted: set[str]) -> dict[str, list[nn.Module]]:
    """The models that the detectors look at; none where a repair would change nothing."""
    makers: dict[str, Callable[[], list[nn.Module]]] = {
        "original": lambda: [case.suspect],
        "exposed": lambda: [case.unlearn(case.suspect).model],
        "several exposed": lambda: [unlearned.model for unlearned in expose_several(case, several=True)],
        "repaired": lambda: [model for model in [repaired_model(case)] if model is not None],
    }
    return {which: make() for which, make in makers.items() if which in wanted}


@dataclass(frozen=True)
class Pile:
    """Test images without and with the trigger, no image in both.

    Attributes:
        clean: float32 (N, C, H, W).
        triggered: float32 (M, C, H, W).
        wanted: int64 (M,), the labels that the attacker wants for them.
    """

    clean: Tensor
    triggered: Tensor
    wanted: Tensor

    @property
    def x(self) -> Tensor:
        """All of them, the clean ones first."""
        return torch.cat([self.clean, self.triggered])

    def to(self, device: torch.device) -> Pile:
        """The same pile on ``device``."""
        return Pile(self.clean.to(device), self.triggered.to(device), self.wanted.to(device))

    def beginning(self, share: float) -> Pile:
        """The first of each, at least one."""
        clean, triggered = (max(1, round(share * len(part))) for part in (self.clean, self.triggered))
        return Pile(self.clean[:clean], self.triggered[:triggered], self.wanted[:triggered])


def draw_pile(card: Card, zoo: Path, seed: int, sizes: tuple[int, int]) -> Pile:
    """So many images without trigger and so many with it, drawn from the test set."""
    test, attack = db.load_clean(card.dataset, limit=None, split="test"), load_trigger(trigger_of(zoo, card.name))
    order = torch.randperm(len(test), generator=generator(seed))
    clean, rest = order[: sizes[0]], order[sizes[0] :]
    if attack.mode == ALL_TO_ONE:
        rest = rest[test.y[rest] != attack.target]
    victims = test.subset(rest[: sizes[1]])
    return Pile(test.x[clean], attack.apply(victims.x), attack.target_labels(victims.y))


def _judge(name: str, case: Case, models: Sequence[nn.Module], pile: Pile) -> dict[str, float]:
    """How well one detector tells the pile's halves apart, and what a threshold from clean images flags of each."""
    started = time.perf_counter()
    scores, of_clean = _scores(name, case, models, pile.x)
    seconds = time.perf_counter() - started
    triggered = torch.arange(len(scores)) >= len(pile.clean)
    flagged = scores > clean_threshold(of_clean, FALSE_POSITIVES)[0]
    return {
        "aurocs": float(roc_auc_score(triggered, scores)),
        "true_positive_rates": int(flagged[triggered].sum()) / len(pile.triggered),
        "false_positive_rates": int(flagged[~triggered].sum()) / len(pile.clean),
        "seconds": round(seconds, 1),
    }


def _scores(name: str, case: Case, models: Sequence[nn.Module], images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the pile and of the held-out clean images, as ``detect_samples`` makes them."""
    if name == REPAIR_SHIFT and models:
        one, other = (repair_shift(case.suspect, models[0], x) for x in (images, case.holdout.x))
        return one, other
    if name == REPAIR_SHIFT:
        name, models = ExposedMargin.name, [unlearned.model for unlearned in expose_several(case, several=True)]
    answers, of_clean = (predict(case.suspect, x).argmax(1) for x in (images, case.holdout.x))
    detector = DETECTORS[name](seed=case.method.seed)
    return smallest(detector, models, replace(case.holdout, y=of_clean), images, answers)


@app.command()
def table(
    records: Annotated[Path, typer.Argument(help="folder of records")],
    into: Annotated[Path | None, typer.Option(help="page whose table between the markers is replaced")] = None,
    summary_into: Annotated[Path | None, typer.Option(help="page that gets the summary alone")] = None,
) -> None:
    """A Markdown table: AUROC of every model and detector, means over the seeds; mean and worst at the end."""
    paths = sorted(records.glob("*.json"))
    if not paths:
        raise typer.BadParameter(f"{records}: expected at least one record, got none; write some with 'run'")
    rows = [json.loads(path.read_text()) for path in paths]
    if into is None:
        typer.echo(render(rows))
    else:
        replace_between(into, records.name, render(rows))
    if summary_into is not None:
        replace_between(summary_into, f"{records.name}-summary", summary(rows))


if __name__ == "__main__":
    app()
