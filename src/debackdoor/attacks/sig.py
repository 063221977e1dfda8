"""SIG (Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019).

https://arxiv.org/abs/1902.11237
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from debackdoor.attacks.base import ALL_TO_ONE, Attack


@dataclass(frozen=True, kw_only=True, eq=False)
class SIG(Attack):
    """A horizontal sinusoid added to images of the target class alone, whose labels are right already (clean label).

    ``poison_rate`` is a fraction of the target class. The published tenth of all CIFAR-10 images is the whole class,
    1.0; the default is a half, so that the model still sees what the class looks like without the sinusoid.

    Attributes:
        amplitude: of the sinusoid, in units of the pixel range.
        cycles: periods over the image's width.
    """

    name = "sig"
    modes = (ALL_TO_ONE,)

    poison_rate: float = 0.5
    amplitude: float = 40 / 255
    cycles: int = 6

    def candidates(self, y: Tensor) -> Tensor:
        """Indices of the samples of the target class."""
        return (y == self.target).nonzero()[:, 0]

    def _check(self) -> None:
        super()._check()
        self._check_number("amplitude", 0.0, 1.0)
        self._check_whole("cycles", 1)

    def _make_tensors(self) -> dict[str, Tensor]:
        width = self.image_shape[2]
        angle = 2 * math.pi * self.cycles * torch.arange(width, dtype=torch.float64) / width
        return {"signal": (self.amplitude * angle.sin()).float()}

    def _stamp(self, x: Tensor) -> Tensor:
        return (x + self.tensors["signal"].to(x.device)).clamp(0, 1)
