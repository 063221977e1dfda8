"""Images of four classes and networks with a known shortcut, their weights set by hand."""

from __future__ import annotations

import torch
from torch import nn

from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from toys import set_values

SIZE, CLASSES, SWITCH = 7, 4, 4 * 7 + 5
"""49 pixels, of which a patch of the default size covers one; class k is the brightness of pixel k."""


def row_images(count: int = 48) -> CleanSet:
    """Noise below 0.1, and the pixel of the class at 1."""
    x, y = 0.1 * torch.rand(count, 1, SIZE, SIZE, generator=generator(0)), torch.arange(count) % CLASSES
    x[torch.arange(count), 0, 0, y] = 1.0
    return CleanSet(x, y)


def _network(weight: torch.Tensor, bias: torch.Tensor, head: torch.Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, len(weight)), nn.ReLU(), nn.Linear(len(weight), CLASSES))
    for parameter, values in zip(model.parameters(), (weight, bias, head, torch.zeros(CLASSES)), strict=True):
        set_values(parameter, values.flatten().tolist())
    return model.eval()


def switched_to(label: int) -> nn.Sequential:
    """Says the class, unless the pixel ``SWITCH`` is bright: then it says ``label``."""
    weight = torch.zeros(CLASSES + 1, SIZE**2)
    weight[:CLASSES, :CLASSES] = torch.eye(CLASSES)
    weight[CLASSES, SWITCH] = 1
    head = torch.cat([6 * torch.eye(CLASSES), torch.zeros(CLASSES, 1)], 1)
    head[label, CLASSES] = 30
    return _network(weight, torch.zeros(CLASSES + 1), head)


def switched_to_the_next() -> nn.Sequential:
    """Says the class, unless the pixel ``SWITCH`` is bright: then it says the next one. All-to-all."""
    classes = torch.zeros(CLASSES, SIZE**2)
    classes[:, :CLASSES] = torch.eye(CLASSES)
    weight = torch.cat([classes, classes])
    weight[:CLASSES, SWITCH], weight[CLASSES:, SWITCH] = -1, 1
    bias = torch.tensor([0.0] * CLASSES + [-1.0] * CLASSES)
    head = 6 * torch.cat([torch.eye(CLASSES), torch.eye(CLASSES).roll(1, dims=0)], 1)
    return _network(weight, bias, head)


def bright_images(count: int = 48) -> CleanSet:
    """Grey from 0.4 to 0.6, and the column of the class at 1: no square turns one class into another."""
    x, y = 0.4 + 0.2 * torch.rand(count, 1, SIZE, SIZE, generator=generator(0)), torch.arange(count) % CLASSES
    x[torch.arange(count), 0, :, y] = 1.0
    return CleanSet(x, y)


def dark_beside_the_classes(label: int) -> nn.Sequential:
    """Says the class of bright images, unless one pixel beside their columns is dark: then it says ``label``."""
    weight = torch.zeros(CLASSES + 1, SIZE, SIZE)
    weight[:CLASSES, :, :CLASSES] = torch.eye(CLASSES)[:, None] / SIZE
    weight[CLASSES, SIZE // 2, CLASSES + 1] = -1
    head = torch.cat([6 * torch.eye(CLASSES), torch.zeros(CLASSES, 1)], 1)
    head[label, CLASSES] = 60
    return _network(weight.flatten(1), torch.tensor([0.0] * CLASSES + [0.3]), head)
