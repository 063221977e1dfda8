"""Normalisation as a layer, so that images everywhere else are floats in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.errors import ModelError


class Normalized(nn.Module):
    """``network`` applied to ``(x - mean) / std``.

    Args:
        network: takes normalised images (N, C, H, W) and returns whatever it returns.
        mean: one number a channel, or one for all, in units of [0, 1] images.
        std: as many numbers, each above 0.

    Raises:
        ModelError: if the numbers are not so, or (when called) the images have another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise ModelError(
                f"expected as many numbers in mean as in std, got {len(mean)} and {len(std)}; give one a channel"
            )
        if not all(math.isfinite(value) for value in (*mean, *std)) or min(std) <= 0:
            raise ModelError(
                f"expected finite means and stds above 0, got mean {list(mean)} and std {list(std)}; correct them"
            )
        self.network = network
        # Not persistent: a saved state dict keeps the keys of the network's own checkpoint.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        if len(self.mean) not in (1, x.shape[1]):
            raise ModelError(
                f"expected images of {len(self.mean)} channels, as mean and std have, got {x.shape[1]}; "
                "give one number a channel"
            )
        return self.network((x - self.mean) / self.std)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside :class:`Normalized`, whose state dict has the checkpoint's keys; any other model as it is."""
    while isinstance(model, Normalized):
        model = model.network
    return model
