"""Whether a small universal perturbation leads to one label, or away from all, far more often than is usual.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019, section
IV: a backdoor is a shortcut to its label. Here the size of the perturbation is fixed and its success compared, for
patches, additive patterns and warps; a patch that leads away from the true labels finds all-to-all backdoors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from torch import Tensor, nn

from debackdoor.detectors.perturbations import KINDS, Additive, Sizes
from debackdoor.detectors.universal import AWAY, UniversalSearch, aims_at, patches_away
from debackdoor.models.forward import accuracy, predict
from debackdoor.types import CleanSet, Progress

STEPS, IMAGES = 60, 4
"""Steps of the search, and images a perturbation in each of them."""

AWAY_STARTS = 8
"""Patches that lead away start several times: not every start finds an all-to-all backdoor."""


@dataclass(frozen=True)
class Shortcuts:
    """How often the perturbations that were found work on hold-out images.

    Attributes:
        rates: by kind and label: the share of images of other labels that the perturbation sends there.
        away: how far accuracy falls under the best patch that leads away, of all images: at most the accuracy. None
            where no such patch was searched for.
        gathered: the largest share of that patch's answers on one label, or None.
        patterns: by label: the additive pattern, float32 (C, H, W) on the CPU.
        sizes: of the perturbations.
    """

    rates: Mapping[str, Mapping[int, float]]
    away: float | None
    gathered: float | None
    patterns: Mapping[int, Tensor] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)

    @property
    def spread(self) -> float:
        """How much more often a patch leads away than its answers gather: large for all-to-all backdoors alone."""
        return 0.0 if self.away is None or self.gathered is None else self.away - self.gathered


def lead(rates: Mapping[int, float], label: int) -> float:
    """How far the label's rate is above the other labels' median."""
    others = [rate for other, rate in rates.items() if other != label]
    return rates.get(label, 0.0) - median(others or [0.0])


def find_shortcuts(
    model: nn.Module,
    fit: CleanSet,
    holdout: CleanSet,
    labels: Sequence[int],
    *,
    away: int = AWAY_STARTS,
    sizes: Sizes | None = None,
    steps: int = STEPS,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Shortcuts:
    """One perturbation of every kind towards each of ``labels`` and several patches towards none, learned on ``fit``.

    Args:
        model: in eval mode; it gets no gradients.
        fit: images that the search learns from.
        holdout: images that judge what it finds.
        labels: which; the other labels' rates tell what is usual, so a dozen is better than two.
        away: how many patches may lead anywhere; 0 looks for none.
        sizes: of the perturbations; by default the usual ones.
        steps: of the search.
        seed: of the search.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called after every few steps.
    """
    sizes = sizes or Sizes()
    search = UniversalSearch([*aims_at(labels), *patches_away(away)], fit.x, sizes, seed)
    search.run(model, fit, steps, IMAGES, precision=precision, progress=progress)
    rates: dict[str, dict[int, float]] = {kind.kind: {} for kind in KINDS}
    patterns: dict[int, Tensor] = {}
    away_and_gathered: list[tuple[float, float]] = []
    right = accuracy(predict(model, holdout.x, precision=precision), holdout.y)
    for number, aim in enumerate(search.aims):
        if aim.target == AWAY:
            answers = search.answers(model, holdout.x, number, precision=precision)
            fall = right - float((answers == holdout.y).float().mean())
            away_and_gathered.append((fall, float(answers.bincount().max()) / len(answers)))
        else:
            rates[aim.kind.kind][aim.target] = search.success(model, holdout, number, precision=precision)
            if aim.kind is Additive:
                patterns[aim.target] = search.pattern(number).cpu()
    most, gathered = max(away_and_gathered, key=lambda found: found[0] - found[1], default=(None, None))
    return Shortcuts(rates, most, gathered, patterns, sizes)
