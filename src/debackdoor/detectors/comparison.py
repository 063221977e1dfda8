"""Whether one label is easier to reach by a small trigger than others are.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019, section
IV: a backdoor is a shortcut, so the trigger that leads to its label is abnormally small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from torch import nn

from debackdoor.detectors.trigger import SearchSettings, search_triggers
from debackdoor.types import CleanSet, Progress


@dataclass(frozen=True)
class TriggerSizes:
    """The smallest trigger found towards one label, beside those towards others.

    Attributes:
        pixels: L1 norm of the label's trigger, in pixels.
        success_rate: share of hold-out images of other labels that it sends to the label.
        other_pixels: median L1 norm of the other labels' triggers, in pixels.
    """

    pixels: float
    success_rate: float
    other_pixels: float

    @property
    def ease(self) -> float:
        """How many times smaller the label's trigger is than the others' median; about 1 where no label stands out."""
        return self.other_pixels / max(self.pixels, 1e-3)


@dataclass(frozen=True)
class TriggerComparison:
    """Searches a model for small triggers to ``label`` and to a few other labels; the same search for every model.

    Attributes:
        label: the suspect.
        fit: images that the search learns from.
        holdout: images that judge what it finds.
        seed: of the search.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called from inside the search.
        others: how many other labels.
    """

    label: int
    fit: CleanSet
    holdout: CleanSet
    seed: int = 0
    precision: str = "auto"
    progress: Progress | None = None
    others: int = 3

    def __call__(self, model: nn.Module) -> TriggerSizes:
        rest = [label for label in self.fit.y.unique().tolist() if label != self.label]
        labels = [self.label, *rest[:: math.ceil(len(rest) / self.others)]]
        found, *others = search_triggers(
            model,
            self.fit,
            self.holdout,
            labels,
            SearchSettings(),
            seed=self.seed,
            precision=self.precision,
            progress=self.progress,
        )
        return TriggerSizes(found.l1, found.success_rate, median(trigger.l1 for trigger in others))
