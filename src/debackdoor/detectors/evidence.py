"""All that speaks for a backdoor, taken together: which labels are suspect, and whether they still are later."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from debackdoor.detectors.carried import Carried
from debackdoor.detectors.label import PileUp
from debackdoor.detectors.margin import Margins
from debackdoor.detectors.perturbations import KINDS
from debackdoor.detectors.shortcut import Shortcuts, lead
from debackdoor.detectors.squares import Square, Squares
from debackdoor.detectors.universal import Aim, aims_at, patches_away

RARE, FAIRLY_RARE = 1e-9, 0.05
"""A largest margin that is no more probable than this without a backdoor counts, alone or with a faint pile-up.

The probability is read off a distribution that a handful of labels gave, and small networks without a backdoor can
come far below 0.001. Drawn from one distribution, the largest of five margins is that rare once in 25 cases.
"""

OUTSTANDING = 2.5
"""So a margin that counts alone is at least so many times the other labels' median, too."""

PILED_UP, FAINT = 0.3, 0.25
"""How far above chance (1 / K) the share of answers on one label must be to count, alone or with a fairly rare margin.

That two faint signs name the same label by chance is one in K.
"""

STANDS_OUT = 0.5
"""A perturbation whose success is this far above what is usual counts."""

SQUARE_STANDS_OUT = 0.8
"""The same for a plain square, which is larger: without a backdoor one was found 0.63 above."""

SQUARE = "square"

WHOLE_MODEL = ("pile-up", "margin")
"""Signs that show no trigger."""

SIGNS = (*WHOLE_MODEL, *(kind.kind for kind in KINDS), SQUARE)
"""All that can speak against a label."""

BACKDOORED, SUSPICIOUS = 1.0, 0.85
"""The strongest sign, as a multiple of its threshold, from which on a model is called so."""

TRIGGERS = 8
"""At least this many perturbations stand in for the trigger when it is unlearned."""


