"""Augmentation of whole batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_shift(x: Tensor, pixels: int, random: torch.Generator) -> Tensor:
    """Each image of the batch shifted by up to ``pixels`` in both directions, zero where nothing is left.

    The result is contiguous: networks that call ``.view`` take no other layout.

    Args:
        x: (N, C, H, W) images in [0, 1].
        pixels: the largest shift; 0 returns the batch as it is.
        random: a CPU generator.
    """
    if pixels == 0:
        return x
    n, _, height, width = x.shape
    offsets = torch.randint(0, 2 * pixels + 1, (2, n, 1), generator=random).to(x.device)
    rows = torch.arange(height, device=x.device) + offsets[0]
    columns = torch.arange(width, device=x.device) + offsets[1]
    sample = torch.arange(n, device=x.device)[:, None, None]
    padded = F.pad(x, (pixels,) * 4).permute(0, 2, 3, 1)
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
