"""What the tests of the command detect share: a stand-in, a pile, the words of a command, valid records."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from torch import Tensor, nn

from cli_cases import Shell
from data_cases import png
from debackdoor.report import load_schema
from debackdoor.types import CleanSet, SampleScores


class StandIn:
    """Takes the place of the detection: scores are the images' numbers, and 10 more if flagged, so above 10."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.flagged, self.p_value = [2, 3], 1e-6

    def __call__(self, model: nn.Module, clean: CleanSet, images: Tensor, **options: Any) -> SampleScores:
        self.given = {"images": len(clean), "pile": images, **options}
        options["progress"]("unlearn", 1, 2, {"accuracy": 0.5})
        if self.error is not None:
            raise self.error
        flags = torch.tensor([index in self.flagged for index in range(len(images))])
        scores = torch.arange(float(len(images))) + 10 * flags
        answers = torch.full((len(images),), 7)
        return SampleScores(scores, 10.0, flags, answers, options["false_positive_rate"], self.p_value, "a stand-in")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(importlib.import_module("debackdoor.detect"), "detect_samples", made)
    return made


def pile_of(shell: Shell, count: int = 4) -> Path:
    """A folder of images 0.png, 1.png, ... of that red; the last is in a sub-folder."""
    folder = shell.folder / "pile"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        name = str(index).zfill(len(str(count - 1))) + ".png"
        (folder / ("sub" if index == count - 1 else "") / name).write_bytes(png((index, 0, 0)))
    return folder


def detect_of(shell: Shell, *more: object, count: int = 4) -> list[object]:
    return [
        "detect", shell.checkpoint(), "--arch", shell.arch, "--clean", "digits", "--suspects", pile_of(shell, count),
        *more,
    ]  # fmt: skip


def valid(text: str) -> Any:
    """The record, if it is as its schema says."""
    record = json.loads(text)
    Draft202012Validator(load_schema("detect")).validate(record)
    return record
