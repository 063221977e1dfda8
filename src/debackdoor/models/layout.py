"""How weights and images lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from debackdoor.models.forward import predict


def memory_format(model: nn.Module, place: torch.device) -> torch.memory_format:
    """Channels last, which is faster, wherever it is safe.

    On CPUs, two ways back corrupt memory in this format or end the process: that of a strided 1x1 convolution with
    fewer than 16 inputs (https://github.com/uxlfoundation/oneDNN/issues/6035), and that of group normalisation whose
    input needs no gradient.
    """
    unsafe = place.type == "cpu" and any(
        _is_narrow(module) or isinstance(module, nn.GroupNorm) for module in model.modules()
    )
    return torch.contiguous_format if unsafe else torch.channels_last


def _is_narrow(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels < 16
        and max(module.stride) > 1
        and module.kernel_size == (1, 1)
    )


def to_faster_layout(model: nn.Module, x: Tensor, precision: str = "auto") -> None:
    """Brings the model's weights into the layout that is the fastest of the safe ones.

    A network that cannot take it (one that calls ``.view`` on feature maps) gets the contiguous one. ``x`` is a small
    batch (N, C, H, W) to try it on, in the precision that it will be used in.
    """
    set_layout(model, memory_format(model, x.device))
    try:
        predict(model, x, precision=precision)
    except RuntimeError:
        set_layout(model, torch.contiguous_format)


def layout_of(model: nn.Module) -> torch.memory_format:
    """The layout that the model's weights are in; contiguous where theirs is both."""
    last = any(
        weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        for weight in model.parameters()
    )
    return torch.channels_last if last else torch.contiguous_format


def set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    """Brings the model's four-dimensional weights into a memory layout; no value changes."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
