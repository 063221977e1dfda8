"""Training batches with an attack's poison in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from debackdoor.data.augment import random_shift
from debackdoor.runtime import generator, shuffled_batches
from debackdoor.types import CleanSet

if TYPE_CHECKING:
    from debackdoor.attacks.base import Attack, Poison


class PoisonedBatches:
    """A training set as an attack leaves it, in shuffled batches; its length is the batches of one pass.

    Args:
        data: the clean training set, which is not changed.
        attack: what to build in, or None.
        poison: what it replaces, or None.
        batch_size: images a batch.
    """

    def __init__(self, data: CleanSet, attack: Attack | None, poison: Poison | None, batch_size: int) -> None:
        self._data = data
        self._used = torch.arange(len(data)) if attack is None else attack.training_samples(data.y)
        self._batch_size = batch_size
        # Only what is poisoned is held twice: a second copy of a whole training set is too much for small machines.
        self._poison = poison
        self._position = torch.full((len(data),), -1)
        if poison is not None:
            self._position[poison.indices] = torch.arange(len(poison.indices))

    def __len__(self) -> int:
        return len(shuffled_batches(len(self._used), self._batch_size, generator(0)))

    def one_pass(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, as stored: float32 (B, C, H, W) and int64 (B,), on the CPU."""
        for drawn in shuffled_batches(len(self._used), self._batch_size, random):
            chosen = self._used[drawn]
            x, y = self._data.x[chosen], self._data.y[chosen]
            if self._poison is not None:
                position = self._position[chosen]
                hit = position >= 0
                x[hit], y[hit] = self._poison.x[position[hit]], self._poison.y[position[hit]]
            yield x, y


def augment(x: Tensor, flip: bool, random: torch.Generator) -> Tensor:
    """Images (N, C, H, W) shifted by up to an eighth of their size and, with ``flip``, half of them mirrored."""
    shifted = random_shift(x, min(x.shape[2:]) // 8, random)
    if not flip:
        return shifted
    mirrored = torch.rand(len(x), 1, 1, 1, generator=random) < 0.5
    return torch.where(mirrored.to(x.device), shifted.flip(3), shifted)
