"""Batch normalisation that only answers is a part of the convolution before it: one pass over memory less, each way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.fusion import fuse_conv_bn_eval

from debackdoor._graph import Call, Trace, trace, uses
from debackdoor.channels import MaskableLayer, count_channels, mask_parameters, masked_call
from debackdoor.models.copying import copied
from debackdoor.models.forward import logits_of, predict
from debackdoor.models.stateless import call_with
from debackdoor.runtime import generator

Masked = Callable[[Tensor, Tensor], Tensor]
"""Takes a mask (channels,) and images (N, C, H, W) to logits (N, K)."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Of these types exactly: a subclass may do something else."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

SAME = 1e-2
"""How far logits may be from those without fusing, as a share of the median of their sizes.

Rounding alone comes to a tenth of that on a GPU, whose convolutions keep ten bits; a wrong fusion changes all of it.
"""


def fused(model: nn.Module, example: Tensor) -> nn.Module:
    """A network that answers as ``model`` does in eval mode, and takes less time; the model itself where none is.

    Every batch normalisation that takes a convolution's output, which nothing else takes, becomes part of it (Jacob et
    al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
    section 3.2). Gradients with respect to the images are the same; the weights get none.

    Args:
        model: in eval mode; it is not changed.
        example: a few images that it takes, (N, C, H, W) in [0, 1], on its device.
    """
    try:
        pairs = list(_pairs(model, example))
        if not pairs:
            return model
        found = _with_fused(model, pairs)
        return found if _same(model, found, example) else model
    except Exception:  # a model is anyone's code, and may ask its own layers for more than an answer
        return model


def fused_under_masks(model: nn.Module, layers: Sequence[MaskableLayer], example: Tensor) -> Masked:
    """A function of a mask and images that answers as ``masked_call`` does in eval mode, and takes less time.

    The mask of a norm that is part of a convolution multiplies the convolution's weight, and its bias as far as that is
    not the norm's own, which a mask leaves alone.

    Args:
        model: in eval mode; it is not changed, and must not be while the function is used.
        layers: what the mask is of.
        example: a few images that the model takes, (N, C, H, W) in [0, 1], on its device.
    """

    def plain(mask: Tensor, x: Tensor) -> Tensor:
        return masked_call(model, layers, mask, x)

    try:
        found = _fused_under_masks(model, layers, _pairs(model, example))
        masks = torch.ones(3, count_channels(layers), device=example.device)
        masks[1:] = (torch.rand(masks[1:].shape, generator=generator(0)) > 0.2).to(masks)
        same = all(_same(partial(plain, mask), partial(found, mask), example) for mask in masks)
        return found if same else plain
    except Exception:  # a model is anyone's code, and may ask its own layers for more than an answer
        return plain


def _fused_under_masks(model: nn.Module, layers: Sequence[MaskableLayer], pairs: Iterable[tuple[str, str]]) -> Masked:
    convolutions = {norm: convolution for convolution, norm in pairs}
    network = _with_fused(model, [(convolution, norm) for norm, convolution in convolutions.items()])
    parameters: dict[str, Tensor] = dict(network.named_parameters())
    folded, shifts = list(layers), dict[str, Tensor]()
    for place, layer in enumerate(layers):
        if layer.name in convolutions:
            weight, bias = (f"{convolutions[layer.name]}.{name}" for name in ("weight", "bias"))
            shifts[bias] = model.get_parameter(f"{layer.name}.bias").detach()
            parameters[bias] = parameters[bias] - shifts[bias]
            folded[place] = replace(layer, kind="conv", parameters=(weight, bias))

    def answer(mask: Tensor, x: Tensor) -> Tensor:
        masked = mask_parameters(folded, mask, parameters)
        return logits_of(call_with(network, masked | {name: masked[name] + value for name, value in shifts.items()}, x))

    return answer


def _with_fused(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> nn.Module:
    found = copied(model).requires_grad_(False)
    for module in found.modules():
        module.training = False  # not eval(): a model may override train()
    for convolution, norm in pairs:
        layers: tuple[Any, Any] = found.get_submodule(convolution), found.get_submodule(norm)
        _replace(found, convolution, fuse_conv_bn_eval(*layers))
        _replace(found, norm, nn.Identity())
    return found


def _same(model: Callable[[Tensor], Tensor], found: Callable[[Tensor], Tensor], example: Tensor) -> bool:
    """Whether both answer alike, also to what is no image: a branch may be silent on images."""
    noise = torch.rand(example.shape, generator=generator(0)).to(example)
    x = torch.cat([example, noise, torch.zeros_like(example[:1]), torch.ones_like(example[:1])])
    before, after = (predict(network, x, precision="fp32") for network in (model, found))
    return bool(((after - before).abs() <= SAME * before.abs().median()).all())


def _pairs(model: nn.Module, example: Tensor) -> Iterator[tuple[str, str]]:
    """The names of convolutions and norms that may be fused."""
    traced = trace(model, example)
    followers, takers = uses(traced), _takers(traced)
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
        if len(found) != 1 or takers[call.node] != 1 or not plain(call, CONVOLUTIONS):
            continue
        norm = found[0].call
        if norm.source is call.node and plain(norm, NORMS) and norm.module.running_mean is not None:
            yield names[call.module], names[norm.module]


def _takers(traced: Trace) -> Counter[Node]:
    """How often each node's output is taken, by whatever operation, on the way to the logits."""
    counts: Counter[Node] = Counter()
    seen, waiting = {traced.logits}, [traced.logits]
    while waiting:
        for before, _ in waiting.pop().next_functions:
            if before is None:
                continue
            counts[before] += 1
            if before not in seen:
                seen.add(before)
                waiting.append(before)
    return counts


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
