"""What the package returns can be compared, kept in sets and looked for in lists, also where it holds tensors."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from debackdoor.defenses import ABLUnlearning
from debackdoor.errors import DataError
from debackdoor.types import CleanSet, RecoveredPattern, RecoveredTrigger, SampleScores, ScanReport

IMAGES = CleanSet(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2]))
TRIGGER = RecoveredTrigger(1, torch.rand(1, 2, 2), torch.rand(1, 2, 2), 0.9, 2.0)
PATTERN = RecoveredPattern(1, torch.rand(1, 2, 2), 0.9)
SCORES = SampleScores(torch.rand(3), 0.5, torch.ones(3) > 0, torch.tensor([0, 1, 2]), 0.01, 1.0, "strip")
REPORT = ScanReport("clean", "nothing", 0.1, (), False, TRIGGER, {}, (), {}, PATTERN)


@pytest.mark.parametrize("value", [IMAGES, TRIGGER, PATTERN, SCORES], ids=lambda value: type(value).__name__)
def test_it_equals_itself_alone(value: Any) -> None:
    other = replace(value)
    assert value == value
    assert value != other
    assert [other, value].index(value) == 1
    assert len({value, other}) == 2


def test_images_without_pixels_are_refused() -> None:
    with pytest.raises(DataError, match=r"memory: expected images with pixels, got shape \(4, 3, 0, 0\)"):
        CleanSet(torch.zeros(4, 3, 0, 0), torch.zeros(4, dtype=torch.int64))


def test_reports_are_equal_where_all_they_say_is_the_same() -> None:
    assert replace(REPORT) == REPORT
    assert replace(REPORT, trigger=replace(TRIGGER)) != REPORT  # another trigger, as far as anyone can tell
    assert replace(REPORT, score=0.2) != REPORT


def test_a_defence_that_holds_images_can_be_compared() -> None:
    assert ABLUnlearning(poisoned=IMAGES) == ABLUnlearning(poisoned=IMAGES)
    assert ABLUnlearning(poisoned=IMAGES) != ABLUnlearning(poisoned=replace(IMAGES))
