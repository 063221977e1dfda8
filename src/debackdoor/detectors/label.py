"""Which label the exposed model gives away.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, abstract: as the clean task is forgotten,
what remains is the backdoor, and the answers on clean images pile up on its label. So they do on some label or other
without a backdoor; but then it is another label when the model forgets other images, and takes more steps. Here several
parts of the images are forgotten, each by the scales and shifts of the normalisation layers alone, which leaves the
backdoor's features as they are, and what counts is the share that a label gets every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from debackdoor.data import split_clean
from debackdoor.rnp.unlearn import Unlearned, UnlearnSettings, unlearn
from debackdoor.types import CleanSet, Progress

RUNS, LEFT_OUT = 12, 0.4
"""Unlearnings, and the share of the images that each of them leaves out.

Without a backdoor a label can be the favourite of two unlearnings out of three; few are not enough to tell.
"""

ENOUGH, SURE = 6, 0.8
"""No more unlearnings are needed where a label has had a share like this in each of so many."""


@dataclass(frozen=True)
class PileUp:
    """Where the answers on clean images pile up during unlearning.

    Attributes:
        label: the label with the largest share.
        share: of the answers, a fraction: the label's largest at any check, and of several unlearnings the smallest of
            these, less what the label has of the images beyond an equal part.
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


def unlearn_parts(
    model: nn.Module,
    fit: CleanSet,
    *,
    runs: int = RUNS,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Iterator[Unlearned]:
    """Several unlearnings by the normalisation layers alone, each of another part of the images.

    Args:
        model: with normalisation layers that learn; it is not changed.
        fit: the images that parts are drawn from.
        runs: how many unlearnings.
        seed: of the parts and of the order of the images.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called from inside the unlearnings.
    """
    settings = UnlearnSettings(lr=0.02, norm_only=True)
    for run in range(runs):
        part, _ = split_clean(fit, LEFT_OUT, seed * runs + run)
        yield unlearn(model, part, settings, seed=seed + run, precision=precision, progress=progress)


def repeated_shares(histories: Iterable[Sequence[Mapping[str, Any]]], least: float = 0.0) -> list[float]:
    """For every label the share of the answers that it reaches in each of several unlearnings; K fractions.

    Args:
        histories: one an unlearning, each only asked for when it is needed.
        least: no more are asked for when every label has been below this once, nor when one was far above it in each
            of the first :data:`ENOUGH`.
    """
    smallest: list[float] = []
    for done, history in enumerate(histories, start=1):
        peaks = [peak_share(history, label) for label in range(len(history[0]["label_shares"]))]
        smallest = [min(pair) for pair in zip(smallest or peaks, peaks, strict=True)]
        if max(smallest) < least or (done >= ENOUGH and max(smallest) >= SURE):
            break
    return smallest


def most_repeated(shares: Sequence[float]) -> PileUp:
    """The label with the largest of the shares, one a label; the first of several."""
    label = max(range(len(shares)), key=lambda label: shares[label])
    return PileUp(label, shares[label])


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
