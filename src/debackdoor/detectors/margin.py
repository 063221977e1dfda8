"""Whether the model can be made far surer of one label than of any other.

Wang et al., "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern Types Using a Maximum
Margin Statistic", IEEE S&P 2024, section 4: a backdoor's target is learnt from many triggers that all look alike, so
its largest margin stands out, whatever the trigger is. The search needs no images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from debackdoor.errors import check_count, check_positive
from debackdoor.models.forward import logits_of, margins_of
from debackdoor.runtime import at_most, autocast, generator
from debackdoor.types import Progress

FEWEST_CLASSES = 5
"""Below this there are too few other labels to tell what is usual; the p-value is 1."""


@dataclass(frozen=True)
class MarginSettings:
    """Hyper-parameters of the search.

    Attributes:
        steps: of Adam on the pixels.
        lr: its step size, in pixel values of [0, 1].
        starts: random images a label; fewer where ``batch_size`` does not hold that many, at least one.
        batch_size: images that go through the model at once.
    """

    steps: int = 60
    lr: float = 0.1
    starts: int = 4
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_count(steps=self.steps, starts=self.starts, batch_size=self.batch_size)
        check_positive(lr=self.lr)


@dataclass(frozen=True)
class Margins:
    """The largest margin found for every label.

    Attributes:
        values: logit of the label minus the largest other, at its largest, one a label.
        label: where it is largest.
        ratio: the largest, as a multiple of the others' median.
        p_value: how probable so large a maximum is if all labels follow the gamma distribution of the others, [0, 1];
            taken as known, as in the paper, though it is fitted to few numbers: so it comes out too small.
    """

    values: tuple[float, ...]
    label: int
    ratio: float
    p_value: float


def largest_margins(
    model: nn.Module,
    example: Tensor,
    num_classes: int,
    settings: MarginSettings | None = None,
    *,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Margins:
    """Climbs, for every label, from random images in [0, 1] to the largest margin in that label's favour.

    Args:
        model: in eval mode; it gets no gradients.
        example: an image batch (N, C, H, W) on the model's device; only shape and device count.
        num_classes: how many logits the model has.
        settings: of the search.
        seed: of the random images.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called after every batch of random images.
    """
    s, random = settings or MarginSettings(), generator(seed)
    starts = max(1, min(s.starts, s.batch_size // num_classes))
    labels = torch.arange(num_classes).repeat_interleave(starts)
    found = []
    for part in labels.split(at_most(s.batch_size)):
        x = torch.rand(len(part), *example.shape[1:], generator=random).to(example.device)
        found.append(_climb(model, x, part.to(example.device), s, precision))
        if progress is not None:
            progress("search margins", sum(map(len, found)), len(labels), {"margin": float(found[-1].max())})
    return summarise(torch.cat(found).view(num_classes, starts).amax(1).tolist())


def summarise(values: list[float]) -> Margins:
    """What the largest margins, one a label, say together."""
    label = int(np.argmax(values))
    others = np.delete(values, label)
    ratio = values[label] / max(float(np.median(others)), 1e-6)
    if len(values) < FEWEST_CLASSES:
        return Margins(tuple(values), label, ratio, 1.0)
    # The gamma distribution knows positive numbers only; a label that never leads has a margin of almost nothing.
    others = np.maximum(others, 1e-6)
    if np.ptp(others) < 1e-6 * others.mean():  # a distribution without width cannot be fitted
        return Margins(tuple(values), label, ratio, float(values[label] <= others.mean() * (1 + 1e-6)))
    shape, _, scale = stats.gamma.fit(others, floc=0)
    below = stats.gamma.logcdf(max(values[label], 1e-6), shape, scale=scale)
    return Margins(tuple(values), label, ratio, float(-math.expm1(len(values) * below)))


def _climb(model: nn.Module, start: Tensor, labels: Tensor, settings: MarginSettings, precision: str) -> Tensor:
    """The largest margin (N,) on the way up from each image of ``start``."""
    x = start.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=settings.lr)
    best = torch.full((len(x),), -math.inf, device=x.device)
    for _ in range(settings.steps):
        with autocast(x.device, precision):
            logits = logits_of(model(x.clone())).float()  # the model may work in place
        margin = margins_of(logits, labels)
        # Not maximum, for which a margin that overflows in half precision would outdo all others.
        best = torch.fmax(best, margin.detach())
        (x.grad,) = torch.autograd.grad(-margin.sum(), x)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return best.nan_to_num(nan=0.0, neginf=0.0)
