"""Which label the exposed model gives away.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, abstract: as the clean task is forgotten,
what remains is the backdoor, and the answers on clean images pile up on its label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PileUp:
    """Where the answers on clean images pile up during unlearning.

    Attributes:
        label: the label with the largest share of answers at any check.
        share: that share, a fraction; 1 / K where the answers stay evenly spread.
    """

    label: int
    share: float


def largest_pile_up(history: Sequence[Mapping[str, Any]]) -> PileUp:
    """The label on which the answers pile up most, over all checks of an unlearning.

    Args:
        history: rows of :class:`~debackdoor.rnp.unlearn.Unlearned`, each with ``label_shares``.

    Raises:
        ValueError: if the history is empty.
    """
    if not history:
        raise ValueError("expected at least one check in the history of unlearning, got none")
    share, label = max((share, -label) for row in history for label, share in enumerate(row["label_shares"]))
    return PileUp(-label, share)


def peak_share(history: Sequence[Mapping[str, Any]], label: int) -> float:
    """The largest share of answers that the label gets at any check."""
    return max(float(row["label_shares"][label]) for row in history)


def growth(history: Sequence[Mapping[str, Any]], label: int) -> float:
    """How much of the answers the label gains up to its peak, for each part of the accuracy that is lost by then.

    1 means that every answer that turned wrong went to the label; an even spread gives 1 / (K - 1) or less.
    """
    peak = max(history, key=lambda row: row["label_shares"][label])
    first = history[0]
    lost = float(first["accuracy"] - peak["accuracy"])
    return float(peak["label_shares"][label] - first["label_shares"][label]) / lost if lost > 0 else 0.0
