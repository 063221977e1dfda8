"""Unlearning by the normalisation layers alone, of several parts of the images; and when that tells a label."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from channel_cases import assert_as_found, snapshot
from debackdoor.case import open_case
from debackdoor.defenses.rnp import RNP
from debackdoor.detectors.label import RUNS, PileUp, unlearn_parts
from debackdoor.rnp.modes import normalisation_learns, require_norm_gradients
from debackdoor.rnp.unlearn import Unlearned, UnlearnSettings, unlearn
from debackdoor.types import CleanSet
from evidence_cases import evidence
from rnp_cases import quadrant_set, quadrants, strip_set, strips

CASE = import_module("debackdoor.case")
LABEL = import_module("debackdoor.detectors.label")
EXAMINATION = import_module("debackdoor.detectors.examination")


def test_with_norm_only_every_other_parameter_stays_bit_for_bit() -> None:
    """Not even decay moves it, and what the caller froze of the norm learns all the same."""
    model = quadrants()
    model[1].weight.requires_grad_(False)
    settings = UnlearnSettings(lr=0.02, norm_only=True, weight_decay=0.1, max_passes=2, least_steps=2)
    found = unlearn(model, quadrant_set(), settings, precision="fp32").model
    before = dict(model.named_parameters())
    changed = {name for name, value in found.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"1.weight", "1.bias"}
    assert {name for name, value in found.named_parameters() if value.grad is not None} == changed
    assert not torch.equal(found[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize(
    ("norm", "learns"),
    [
        (nn.BatchNorm1d(5), True),
        (nn.BatchNorm2d(5, track_running_stats=False), True),
        (nn.BatchNorm2d(5, affine=False), False),
        (nn.LayerNorm(5), False),
        (nn.GroupNorm(1, 5), False),
        (nn.Conv2d(5, 5, 1), False),
    ],
    ids=str,
)
def test_which_normalisation_learns(norm: nn.Module, learns: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Sequential(norm)).requires_grad_(False)
    assert normalisation_learns(model) is learns
    require_norm_gradients(model)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == (
        {"1.0.weight", "1.0.bias"} if learns else set()
    )


def parts_of(fit: CleanSet, monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[CleanSet]:
    """The parts that are unlearned."""
    parts: list[CleanSet] = []
    with monkeypatch.context() as patch:
        patch.setattr(LABEL, "unlearn", lambda model, part, settings, **_: parts.append(part))
        assert len(list(unlearn_parts(strips(), fit, **more))) == len(parts)
    return parts


def test_every_unlearning_gets_another_part_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 images a class 0.4 are 6: ten are left. No seed shares a part with another."""
    fit = strip_set()
    parts = [part for seed in (0, 1) for part in parts_of(fit, monkeypatch, seed=seed)]
    assert len(parts) == 2 * RUNS
    for part in parts:
        assert Counter(part.y.tolist()) == dict.fromkeys(range(5), 10)
        assert (part.x.flatten(1)[:, None] == fit.x.flatten(1)).all(2).any(1).all()
    assert len({tuple(part.x.flatten().tolist()) for part in parts}) == 2 * RUNS
    again = parts_of(fit, monkeypatch, seed=1)
    assert all(torch.equal(one.x, two.x) for one, two in zip(parts[RUNS:], again, strict=True))
    assert len(parts_of(fit, monkeypatch, runs=2)) == 2


def test_the_model_is_left_alone_and_the_seed_decides() -> None:
    model, heard = strips().train(), []
    before = snapshot(model)

    def histories(seed: int) -> list[list[dict[str, Any]]]:
        found = unlearn_parts(
            model, strip_set(), runs=2, seed=seed, precision="fp32", progress=lambda stage, *_: heard.append(stage)
        )
        return [unlearned.history for unlearned in found]

    one, two, other = (histories(seed) for seed in (1, 1, 2))
    assert_as_found(model, before)
    assert one == two != other
    assert one[0] != one[1]
    assert set(heard) == {"unlearn"}


@pytest.fixture
def looked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The searches take no time and find nothing; the first label of those that shortcuts are searched for."""
    first: list[int] = []
    found = evidence()
    monkeypatch.setattr(EXAMINATION, "largest_margins", lambda *_, **__: found.margins)
    monkeypatch.setattr(
        EXAMINATION, "find_shortcuts", lambda _m, _f, _h, labels, **__: first.extend(labels[:1]) or found.shortcuts
    )
    return first


@pytest.mark.parametrize(
    ("norm", "classes", "fewest"),
    [
        (nn.BatchNorm2d(4), 4, 1),
        (nn.BatchNorm1d(5, affine=False), 5, 1),
        (nn.LayerNorm(5), 5, 1),
        (nn.BatchNorm1d(5), 5, 2),
    ],
    ids=str,
)
def test_few_classes_or_norms_that_learn_give_no_pile_up(
    norm: nn.Module, classes: int, fewest: int, looked_for: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The label where answers gathered while all weights unlearned is then looked at first."""
    monkeypatch.setattr(CASE, "FEWEST_NORMS", fewest)
    model, clean = (quadrants(), quadrant_set()) if classes == 4 else (strips(), strip_set())
    model[1 if classes == 4 else 3] = norm
    case = open_case(model, clean, RNP(precision="fp32"), "cpu")
    exposure = case.expose()
    assert case.classes == classes
    assert case.evidence(exposure).pile_up is None
    assert looked_for == [LABEL.largest_pile_up(exposure.unlearned.history).label]


def test_a_pile_up_is_the_label_that_repeats(looked_for: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Label 4 gets all answers once and none in the other unlearning, label 1 gets 0.5 and 0.75."""
    shares = [[[0.0, 0.5, 0.25, 0.25, 0.0], [0.0] * 4 + [1.0]], [[0.25, 0.75, 0.0, 0.0, 0.0]]]
    made = [Unlearned(nn.Identity(), "forgotten", 0.0, [], [{"label_shares": row} for row in run]) for run in shares]
    monkeypatch.setattr(CASE, "FEWEST_NORMS", 1)
    monkeypatch.setattr(CASE, "unlearn_parts", lambda *_, **__: iter(made))
    case = open_case(strips(), strip_set(), RNP(precision="fp32"), "cpu")
    assert case.pile_ups(case.suspect) == [0.0, 0.5, 0.0, 0.0, 0.0]
    assert case.evidence(case.expose()).pile_up == PileUp(1, 0.5)
    assert looked_for == [1]
