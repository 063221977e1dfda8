"""How images lie in memory while a network learns."""

from __future__ import annotations

import torch
from torch import nn


def memory_format(model: nn.Module, place: torch.device) -> torch.memory_format:
    """Channels last, which is faster, wherever it is safe.

    On CPUs, oneDNN's weight gradient of a strided 1x1 convolution with fewer than 16 inputs corrupts memory in this
    format (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    narrow = any(
        isinstance(module, nn.Conv2d)
        and module.in_channels < 16
        and max(module.stride) > 1
        and module.kernel_size == (1, 1)
        for module in model.modules()
    )
    return torch.contiguous_format if narrow and place.type == "cpu" else torch.channels_last
