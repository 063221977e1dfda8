"""What the tests of checkpoints share: small networks, files of their weights, and pickles that would run code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from debackdoor.checkpoint import read_checkpoint, write_checkpoint
from debackdoor.errors import CheckpointError
from debackdoor.models import state_dict_of


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def saved(tmp_path: Path, model: nn.Module, name: str = "m.safetensors") -> Path:
    write_checkpoint(tmp_path / name, state_dict_of(model))
    return tmp_path / name


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        left[key].dtype == right[key].dtype
        and left[key].shape == right[key].shape
        and left[key].flatten().view(torch.uint8).tolist() == right[key].flatten().view(torch.uint8).tolist()
        for key in left
    )


def refusal(path: Path) -> str:
    """The message, checked to be one plain sentence that names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 330
    assert message.startswith(str(path))
    return message


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


class ShellPayload(Payload):
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)
