"""What a scan's report holds, and that the model is left alone."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

import debackdoor as db
from channel_cases import assert_as_found, snapshot
from conftest import DigitsVictim
from debackdoor.attacks import train
from debackdoor.data import load_dataset
from debackdoor.detectors.evidence import SUSPICIOUS
from debackdoor.types import CleanSet
from evidence_cases import evidence
from rnp_cases import lived_in, quadrant_set
from shortcut_cases import CLASSES, SWITCH, row_images, switched_to, switched_to_the_next

# Not ``import debackdoor.scan as ...``, which is the function.
SCAN = import_module("debackdoor.scan")
STAGES = import_module("debackdoor.defenses.rnp")
EXAMINATION = import_module("debackdoor.detectors.examination")
CASE = import_module("debackdoor.case")


def test_the_report_of_a_switch() -> None:
    """The switch's pixel alone sends every image to label 2: all succeed, towards the others none does.

    The margin of label 2 is largest with its own pixel and the switch at 1, 6 + 30, that of the others is 6.
    """
    data = row_images()
    report = db.scan(switched_to(2), CleanSet(data.x, data.y, ("a", "b", "c", "d")), device="cpu", precision="fp32")
    assert (report.verdict, report.all_to_all) == ("backdoored", False)
    assert report.message == "label 2 stands out by a small universal patch and a plain square"
    assert report.score == pytest.approx(2.0)
    (suspect,) = report.suspects
    assert (suspect.label, suspect.name, suspect.reasons) == (2, "c", ("patch", "square"))
    numbers = suspect.evidence
    assert numbers["margin"] == pytest.approx(36.0)
    assert numbers["patch_success"] == numbers["patch_lead"] == 1.0
    assert report.trigger is not None
    assert report.trigger.label == 2
    assert int((report.trigger.mask * report.trigger.pattern).argmax()) == SWITCH
    assert numbers["trigger_success"] == report.trigger.success_rate > 0.7
    assert numbers["trigger_pixels"] == report.trigger.l1 < 1

    shares = [row["label_shares"] for row in report.history["unlearn"]]
    assert numbers["unlearning_share"] == max(share[2] for share in shares)
    whole = report.evidence
    assert whole["pile_up_counts"] == 0  # no batch normalisation
    assert whole["pile_up_share"] == max(map(max, shares))
    assert (whole["patch_label"], whole["patch_success"], whole["margin_label"]) == (2, 1.0, 2)
    assert whole["margin_ratio"] == pytest.approx(6.0)
    assert whole["unlearned_accuracy"] == report.history["unlearn"][-1]["accuracy"] <= 0.35
    assert not any(name.endswith(("_before", "_after")) for name in whole)
    assert set(report.history) == {"unlearn", "recover"}
    assert sorted(channel.index for channel in report.ranking) == list(range(CLASSES + 1))
    scores = [channel.score for channel in report.ranking]
    assert scores == sorted(scores)


def test_without_the_switch_nothing_is_found() -> None:
    model = switched_to(2)
    with torch.no_grad():
        model[1].weight[CLASSES] = 0
    report = db.scan(model, row_images(), device="cpu", precision="fp32")
    assert (report.verdict, report.suspects, report.trigger) == ("clean", (), None)
    assert 0 <= report.score < SUSPICIOUS
    assert "nothing is exposed" in report.message
    assert report.history["unlearn"]


def test_a_switch_to_the_next_class_is_all_to_all() -> None:
    """The best patch leads all images away, a quarter of them to each label: 0.75 is 1.5 times 0.5."""
    report = db.scan(switched_to_the_next(), row_images(), device="cpu", precision="fp32")
    assert (report.verdict, report.all_to_all, report.suspects, report.trigger) == ("backdoored", True, (), None)
    assert report.message == "a small patch leads at least 100% of the images away from their labels, to many"
    assert report.score == pytest.approx(1.5)


def test_the_callers_model_is_left_alone_and_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers pile up as they may on any of four labels; here that counts, so that there is a trigger to recover."""
    monkeypatch.setattr(CASE, "FEWEST_CLASSES", 4)
    monkeypatch.setattr(CASE, "FEWEST_NORMS", 1)
    model, clean = lived_in(), quadrant_set()
    x, y, before = clean.x.clone(), clean.y.clone(), snapshot(model)
    heard: list[str] = []
    one = db.scan(model, clean, seed=2, device="cpu", progress=lambda stage, *_: heard.append(stage))
    assert_as_found(model, before)  # torch's random state included
    assert torch.equal(clean.x, x)
    assert torch.equal(clean.y, y)
    torch.manual_seed(99)  # the surroundings must not matter
    two = db.scan(lived_in(), clean, seed=2, device="cpu")
    assert one.trigger is not None
    assert two.trigger is not None
    assert torch.equal(one.trigger.mask, two.trigger.mask)
    assert torch.equal(one.trigger.pattern, two.trigger.pattern)
    assert replace(one, trigger=None) == replace(two, trigger=None)
    assert list(dict.fromkeys(heard)) == [
        "unlearn", "recover", "search margins", "search perturbations", "search squares", "search trigger"
    ]  # fmt: skip


