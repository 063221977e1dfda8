"""A scan of too little is inconclusive, and one of bad input is refused; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import debackdoor as db
from channel_cases import assert_as_found, snapshot
from debackdoor.errors import DataError, DebackdoorError, ModelError
from debackdoor.types import CleanSet, ScanReport
from rnp_cases import lived_in, quadrant_set, quadrants


def relabelled(y: torch.Tensor) -> CleanSet:
    return CleanSet(quadrant_set(len(y)).x, y)


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        (quadrant_set(19), "at least 20 clean images, got 19"),
        (relabelled(torch.ones(80).long()), "at least 2 classes, got only class 1"),
        (relabelled(torch.arange(80) // 4 % 4), "accuracy 25.0%, no better than chance"),
        (relabelled((torch.arange(80) + 1) % 4), "accuracy 0.0%, no better than chance"),
    ],
)
def test_too_little_to_go_by_is_inconclusive_at_once(clean: CleanSet, message: str) -> None:
    model = lived_in()
    before, heard = snapshot(model), []
    report = db.scan(model, clean, device="cpu", progress=lambda *now: heard.append(now))
    assert heard == []
    assert report.message.startswith("nothing can be told: ")
    assert message in report.message
    assert replace(report, message="") == ScanReport("inconclusive", "", None, (), False, None, {}, (), {})
    assert_as_found(model, before)


def constant() -> nn.Module:
    model = quadrants()
    nn.init.zeros_(model[5].weight)
    return model


def overflowing() -> nn.Module:
    model = quadrants()
    nn.init.constant_(model[5].bias, float("inf"))
    return model


@pytest.mark.parametrize(
    ("make", "clean", "arguments", "error", "message"),
    [
        (quadrants, relabelled(torch.arange(80) % 5), {}, DataError, "labels of 0 to 3 .* got 4 for image 4 of those"),
        (
            quadrants, CleanSet(torch.zeros(80, 3, 8, 8), torch.arange(80) % 4), {}, ModelError,
            r"images of shape \(3, 8, 8\), got .*; check --arch and the image size",
        ),
        (constant, quadrant_set(), {}, ModelError, "depend on the image, got the same for all; "),
        (overflowing, quadrant_set(), {}, ModelError, "finite outputs on the clean images, got NaN"),
        (quadrants, quadrant_set(), {"seed": -1}, DebackdoorError, "a seed from 0 to 2147483647, got -1; correct it"),
        (quadrants, quadrant_set(), {"device": "tpu"}, DebackdoorError, "auto, cpu, cuda, got 'tpu'; choose"),
        (quadrants, quadrant_set(), {"precision": "fp8"}, DebackdoorError, "auto, fp32, bf16, got 'fp8'; choose"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(
    make: Callable[[], nn.Module], clean: CleanSet, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make().train()
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        db.scan(model, clean, **{"device": "cpu", **arguments})
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DebackdoorError)
    assert_as_found(model, before)
