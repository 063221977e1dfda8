"""A scan's verdict on evidence made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module

import pytest

from debackdoor.case import Case, open_case
from debackdoor.defenses.rnp import RNP, Exposure
from debackdoor.detectors.evidence import RARE, STANDS_OUT, SUSPICIOUS, Evidence
from debackdoor.detectors.label import PileUp
from debackdoor.types import ScanReport
from evidence_cases import evidence
from report_cases import trigger
from shortcut_cases import row_images, switched_to

# Not ``import debackdoor.scan as ...``, which is the function.
SCAN = import_module("debackdoor.scan")

PARTING = {"margin": (1, 4.0, RARE), "pile_up": PileUp(3, 0.9)}
"""A margin that speaks against label 1 and a pile-up against label 3."""

NEAR = 0.1 + SUSPICIOUS * STANDS_OUT
"""A success rate that comes near to standing out, where 0.1 is usual."""


@pytest.fixture(scope="module")
def opened() -> tuple[Case, Exposure]:
    case = open_case(switched_to(2), row_images(), RNP(precision="fp32"), "cpu")
    return case, case.expose()


def judged(
    opened: tuple[Case, Exposure], found: Evidence, monkeypatch: pytest.MonkeyPatch, reason: str = "forgotten"
) -> ScanReport:
    """The report on made-up evidence and with a made-up trigger, after an unlearning that stopped for ``reason``."""
    case, exposure = opened
    monkeypatch.setattr(SCAN, "recover_trigger", lambda *given, **_: replace(trigger(1, 7), label=given[4]))
    exposure = replace(exposure, unlearned=replace(exposure.unlearned, reason=reason))
    return SCAN.scan_case(case, exposure, found)


@pytest.mark.parametrize(
    ("found", "verdict", "labels", "message"),
    [
        (evidence(), "clean", [], "nothing is exposed"),
        (evidence(patch={2: NEAR - 0.01}), "clean", [], "nothing is exposed"),
        (evidence(patch={2: NEAR + 0.01}), "suspicious", [2], "label 2 comes near to standing out.*more clean images"),
        (evidence(margin=(1, 2.6, RARE**0.84)), "clean", [], "nothing is exposed"),
        (evidence(margin=(1, 2.6, RARE**0.86)), "suspicious", [1], "label 1 comes near"),
        (evidence(margin=(1, 2.0, RARE**2)), "clean", [], "nothing is exposed"),
        (evidence(margin=(1, 2.2, RARE**2)), "suspicious", [1], "label 1 comes near"),
        (evidence(away=0.66), "suspicious", [], "a patch that leads away to many labels comes near"),
        (evidence(patch={2: 0.61}), "backdoored", [2], "^label 2 stands out by a small universal patch$"),
        (
            evidence(away=0.9),
            "backdoored",
            [],
            "a small patch leads at least 90% of the images away from their labels, to many",
        ),
        (evidence(patch={0: 0.9, 3: 0.8}), "backdoored", [0, 3], "label 0 stands out.*; label 3 stands out"),
        (evidence(**PARTING), "inconclusive", [1, 3], "should name one label: scan again with more clean images"),
        # A trigger that was found settles it, towards one label or to many.
        (evidence(**PARTING, warp={3: 0.9}), "backdoored", [3, 1], "label 3 .* and a slight universal warp"),
        (evidence(**PARTING, patch={0: 0.9}), "backdoored", [0, 1, 3], "label 0 stands out by a small universal patch"),
        (evidence(**PARTING, away=0.9), "backdoored", [1, 3], "a small patch leads at least 90%"),
    ],
)
def test_verdicts(
    found: Evidence,
    verdict: str,
    labels: list[int],
    message: str,
    opened: tuple[Case, Exposure],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = judged(opened, found, monkeypatch)
    assert report.verdict == verdict
    assert [suspect.label for suspect in report.suspects] == labels
    assert re.search(message, report.message)
    assert report.score == found.score
    assert report.all_to_all == found.all_to_all
    assert found.exposed == (verdict == "backdoored")
    assert (report.trigger.label if report.trigger else None) == (labels[0] if labels else None)


@pytest.mark.parametrize("reason", ["steps", "stuck"])
@pytest.mark.parametrize("found", [evidence(), evidence(patch={2: 0.56})])
def test_nothing_is_told_of_a_model_that_did_not_forget(
    found: Evidence, reason: str, opened: tuple[Case, Exposure], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = judged(opened, found, monkeypatch, reason)
    assert (report.verdict, report.suspects, report.trigger) == ("inconclusive", (), None)
    assert re.search(r"was not unlearned \(accuracy \d+%\).*; give more clean images", report.message)


def test_a_finding_stands_though_the_model_did_not_forget(
    opened: tuple[Case, Exposure], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(opened, evidence(patch={2: 0.9}), monkeypatch, "stuck").verdict == "backdoored"


def test_what_is_only_near_has_no_reason_but_its_numbers(
    opened: tuple[Case, Exposure], monkeypatch: pytest.MonkeyPatch
) -> None:
    (suspect,) = judged(opened, evidence(patch={2: 0.56}), monkeypatch).suspects
    assert (suspect.label, suspect.name, suspect.reasons) == (2, None, ())
    assert suspect.evidence["patch_success"] == 0.56
    assert suspect.evidence["patch_lead"] == pytest.approx(0.46)
    assert suspect.evidence["trigger_success"] == trigger(1, 7).success_rate
    assert suspect.evidence["trigger_pixels"] == trigger(1, 7).l1


def test_a_faint_pattern_that_counts_against_the_first_suspect_is_handed_on(
    opened: tuple[Case, Exposure], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evidence(additive={2: 0.8})
    pattern = judged(opened, found, monkeypatch).pattern
    assert pattern is not None
    assert (pattern.label, pattern.success_rate) == (2, 0.8)
    assert pattern.pattern is found.shortcuts.patterns[2]
    assert judged(opened, evidence(patch={2: 0.8}), monkeypatch).pattern is None
