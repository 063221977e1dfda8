"""The searches: which labels they are for, and when they are made anew, with smaller perturbations."""

import pytest

from debackdoor.detectors.examination import HALVINGS, Examination
from debackdoor.detectors.perturbations import Sizes
from debackdoor.detectors.shortcut import Shortcuts
from evidence_cases import USUAL, evidence
from rnp_cases import quadrant_set, quadrants
from shortcut_cases import CLASSES, row_images, switched_to_the_next


def test_after_a_repair_the_suspects_are_compared_with_a_few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def search(model: object, fit: object, holdout: object, labels: list[int], *, away: int, **_: object) -> Shortcuts:
        asked.append((labels, away))
        return evidence().shortcuts

    monkeypatch.setattr("debackdoor.detectors.examination.find_shortcuts", search)
    examine = Examination(quadrant_set(), quadrant_set(), 4)
    examine(quadrants(), 2)
    examine.again(quadrants(), evidence(patch={3: 0.9}))
    examine.again(quadrants(), evidence(away=0.9))
    assert sorted(asked[0][0]) == [0, 1, 2, 3]
    assert asked[0][0][0] == 2
    assert asked[0][1] > 0
    assert asked[1] == ([3, 0, 1, 2, 4], 0)
    assert asked[2] == ([0, 1, 2, 3, 4], asked[0][1])


@pytest.mark.parametrize(("away", "kept"), [(0.0, False), (2.0, True)])
def test_a_second_search_away_counts_where_it_finds_more(away: float, kept: bool) -> None:
    data = row_images()
    found = evidence(away=away)
    again = Examination(data, data, CLASSES, precision="fp32").once_more(switched_to_the_next(), found)
    assert (again == found) == kept
    assert again.all_to_all
    assert again.shortcuts.rates == found.shortcuts.rates


def test_what_a_second_search_found_is_checked_with_patches_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches that lead anywhere would be halved, but those that lead away were found at full size."""
    asked: list[float] = []

    def search(*_: object, away: int, sizes: Sizes | None, **__: object) -> Shortcuts:
        asked.append((sizes or Sizes()).patch)
        patch = dict.fromkeys(USUAL, 0.95)
        return Shortcuts({"additive": USUAL, "patch": patch, "warp": USUAL}, 0.9 if away else 0.0, 0.2, {}, Sizes())

    monkeypatch.setattr("debackdoor.detectors.examination.find_shortcuts", search)
    examine = Examination(quadrant_set(), quadrant_set(), 4)
    found = examine.once_more(quadrants(), evidence(patch=dict.fromkeys(USUAL, 0.95)))
    assert found.all_to_all
    examine.again(quadrants(), found)
    assert asked == [Sizes().patch] * 2


@pytest.mark.parametrize("easy_until", [1 / 50, 1 / 100, 0.0])
def test_perturbations_that_lead_anywhere_get_smaller(easy_until: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch larger than some size leads to every label, a smaller one to label 2 alone; the other kinds to none."""
    asked: list[tuple[tuple[int, ...], int, Sizes]] = []

    def search(
        model: object, fit: object, holdout: object, labels: list[int], *, away: int, sizes: Sizes | None, **_: object
    ) -> Shortcuts:
        asked.append((tuple(labels), away, sizes or Sizes()))
        patch = dict.fromkeys(USUAL, 0.95) if asked[-1][2].patch > easy_until else {**USUAL, 2: 0.9}
        return Shortcuts({"additive": USUAL, "patch": patch, "warp": USUAL}, 0.1, 0.2, {}, asked[-1][2])

    monkeypatch.setattr("debackdoor.detectors.examination.find_shortcuts", search)
    everywhere = evidence(patch=dict.fromkeys(USUAL, 0.95))
    assert not everywhere.exposed
    examine = Examination(quadrant_set(), quadrant_set(), 4)
    found = examine.once_more(quadrants(), everywhere)
    halvings = {1 / 50: 1, 1 / 100: 1, 0.0: HALVINGS}[easy_until]
    assert [(away > 0, sizes.patch) for _, away, sizes in asked] == [
        (True, 1 / 50), *((False, 1 / 50 / 2**done) for done in range(1, halvings + 1))
    ]  # fmt: skip
    assert found.shortcuts.sizes == Sizes(patch=1 / 50 / 2**halvings)
    assert found.shortcuts.patterns == everywhere.shortcuts.patterns
    assert found.label == (2 if easy_until else None)
    assert found.numbers("before")["patch_size_before"] == 1 / 50 / 2**halvings
    asked.clear()
    examine.again(quadrants(), found)
    assert asked[0][2] == found.shortcuts.sizes
