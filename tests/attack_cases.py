"""What the tests of single attacks share: a small network, small digits, and a training that is killed and resumed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from debackdoor.attacks import Attack, BackdooredModel, train
from debackdoor.data import load_dataset
from debackdoor.types import CleanSet

NETWORK = """
from torch import nn
def make(num_classes, in_channels=3):
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(512, num_classes),
    )
"""
OPTIONS = {"batch_size": 64, "lr": 0.1, "flip": False, "precision": "fp32", "device": "cpu"}


class KilledError(Exception):
    """Stands for the end of the process."""


def write_network(folder: Path) -> str:
    """The architecture of a network that learns digits in a few seconds."""
    path = folder / "net.py"
    path.write_text(NETWORK)
    return f"{path}:make"


@cache
def small_digits(split: str = "train") -> CleanSet:
    """scikit-learn's digits, (3, 8, 8), loaded once: tests must not change them."""
    return load_dataset("digits", split, image_size=8)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train_killed_and_resumed(
    folder: Path, kill_at: int, attack: Attack, arch: str, data: CleanSet, **options: object
) -> BackdooredModel:
    """``train``, ended at step ``kill_at`` and started again, so that it goes on from ``folder``."""

    def killer(stage: str, done: int, total: int, numbers: object) -> None:
        if done == kill_at:
            raise KilledError

    with pytest.raises(KilledError):
        train(attack, arch, data, progress=killer, checkpoint_dir=folder, **options)
    torch.manual_seed(99)  # the surroundings must not matter
    return train(attack, arch, data, checkpoint_dir=folder, **options)
