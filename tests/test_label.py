"""What the history of an unlearning says about labels."""

from collections.abc import Iterator

import pytest
import torch

from debackdoor.detectors.label import (
    PileUp,
    growth,
    largest_pile_up,
    most_repeated,
    peak_share,
    repeated_shares,
)
from debackdoor.models.forward import label_shares


def test_the_pile_up_is_the_largest_share_at_any_check() -> None:
    rows = [{"label_shares": shares} for shares in ([0.4, 0.3, 0.3], [0.1, 0.2, 0.7], [0.5, 0.5, 0.0])]
    assert largest_pile_up(rows) == PileUp(label=2, share=0.7)
    assert largest_pile_up(rows[2:]) == PileUp(label=0, share=0.5)
    with pytest.raises(ValueError, match="at least one check"):
        largest_pile_up([])


def test_the_peak_share_is_one_labels_largest() -> None:
    rows = [{"label_shares": shares} for shares in ([0.4, 0.6], [0.7, 0.3], [0.5, 0.5])]
    assert (peak_share(rows, 0), peak_share(rows, 1)) == (0.7, 0.6)


def test_growth_is_what_a_label_gains_for_what_accuracy_loses() -> None:
    """Up to its peak label 0 gains 0.5 while accuracy loses 0.5; label 1 gains 0.125 for 0.25; label 2 only loses."""
    rows = [
        {"accuracy": 1.0, "label_shares": [0.25, 0.25, 0.5]},
        {"accuracy": 0.75, "label_shares": [0.25, 0.375, 0.375]},
        {"accuracy": 0.5, "label_shares": [0.75, 0.25, 0.0]},
        {"accuracy": 0.25, "label_shares": [0.5, 0.25, 0.25]},
    ]
    assert [growth(rows, label) for label in range(3)] == [1.0, 0.5, 0.0]


def test_what_repeats_is_the_smallest_of_a_labels_largest_shares() -> None:
    """One unlearning reaches 0.5, 0.7 and 0.3, the other 0.6, 0.2 and 0.3: label 1 has the largest, and only once."""
    histories = [
        [{"label_shares": [0.5, 0.2, 0.3]}, {"label_shares": [0.1, 0.7, 0.2]}],
        [{"label_shares": [0.6, 0.1, 0.3]}, {"label_shares": [0.5, 0.2, 0.3]}, {"label_shares": [0.6, 0.2, 0.2]}],
    ]
    assert repeated_shares(histories) == [0.5, 0.2, 0.3]
    assert repeated_shares(iter(histories[:1])) == [0.5, 0.7, 0.3]
    assert most_repeated([0.5, 0.2, 0.3]) == PileUp(0, 0.5)
    assert most_repeated([0.2, 0.4, 0.4]) == PileUp(1, 0.4)


def test_no_more_unlearnings_are_asked_for_than_it_takes_to_find_no_label() -> None:
    asked = []

    def histories() -> Iterator[list[dict[str, list[float]]]]:
        for run, shares in enumerate(([0.9, 0.1], [0.6, 0.5], [0.3, 0.8], [0.9, 0.9])):
            asked.append(run)
            yield [{"label_shares": shares}]

    assert repeated_shares(histories(), least=0.4) == [0.3, 0.1]
    assert asked == [0, 1, 2]
    assert repeated_shares(histories(), least=0.3) == [0.3, 0.1]
    assert asked[3:] == [0, 1, 2, 3]


def test_answers_that_are_no_numbers_are_of_no_label() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    assert label_shares(logits) == [0.25, 0.25]
