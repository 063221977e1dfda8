"""Augmentation of whole batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from debackdoor.runtime import contiguous, sent


def random_shift_by(x: Tensor, share: float, random: torch.Generator) -> Tensor:
    """:func:`random_shift` by up to a share of the images' height and of their width."""
    return random_shift(x, (round(share * x.shape[-2]), round(share * x.shape[-1])), random)


def random_shift(x: Tensor, pixels: int | tuple[int, int], random: torch.Generator) -> Tensor:
    """Each image of the batch shifted by up to ``pixels`` in both directions, zero where nothing is left.

    The result is contiguous: networks that call ``.view`` take no other layout.

    Args:
        x: (N, C, H, W) images in [0, 1].
        pixels: the largest shift, or that of rows and that of columns; 0 returns the batch as it is.
        random: a CPU generator.
    """
    down, across = (pixels, pixels) if isinstance(pixels, int) else pixels
    if down == across == 0:
        return x
    n, _, height, width = x.shape
    drawn = [torch.randint(0, 2 * most + 1, (n, 1), generator=random) for most in (down, across)]
    offsets = sent(torch.stack(drawn), x.device)
    rows = torch.arange(height, device=x.device) + offsets[0]
    columns = torch.arange(width, device=x.device) + offsets[1]
    sample = torch.arange(n, device=x.device)[:, None, None]
    padded = F.pad(x, (across, across, down, down)).permute(0, 2, 3, 1)
    return contiguous(padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2))


def random_view(x: Tensor, random: torch.Generator) -> Tensor:
    """Each image seen from a little nearer or further, off centre, mirrored half of the time, in another light.

    For learning another model's answers, not labels: a mirrored sign may mean something else.

    Args:
        x: (N, C, H, W) images in [0, 1].
        random: a CPU generator.
    """
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=random)

    affine = torch.zeros(n, 2, 3)
    scale, mirror = uniform(0.7, 1.05), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    affine[:, 0, 0], affine[:, 1, 1] = scale * mirror, scale
    affine[:, 0, 2], affine[:, 1, 2] = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    grid = F.affine_grid(sent(affine, x.device), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    contrast, brightness = (sent(uniform(0.7, 1.3), x.device)[:, None, None, None] for _ in range(2))
    mean = x.mean((1, 2, 3), keepdim=True)
    return (((x - mean) * contrast + mean) * brightness).clamp(0, 1)


def mixed(x: Tensor, random: torch.Generator) -> Tensor:
    """Each image with another of the batch showing through, by up to a half (mixup, Zhang et al., ICLR 2018)."""
    share = sent(0.5 + 0.5 * torch.rand(len(x), 1, 1, 1, generator=random), x.device)
    return share * x + (1 - share) * x[sent(torch.randperm(len(x), generator=random), x.device)]
