"""CA and ASR along the pruning order, and the masks behind it: our scores beside the published ones.

    python benchmarks/pruning_order.py measure badnets sig dynamic --out benchmarks/results/pruning-order.json
    python benchmarks/pruning_order.py draw benchmarks/results/pruning-order.json --out docs/figures

The trigger and the test set serve to draw the curves; neither order has seen them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import typer
from publish import commit
from zoo_models import chosen_cards

import debackdoor as db
from debackdoor.attacks import load_trigger
from debackdoor.case import HOLDOUT
from debackdoor.data import split_clean
from debackdoor.defenses import RNP
from debackdoor.evaluation import evaluate
from debackdoor.files import atomic_write_text
from debackdoor.models import load_model
from debackdoor.rnp.prune import prune
from debackdoor.runtime import versions
from debackdoor.types import CleanSet
from debackdoor.zoo import Card, trigger_of, weights_of

METHODS = {"ours": RNP(budget=0.01), "published": RNP.published()}
POINTS = (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64, 85, 114, 152)
"""How many channels are pruned at each measurement."""

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@app.command()
def measure(
    names: Annotated[list[str], typer.Argument(help="models of the zoo")],
    out: Annotated[Path, typer.Option(help="the record")],
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    limit: Annotated[int, typer.Option(help="clean images")] = 500,
    tests: Annotated[int, typer.Option(help="test images")] = 1000,
) -> None:
    """Prunes along both orders and measures; the record is written when all is done."""
    cards = {card.name: card for card in chosen_cards(zoo, names)}
    curves = []
    for name in names:
        card = cards[name]
        clean = db.load_clean(card.dataset, limit=limit, seed=0)
        test = db.load_clean(card.dataset, limit=tests, seed=0, split="test")
        for method in METHODS:
            curves.append(_curve(card, zoo, method, clean, test))
            typer.echo(f"{name}, {method}")
    record = {
        "schema": "debackdoor/pruning-order/1",
        "clean_images": limit,
        "test_images": tests,
        "seed": 0,
        "versions": versions(),
        "commit": commit(),
        "sha256": {name: cards[name].sha256 for name in names},
        "curves": curves,
    }
    atomic_write_text(out, json.dumps(record, indent=1) + "\n")


def _curve(card: Card, zoo: Path, name: str, clean: CleanSet, test: CleanSet) -> dict[str, Any]:
    model, method = load_model(weights_of(zoo, card.name), card.arch).eval(), METHODS[name]
    fit = clean if method.threshold is not None else split_clean(clean, HOLDOUT, 0)[0]
    exposure = method.expose(model, fit)
    attack = load_trigger(trigger_of(zoo, card.name))
    points = []
    for count in POINTS:
        found = evaluate(prune(model, exposure.layers, exposure.ranking[:count]).eval(), test, attack)
        points.append([count, found.clean_accuracy, found.attack_success_rate])
    return {
        "model": card.name,
        "scores": name,
        "points": points,
        "masks": [round(float(value), 4) for value in exposure.recovered.mask],
        "chosen": len(method.choose(model, exposure, clean)),
    }


@app.command()
def draw(
    record: Annotated[Path, typer.Argument(help="what measure wrote")],
    out: Annotated[Path, typer.Option(help="folder for the figures")],
) -> None:
    """Two figures: the curves, and histograms of the masks."""
    out.mkdir(parents=True, exist_ok=True)
    curves = json.loads(record.read_text())["curves"]
    names = list(dict.fromkeys(curve["model"] for curve in curves))
    for title, paint in (("pruning-order", _paint_curve), ("masks", _paint_masks)):
        figure, axes = plt.subplots(
            len(METHODS), len(names), figsize=(3.4 * len(names), 5), sharex=True, sharey=True, squeeze=False
        )
        for curve in curves:
            axis = axes[list(METHODS).index(curve["scores"])][names.index(curve["model"])]
            whose = {"ours": "our scores", "published": "published scores"}[curve["scores"]]
            axis.set_title(f"{curve['model']}, {whose}", fontsize=9)
            paint(axis, curve)
        axes[0][0].legend(fontsize=8)
        figure.supxlabel("channels pruned" if title == "pruning-order" else "mask after recovery", fontsize=10)
        figure.tight_layout()
        figure.savefig(out / f"{title}.png", dpi=110)
        plt.close(figure)


def _paint_curve(axis: plt.Axes, curve: dict[str, Any]) -> None:
    counts, accuracy, success = np.array(curve["points"]).T
    axis.plot(counts, 100 * accuracy, label="CA, %", color="tab:blue")
    axis.plot(counts, 100 * success, label="ASR, %", color="tab:red")
    axis.set_ylim(-2, 102)
    axis.grid(alpha=0.3)


def _paint_masks(axis: plt.Axes, curve: dict[str, Any]) -> None:
    axis.hist(curve["masks"], bins=np.linspace(0, 1, 21), log=True, label="channels", color="tab:gray")
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    app()
