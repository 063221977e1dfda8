"""What is found on a suspect model and tried on another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from debackdoor.detectors.carried import STARTS, WORKS, Carried, carried_over
from debackdoor.detectors.shortcut import AWAY_STARTS
from debackdoor.models.copying import copied
from shortcut_cases import SWITCH, row_images, switched_to, switched_to_the_next


def weaker(model: nn.Sequential, times: float) -> nn.Sequential:
    """The same network, its switch so many times as strong."""
    other = copied(model)
    with torch.no_grad():
        other[1].weight[:, SWITCH] *= times
    return other


def over(suspect: nn.Module, repaired: nn.Module, away: bool = False) -> tuple[Carried, ...]:
    clean = row_images()
    labels = [] if away else [2]
    return carried_over(suspect, repaired, clean, clean, labels, away=away, precision="fp32")


@pytest.mark.parametrize(("times", "left"), [(1.0, True), (0.0, False)])
def test_a_patch_towards_a_label_is_tried_on_the_other_network(times: float, left: bool) -> None:
    suspect = switched_to(2)
    patches = [carried for carried in over(suspect, weaker(suspect, times)) if carried.kind == "patch"]
    assert 1 <= len(patches) <= STARTS
    assert all(carried.before >= WORKS and carried.label == 2 for carried in patches)
    assert {carried.left for carried in patches} == {left}


@pytest.mark.parametrize(("times", "left"), [(1.0, True), (0.0, False)])
def test_a_patch_away_from_all_labels_is_tried_too(times: float, left: bool) -> None:
    suspect = switched_to_the_next()
    found = over(suspect, weaker(suspect, times), away=True)
    assert 1 <= len(found) <= AWAY_STARTS
    assert all(carried.label is None and carried.before >= WORKS for carried in found)
    assert found[0].left is left


def test_the_one_that_works_best_comes_first_and_what_works_on_neither_is_left_out() -> None:
    suspect = switched_to(2)
    found = over(suspect, suspect)
    assert [carried.after for carried in found] == sorted((carried.after for carried in found), reverse=True)
    assert over(weaker(suspect, 0.0), suspect) == ()
