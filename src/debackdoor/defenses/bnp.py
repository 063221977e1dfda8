"""Pruning by batch-norm statistics.

Zheng et al., "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022,
https://openreview.net/forum?id=wwW-1k1ljIg, the method BNP: a norm's stored statistics come from poisoned training
images too, so where they differ from those of clean images, a trigger has moved them. As in the authors' code, the
clean images are shifted as training images are, whose statistics are stored, and a channel's scale is set to zero and
its shift stays; BackdoorBench's copy lacks a factor 1/2 before the logarithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from debackdoor.channels import MaskableLayer, find_channels
from debackdoor.data.augment import random_shift_by
from debackdoor.defenses.base import Defense, suspect_copy
from debackdoor.defenses.levels import (
    BUDGET,
    DEVIATIONS,
    blind_rule,
    cost,
    outlier_levels,
    pruned_result,
    rank_outliers,
    strongest,
)
from debackdoor.errors import ModelError, check_fraction, check_positive
from debackdoor.models.forward import predict
from debackdoor.runtime import generator
from debackdoor.types import CleanSet, Progress, RepairResult, Step


@dataclass(frozen=True, kw_only=True)
class BNP(Defense):
    """Prunes channels whose stored statistics diverge from those of clean images.

    No label is learned from, so all clean images judge, of the blind rule and of what pruning costs.

    Attributes:
        u: standard deviations above a layer's mean divergence from which on a channel is pruned (the authors' code has
            3); None takes the strongest of 10, 9.5, ..., 0.5 within the budget.
        budget: how far accuracy on the clean images may fall where ``u`` is None, a fraction.
        shift: largest random shift of the images that give statistics, a fraction of their height and width.

    Example:
        >>> result = BNP(u=3.0)(model, clean)  # doctest: +SKIP
    """

    name: ClassVar[str] = "bnp"

    u: float | None = 3.0
    budget: float = BUDGET
    shift: float = 0.125

    def __post_init__(self) -> None:
        check_positive(u=self.u)
        check_fraction(budget=self.budget, shift=self.shift)

    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        model = suspect_copy(model, clean, self.precision)
        shifted = random_shift_by(clean.x, self.shift, generator(self.seed))
        layers, values = divergences(model, shifted)
        # A scale of zero hides its channel already, whatever its statistics.
        alive = [model.get_parameter(layer.parameters[0]).detach() != 0 for layer in layers]
        ranking = rank_outliers(layers, values, alive)
        measure = cost(model, layers, clean, self.precision)
        levels = outlier_levels(ranking, DEVIATIONS if self.u is None else (self.u,))
        choice = strongest(levels, measure, self.budget if self.u is None else 1.0, progress=progress)
        rule = f"{self.u} standard deviations above the layer's mean"
        if self.u is None:
            rule = blind_rule(self.budget, "clean images")
        scoring = Step("rank", "divergence of batch-norm statistics", {"channels": float(len(ranking))})
        return pruned_result(model, layers, choice, scoring, rule)


def divergences(model: nn.Module, x: Tensor) -> tuple[tuple[MaskableLayer, ...], list[Tensor]]:
    """The batch norms with stored statistics, and how far each channel's are from those of the images.

    Args:
        model: in eval mode; it is left as found.
        x: clean images (N, C, H, W).

    Returns:
        The layers, and for each a float64 tensor (size,): the Kullback-Leibler divergence, in nats, of the normal
        distribution with the images' mean and variance from the one with the stored ones.

    Raises:
        ModelError: if no maskable batch norm stores statistics.
    """
    layers = tuple(layer for layer in find_channels(model, x[:2]) if _has_statistics(model.get_submodule(layer.name)))
    if not layers:
        raise ModelError(
            f"expected a model with batch normalisation that stores its statistics, got {type(model).__name__} "
            "without any; use the defence rnp, anp or clp, which need none"
        )
    with _moments(model, layers) as moments:
        predict(model, x, precision="fp32")
        return layers, [_divergence(model.get_submodule(layer.name), *moments[layer.name]()) for layer in layers]


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None


def _divergence(module: nn.Module, mean: Tensor, variance: Tensor) -> Tensor:
    norm: Any = module
    stored_mean, stored_variance = norm.running_mean.double(), norm.running_var.double() + norm.eps
    variance = variance + norm.eps
    ratio = (variance + (mean - stored_mean) ** 2) / stored_variance
    return 0.5 * (stored_variance / variance).log() + 0.5 * ratio - 0.5


class _Moments:
    """Sums over everything a norm is given, from which mean and variance are made."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook; the input is (N, C) or (N, C, ...)."""
        values = args[0].detach().double().movedim(1, 0).flatten(1)
        self.count += values.shape[1]
        # Not in place: the first sum broadcasts over the channels, on their device.
        self.sum, self.squares = values.sum(1) + self.sum, (values**2).sum(1) + self.squares

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel; the variance is a sample's, as the stored one is."""
        mean = self.sum / self.count
        rest = self.squares - self.count * mean**2
        return mean, rest.clamp(min=0) / max(self.count - 1, 1)


@contextmanager
def _moments(model: nn.Module, layers: Sequence[MaskableLayer]) -> Iterator[dict[str, _Moments]]:
    found = {layer.name: _Moments() for layer in layers}
    hooks = [model.get_submodule(name).register_forward_pre_hook(moments.add) for name, moments in found.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
