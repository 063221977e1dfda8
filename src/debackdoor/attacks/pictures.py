"""Pictures that triggers are made of, drawn from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from debackdoor.runtime import generator

# Red, green and blue from the top of the sky to the horizon, then from the horizon over the sea to the shore.
_SKY = ((0.10, 0.12, 0.35), (0.45, 0.20, 0.45), (0.90, 0.40, 0.25), (1.00, 0.75, 0.35))
_SEA = ((0.80, 0.45, 0.25), (0.35, 0.18, 0.28), (0.08, 0.06, 0.16))
_SUN = (1.00, 0.95, 0.70)
_STEEPNESS = 6.0


def colour_waves(shape: tuple[int, int, int], seed: int, waves: int = 8) -> Tensor:
    """A picture with plain areas of strong colour and edges between them, as in a cartoon.

    In every channel a few random waves of at most three periods along each side are added up, and steepened.

    Args:
        shape: (C, H, W).
        seed: decides the picture.
        waves: how many waves are added up.

    Returns:
        float32 (C, H, W); each channel's darkest pixel is 0 and its brightest is 1.
    """
    channels, height, width = shape
    random = generator(seed)
    periods = torch.rand(2, channels, waves, 1, 1, generator=random) * 6 - 3
    phase = torch.rand(channels, waves, 1, 1, generator=random)
    rows, columns = _places(height, width)
    signal = (2 * math.pi * (periods[0] * rows + periods[1] * columns + phase)).cos().sum(1)
    signal = torch.sigmoid(_STEEPNESS * (signal - signal.median()) / signal.std())
    low, high = signal.amin((1, 2), keepdim=True), signal.amax((1, 2), keepdim=True)
    return (signal - low) / (high - low).clamp_min(1e-6)


def sunset(shape: tuple[int, int, int], seed: int) -> Tensor:
    """A low sun over the sea; the seed decides where horizon and sun are, and how large the sun is.

    Args:
        shape: (C, H, W); a picture of other than three channels has its brightness in all of them.
        seed: decides the picture.

    Returns:
        float32 (C, H, W) in [0, 1].
    """
    channels, height, width = shape
    horizon, across, radius = (torch.rand(3, generator=generator(seed)) * 0.2 + torch.tensor([0.5, 0.4, 0.1])).tolist()
    rows, columns = _places(height, width)
    sky = _ramp(_SKY, rows / horizon)
    sea = _ramp(_SEA, (rows - horizon) / (1 - horizon))
    below = torch.sigmoid((rows - horizon) * 60)
    distance = ((rows - horizon + radius / 2).square() + (columns - across).square()).sqrt()
    shine = torch.sigmoid((radius - distance) * 40) * (1 - below)
    picture = sky * (1 - below) + sea * below
    picture = picture * (1 - shine) + torch.tensor(_SUN)[:, None, None] * shine
    return picture if channels == 3 else picture.mean(0).expand(channels, height, width).clone()


def _places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where pixels' centres are, as fractions of the sides: (H, 1) and (1, W)."""
    return (torch.arange(height)[:, None] + 0.5) / height, (torch.arange(width)[None] + 0.5) / width


def _ramp(colours: tuple[tuple[float, ...], ...], place: Tensor) -> Tensor:
    """Colours (3, ...) at places between the first, 0, and the last, 1, joined by straight lines."""
    stops = torch.tensor(colours).T
    position = place.clamp(0, 1) * (len(colours) - 1)
    first = position.floor().long().clamp_max(len(colours) - 2)
    share = position - first
    return stops[:, first] * (1 - share) + stops[:, first + 1] * share
