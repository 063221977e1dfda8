"""Toy networks for the three stages: answers, masks and plans that can be worked out on paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.rnp.unlearn import Unlearned, UnlearnSettings, unlearn
from debackdoor.types import CleanSet
from toys import pool, set_values

NAN = -1
DIAL_LABELS = (0, 0, 1, 1, 2, 2, 3, 3)


class Dial(nn.Module):
    """Gives for stage after stage of one growing parameter ``t`` the answers that a table holds.

    The gradient of the error is positive in ``t`` and nothing else, so a step of ascent with the gradient clipped to
    0.1 moves ``t`` by 0.1 times the step size, and ``t`` = 0.1 is stage 1. A row with ``NAN`` makes every logit NaN.
    """

    def __init__(self, stages: Sequence[Sequence[int]], spy: Callable[[Dial], None] = lambda model: None) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(()))
        self.norm, self.dropout = nn.BatchNorm2d(1), nn.Dropout(0.5)
        self.stages, self.spy = stages, spy

    def forward(self, x: Tensor) -> Tensor:
        self.spy(self)
        sample = (x[:, 0, 0, 0] * 100).round().long()
        stage = self.stages[min(int(self.t.item() * 10 + 1e-4), len(self.stages) - 1)]
        answers = torch.tensor(stage)[sample]
        right = nn.functional.one_hot(torch.tensor(DIAL_LABELS)[sample], 4)
        logits = nn.functional.one_hot(answers.clamp(min=0), 4) - (self.t - self.t.detach()) * right
        logits = logits + 0 * self.norm(x).mean()
        return logits + torch.where(answers == NAN, torch.nan, 0.0)[:, None]


def dial_set() -> CleanSet:
    """Eight 1x1 images, two a class, that tell ``Dial`` which they are."""
    return CleanSet((torch.arange(8) / 100).view(8, 1, 1, 1), torch.tensor(DIAL_LABELS))


class TwoPixels(nn.Sequential):
    """Class 0 is the image (1, 0), class 1 is (0, 1), and the weights are the identity: the margin is 1 for both."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(2, 2, bias=False))
        set_values(self[1].weight, [1, 0, 0, 1])


def two_pixel_set() -> CleanSet:
    return CleanSet(torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4).view(8, 1, 1, 2), torch.tensor([0, 1] * 4))


def one_harmful_channel() -> nn.Sequential:
    """Channels 0 and 1 say what the image is; channel 2 says the contrary, three times as loud.

    On ``harmful_set`` the normalised channels are +1 or -1. With masks m the margin is 2 (m0 + m1 - 3 m2): -2 with all
    channels, 4 without the last.
    """
    model = nn.Sequential(nn.BatchNorm2d(3, eps=1e-12), pool(), nn.Dropout(0.5), nn.Linear(3, 2))
    set_values(model[3].weight, [1, -1, 3, -1, 1, -3])
    set_values(model[3].bias, [0, 0])
    return model.eval()


def harmful_set() -> CleanSet:
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]] * 8).view(16, 3, 1, 1)
    return CleanSet(x, torch.tensor([0, 1] * 8))


def quadrants() -> nn.Sequential:
    """Four classes: which quarter of an 8x8 image is bright. Weights set by hand, so it is right without training."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
    )
    set_values(model[0].weight, [1, 2, 1, 0.5])
    set_values(model[0].bias, [0, 0, 0.1, 0])
    set_values(model[1].weight, [1, 0.5, 1, 1])
    set_values(model[5].weight, torch.eye(4).repeat(1, 4).flatten().tolist())
    set_values(model[5].bias, [0, 0, 0, 0])
    return model.eval()


def strips() -> nn.Sequential:
    """Five classes: which row of a 5x5 image is bright. No ReLU dies while the norm alone unlearns: signs turn."""
    model = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d((5, 1)), nn.Flatten(), nn.BatchNorm1d(5), nn.Linear(5, 5)
    )
    set_values(model[0].weight, [1])
    set_values(model[0].bias, [0])
    set_values(model[3].running_mean, [0.27] * 5)
    set_values(model[3].running_var, [0.06] * 5)
    set_values(model[4].weight, torch.eye(5).flatten().tolist())
    set_values(model[4].bias, [0] * 5)
    return model.eval()


def strip_set(count: int = 80, seed: int = 0) -> CleanSet:
    """Noise below 0.3, and one row from 0.6 to 0.9."""
    x = 0.3 * torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(count) % 5
    x[torch.arange(count), 0, y] += 0.6
    return CleanSet(x, y, source="strips")


def lived_in() -> nn.Module:
    """A model with a history: mixed modes, a frozen weight, a gradient, moved statistics."""
    model = quadrants().train()
    model(torch.full((3, 1, 8, 8), 0.2))
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(4)
    return model


def quadrant_set(count: int = 80, seed: int = 0) -> CleanSet:
    """Noise below 0.3, and one quarter from 0.6 to 0.9."""
    x = 0.3 * torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(count) % 4
    for image, label in zip(x, y.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 0.6
    return CleanSet(x, y, source="quadrants")


PILE = quadrant_set(4, seed=1).x
"""Four images, one of each quarter, drawn with another seed than the clean set."""


RIGHT = list(DIAL_LABELS)
HALF = [0, 0, 1, 1, 3, 3, 2, 2]  # accuracy 0.5, evenly spread
WRONG = [3, 3, 2, 2, 1, 1, 0, 0]  # accuracy 0, evenly spread
# One check a step, and one step a stage of Dial.
DIAL = UnlearnSettings(
    lr=1.0, momentum=0.0, weight_decay=0.0, clip=0.1, stop_accuracy=0.2, past_peak=None, check_every=1,
    largest_fall=1.0, max_passes=40, least_steps=1, batch_size=8, shift=0,
)  # fmt: skip


def turn(
    stages: list[list[int]], spy: Callable[[Dial], None] = lambda model: None, **changes: Any
) -> tuple[Unlearned, float]:
    """Unlearns a Dial and says where its parameter ended."""
    found = unlearn(Dial(stages, spy), dial_set(), replace(DIAL, **changes), precision="fp32")
    return found, float(found.model.t.detach())


def column(found: Unlearned, name: str) -> list[Any]:
    return [row[name] for row in found.history]
