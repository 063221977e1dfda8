"""What the tests of the command line share: a network file, checkpoints, images, and a way to run commands."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from debackdoor.cli import main
from debackdoor.models import build_model

NETWORK = """
from torch import nn

def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

def make(num_classes):
    return nn.Sequential(
        *block(3, 16), *block(16, 32), *block(32, 32),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, num_classes),
    )

def make_other(num_classes):
    return nn.Sequential(*block(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str


class Shell:
    """Runs commands in this process, in a folder of their own."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capture = capture
        (folder / "net.py").write_text(NETWORK)
        self.arch = f"{folder / 'net.py'}:make"

    def __call__(self, *arguments: object) -> Ran:
        self._capture.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self._capture.readouterr()
        return Ran(code, out, err)

    def checkpoint(self, name: str = "model.safetensors", **changes: torch.Tensor) -> Path:
        """A file with the random weights of ``make`` for 10 classes, some of them replaced."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = build_model(self.arch, 10).state_dict()
        path = self.folder / name
        save_file(weights | changes, path)
        return path

    def images(self, labels: list[int], name: str = "images.npz") -> Path:
        """Random 16x16 images with these labels."""
        path = self.folder / name
        x = np.random.default_rng(0).integers(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)
        np.savez(path, x=x, y=np.array(labels, dtype=np.int64))
        return path

    def files(self) -> set[Path]:
        """Everything in the folder but what running a network file leaves."""
        return {path for path in self.folder.rglob("*") if "__pycache__" not in path.parts}


def full_disk(*_: object, **__: object) -> None:
    """Takes the place of whatever writes."""
    raise OSError(errno.ENOSPC, "No space left on device")
