"""Draws the triggers that a scan recovers for patch attacks beside the true ones.

python benchmarks/trigger_pictures.py badnets trojan cl wrn16-badnets gtsrb-badnets --out docs/figures/triggers.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from zoo_models import chosen_cards

import debackdoor as db
from debackdoor.attacks import load_trigger
from debackdoor.case import open_case
from debackdoor.defenses import RNP
from debackdoor.detectors.trigger import recover_trigger, search_triggers
from debackdoor.models import load_model
from debackdoor.types import RecoveredTrigger
from debackdoor.zoo import trigger_of, weights_of

app = typer.Typer(add_completion=False, help=__doc__)


@dataclass(frozen=True)
class Row:
    """One model: an image, the same under the true trigger, and under the recovered ones."""

    name: str
    clean: Tensor
    true: Tensor
    exposed: RecoveredTrigger
    original: RecoveredTrigger


@app.command()
def draw(
    names: Annotated[list[str], typer.Argument(help="models of the zoo with patch attacks")],
    out: Annotated[Path, typer.Option(help="the picture")],
    zoo: Annotated[Path, typer.Option(help="the tier's folder")] = Path("zoo/slim"),
    seed: Annotated[int, typer.Option(help="of the clean images and the searches")] = 0,
) -> None:
    """One row a model."""
    rows = [recover(name, zoo, seed) for name in names]
    figure = Figure(figsize=(7.4, 1.55 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 5, squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        found = row.exposed, row.original
        _show(line[0], row.clean, f"{row.name}: clean")
        _show(line[1], row.true, "true trigger")
        _show(line[2], (row.true - row.clean).abs().amax(0, keepdim=True) > 1e-3, "its place")
        for place, trigger, what in zip(line[3:], found, ("with the exposed model", "original alone"), strict=True):
            title = f"{what}\n{trigger.success_rate:.0%}, {trigger.l1:.0f} px"
            _show(place, trigger.apply(row.clean), title)
    figure.savefig(out, dpi=150, metadata={"Software": None})


def recover(name: str, zoo: Path, seed: int) -> Row:
    """What a scan recovers towards the true target, and Neural Cleanse's search on the suspect model alone."""
    (card,) = chosen_cards(zoo, [name])
    clean = db.load_clean(card.dataset, seed=seed)
    case = open_case(load_model(weights_of(zoo, name), card.arch), clean, RNP(seed=seed))
    exposed = case.unlearn(case.suspect).model
    label = int(card.target or 0)
    found = recover_trigger(case.suspect, exposed, case.fit, case.holdout, label, seed=seed)
    (alone,) = search_triggers(case.suspect, case.fit, case.holdout, [label], seed=seed)
    image = case.holdout.x[case.holdout.y != label][:1]
    return Row(name, image[0], load_trigger(trigger_of(zoo, name)).apply(image)[0], found, alone)


def _show(axes: Axes, image: Tensor, title: str) -> None:
    axes.imshow(image.float().permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=7)
    axes.set_axis_off()


if __name__ == "__main__":
    app()
