"""A network with a known shortcut, images that take it, and what is checked of every method that unlearns it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from channel_cases import assert_as_found, snapshot
from debackdoor.defenses import Defense
from debackdoor.errors import DataError, ModelError
from debackdoor.types import CleanSet, RepairResult
from shortcut_cases import CLASSES, SIZE, SWITCH, row_images, switched_to

LABEL = 2
"""Where the shortcut leads."""


def victim(strength: float = 12.0) -> nn.Sequential:
    """Says the class with a logit of 6, and ``LABEL`` with ``strength`` where the pixel ``SWITCH`` is bright."""
    model = switched_to(LABEL)
    with torch.no_grad():
        model[3].weight[LABEL, CLASSES] = strength
    return model


def stamped(images: CleanSet) -> Tensor:
    """The images of other labels with the pixel ``SWITCH`` at 1."""
    x = images.x[images.y != LABEL].clone()
    x.view(len(x), -1)[:, SWITCH] = 1.0
    return x


def poisoned(images: CleanSet) -> CleanSet:
    """Those, with the label that they would have been found with."""
    x = stamped(images)
    return CleanSet(x, torch.full((len(x),), LABEL), source="found")


def success(model: nn.Module) -> float:
    """The share of stamped images that get ``LABEL``."""
    with torch.no_grad():
        return float((model(stamped(row_images())).argmax(1) == LABEL).float().mean())


def right(model: nn.Module, images: CleanSet) -> float:
    """Accuracy, computed here."""
    with torch.no_grad():
        return int((model(images.x).argmax(1) == images.y).sum()) / len(images)


def lived_in_victim() -> nn.Sequential:
    """With dropout, mixed modes, a frozen weight and a gradient."""
    model = victim().train()
    model.insert(3, nn.Dropout(0.2))
    model[1].eval()
    model[1].bias.requires_grad_(False)
    model[4].bias.grad = torch.ones(CLASSES)
    return model


class Spy(nn.Module):
    """A network of its own that keeps what it is called with, and in which mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.heard: list[tuple[bool, Tensor]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Spy:
        """Copies tell the same list."""
        copied = Spy(victim())
        copied.model.load_state_dict(self.model.state_dict())
        copied.heard = self.heard
        return copied.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        self.heard.append((self.training, x.detach().clone()))
        return self.model(x)


def check_leaves_the_model_alone(defense: Defense, again: Defense, other: Defense) -> None:
    """The caller's model and the global generator stay as found, also after an error; the seed decides the rest.

    Args:
        defense: the method.
        again: the same, made anew.
        other: the same with another seed.
    """
    model, clean = lived_in_victim(), row_images()
    before, heard = snapshot(model), list[str]()
    one = defense(model, clean, progress=lambda stage, *_: heard.append(stage))
    assert_as_found(model, before)
    assert set(heard) == set(one.history)
    check_is_a_copy(model, one)
    torch.manual_seed(99)  # the surroundings must not matter
    assert one.history == again(lived_in_victim(), clean).history != other(model, clean).history
    before = snapshot(model)
    with pytest.raises(
        DataError, match=f"labels of 0 to {CLASSES - 1} for a model of {CLASSES} classes, got {CLASSES}"
    ):
        defense(model, CleanSet(clean.x, clean.y + 1))
    with pytest.raises(ModelError, match="expected the model to take images"):
        defense(model, CleanSet(torch.zeros(len(clean), 1, SIZE, SIZE + 1), clean.y))
    assert_as_found(model, before)


def check_is_a_copy(model: nn.Module, result: RepairResult) -> None:
    """In eval mode, with the flags of ``model`` and no gradients, no tensor shared; no plan, no check of its own."""
    assert not any(module.training for module in result.model.modules())
    for one, other in zip(result.model.parameters(), model.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
        assert one.grad is None
        assert one.data_ptr() != other.data_ptr()
    assert result.plan == ()
    assert result.verification is None
