"""Evidence: which labels it makes suspect, what it takes to unlearn them, and what counts as gone."""

import math
import sys
from itertools import product

import numpy as np
import pytest

from debackdoor.detectors.evidence import (
    FAINT,
    FAIRLY_RARE,
    OUTSTANDING,
    PILED_UP,
    RARE,
    STANDS_OUT,
    TRIGGERS,
    Evidence,
    remains,
)
from debackdoor.detectors.label import PileUp
from debackdoor.detectors.margin import summarise
from debackdoor.detectors.perturbations import KINDS, Patch
from debackdoor.detectors.universal import AWAY
from evidence_cases import evidence

CHANCE = 1 / 5
BIT = 0.01


def test_nothing_suspect() -> None:
    nothing = evidence(patch={2: 0.55})
    assert not nothing.exposed
    assert nothing.label is None
    assert nothing.aims == []


@pytest.mark.parametrize(
    ("given", "label", "why"),
    [
        (evidence(margin=(3, 4.0, RARE)), 3, ("margin",)),
        (evidence(pile_up=PileUp(4, CHANCE + PILED_UP + BIT)), 4, ("pile-up",)),
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


def test_of_five_labels_alike_a_rare_margin_is_no_evidence_alone() -> None:
    """Margins from one gamma distribution that varies by a fifth: the p-value is often tiny, the ratio never large."""
    drawn = np.random.default_rng(0).gamma(25, 1 / 25, (400, 5))
    found = [Evidence(summarise(list(values)), evidence().shortcuts, evidence().squares) for values in drawn]
    assert sum(one.margins.p_value <= RARE for one in found) >= 8
    assert not any(one.exposed for one in found)


def test_labels_to_which_no_search_led() -> None:
    found = evidence(margin=(2, 4.0, RARE), pile_up=PileUp(0, 0.9), patch={0: 0.9})
    assert found.reasons == {0: ("pile-up", "patch"), 2: ("margin",)}
    assert found.unseen == [2]


def test_the_label_with_most_reasons_comes_first_and_then_the_stronger() -> None:
    found = evidence(margin=(2, 4.0, RARE), pile_up=PileUp(0, 0.9), patch={0: 0.9, 2: 0.8}, warp={4: 0.9})
    assert found.reasons == {0: ("pile-up", "patch"), 2: ("margin", "patch"), 4: ("warp",)}
    assert {aim.target for aim in found.aims} == {0, 2, 4}


def test_all_to_all_has_no_label_and_patches_that_lead_away() -> None:
    found = evidence(away=0.9)
    assert found.all_to_all
    assert found.exposed
    assert found.label is None
    assert {(aim.kind, aim.target) for aim in found.aims} == {(Patch, AWAY)}


def test_two_faint_signs_count_where_they_agree() -> None:
    faint = PileUp(3, CHANCE + FAINT + BIT)
    assert not evidence(pile_up=faint).exposed
    assert not evidence(margin=(3, 1.9, 0.04)).exposed
    assert not evidence(margin=(2, 1.9, 0.04), pile_up=faint).exposed
    assert not evidence(margin=(3, 1.9, 0.06), pile_up=faint).exposed
    assert not evidence(margin=(3, 1.9, 0.04), pile_up=PileUp(3, CHANCE + FAINT - BIT)).exposed
    assert evidence(margin=(3, 1.9, 0.04), pile_up=faint).reasons == {3: ("pile-up", "margin")}


def test_what_is_no_longer_found_is_gone() -> None:
    before = evidence(patch={2: 0.9}, pile_up=PileUp(3, 0.9))
    assert remains(before, evidence()) == []
    assert remains(before, evidence(patch={2: 0.9})) == [2]
    assert remains(before, evidence(pile_up=PileUp(3, 0.8))) == [3]
    assert remains(before, evidence(patch={4: 0.9})) == []


def test_the_numbers_name_the_label_of_every_kind() -> None:
    numbers = evidence(patch={2: 0.9}).numbers("before")
    assert (numbers["patch_label_before"], numbers["patch_success_before"]) == (2, 0.9)
    assert numbers["patch_lead_before"] == pytest.approx(0.8)
    assert numbers["margin_ratio_before"] == 1.3


def test_what_was_not_searched_for_has_no_number_and_speaks_against_nothing() -> None:
    """A spread of -0.1 is no sign either: all but the two numbers is the same."""
    without, some = evidence(away=None, patch={2: 0.5}), evidence(away=0.1, patch={2: 0.5})
    assert {**without.numbers("after"), "away_after": 0.1, "gathered_after": 0.2} == some.numbers("after")
    assert (without.all_to_all, without.exposed, without.nearest) == (False, False, 2)
    assert without.score == some.score


def test_strengths_are_multiples_of_the_thresholds() -> None:
    """The logarithm of a square is twice that of the number; of shares what is above chance, 1 / 5, is halved."""
    rates = {2: 0.1 + 1.5 * STANDS_OUT}
    found = evidence(margin=(3, 2.0, RARE**2), pile_up=PileUp(0, CHANCE + PILED_UP / 2), patch=rates).strengths
    assert found[3]["margin"] == pytest.approx(2.0 / OUTSTANDING)  # not as far out as one that counts alone has to be
    assert evidence(margin=(3, OUTSTANDING, RARE**2)).strengths[3]["margin"] == pytest.approx(2.0)
    assert evidence(margin=(3, 2.4, RARE**0.1)).strengths[3]["margin"] == pytest.approx(0.1)
    assert found[0]["pile-up"] == pytest.approx(0.5)
    assert found[2] == pytest.approx({"additive": 0.0, "patch": 1.5, "warp": 0.0, "square": 0.0})
    assert found[1] == pytest.approx({"additive": 0.0, "patch": 0.0, "warp": 0.0, "square": 0.0})
    assert set(found) == {0, 1, 2, 3, 4}


def test_two_faint_signs_are_as_strong_as_the_weaker_of_them() -> None:
    """A share of 1.1 times ``FAINT`` above chance, and a margin of 2, 1.05 or half the rarity that is asked for."""
    share = CHANCE + 1.1 * FAINT
    assert share - CHANCE < PILED_UP
    for power, wanted in ((2.0, 1.1), (1.05, 1.05)):
        together = evidence(margin=(3, 1.9, FAIRLY_RARE**power), pile_up=PileUp(3, share)).strengths[3]
        assert (together["margin"], together["pile-up"]) == pytest.approx((wanted, wanted))
    apart = evidence(margin=(3, 1.9, FAIRLY_RARE**0.5), pile_up=PileUp(3, share)).strengths[3]
    assert apart["pile-up"] == pytest.approx(1.1 * FAINT / PILED_UP)
    assert apart["margin"] == pytest.approx(0.5 * math.log(FAIRLY_RARE) / math.log(RARE))


def test_a_margin_that_cannot_be_told_from_chance_or_from_zero_is_a_number() -> None:
    assert str(evidence(margin=(1, 1.0, 1.0)).strengths[1]["margin"]) == "0.0"  # not -0.0, which people would read
    largest = math.log(sys.float_info.min) / math.log(RARE)
    assert evidence(margin=(1, 99.0, 0.0)).strengths[1]["margin"] == pytest.approx(largest)


def test_the_nearest_label_has_the_strongest_sign() -> None:
    assert evidence(patch={2: 0.5}, warp={4: 0.4}).nearest == 2
    assert evidence(margin=(3, 3.0, RARE**0.9), patch={2: 0.5}).nearest == 3
    assert evidence(patch={2: 0.9}).nearest == 2
    assert evidence(away=0.6, patch={2: 0.4}).nearest is None  # a spread of 0.4, a lead of 0.3
    assert evidence(away=0.6, patch={2: 0.55}).nearest == 2


def test_the_score_is_that_of_the_strongest_sign_wherever_it_leads() -> None:
    assert evidence(patch={2: 0.5}, warp={4: 0.7}).score == pytest.approx(1.2)
    assert evidence(away=0.8, warp={4: 0.5}).score == pytest.approx(1.2)
    assert evidence(margin=(1, 1.0, 1.0)).score == 0.0


def test_model_wide_signs_disagree_where_they_name_two_labels_and_no_trigger_backs_either() -> None:
    parting = {"margin": (1, 4.0, RARE), "pile_up": PileUp(3, 0.9)}
    assert evidence(**parting).disagree
    assert not evidence(margin=(1, 4.0, RARE), pile_up=PileUp(1, 0.9)).disagree
    assert not evidence(margin=(1, 4.0, RARE)).disagree
    assert not evidence(**parting, patch={3: 0.9}).disagree
    assert not evidence(**parting, patch={0: 0.9}).disagree
    assert not evidence(**parting, away=0.9).disagree


@pytest.mark.parametrize(("p_value", "label"), list(product([1.0, 0.06, 0.05, 1.1 * RARE, RARE, 0.0], [1, 2])))
def test_a_score_of_one_and_a_finding_are_the_same(p_value: float, label: int) -> None:
    shares = [CHANCE, *(CHANCE + edge + side for edge in (FAINT, PILED_UP) for side in (-BIT, BIT))]
    for share, away, lead in product(shares, [0.1, 0.69, 0.71], [0.0, 0.49, 0.51]):
        given = evidence((1, 3.0, p_value), away, PileUp(label, share), warp={3: 0.1 + lead})
        assert (given.score >= 1) == (bool(given.reasons) or given.all_to_all) == (given.exposed or given.disagree)
        assert not (given.exposed and given.disagree)
        rare = p_value <= RARE or (p_value <= FAIRLY_RARE and label == 1 and share > CHANCE + FAINT)
        assert ("margin" in given.reasons.get(1, ())) == rare
