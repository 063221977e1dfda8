"""Neural Cleanse: the label whose smallest trigger is far smaller than the others'.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019, section
IV. A baseline: the published costs and step sizes, fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import median_abs_deviation
from torch import nn

from debackdoor.detectors.trigger import SearchSettings, search_triggers
from debackdoor.types import CleanSet, Progress, RecoveredTrigger

OUTLYING = 2.0
"""An anomaly index above this counts, as published."""


def published(steps: int = 200) -> SearchSettings:
    """The published search: the cost doubles after five steps at 99 % success, and falls by 2 ** 1.5 after five below.

    Args:
        steps: published are up to 31,000, with an early stop.
    """
    return SearchSettings(steps=steps, cost=1e-3, patience=5, raise_by=2.0, lower_by=2**1.5, success=0.99)


@dataclass(frozen=True)
class Anomalies:
    """The smallest triggers towards all labels, and how far each is below what is usual.

    Attributes:
        triggers: one a label.
        indices: how many consistent median absolute deviations the trigger's L1 norm is below the median; negative
            above it, 0 where more than half are alike.
        label: the label with the largest index.
    """

    triggers: tuple[RecoveredTrigger, ...]
    indices: tuple[float, ...]
    label: int

    @property
    def index(self) -> float:
        """The largest; above :data:`OUTLYING` the label counts as a backdoor's."""
        return self.indices[self.label]


def neural_cleanse(
    model: nn.Module,
    fit: CleanSet,
    holdout: CleanSet,
    num_classes: int,
    settings: SearchSettings | None = None,
    *,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Anomalies:
    """Searches the smallest trigger towards every label and compares their sizes.

    Args:
        model: in eval mode; it gets no gradients.
        fit: images that the search learns from.
        holdout: images that judge the triggers' success.
        num_classes: how many labels there are.
        settings: of the search; by default the published ones.
        seed: of the search.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called after every few steps.
    """
    triggers = search_triggers(
        model,
        fit,
        holdout,
        range(num_classes),
        settings or published(),
        seed=seed,
        precision=precision,
        progress=progress,
    )
    indices = anomaly_indices([trigger.l1 for trigger in triggers])
    return Anomalies(tuple(triggers), tuple(indices), int(np.argmax(indices)))


def anomaly_indices(sizes: Sequence[float]) -> list[float]:
    """How many median absolute deviations, scaled to a normal distribution's, each size is below the median."""
    deviation = float(median_abs_deviation(sizes, scale="normal"))
    middle = float(np.median(sizes))
    return [(middle - size) / deviation if deviation > 0 else 0.0 for size in sizes]