def test_a_trigger_towards_every_label_is_searched_for_on_request() -> None:
    """It changes nothing else; with another seed other images are held out and the order is another."""
    plain, more, other = (
        db.scan(switched_to(2), row_images(), all_triggers=every, seed=seed, device="cpu")
        for every, seed in ((False, 0), (True, 0), (False, 1))
    )
    rows = more.history["triggers"]
    assert [row["label"] for row in rows] == list(range(CLASSES))
    assert min(rows, key=lambda row: row["l1"])["label"] == 2
    assert rows[2]["success_rate"] > 0.7
    assert plain.history == {name: rows for name, rows in more.history.items() if name != "triggers"}
    assert replace(plain, trigger=None, history={}) == replace(more, trigger=None, history={})
    assert other.history["unlearn"] != plain.history["unlearn"]


class StageError(Exception):
    """Stands for whatever can go wrong."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The searches take no time, and label 1 stands out."""
    found = evidence(patch={1: 0.9})
    monkeypatch.setattr(EXAMINATION, "largest_margins", lambda *_, **__: found.margins)
    monkeypatch.setattr(EXAMINATION, "find_shortcuts", lambda *_, **__: found.shortcuts)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (CASE, "split_clean"),
        (STAGES, "find_channels"),
        (STAGES, "unlearn"),
        (STAGES, "recover"),
        (EXAMINATION, "largest_margins"),
        (EXAMINATION, "find_shortcuts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_callers_model_is_left_alone_when_a_stage_fails(
    place: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lived_in()
    before = snapshot(model)

    def fail(*_: object, **__: object) -> None:
        raise StageError(name)

    monkeypatch.setattr(place, name, fail)
    with pytest.raises(StageError, match=name):
        db.scan(model, quadrant_set(), device="cpu")
    assert_as_found(model, before)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("searches", "clauses"),
    [
        (["recover_trigger"], "; its trigger could not be recovered: StageError: out of memory"),
        (
            ["recover_trigger", "search_triggers"],
            "; a trigger towards every label could not be searched for: StageError: out of memory"
            "; its trigger could not be recovered: StageError: out of memory",
        ),
    ],
)
def test_a_finding_outlives_the_search_for_its_trigger(
    searches: list[str], clauses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StageError("out of\nmemory")

    model = lived_in()
    before = snapshot(model)
    for name in searches:
        monkeypatch.setattr(SCAN, name, fail)
    report = db.scan(model, quadrant_set(), all_triggers="search_triggers" in searches, device="cpu")
    assert_as_found(model, before)
    assert (report.verdict, report.trigger) == ("backdoored", None)
    assert report.message == "label 1 stands out by a small universal patch" + clauses
    assert [suspect.label for suspect in report.suspects] == [1]
    assert "trigger_success" not in report.suspects[0].evidence
    assert set(report.history) == {"unlearn", "recover"}


def test_without_a_finding_a_search_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StageError

    found = evidence()
    monkeypatch.setattr(EXAMINATION, "largest_margins", lambda *_, **__: found.margins)
    monkeypatch.setattr(EXAMINATION, "find_shortcuts", lambda *_, **__: found.shortcuts)
    monkeypatch.setattr(SCAN, "search_triggers", fail)
    with pytest.raises(StageError):
        db.scan(lived_in(), quadrant_set(), all_triggers=True, device="cpu")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stage", ["unlearn", "recover", "search trigger"])
def test_the_callers_model_is_left_alone_when_interrupted(stage: str) -> None:
    model = lived_in()
    before = snapshot(model)

    def interrupt(now: str, *_: object) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        db.scan(model, quadrant_set(), device="cpu", progress=interrupt)
    assert_as_found(model, before)


def test_a_real_backdoor_is_found(digits_victim: DigitsVictim) -> None:
    model = digits_victim.trained.model
    before = snapshot(model)
    report = db.scan(model, digits_victim.clean, device="cpu")
    assert_as_found(model, before)
    assert report.verdict == "backdoored"
    assert [suspect.label for suspect in report.suspects] == [digits_victim.attack.target]
    assert {"pile-up", "patch"} <= set(report.suspects[0].reasons)
    assert report.score >= 1
    assert report.trigger is not None
    others = digits_victim.test.x[digits_victim.test.y != report.trigger.label]
    answers = model(report.trigger.apply(others)).argmax(1)
    assert (answers == digits_victim.attack.target).float().mean() > 0.8


@pytest.mark.slow
def test_a_model_trained_on_clean_digits_is_not_called_backdoored() -> None:
    """Trained as the victim of the slow test of repair is, but for the attack.

    Half as wide as that, a network of digits now and then has one label with an unusually large margin.
    """
    data, clean = load_dataset("digits", image_size=16), load_dataset("digits", limit=500, image_size=16)
    trained = train(
        None, "preactresnet18-w16", data, epochs=10, batch_size=64, lr=0.1, seed=0, flip=False, device="cpu"
    )
    report = db.scan(trained.model, clean, device="cpu")
    assert report.verdict != "backdoored"
    assert report.score < 1