@dataclass(frozen=True)
class Evidence:
    """What the searches on one model find.

    Attributes:
        margins: the largest margin of every label.
        shortcuts: what small universal perturbations do.
        squares: what plain squares do.
        pile_up: where answers piled up in every unlearning; None where that tells nothing: with fewer than five
            classes any label gets many answers; only batch normalisation holds activations in place while the clean
            task is forgotten (the answers of a plain VGG gathered on a label that was no backdoor's); and a shallow
            network has one way to forget, whatever it forgets.
        carried: after a repair, what was found on the suspect model and tried on this one.
    """

    margins: Margins
    shortcuts: Shortcuts
    squares: Squares
    pile_up: PileUp | None = None
    carried: tuple[Carried, ...] = ()

    @property
    def rates(self) -> Mapping[str, Mapping[int, float]]:
        """By kind and label: the share of images of other labels that a perturbation of that kind sends there."""
        return {**self.shortcuts.rates, SQUARE: self.squares.rates}

    @property
    def strengths(self) -> Mapping[int, Mapping[str, float]]:
        """What speaks against every label: each sign as a multiple of its threshold, at least 1 where it counts."""
        found: dict[int, dict[str, float]] = defaultdict(dict)
        rarity = abs(math.log(max(self.margins.p_value, sys.float_info.min)))
        alone = rarity / -math.log(RARE)
        if self.margins.ratio < OUTSTANDING:
            alone = min(alone, self.margins.ratio / OUTSTANDING)
        found[self.margins.label]["margin"] = alone
        if self.pile_up is not None:
            above = self.pile_up.share - 1 / len(self.margins.values)
            found[self.pile_up.label]["pile-up"] = above / PILED_UP
            if self.pile_up.label == self.margins.label:
                together = min(above / FAINT, rarity / -math.log(FAIRLY_RARE))
                signs = found[self.margins.label]
                # Together they count only where both are there; below that each speaks for itself.
                signs.update({name: max(value, together) for name, value in signs.items()} if together >= 1 else {})
        for kind, rates in self.rates.items():
            for label in rates:
                found[label][kind] = lead(rates, label) / threshold(kind)
        return found

    @property
    def reasons(self) -> Mapping[int, tuple[str, ...]]:
        """The suspect labels and what speaks against each, the most suspect first."""
        counts = {
            label: tuple(name for name in SIGNS if signs.get(name, 0) >= 1) for label, signs in self.strengths.items()
        }
        found = {label: names for label, names in counts.items() if names}
        order = sorted(found, key=lambda label: (-len(found[label]), -self._lead(label), label))
        return {label: found[label] for label in order}

    @property
    def score(self) -> float:
        """The strongest sign as a multiple of its threshold: at least 1 where one counts."""
        return max(self.shortcuts.spread / STANDS_OUT, *(max(signs.values()) for signs in self.strengths.values()))

    @property
    def nearest(self) -> int | None:
        """The label that the strongest sign speaks against, whether that counts or not; None where it leads to many."""
        strengths = {label: max(signs.values()) for label, signs in self.strengths.items()}
        label = max(strengths, key=lambda label: strengths[label])
        return label if strengths[label] >= self.shortcuts.spread / STANDS_OUT else None

    def _lead(self, label: int) -> float:
        return sum(lead(rates, label) for rates in self.rates.values())

    @property
    def all_to_all(self) -> bool:
        """Whether a patch leads away from all labels, to no label of its own."""
        return self.shortcuts.spread >= STANDS_OUT

    @property
    def disagree(self) -> bool:
        """Whether the model-wide signs name different labels, and no trigger leads to any of them, or to many."""
        wide = [label for label, names in self.reasons.items() if set(WHOLE_MODEL) & set(names)]
        backed = [label for label, names in self.reasons.items() if len(names) > 1 or not set(WHOLE_MODEL) & set(names)]
        return len(wide) > 1 and not backed and not self.all_to_all

    @property
    def exposed(self) -> bool:
        """Whether a backdoor is: something counts, and the signs do not disagree."""
        return (self.all_to_all or bool(self.reasons)) and not self.disagree

    @property
    def label(self) -> int | None:
        """The most suspect label; None where there is none, or many (all-to-all)."""
        return None if self.all_to_all else next(iter(self.reasons), None)

    @property
    def aims(self) -> list[Aim]:
        """The triggers that it would take to unlearn what was found."""
        labels = list(self.reasons)
        aims = aims_at(labels, math.ceil(TRIGGERS / (len(KINDS) * max(1, len(labels)))))
        return [*aims, *patches_away(TRIGGERS if self.all_to_all else 0)]

    @property
    def unseen(self) -> list[int]:
        """The suspect labels to which no perturbation or square leads: their trigger may be of another kind."""
        return [label for label, names in self.reasons.items() if set(names) <= set(WHOLE_MODEL)]

    @property
    def stamps(self) -> list[Square]:
        """The squares that it would take to unlearn what was found."""
        return [self.squares.best[label] for label, names in self.reasons.items() if SQUARE in names]

    def numbers(self, when: str) -> dict[str, float]:
        """For a record: margins, and for every kind the most suspect label's success and what is usual."""
        numbers: dict[str, float] = {
            f"margin_label_{when}": self.margins.label,
            f"margin_ratio_{when}": self.margins.ratio,
            f"margin_p_value_{when}": self.margins.p_value,
        }
        if self.shortcuts.away is not None and self.shortcuts.gathered is not None:
            numbers |= {f"away_{when}": self.shortcuts.away, f"gathered_{when}": self.shortcuts.gathered}
        if self.pile_up is not None:
            numbers |= {f"pile_up_label_{when}": self.pile_up.label, f"pile_up_share_{when}": self.pile_up.share}
        for kind, rates in self.rates.items():
            best = max(rates, key=lambda label: rates[label])
            numbers[f"{kind}_label_{when}"] = best
            numbers[f"{kind}_success_{when}"] = rates[best]
            numbers[f"{kind}_lead_{when}"] = lead(rates, best)
        if self.carried:
            most = self.carried[0]
            numbers |= {"carried_before": most.before, "carried_after": most.after}
            numbers |= {} if most.label is None else {"carried_label": most.label}
        numbers |= {f"{kind}_size_{when}": size for kind, size in vars(self.shortcuts.sizes).items()}
        return numbers


def threshold(kind: str) -> float:
    """How far above what is usual the success of a perturbation of this kind must be to count."""
    return SQUARE_STANDS_OUT if kind == SQUARE else STANDS_OUT


def remains(before: Evidence, after: Evidence) -> list[int]:
    """The labels suspect before that still are, or to which what led there before still does."""
    led = {carried.label for carried in after.carried if carried.left}
    return [label for label in before.reasons if label in after.reasons or label in led]
