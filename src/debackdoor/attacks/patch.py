"""A square patch near the lower right corner of an image."""

from __future__ import annotations

from torch import Tensor


def patch_place(image_shape: tuple[int, int, int], size: float) -> tuple[slice, slice]:
    """Rows and columns of a square patch near the lower right corner.

    An eighth of the shorter side is left free at the edges, so that the shifts of training cut nothing off.

    Args:
        image_shape: (C, H, W).
        size: the patch's side as a fraction of the shorter side, at most 0.75; at least one pixel results.
    """
    _, height, width = image_shape
    margin, side = min(height, width) // 8, max(1, round(size * min(height, width)))
    rows, columns = (slice(length - margin - side, length - margin) for length in (height, width))
    return rows, columns


def with_patch(x: Tensor, pattern: Tensor, place: tuple[slice, slice]) -> Tensor:
    """New images (N, C, H, W) with ``pattern`` (C, side, side) at ``place``."""
    out = x.clone()
    out[:, :, place[0], place[1]] = pattern.to(x.device)
    return out
