"""Batch normalisation that only answers is a part of the convolution before it: one pass over memory less, each way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from debackdoor._graph import Call, trace, uses
from debackdoor.errors import ModelError
from debackdoor.models.copying import copied
from debackdoor.models.forward import predict

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Of these types exactly: a subclass may do something else."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

SAME = 1e-3
"""How far logits may be from those without fusing, as a share of the largest."""


def fused(model: nn.Module, example: Tensor) -> nn.Module:
    """A network that answers as ``model`` does in eval mode, and takes less time; the model itself where none is.

    Every batch normalisation that takes a convolution's output, which nothing else takes, becomes part of it (Jacob et
    al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
    section 3.2). Gradients with respect to the images are the same; the weights get none.

    Args:
        model: in eval mode; it is not changed.
        example: a few images that it takes, (N, C, H, W), on its device.
    """
    try:
        pairs = list(_pairs(model, example))
        if not pairs:
            return model
        found = copied(model).eval().requires_grad_(False)
        for convolution, norm in pairs:
            layers: tuple[Any, Any] = found.get_submodule(convolution), found.get_submodule(norm)
            _replace(found, convolution, fuse_conv_bn_eval(*layers))
            _replace(found, norm, nn.Identity())
        before, after = (predict(network, example, precision="fp32") for network in (model, found))
    except (ModelError, AttributeError, RuntimeError, TypeError):  # of a network that asks its own layers for more
        return model
    same = bool(torch.isfinite(after).all()) and float((after - before).abs().max()) <= SAME * float(before.abs().max())
    return found if same else model


def _pairs(model: nn.Module, example: Tensor) -> Iterator[tuple[str, str]]:
    """The names of convolutions and norms that may be fused."""
    traced = trace(model, example)
    followers = uses(traced)
    times = Counter(call.module for call in traced.calls)
    owners = Counter(value for _, value in model.named_parameters(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}

    def plain(call: Call, types: tuple[type[nn.Module], ...]) -> bool:
        module = call.module
        own = list(module.parameters(recurse=False))
        hooked = bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        return type(module) in types and times[module] == 1 and not hooked and all(owners[value] == 1 for value in own)

    for call in traced.calls:
        found = followers.get(call.node, [])
        if len(found) != 1 or not plain(call, CONVOLUTIONS):
            continue
        norm = found[0].call
        if norm.source is call.node and plain(norm, NORMS) and norm.module.running_mean is not None:
            yield names[call.module], names[norm.module]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
