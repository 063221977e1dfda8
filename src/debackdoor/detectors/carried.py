"""Whether perturbations that lead the suspect model to a label lead the repaired one there, too.

A fresh search on a repaired model may find nothing where the trigger still works. On the suspect model, where the
backdoor is whole, it is easier to find, so it is searched for there, and then tried on the repaired one (Wang et al.,
"Neural Cleanse", IEEE S&P 2019, section VI, measure the reversed trigger's success after a mitigation, beside the
attacker's own).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from debackdoor.detectors.perturbations import Sizes
from debackdoor.detectors.shortcut import AWAY_STARTS
from debackdoor.detectors.universal import AWAY, UniversalSearch, aims_at, patches_away
from debackdoor.models.forward import predict, share_led
from debackdoor.types import CleanSet, Progress

STEPS, IMAGES, STARTS = 150, 4, 3
"""Steps of the search, images a perturbation in each of them, and perturbations of each kind towards a label alone.

Longer than a search that compares labels: in so many steps almost every start finds the way to a backdoor's label.
"""

WORKS = 0.5
"""What has this success on the suspect model is tried on the repaired one."""

LEFT = 0.25
"""A success on the repaired model from which on the backdoor is still there.

After whole repairs of four models of the zoo it was 0.17 at most, after repairs that lacked a part 0.40 at least; of
others ``docs/results.md`` tells.
"""


@dataclass(frozen=True)
class Carried:
    """A perturbation found on the suspect model and what it does.

    Attributes:
        kind: ``additive``, ``patch`` or ``warp``.
        label: that it leads to; None where it leads away from all.
        before: on the suspect model, how much larger the share of images of other labels is that get the label with it
            than without, of the hold-out part; where it leads away, how far accuracy falls.
        after: the same on the repaired model.
    """

    kind: str
    label: int | None
    before: float
    after: float

    @property
    def left(self) -> bool:
        """Whether it still works."""
        return self.after >= LEFT


def carried_over(
    suspect: nn.Module,
    repaired: nn.Module,
    fit: CleanSet,
    holdout: CleanSet,
    labels: Sequence[int],
    *,
    away: bool = False,
    sizes: Sizes | None = None,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> tuple[Carried, ...]:
    """The perturbations that work on the suspect model, those that work best on the repaired one first.

    Args:
        suspect: in eval mode; it gets no gradients.
        repaired: made from it, in eval mode.
        fit: images that the search learns from.
        holdout: images that judge what it finds.
        labels: to search for, of those that were suspect.
        away: whether to search for patches that lead away, too.
        sizes: of the perturbations; by default the usual ones.
        seed: of the search.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called after every few steps.
    """
    aims = [*aims_at(labels, max(1, STARTS // max(1, len(labels)))), *patches_away(AWAY_STARTS if away else 0)]
    search = UniversalSearch(aims, fit.x, sizes or Sizes(), seed)
    search.run(suspect, fit, STEPS, IMAGES, precision=precision, progress=progress)
    found = []
    for number, aim in enumerate(search.aims):
        before, after = (_gain(search, model, holdout, number, precision) for model in (suspect, repaired))
        if before >= WORKS:
            found.append(Carried(aim.kind.kind, None if aim.target == AWAY else aim.target, before, after))
    return tuple(sorted(found, key=lambda carried: -carried.after))


def _gain(search: UniversalSearch, model: nn.Module, holdout: CleanSet, number: int, precision: str) -> float:
    """A perturbation's success beyond what there is without it: a model of little accuracy errs to any label."""
    success, target = search.success(model, holdout, number, precision=precision), search.aims[number].target
    if target == AWAY:
        return success
    return success - share_led(holdout, target, lambda x: predict(model, x, precision=precision).argmax(1))
