"""What the training loops of this package share: augmentation, modes, and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from debackdoor.models.forward import logits_of
from debackdoor.runtime import autocast


def random_shift(x: Tensor, pixels: int, random: torch.Generator) -> Tensor:
    """Each image of the batch shifted by up to ``pixels`` in both directions, zero where nothing is left.

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
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalisation_in_train_mode(model: nn.Module) -> None:
    """Eval mode everywhere (no dropout) but for the normalisation layers, which use and update batch statistics."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.train()


@torch.no_grad()
def predict(model: Callable[[Tensor], Any], x: Tensor, *, batch_size: int = 500, precision: str = "auto") -> Tensor:
    """Float32 logits (N, K) on images (N, C, H, W) in [0, 1].

    ``model`` is used in the mode it is in, and may be any function that calls one.
    """
    with autocast(x.device, precision):
        return torch.cat([logits_of(model(batch)).float() for batch in x.split(batch_size)])


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    # Counted rather than averaged: a float32 mean of 0.958 reads 0.9580000042915344 in a record.
    return int((logits.argmax(1) == y).sum()) / len(y)


def label_shares(logits: Tensor) -> list[float]:
    """How large a share of the answers each label gets; K fractions that sum to 1."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return (counts / len(logits)).tolist()
