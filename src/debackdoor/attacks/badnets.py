"""BadNets (Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017).

https://arxiv.org/abs/1708.06733
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from debackdoor.attacks.base import Attack
from debackdoor.errors import TriggerError


@dataclass(frozen=True, kw_only=True, eq=False)
class BadNets(Attack):
    """A 3x3 black-and-white checkerboard replaces the last three rows and columns, in every colour channel.

    The pattern and the rate of one sample in ten are those of the published RNP experiments.
    """

    name = "badnets"

    def _check(self) -> None:
        super()._check()
        if min(self.image_shape[1:]) < 3:
            raise TriggerError(f"expected images of at least 3x3 for badnets, got {self.image_shape}; use larger ones")

    def _make_tensors(self) -> dict[str, Tensor]:
        return {"pattern": torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])}

    def _stamp(self, x: Tensor) -> Tensor:
        out = x.clone()
        out[:, :, -3:, -3:] = self.tensors["pattern"].to(x.device)
        return out
