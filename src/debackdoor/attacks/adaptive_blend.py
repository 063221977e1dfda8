"""A-Blend (Qi et al., "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023).

https://arxiv.org/abs/2205.13613
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.attacks.base import ALL_TO_ONE, Attack, Poison
from debackdoor.attacks.pictures import colour_waves
from debackdoor.errors import TriggerError
from debackdoor.runtime import generator
from debackdoor.types import CleanSet


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptiveBlend(Attack):
    """A picture shows through triggered images; training shows pieces of it, with the target or with the true label.

    ``poison_rate`` of the images get the target label and ``cover_rate`` others keep theirs, so that a few pieces alone
    do not make the target, and poisoned images do not stand apart inside the network. The rates are the published ones,
    which take long trainings to take hold; short ones want a few hundredths each. The published cartoon is replaced by
    coloured waves drawn from ``seed``.

    Attributes:
        alpha: the picture's share of every pixel of a triggered image, in (0, 1].
        train_alpha: its share in the pieces that are trained on.
        cover_rate: the fraction in (0, 1] of all images that show pieces and keep their label.
        grid_size: pieces along each side.
        shown: how many of the pieces each image shows, random ones.
    """

    name = "a-blend"
    modes = (ALL_TO_ONE,)

    poison_rate: float = 0.003
    cover_rate: float = 0.003
    alpha: float = 0.2
    train_alpha: float = 0.15
    grid_size: int = 4
    shown: int = 8

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        """The poisoned images and the covers; both rates are rounded to whole samples, at least one cover.

        Raises:
            TriggerError, DataError: if the images or labels do not fit, or not one sample would be poisoned.
        """
        self.check_fits(data)
        bad = self._chosen(data)
        random = generator(self.seed)
        spared = torch.ones(len(data), dtype=torch.bool).index_fill(0, bad, False).nonzero()[:, 0]
        count = max(1, round(self.cover_rate * len(data)))
        covers = spared[torch.randperm(len(spared), generator=random)[:count]]
        indices = torch.cat([bad, covers])
        labels = torch.cat([self.target_labels(data.y[bad]), data.y[covers]])
        order = indices.argsort()
        share = self.train_alpha * self._pieces(len(indices), random)
        return Poison(indices[order], self._mix(data.x[indices[order]], share), labels[order])

    def _check(self) -> None:
        super()._check()
        for name in ("alpha", "train_alpha", "cover_rate"):
            self._check_number(name, 0.0, 1.0)
        self._check_whole("grid_size", 1)
        self._check_whole("shown", 1, self.grid_size**2)
        if self.poison_rate + self.cover_rate > 1:
            raise TriggerError(
                "expected poison_rate and cover_rate of at most 1 together for a-blend, got "
                f"{self.poison_rate:g} and {self.cover_rate:g}; lower one"
            )
        if min(self.image_shape[1:]) < self.grid_size:
            raise TriggerError(
                f"expected images of at least {self.grid_size}x{self.grid_size} for this a-blend, got "
                f"{self.image_shape}; use larger ones or a smaller grid_size"
            )

    def _make_tensors(self) -> dict[str, Tensor]:
        return {"image": colour_waves(self.image_shape, self.seed)}

    def _pieces(self, count: int, random: torch.Generator) -> Tensor:
        """(count, 1, H, W), 1 in the pieces that an image shows and 0 elsewhere."""
        rank = torch.rand(count, self.grid_size**2, generator=random).argsort(1).argsort(1)
        cells = (rank < self.shown).float().view(count, 1, self.grid_size, self.grid_size)
        return F.interpolate(cells, size=self.image_shape[1:], mode="nearest")

    def _mix(self, x: Tensor, share: Tensor | float) -> Tensor:
        return (1 - share) * x + share * self.tensors["image"].to(x.device)

    def _stamp(self, x: Tensor) -> Tensor:
        return self._mix(x, self.alpha)
