"""A scan and a repair in one go end with what each of them ends with."""

import pytest
import torch

import debackdoor as db
from channel_cases import assert_as_found, snapshot
from debackdoor.errors import DebackdoorError
from rnp_cases import lived_in, quadrant_set


def test_both_end_as_each_of_them_does() -> None:
    model, clean = lived_in(), quadrant_set()
    before, heard = snapshot(model), list[str]()
    settings = {"seed": 3, "device": "cpu", "precision": "fp32"}
    report, result = db.scan_and_repair(
        model, clean, budget=0.3, progress=lambda stage, *_: heard.append(stage), **settings
    )  # fmt: skip
    assert_as_found(model, before)
    scanned, repaired = db.scan(model, clean, **settings), db.repair(model, clean, budget=0.3, **settings)
    assert (report.verdict, report.message, report.score) == (scanned.verdict, scanned.message, scanned.score)
    assert report.evidence == scanned.evidence
    assert (result.plan, result.steps, result.verification) == (repaired.plan, repaired.steps, repaired.verification)
    weights, others = result.model.state_dict(), repaired.model.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert heard.count("search margins") == 1 + result.changed


def test_a_budget_that_is_no_fraction_is_refused() -> None:
    with pytest.raises(DebackdoorError, match="budget from 0 to 1, got 2"):
        db.scan_and_repair(lived_in(), quadrant_set(), budget=2)
