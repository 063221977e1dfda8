"""The searches that evidence comes from: the first look at a model, a closer one, and that after a repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from torch import nn

from debackdoor.detectors.carried import Carried, carried_over
from debackdoor.detectors.evidence import Evidence
from debackdoor.detectors.margin import Margins, largest_margins
from debackdoor.detectors.perturbations import Additive, Sizes
from debackdoor.detectors.shortcut import AWAY_STARTS, Shortcuts, find_shortcuts
from debackdoor.detectors.squares import Squares, find_squares
from debackdoor.fusing import fused
from debackdoor.stages import Keep, anew, of
from debackdoor.types import CleanSet, Progress

LEADS_ANYWHERE, HALVINGS = 0.4, 2
"""Where the median label is reached more often than this, a perturbation is too large to tell one from the others.

Networks of little accuracy answer to anything. Their perturbations get half the size, so many times at most.
"""

MOST_LABELS = 12
"""Shortcuts are searched for towards this many labels at most: those most suspect by other evidence."""

COMPARED = 5
"""Labels that were not suspect, beside which those that were are looked at again."""


@dataclass(frozen=True)
class Examination:
    """The same searches for every model, before and after a repair.

    Attributes:
        fit: images that the searches learn from.
        holdout: images that judge what they find.
        num_classes: how many logits the model has.
        seed: of the searches.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called from inside the searches.
        keep: has the searches of an earlier run, or keeps none.
    """

    fit: CleanSet
    holdout: CleanSet
    num_classes: int
    seed: int = 0
    precision: str = "auto"
    progress: Progress | None = None
    keep: Keep = anew

    def __call__(self, model: nn.Module, first: int) -> Evidence:
        """Margins and squares of all labels, shortcuts to ``first`` and those with the largest margins, and away."""
        here, model = self._on(model)
        margins = here._margins(model)
        by_margin = [int(label) for label in np.argsort(margins.values)[::-1] if label != first]
        shortcuts = here._shortcuts(model, [first, *by_margin][:MOST_LABELS], AWAY_STARTS)
        return Evidence(margins, shortcuts, here._squares(model))

    def once_more(self, model: nn.Module, found: Evidence) -> Evidence:
        """What was found, with a second search for patches away, and with smaller perturbations where they are needed.

        Not every search finds an all-to-all backdoor; this one has no other aims beside it.
        """
        here, model = self._on(model)
        fresh, shortcuts = replace(here, seed=self.seed + 1), found.shortcuts
        more = fresh._shortcuts(model, (), AWAY_STARTS)
        if more.spread > shortcuts.spread:
            shortcuts = replace(shortcuts, away=more.away, gathered=more.gathered)
        found = replace(found, shortcuts=shortcuts)
        if found.exposed:  # by patches of the full size, which the check after a repair is to look for, too
            return found
        for _ in range(HALVINGS):
            large = [kind for kind, rates in shortcuts.rates.items() if median(rates.values()) > LEADS_ANYWHERE]
            if large:
                shortcuts = fresh._smaller(model, shortcuts, large)
        return replace(found, shortcuts=shortcuts)

    def _smaller(self, model: nn.Module, shortcuts: Shortcuts, kinds: Sequence[str]) -> Shortcuts:
        """The shortcuts with half the size for some kinds."""
        sizes = shortcuts.sizes.halved(kinds)
        found = self._shortcuts(model, list(shortcuts.rates[kinds[0]]), 0, sizes)
        rates = {**shortcuts.rates, **{kind: found.rates[kind] for kind in kinds}}
        patterns = found.patterns if Additive.kind in kinds else shortcuts.patterns
        return replace(shortcuts, rates=rates, patterns=patterns, sizes=sizes)

    def again(self, model: nn.Module, before: Evidence) -> Evidence:
        """The same for a repaired model from a new start, with shortcuts to the suspects and a few labels beside."""
        here, model = self._on(model)
        suspects = list(before.reasons)
        others = [label for label in before.shortcuts.rates["patch"] if label not in suspects][:COMPARED]
        away = AWAY_STARTS if before.all_to_all else 0
        fresh = replace(here, seed=self.seed + 1)
        shortcuts = fresh._shortcuts(model, [*suspects, *others], away, before.shortcuts.sizes)
        return Evidence(fresh._margins(model), shortcuts, fresh._squares(model))

    def carried(self, suspect: nn.Module, model: nn.Module, before: Evidence) -> tuple[Carried, ...]:
        """What leads the suspect model to the labels that were suspect, or away, tried on the repaired one."""
        labels, seed = list(before.reasons)[:MOST_LABELS], self.seed + 1
        looked_for: dict[str, Any] = {"away": before.all_to_all, "sizes": before.shortcuts.sizes}

        def make() -> tuple[Carried, ...]:
            on, to = (fused(network, self.fit.x[:2]) for network in (suspect, model))
            usual = {**self._usual, **looked_for, "seed": seed}
            return carried_over(on, to, self.fit, self.holdout, labels, **usual)

        return self.keep("carried", make, suspect, model, labels, seed, looked_for)

    def _on(self, model: nn.Module) -> tuple[Examination, nn.Module]:
        """The searches as those on this model, and what they are to search on in its place."""
        return replace(self, keep=of(self.keep, model)), fused(model, self.fit.x[:2])

    def _margins(self, model: nn.Module) -> Margins:
        search = partial(largest_margins, model, self.fit.x, self.num_classes, **self._usual)
        return self.keep("margins", search, self.seed)

    def _shortcuts(self, model: nn.Module, labels: Sequence[int], away: int, sizes: Sizes | None = None) -> Shortcuts:
        search = partial(find_shortcuts, model, self.fit, self.holdout, labels, away=away, sizes=sizes, **self._usual)
        return self.keep("shortcuts", search, self.seed, labels, away, sizes)

    def _squares(self, model: nn.Module) -> Squares:
        search = partial(find_squares, model, self.fit, self.holdout, self.num_classes, **self._usual)
        return self.keep("squares", search, self.seed)

    @property
    def _usual(self) -> dict[str, Any]:
        return {"seed": self.seed, "precision": self.precision, "progress": self.progress}
