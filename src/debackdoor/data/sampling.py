"""Seeded choices by class: a balanced sample, and the fit / hold-out split."""

from __future__ import annotations

import numpy as np
import torch

from debackdoor.data.source import Indices
from debackdoor.errors import DataError
from debackdoor.types import CleanSet


def balanced_sample(labels: Indices, limit: int | None, seed: int) -> Indices:
    """Indices of a class-balanced random sample, or of everything in order where ``limit`` is None.

    The classes take turns, so each has equally many as far as it can, and every prefix of the result is balanced too:
    with one seed, a smaller sample is the beginning of a larger one.

    Raises:
        DataError: if ``limit`` is not a whole number of at least 1, or ``seed`` not one of at least 0.
    """
    random = _random(seed)
    if limit is None:
        return np.arange(len(labels))
    if not isinstance(limit, int) or limit < 1:
        raise DataError(f"expected a limit of at least 1 image, got {limit!r}; leave it out to take all")
    shuffled = random.permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    return shuffled[np.argsort(turn[shuffled], kind="stable")][:limit]


def split_clean(clean: CleanSet, holdout: float, seed: int = 0) -> tuple[CleanSet, CleanSet]:
    """Splits a clean set into a fit part and a hold-out part, disjoint and together the whole, by class and seeded.

    Args:
        clean: at least two images.
        holdout: the share of each class that is held out, strictly between 0 and 1. A class of two or more samples
            appears in both parts; the classes of a single sample are shared out as if they were one class.
        seed: the same seed gives the same split.

    Returns:
        The fit part and the hold-out part, each in the order of ``clean``.

    Raises:
        DataError: if there are fewer than two images, or ``holdout`` or ``seed`` is out of range.
    """
    if not 0 < holdout < 1:
        raise DataError(f"expected a hold-out share between 0 and 1, got {holdout}; choose for example 0.5")
    if len(clean) < 2:
        raise DataError(f"{clean.source}: expected at least 2 images to split, got {len(clean)}; add clean images")
    _, group, count = np.unique(clean.y.cpu().numpy(), return_inverse=True, return_counts=True)
    group[count[group] == 1] = -1
    rng = _random(seed)
    held = np.zeros(len(clean), dtype=bool)
    for members in (np.flatnonzero(group == value) for value in np.unique(group)):
        share = round(holdout * len(members))
        if len(members) > 1:
            share = min(max(share, 1), len(members) - 1)
            held[rng.permutation(members)[:share]] = True
    fit, hold = (torch.from_numpy(np.flatnonzero(part)) for part in (~held, held))
    return clean.subset(fit), clean.subset(hold)


def _random(seed: int) -> np.random.Generator:
    """Numpy's generator for a seed that it takes."""
    if not isinstance(seed, int) or seed < 0:
        raise DataError(f"expected a seed of at least 0, a whole number, got {seed!r}; choose for example 0")
    return np.random.default_rng(seed)
