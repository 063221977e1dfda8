"""Channel Lipschitzness based Pruning: no data needed.

Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022, https://arxiv.org/abs/2208.03111:
a channel that a trigger can drive high has a large Lipschitz constant. Channels more than ``u`` standard deviations
above their layer's mean are set to zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from debackdoor._graph import NORMS, trace, uses
from debackdoor.channels import MaskableLayer, find_channels
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
from debackdoor.types import CleanSet, Progress, RepairResult, Step


@dataclass(frozen=True, kw_only=True)
class CLP(Defense):
    """Prunes channels with an outlying Lipschitz constant.

    No image is learned from, so all clean images judge, of the blind rule and of what pruning costs.

    Attributes:
        u: standard deviations above a layer's mean from which on a channel is pruned (the paper's 3); None takes the
            strongest of 10, 9.5, ..., 0.5 within the budget.
        budget: how far accuracy on the clean images may fall where ``u`` is None, a fraction.

    Example:
        >>> result = CLP(u=3.0)(model, clean)  # doctest: +SKIP
    """

    name: ClassVar[str] = "clp"

    u: float | None = 3.0
    budget: float = BUDGET

    def __post_init__(self) -> None:
        check_positive(u=self.u)
        check_fraction(budget=self.budget)

    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        model = suspect_copy(model, clean, self.precision)
        layers, constants = lipschitz(model, clean.x[:2])
        ranking = rank_outliers(layers, constants, [values > 0 for values in constants])
        measure = cost(model, layers, clean, self.precision)
        levels = outlier_levels(ranking, DEVIATIONS if self.u is None else (self.u,))
        choice = strongest(levels, measure, self.budget if self.u is None else 1.0, progress=progress)
        rule = f"{self.u} standard deviations above the layer's mean"
        if self.u is None:
            rule = blind_rule(self.budget, "clean images")
        scoring = Step("rank", "channel Lipschitz constants", {"channels": float(len(ranking))})
        return pruned_result(model, layers, choice, scoring, rule)


def lipschitz(model: nn.Module, example: Tensor) -> tuple[tuple[MaskableLayer, ...], list[Tensor]]:
    """The layers that convolve, and an upper bound of the Lipschitz constant of each of their channels.

    The bound is the largest singular value of the channel's weights (inputs x places), times ``|gamma| / sqrt(var +
    eps)`` of the batch norm that follows, times ``|gamma|`` of another norm, whose scale depends on the image. Which
    norm follows which convolution is read from a traced pass: a norm of a sum, as in pre-activation networks, belongs
    to none, and its convolutions count alone. Where nothing convolves, hidden linear layers take the place.

    Args:
        model: in eval mode; it is left as found.
        example: images that it takes, (N, C, H, W).

    Returns:
        Layers that name all parameters a mask sets to zero, a norm's shift too, as the paper does; and a float64 tensor
        (size,) for each, 0 for dead channels: with no weight, or a variance that epsilon outweighs.

    Raises:
        ModelError: if there is neither a convolution nor a hidden linear layer.
    """
    layers = find_channels(model, example)
    sources = _convolutions_before(model, example)
    found: list[tuple[MaskableLayer, Tensor]] = []
    for layer in layers:
        module = model.get_submodule(layer.name)
        if layer.kind == "norm" and module in sources:
            found.append((_with_shift(layer, model), _largest_singular(sources[module]) * _gain(module)))
        elif layer.kind == "conv":
            found.append((layer, _largest_singular(module)))
    if not found:
        hidden = [layer for layer in layers if layer.kind == "linear"]
        found = [(layer, _largest_singular(model.get_submodule(layer.name))) for layer in hidden]
    if not found:
        raise ModelError(
            f"expected a model with convolutions or hidden linear layers, got {type(model).__name__} with none that "
            "can be pruned; use the defence rnp or anp"
        )
    return tuple(layer for layer, _ in found), [values for _, values in found]


def _convolutions_before(model: nn.Module, example: Tensor) -> dict[nn.Module, nn.Module]:
    """For each norm that normalises the output of one convolution and nothing else: that convolution."""
    traced = trace(model, example)
    followers = uses(traced)
    found: dict[nn.Module, set[nn.Module | None]] = {}
    for call in traced.calls:
        for use in followers.get(call.node, []):
            if isinstance(use.call.module, NORMS):
                fits = use.alone and _is_convolution(call.module) and call.module.out_channels == _size(use.call.module)
                found.setdefault(use.call.module, set()).add(call.module if fits else None)
    return {
        norm: source
        for norm, sources in found.items()
        if len(sources) == 1 and (source := next(iter(sources))) is not None
    }


def _is_convolution(module: nn.Module) -> bool:
    """Whether a channel's weights can be read off: not so for grouped transposed convolutions."""
    return isinstance(module, nn.modules.conv._ConvNd) and not (module.transposed and module.groups > 1)


def _size(norm: Any) -> int:
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features


def _largest_singular(module: Any) -> Tensor:
    """The largest singular value of each output channel's weights, a matrix (inputs, places); float64 (channels,)."""
    weight = module.weight.detach().double()
    if getattr(module, "transposed", False):
        weight = weight.transpose(0, 1)
    matrices = weight.reshape(*weight.shape[:2], -1)
    # Their squared singular values are the eigenvalues of a product as small as the kernel, which are found faster.
    wide = matrices.shape[1] < matrices.shape[2]
    product = matrices @ matrices.mT if wide else matrices.mT @ matrices
    return torch.linalg.eigvalsh(product)[:, -1].clamp(min=0).sqrt()


def _gain(norm: Any) -> Tensor:
    """What a norm multiplies each channel by, as far as the model says; 0 for channels that never vary."""
    scale = norm.weight.detach().double().abs()
    if isinstance(norm, _NormBase) and norm.running_var is not None:
        variance = norm.running_var.double()
        return torch.where(variance > norm.eps, scale / (variance + norm.eps).sqrt(), 0.0)
    return scale


def _with_shift(layer: MaskableLayer, model: nn.Module) -> MaskableLayer:
    """The norm with its shift among the parameters that a mask multiplies."""
    known = {name for name, _ in model.named_parameters()}
    return replace(layer, parameters=tuple(_present(layer.parameters, known)))


def _present(weights: Iterable[str], known: set[str]) -> Iterable[str]:
    for name in weights:
        yield name
        bias = name.removesuffix("weight") + "bias"
        if bias in known:
            yield bias
