"""Evidence: which labels it makes suspect, what it takes to unlearn them, and what counts as gone."""

import pytest

from debackdoor.detectors.evidence import TRIGGERS, Evidence, Examination, remains
from debackdoor.detectors.label import PileUp
from debackdoor.detectors.margin import Margins
from debackdoor.detectors.perturbations import KINDS, Patch
from debackdoor.detectors.shortcut import Shortcuts
from debackdoor.detectors.universal import AWAY
from rnp_cases import quadrant_set, quadrants

USUAL = dict.fromkeys(range(5), 0.1)


def evidence(
    margin: tuple[int, float, float] = (1, 1.3, 0.5),
    away: float = 0.1,
    pile_up: PileUp | None = None,
    **stands_out: dict[int, float],
) -> Evidence:
    """Nothing suspect but what is named: a margin's label, ratio and p-value, and success rates by kind and label."""
    rates = {kind.kind: USUAL | stands_out.get(kind.kind, {}) for kind in KINDS}
    return Evidence(Margins((1.0,) * 5, *margin), Shortcuts(rates, away, 0.2), pile_up)


def test_nothing_suspect() -> None:
    nothing = evidence(patch={2: 0.55})
    assert not nothing.exposed
    assert nothing.label is None
    assert nothing.aims == []


@pytest.mark.parametrize(
    ("given", "label", "why"),
    [
        (evidence(margin=(3, 4.0, 0.001)), 3, ("margin",)),
        (evidence(pile_up=PileUp(4, 0.9)), 4, ("pile-up",)),
        (evidence(additive={0: 0.8}), 0, ("additive",)),
        (evidence(warp={2: 0.61}), 2, ("warp",)),
    ],
)
def test_one_reason_is_enough(given: Evidence, label: int, why: tuple[str, ...]) -> None:
    assert given.exposed
    assert given.reasons == {label: why}
    assert given.label == label
    assert {aim.target for aim in given.aims} == {label}
    assert {aim.kind for aim in given.aims} == set(KINDS)
    assert len(given.aims) >= TRIGGERS


def test_the_label_with_most_reasons_comes_first_and_then_the_stronger() -> None:
    found = evidence(margin=(2, 4.0, 0.001), pile_up=PileUp(0, 0.9), patch={0: 0.9, 2: 0.8}, warp={4: 0.9})
    assert found.reasons == {0: ("pile-up", "patch"), 2: ("margin", "patch"), 4: ("warp",)}
    assert {aim.target for aim in found.aims} == {0, 2, 4}


def test_all_to_all_has_no_label_and_patches_that_lead_away() -> None:
    found = evidence(away=0.9)
    assert found.all_to_all
    assert found.exposed
    assert found.label is None
    assert {(aim.kind, aim.target) for aim in found.aims} == {(Patch, AWAY)}


def test_two_faint_signs_count_where_they_agree() -> None:
    faint = PileUp(3, 0.5)
    assert not evidence(pile_up=faint).exposed
    assert not evidence(margin=(3, 1.9, 0.04)).exposed
    assert not evidence(margin=(2, 1.9, 0.04), pile_up=faint).exposed
    assert not evidence(margin=(3, 1.9, 0.06), pile_up=faint).exposed
    assert not evidence(margin=(3, 1.9, 0.04), pile_up=PileUp(3, 0.4)).exposed
    assert evidence(margin=(3, 1.9, 0.04), pile_up=faint).reasons == {3: ("pile-up", "margin")}


def test_what_is_no_longer_found_is_gone() -> None:
    before = evidence(patch={2: 0.9}, pile_up=PileUp(3, 0.9))
    assert remains(before, evidence()) == []
    assert remains(before, evidence(patch={2: 0.9})) == [2]
    assert remains(before, evidence(pile_up=PileUp(3, 0.8))) == [3]
    assert remains(before, evidence(patch={4: 0.9})) == []


def test_after_a_repair_the_suspects_are_compared_with_a_few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def search(model: object, fit: object, holdout: object, labels: list[int], *, away: int, **_: object) -> Shortcuts:
        asked.append((labels, away))
        return evidence().shortcuts

    monkeypatch.setattr("debackdoor.detectors.evidence.find_shortcuts", search)
    examine = Examination(quadrant_set(), quadrant_set(), 4)
    examine(quadrants(), 2)
    examine.again(quadrants(), evidence(patch={3: 0.9}))
    examine.again(quadrants(), evidence(away=0.9))
    assert sorted(asked[0][0]) == [0, 1, 2, 3]
    assert asked[0][0][0] == 2
    assert asked[0][1] > 0
    assert asked[1] == ([3, 0, 1, 2, 4], 0)
    assert asked[2] == ([0, 1, 2, 3, 4], asked[0][1])


def test_the_numbers_name_the_label_of_every_kind() -> None:
    numbers = evidence(patch={2: 0.9}).numbers("before")
    assert (numbers["patch_label_before"], numbers["patch_success_before"]) == (2, 0.9)
    assert numbers["patch_lead_before"] == pytest.approx(0.8)
    assert numbers["margin_ratio_before"] == 1.3
