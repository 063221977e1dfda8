"""What a repair's own check passes and rejects, and what is left alone since nothing certain was found."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import debackdoor as db
from debackdoor.case import open_case
from debackdoor.defenses.rnp import RNP
from debackdoor.detectors.carried import LEFT, Carried
from debackdoor.detectors.evidence import RARE, STANDS_OUT, SUSPICIOUS
from debackdoor.detectors.examination import Examination
from debackdoor.detectors.label import PileUp
from debackdoor.models.copying import copied
from debackdoor.repair import repair_case, repair_unchecked, verify
from debackdoor.scan import scan_case
from evidence_cases import evidence
from shortcut_cases import SWITCH, row_images, switched_to, switched_to_the_next

NEAR = 0.1 + SUSPICIOUS * STANDS_OUT
"""A success rate that comes near to standing out, where 0.1 is usual."""


@pytest.mark.parametrize(("patch", "conclusive"), [(NEAR - 0.01, True), (NEAR + 0.01, False)])
def test_what_comes_near_to_standing_out_is_left_alone_and_not_cleared(patch: float, conclusive: bool) -> None:
    case = open_case(switched_to(2), row_images(), RNP(precision="fp32"), "cpu")
    result = repair_case(case, case.expose(), evidence(patch={2: patch}))
    assert result.verification is not None
    assert (result.changed, result.verification.passed) == (False, conclusive)
    assert result.verification.conclusive is conclusive
    told = "^nothing is exposed" if conclusive else "^inconclusive: label 2 comes near to standing out.*left as it is"
    assert re.search(told, result.verification.message)


def test_signs_that_name_different_labels_are_left_alone_as_a_scan_leaves_them() -> None:
    case = open_case(switched_to(2), row_images(), RNP(precision="fp32"), "cpu")
    exposure, found = case.expose(), evidence(margin=(1, 4.0, RARE), pile_up=PileUp(3, 0.9))
    verification = repair_case(case, exposure, found).verification
    assert scan_case(case, exposure, found).verdict == "inconclusive"
    assert not repair_unchecked(case, exposure, found).changed
    assert (verification.passed, verification.conclusive, verification.label) == (False, False, None)
    assert re.search("^inconclusive: .* should name one label; the model is left as it is", verification.message)


@pytest.mark.parametrize("model", [switched_to(2), switched_to_the_next()], ids=["all-to-one", "all-to-all"])
def test_the_check_passes_a_repaired_network_and_no_other(model: nn.Sequential) -> None:
    """The switch is gone when the units that it feeds answer to it no longer."""
    case = open_case(model, row_images(), RNP(precision="fp32"), "cpu")
    exposure = case.expose()
    before = case.evidence(exposure)
    assert before.exposed
    without = copied(case.suspect)
    with torch.no_grad():
        without[1].weight[:, SWITCH] = 0
    suspect, repaired = (verify(case, exposure, before, network) for network in (case.suspect, without))
    assert not suspect.passed
    assert re.search("after the repair (it is still there for label 2|such a patch still leads)", suspect.message)
    assert repaired.passed


@pytest.mark.parametrize(("after", "passed"), [(LEFT - 0.01, True), (LEFT, False)])
@pytest.mark.parametrize("label", [2, None], ids=["all-to-one", "all-to-all"])
def test_what_led_the_suspect_model_may_lead_the_repaired_one_no_longer(
    monkeypatch: pytest.MonkeyPatch, label: int | None, after: float, passed: bool
) -> None:
    model = switched_to_the_next() if label is None else switched_to(label)
    case = open_case(model, row_images(), RNP(precision="fp32"), "cpu")
    exposure = case.expose()
    before = case.evidence(exposure)
    monkeypatch.setattr(Examination, "again", lambda *_: evidence())
    monkeypatch.setattr(Examination, "carried", lambda *_: (Carried("patch", label, 0.9, after),))
    verification = verify(case, exposure, before, case.suspect)
    assert verification.passed is passed
    assert verification.evidence["carried_before"] == 0.9
    assert verification.evidence["carried_after"] == after
    assert verification.evidence.get("carried_label") == label
    told = "find nothing" if passed else "still there for label 2" if label == 2 else "still leads 25% away"
    assert told in verification.message


def test_an_all_to_all_backdoor_is_gone() -> None:
    clean = row_images(96)
    result = db.repair(switched_to_the_next(), clean, device="cpu", precision="fp32")
    assert result.changed
    assert result.verification is not None
    assert result.verification.passed
    assert result.verification.label is None
    bright = clean.x.clone()
    bright.flatten(1)[:, SWITCH] = 1
    assert (result.model(bright).argmax(1) == clean.y).float().mean() > 0.9


def test_channels_that_were_zero_already_are_no_change() -> None:
    case = open_case(switched_to(2), row_images(), RNP(precision="fp32"), "cpu")
    exposure = case.expose()
    once = case.method.remove(case.suspect, exposure, exposure.ranking[:1], case.holdout)
    twice = case.method.remove(once.model, exposure, exposure.ranking[:1], case.holdout)
    assert (once.changed, twice.changed) == (True, False)
