"""Blend (Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017).

https://arxiv.org/abs/1712.05526
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from debackdoor.attacks.base import Attack
from debackdoor.runtime import generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Blend(Attack):
    """One fixed Gaussian-noise image, drawn from ``seed``, shows through every triggered image.

    Attributes:
        alpha: the noise image's share of every pixel, in (0, 1], the same in training and in tests.
    """

    name = "blend"

    alpha: float = 0.2

    def _check(self) -> None:
        super()._check()
        self._check_number("alpha", 0.0, 1.0)

    def _make_tensors(self) -> dict[str, Tensor]:
        noise = torch.randn(self.image_shape, generator=generator(self.seed))
        return {"image": (0.5 + 0.25 * noise).clamp(0, 1)}

    def _stamp(self, x: Tensor) -> Tensor:
        return (1 - self.alpha) * x + self.alpha * self.tensors["image"].to(x.device)
