"""Whether one plain square leads to one label far more often than is usual.

A trigger that a person draws or sticks on can be larger than a patch that a search may fill pixel by pixel: of that
size some pattern leads to every label of every network. Of one colour it has little freedom, and what it reaches is
usual for no label (Garg et al., "Can Adversarial Weight Perturbations Inject Neural Backdoors?", CIKM 2020, use one of
a tenth of the pixels). So few squares are different that all can be tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.models.forward import predict, predict_changed, share_led
from debackdoor.runtime import answered_at_once, generator
from debackdoor.types import CleanSet, Progress

SIDES = (0.25, 0.35)
"""Sides of the squares, as shares of the image's shorter side."""

OVERLAP = 1 / 3
"""How much of its side a square shares with the next one, about."""

TRIED_ON = 32
"""Images that the squares are tried on; others judge the best."""

ODD_SIDE, ODD_PLACE = 0.3, 0.3
"""How far side and place of a jittered square are from those that were found, as shares of its side."""


@dataclass(frozen=True)
class Square:
    """A square of one colour.

    Attributes:
        row: of its first pixel.
        column: of its first pixel.
        side: in pixels.
        colour: a value in [0, 1] a channel.
    """

    row: int
    column: int
    side: int
    colour: tuple[float, ...]

    def apply(self, x: Tensor) -> Tensor:
        """The images (N, C, H, W) in [0, 1] with the square on them; what sticks out is cut off."""
        out = x.clone()
        rows, columns = (slice(max(0, first), max(0, first + self.side)) for first in (self.row, self.column))
        for channel, value in enumerate(self.colour):
            out[:, channel, rows, columns] = value
        return out

    def jittered(self, random: torch.Generator) -> Square:
        """One like it, a little elsewhere and of a little another size."""
        side, down, right = (2 * torch.rand(3, generator=random) - 1).tolist()
        size = max(1, round(self.side * (1 + ODD_SIDE * side)))
        row, column = (
            round(first + ODD_PLACE * self.side * way + (self.side - size) / 2)
            for first, way in ((self.row, down), (self.column, right))
        )
        return Square(row, column, size, self.colour)


@dataclass(frozen=True)
class Squares:
    """The square that leads most often to each label.

    Attributes:
        rates: by label: the share of hold-out images of other labels that the square sends there.
        best: the square, by label.
    """

    rates: Mapping[int, float]
    best: Mapping[int, Square]


def find_squares(
    model: nn.Module,
    fit: CleanSet,
    holdout: CleanSet,
    num_classes: int,
    *,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Squares:
    """Tries plain squares of two sizes everywhere on a few images of ``fit``, and the best for each label on others.

    Args:
        model: in eval mode.
        fit: images that the squares are tried on.
        holdout: images that judge the best.
        num_classes: how many logits the model has.
        seed: of the choice of images.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called after every colour.
    """
    chosen = torch.randperm(len(fit), generator=generator(seed))[:TRIED_ON].to(fit.x.device)
    x, y = fit.x[chosen], fit.y[chosen]
    palette = list(_colours(x.shape[1]))
    most = torch.full((num_classes,), -1.0)
    best: dict[int, Square] = {}
    for done, colour in enumerate(palette, start=1):
        squares = list(_everywhere(x.shape[2:], colour))
        rates = torch.cat([_rates(some, y, num_classes) for some in _answers(model, squares, x, precision)]).cpu()
        for square, reached in zip(squares, rates, strict=True):
            for label in (reached > most).nonzero()[:, 0].tolist():
                most[label], best[label] = reached[label], square
        if progress is not None:
            progress("search squares", done, len(palette), {"success": float(most.max())})
    judged = {label: _success(model, holdout, square, label, precision) for label, square in sorted(best.items())}
    return Squares(judged, best)


def stamped(x: Tensor, squares: Sequence[Square], random: torch.Generator) -> Tensor:
    """The images (N, C, H, W), each with one of the squares on it, jittered."""
    which = torch.randint(len(squares), (len(x),), generator=random).tolist()
    each = (squares[number].jittered(random) for number in which)
    return torch.cat([square.apply(image) for square, image in zip(each, x.split(1), strict=True)])


def _colours(channels: int) -> Iterator[tuple[float, ...]]:
    """Every channel dark or bright, in all ways for up to three, and grey."""
    yield from product((0.0, 1.0), repeat=channels) if channels <= 3 else ((v,) * channels for v in (0.0, 1.0))
    yield (0.5,) * channels


def _everywhere(size: Sequence[int], colour: tuple[float, ...]) -> Iterator[Square]:
    """Overlapping squares that cover an image of ``size`` (H, W)."""
    for side in sorted({max(1, round(share * min(size))) for share in SIDES}):  # small images have one size alone
        for row, column in product(*(_places(length, side) for length in size)):
            yield Square(row, column, side, colour)


def _places(length: int, side: int) -> list[int]:
    """Evenly spaced first pixels, from one end to the other."""
    count = math.ceil((length - side) / (side * (1 - OVERLAP))) + 1
    return sorted({round((length - side) * place / max(1, count - 1)) for place in range(count)})


def _answers(model: nn.Module, squares: Sequence[Square], x: Tensor, precision: str) -> Iterator[Tensor]:
    """The model's labels for the images under the squares, (S, N), for those that share a forward pass.

    A pass of one square's few images would leave the machine waiting.
    """
    together = max(1, answered_at_once(x.device) // len(x))
    for first in range(0, len(squares), together):
        batch = torch.cat([square.apply(x) for square in squares[first : first + together]])
        yield predict(model, batch, precision=precision).argmax(1).view(-1, len(x))


def _rates(answers: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """For every square and label the share of the images of other labels that get it, (S, K), of answers (S, N)."""
    given = F.one_hot(answers, num_classes) * (answers != y)[:, :, None]
    others = (len(y) - F.one_hot(y, num_classes).sum(0)).clamp(min=1)
    return given.sum(1) / others


def _success(model: nn.Module, holdout: CleanSet, square: Square, label: int, precision: str) -> float:
    return share_led(holdout, label, lambda x: predict_changed(model, square.apply, x, precision=precision).argmax(1))
