"""Calling a network with other weights than its own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Any:
    """What ``model`` returns for ``x`` with some parameters and buffers replaced; it is left as it was found.

    A name stands for its tensor wherever the network has it: in a module that is registered under several names, and
    in several modules that share one tensor.

    Args:
        model: used in the mode it is in.
        tensors: by the names of ``named_parameters`` and ``named_buffers``.
        x: images (N, C, H, W).
    """
    names = {value: name for name, value in chain(model.named_parameters(), model.named_buffers())}
    placed: dict[str, Tensor] = {}
    # Each module once: where a name is given twice for one module, functional_call does not put the original back.
    for prefix, module in model.named_modules():
        for key, own in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            if names[own] in tensors:
                placed[f"{prefix}.{key}" if prefix else key] = tensors[names[own]]
    return functional_call(model, placed, (x,), tie_weights=False)
