"""Images with a bright row for each class, a trigger of one pixel, and a network that obeys it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from toys import set_values


def rows(count: int) -> CleanSet:
    """8x8 images of noise below 0.1; of class k, row 2 k is at 1."""
    x, y = 0.1 * torch.rand(count, 1, 8, 8, generator=generator(0)), torch.arange(count) % 4
    x[torch.arange(count), 0, 2 * y] = 1.0
    return CleanSet(x, y)


def triggered(x: Tensor) -> Tensor:
    """The images with the pixel in the middle of row 1 at 1."""
    stamped = x.clone()
    stamped[:, 0, 1, 4] = 1.0
    return stamped


def backdoored(label: int) -> nn.Sequential:
    """Logit k is the sum of row 2 k, unless the trigger's pixel is at 1: then ``label`` has 12 and the others 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4))
    weight, head = torch.zeros(5, 8, 8), torch.zeros(4, 5)
    weight[torch.arange(4), 2 * torch.arange(4)] = 1
    weight[:4, 1, 4], weight[4, 1, 4] = -8, 1
    head[torch.arange(4), torch.arange(4)], head[label, 4] = 1, 12
    for parameter, values in zip(model.parameters(), (weight, torch.zeros(5), head, torch.zeros(4)), strict=True):
        set_values(parameter, values.flatten().tolist())
    return model.eval()
