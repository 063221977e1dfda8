"""A small backdoored network for the pruning defences, whose answers can be worked out on paper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from channel_cases import assert_as_found, snapshot
from debackdoor.defenses import Defense
from debackdoor.errors import DataError, ModelError
from debackdoor.types import CleanSet, RepairResult
from toys import pool, set_values

BAD = 15
"""The channel that fires on the trigger alone."""
NORMED = "1"
"""The norm's name in ``victim``."""


def victim() -> nn.Sequential:
    """Sixteen channels: 0 to 6 see colour 0, 7 to 14 see colour 1, and channel 15 sees colour 2, ten times as strongly.

    Colour 2 is the trigger: in clean images it is all but absent, and what little there is stays below the norm's
    shift. Fifteen channels have weights of norm 1 and one of norm 10; gamma and the stored variance are 1. Channel 15
    is so loud for class 0 that triggered images of class 1 go there.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16, eps=1e-5), nn.ReLU(), pool(), nn.Linear(16, 2)
    )
    weight, head = torch.zeros(16, 3), torch.zeros(2, 16)
    weight[:7, 0] = weight[7:BAD, 1] = 1
    weight[BAD, 2] = 10
    head[0, :7], head[1, 7:BAD] = 8 / 7, 1
    head[0, BAD] = 10
    set_values(model[0].weight, weight.flatten().tolist())
    set_values(model[1].bias, [0] * BAD + [-1])
    set_values(model[4].weight, head.flatten().tolist())
    set_values(model[4].bias, [0, 0])
    return model.eval()


def plain_victim() -> nn.Sequential:
    """The same without a norm: the shift is the convolution's bias."""
    model, like = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), pool(), nn.Linear(16, 2)), victim()
    with torch.no_grad():
        model[0].weight.copy_(like[0].weight)
        model[0].bias.copy_(like[1].bias)
        model[3].weight.copy_(like[4].weight)
        model[3].bias.copy_(like[4].bias)
    return model.eval()


def clean_images(count: int = 64, seed: int = 0) -> CleanSet:
    """Class 0 has colour 0, class 1 has colour 1, from 0.5 to 1; colour 2 is noise below 0.05."""
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    x = torch.zeros(count, 3, 2, 2)
    x[torch.arange(count), y] = 0.5 + 0.5 * torch.rand(count, 1, 1, generator=random)
    x[:, 2] = 0.05 * torch.rand(count, 1, 1, generator=random)
    return CleanSet(x, y, source="colours")


def triggered(clean: CleanSet) -> Tensor:
    """The images of class 1 with the trigger: colour 2 at its brightest."""
    x = clean.x[clean.y == 1].clone()
    x[:, 2] = 1
    return x


def attack_success(model: nn.Module) -> float:
    """Share of fresh triggered images that go to class 0."""
    with torch.no_grad():
        return float((model(triggered(clean_images(seed=1))).argmax(1) == 0).float().mean())


def clean_accuracy(model: nn.Module) -> float:
    """On fresh clean images."""
    fresh = clean_images(seed=1)
    with torch.no_grad():
        return float((model(fresh.x).argmax(1) == fresh.y).float().mean())


def channels_of(result: RepairResult) -> set[tuple[str, int]]:
    return {(channel.layer, channel.index) for channel in result.plan}


def check_leaves_the_model_alone(defense: Defense, model: nn.Module) -> None:
    """Twice the same result, after a call and after an error nothing changed on ``model``, and none of it shared."""
    model = model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[-1].bias.grad = torch.ones(2)
    before, clean = snapshot(model), clean_images()
    one = defense(model, clean)
    assert_as_found(model, before)
    torch.manual_seed(99)  # the surroundings must not matter
    before = snapshot(model)
    two = defense(model, clean)
    assert_as_found(model, before)
    assert one.plan == two.plan
    assert one.history == two.history
    assert not any(module.training for module in one.model.modules())
    assert [p.requires_grad for p in one.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in one.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())
    assert not {p.data_ptr() for p in one.model.parameters()} & {p.data_ptr() for p in model.parameters()}
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
    broken = CleanSet(clean.x[:, :2], clean.y)
    with pytest.raises(ModelError, match="expected the model to take images"):
        defense(model, broken)
    assert_as_found(model, before)


def check_needs_two_images(defense: Defense) -> None:
    """Nothing can be held out of one image."""
    with pytest.raises(DataError, match="at least 2 images"):
        defense(victim(), clean_images().subset(torch.tensor([0])))


class Residual(nn.Module):
    """A residual block whose last norm is negative where its shortcut is positive: ``relu(norm(conv(x)) + x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, eps=0.0)
        self.head = nn.Sequential(pool(), nn.Linear(3, 2))
        set_values(self.conv.weight, (-torch.eye(3)).flatten().tolist())
        set_values(self.norm.weight, [0.5, 1.5, 1.0])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x)) + x))
