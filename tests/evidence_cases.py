"""Evidence made by hand."""

from __future__ import annotations

import torch

from debackdoor.detectors.evidence import SQUARE, Evidence
from debackdoor.detectors.label import PileUp
from debackdoor.detectors.margin import Margins
from debackdoor.detectors.perturbations import KINDS
from debackdoor.detectors.shortcut import Shortcuts
from debackdoor.detectors.squares import Square, Squares

USUAL = dict.fromkeys(range(5), 0.1)


def evidence(
    margin: tuple[int, float, float] = (1, 1.3, 0.5),
    away: float | None = 0.1,
    pile_up: PileUp | None = None,
    **stands_out: dict[int, float],
) -> Evidence:
    """Nothing suspect but what is named: a margin's label, ratio and p-value, and success rates by kind and label.

    An ``away`` of None stands for no search.
    """
    rates = {kind.kind: USUAL | stands_out.get(kind.kind, {}) for kind in KINDS}
    patterns = {label: torch.zeros(1, 7, 7) for label in USUAL}
    squares = Squares(USUAL | stands_out.get(SQUARE, {}), {label: Square(0, label, 3, (0.0,)) for label in USUAL})
    shortcuts = Shortcuts(rates, away, None if away is None else 0.2, patterns)
    return Evidence(Margins((1.0,) * 5, *margin), shortcuts, squares, pile_up)
