"""Adversarial Neuron Pruning.

Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021,
https://arxiv.org/abs/2110.14430: backdoored models are sensitive to perturbations of their neurons, so masks are
learned that keep the clean task right under the worst of them; what they give up is pruned. As in the authors' code,
the noise starts at random in every step and the ascent from there is not projected: it reaches up to twice ``eps``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.channels import MaskableLayer, count_channels, find_channels, masked_call, norms_or_all
from debackdoor.data import split_clean
from debackdoor.data.augment import random_shift_by
from debackdoor.defenses.base import Defense, suspect_copy
from debackdoor.defenses.levels import BUDGET, HOLDOUT, below_levels, blind_rule, cost, pruned_result, strongest
from debackdoor.errors import DebackdoorError, check_between, check_count, check_fraction, check_positive
from debackdoor.models.copying import copied
from debackdoor.models.forward import hits
from debackdoor.models.layout import to_faster_layout
from debackdoor.rnp.modes import normalisation_in_train_mode
from debackdoor.rnp.prune import rank
from debackdoor.runtime import autocast, generator, sent
from debackdoor.types import CleanSet, Progress, RepairResult, Step

THRESHOLDS = tuple(i / 20 for i in range(19))
"""The paper's levels: masks of at most 0, 0.05, ..., 0.9."""
_REPORT_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class ANP(Defense):
    """Prunes channels whose masks fall while the network is trained to bear perturbed scales and shifts.

    Masks and noise lie on normalisation layers alone where there are any, else on all maskable layers. Noise is
    relative to a channel's scale and to its shift (weight and bias); masks lie on the scale alone, and so a pruned
    channel keeps its shift, also in a layer without a norm.

    Attributes:
        alpha: weight of the error without noise; the error under noise has the rest.
        eps: half width of the noise's start, and length of its ascent, relative to the parameters.
        ascents: sign steps that share that length.
        lr: step size of SGD on the masks.
        momentum: of SGD.
        iterations: steps of the masks.
        batch_size: images a step, drawn with replacement.
        shift: largest random shift, a fraction of the image's height and width.
        threshold: where given, every channel whose mask is at most this is pruned (the paper's 0.2); None takes the
            strongest of its levels within the budget.
        budget: how far accuracy on the hold-out part may fall, a fraction.
        holdout: share of the clean set that judges and is not learned from, strictly between 0 and 1; with a
            ``threshold`` there is nothing to choose, and all images teach.

    Example:
        >>> result = ANP(iterations=500)(model, clean)  # doctest: +SKIP
    """

    name: ClassVar[str] = "anp"

    alpha: float = 0.2
    eps: float = 0.4
    ascents: int = 1
    lr: float = 0.2
    momentum: float = 0.9
    iterations: int = 2000
    batch_size: int = 128
    shift: float = 0.125
    threshold: float | None = None
    budget: float = BUDGET
    holdout: float = HOLDOUT

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_count(iterations=self.iterations, batch_size=self.batch_size, ascents=self.ascents)
        check_fraction(alpha=self.alpha, momentum=self.momentum, shift=self.shift)
        check_fraction(threshold=self.threshold, budget=self.budget)
        check_between(holdout=self.holdout)
        if not 0 <= self.eps < float("inf"):
            raise DebackdoorError(f"expected eps of at least 0, got {self.eps}; the paper takes 0.4")

    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        model = suspect_copy(model, clean, self.precision)
        fixed = self.threshold is not None
        fit, holdout = (clean, clean) if fixed else split_clean(clean, self.holdout, self.seed)
        layers, _ = scales_and_shifts(norms_or_all(find_channels(model, fit.x[:2])), model)
        mask, history = self.learn(model, layers, fit, progress=progress)
        levels = below_levels(
            rank(layers, mask, ties=mask), THRESHOLDS if self.threshold is None else (self.threshold,)
        )
        measure = cost(model, layers, holdout, self.precision)
        choice = strongest(levels, measure, 1.0 if fixed else self.budget, progress=progress)
        rule = f"masks of at most {self.threshold}" if fixed else blind_rule(self.budget)
        scoring = Step("mask", f"{self.iterations} steps under adversarial noise", {"channels": float(len(mask))})
        return pruned_result(model, layers, choice, scoring, rule, {"mask": history})

    def learn(
        self,
        model: nn.Module,
        layers: Sequence[MaskableLayer],
        fit: CleanSet,
        *,
        progress: Progress | None = None,
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """The masks (channels,) in [0, 1], and a row every 50 steps: loss with and without noise, accuracy without.

        Batch normalisation uses batch statistics, dropout is off. The model is not changed.
        """
        game = _Game(model, layers, fit, self)
        history: list[dict[str, Any]] = []
        for step in range(1, self.iterations + 1):
            found = game.step()
            if step % _REPORT_EVERY == 0 or step == self.iterations:
                numbers = {name: value.item() for name, value in found.items()}
                history.append({"step": step, **numbers})
                if progress is not None:
                    progress("mask", step, self.iterations, numbers)
        return game.mask.detach().clone(), history


class _Game:
    """Masks against noise, one step of each at a time. No weight gets a gradient."""

    def __init__(self, model: nn.Module, layers: Sequence[MaskableLayer], fit: CleanSet, settings: ANP) -> None:
        self.model, self.fit, self.settings = copied(model), fit, settings
        to_faster_layout(self.model, fit.x[:2], settings.precision)
        normalisation_in_train_mode(self.model)
        self.parameters = {name: value.detach() for name, value in self.model.named_parameters()}
        # Statistics that norms update while they use those of the batch: they are read by nobody.
        self.buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        self.layers = sum(scales_and_shifts(layers, model), ())
        self.mask = torch.ones(count_channels(layers), device=fit.x.device, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.mask], lr=settings.lr, momentum=settings.momentum)
        self.random = generator(settings.seed)

    def step(self) -> dict[str, Tensor]:
        """One step of the masks against noise that was made for them."""
        s, fit = self.settings, self.fit
        index = sent(torch.randint(len(fit), (s.batch_size,), generator=self.random), fit.x.device)
        x, y = random_shift_by(fit.x[index], s.shift, self.random), fit.y[index]
        noise = self._noise(x, y)
        under_noise, slope, _ = self._loss(self._factors() + noise, self.mask, x, y)
        without, gradient, right = self._loss(self._factors(), self.mask, x, y)
        self.mask.grad = s.alpha * gradient + (1 - s.alpha) * slope
        self.optimizer.step()
        with torch.no_grad():
            self.mask.clamp_(0, 1)
        return {"loss": without, "loss_under_noise": under_noise, "accuracy": right}

    def _factors(self) -> Tensor:
        """What scales and then shifts are multiplied by, without noise; differentiable in the mask."""
        return torch.cat([self.mask, torch.ones_like(self.mask)])

    def _noise(self, x: Tensor, y: Tensor) -> Tensor:
        """Noise on scales and shifts that raises the error, found from a random start."""
        s, start = self.settings, self._factors().detach()
        noise = sent(s.eps * (2 * torch.rand(len(start), generator=self.random) - 1), start.device)
        for _ in range(s.ascents if s.eps > 0 else 0):
            point = (start + noise).requires_grad_(True)
            _, slope, _ = self._loss(point, point, x, y)
            noise = noise + s.eps / s.ascents * slope.sign()
        return noise

    def _loss(self, factors: Tensor, leaf: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy with scales and shifts multiplied by ``factors``, its gradient in ``leaf``, and accuracy."""
        with autocast(x.device, self.settings.precision):
            logits = masked_call(self.model, self.layers, factors, x.clone(), self.parameters, self.buffers).float()
        loss = F.cross_entropy(logits, y)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient, hits(logits.detach(), y).double() / len(y)


def scales_and_shifts(
    layers: Sequence[MaskableLayer], model: nn.Module
) -> tuple[tuple[MaskableLayer, ...], tuple[MaskableLayer, ...]]:
    """Each layer twice: once naming its weights alone, once its biases, of which there may be none."""
    known = {name for name, _ in model.named_parameters()}
    scales, shifts = [], []
    for layer in layers:
        weights = tuple(name for name in layer.parameters if not _is_bias(name))
        biases = {name for name in layer.parameters if _is_bias(name)}
        biases |= {name.removesuffix("weight") + "bias" for name in weights}
        scales.append(replace(layer, parameters=weights))
        shifts.append(replace(layer, parameters=tuple(sorted(biases & known))))
    return tuple(scales), tuple(shifts)


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"
