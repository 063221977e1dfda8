"""Training batches with an attack's poison in them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from debackdoor.attacks.base import Attack
from debackdoor.data.augment import random_shift
from debackdoor.runtime import generator, shuffled_batches
from debackdoor.types import CleanSet


class PoisonedBatches:
    """A training set as an attack leaves it, in shuffled and augmented batches; its length is the batches of one pass.

    Args:
        data: the clean training set, which is not changed.
        attack: what to build in, or None.
        batch_size: images a batch.
        flip: whether half of the images, drawn at random, are mirrored.
    """

    def __init__(self, data: CleanSet, attack: Attack | None, batch_size: int, flip: bool) -> None:
        self._data = data
        self._attack = attack
        self._batch_size = batch_size
        self._flip = flip
        # Only what is poisoned is held twice: a second copy of a whole training set is too much for small machines.
        self._poison = attack.poison(data) if attack is not None else None
        self._position = torch.full((len(data),), -1)
        if self._poison is not None:
            self._position[self._poison.indices] = torch.arange(len(self._poison.indices))

    def __len__(self) -> int:
        return len(shuffled_batches(len(self._data), self._batch_size, generator(0)))

    def one_pass(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, poisoned and then augmented: float32 (B, C, H, W) and int64 (B,), on the CPU."""
        for chosen in shuffled_batches(len(self._data), self._batch_size, random):
            x, y = self._data.x[chosen], self._data.y[chosen]
            if self._attack is not None and self._poison is not None:
                position = self._position[chosen]
                hit = position >= 0
                x[hit], y[hit] = self._poison.x[position[hit]], self._poison.y[position[hit]]
                x, y = self._attack.poison_batch(x, y, random)
            yield self._augment(x, random), y

    def _augment(self, x: Tensor, random: torch.Generator) -> Tensor:
        shifted = random_shift(x, min(x.shape[2:]) // 8, random)
        if not self._flip:
            return shifted
        mirrored = torch.rand(len(x), 1, 1, 1, generator=random) < 0.5
        return torch.where(mirrored, shifted.flip(3), shifted)
