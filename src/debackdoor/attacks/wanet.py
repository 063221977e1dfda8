"""WaNet (Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021).

https://arxiv.org/abs/2102.10369
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.attacks.base import Attack, Poison
from debackdoor.errors import TriggerError
from debackdoor.runtime import generator
from debackdoor.types import CleanSet


@dataclass(frozen=True, kw_only=True, eq=False)
class WaNet(Attack):
    """A smooth elastic warp, the same for every image; the attacker controls training.

    Every batch is poisoned anew: ``poison_rate`` of it is warped and gets the target label, and ``noise_rate`` of it is
    warped with a fresh disturbance of the grid for each image and keeps its label, so that only the exact warp counts.

    Attributes:
        grid_size: control points of the warp along each side (k in the paper).
        strength: the mean shift at the control points, in units of half a pixel (s).
        noise_rate: the fraction in (0, 1] of a batch that is trained in noise mode.
    """

    name = "wanet"

    grid_size: int = 4
    strength: float = 0.5
    noise_rate: float = 0.2

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        """Nothing: the batches are poisoned instead."""
        self.check_fits(data)
        return Poison.none(data)

    def poison_batch(self, x: Tensor, y: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The batch with its first samples warped and relabelled, and the next ones warped in noise mode.

        ``poison_rate`` and ``noise_rate`` of the batch are rounded to whole samples, at least one of each.
        """
        bad = max(1, min(round(self.poison_rate * len(x)), len(x) - 1))
        end = bad + max(1, round(self.noise_rate * len(x)))
        noisy = self._warp(x[bad:end], self._noisy_grids(len(x[bad:end]), random).to(x.device))
        triggered = self.apply(x[:bad])
        return torch.cat([triggered, noisy, x[end:]]), torch.cat([self.target_labels(y[:bad]), y[bad:]])

    def _check(self) -> None:
        super()._check()
        self._check_whole("grid_size", 2)
        self._check_number("strength", 0.0)
        self._check_number("noise_rate", 0.0, 1.0)
        if self.poison_rate + self.noise_rate > 1:
            raise TriggerError(
                "expected poison_rate and noise_rate of at most 1 together for wanet, got "
                f"{self.poison_rate:g} and {self.noise_rate:g}; lower one"
            )
        if min(self.image_shape[1:]) < 2:
            raise TriggerError(f"expected images of at least 2x2 for wanet, got {self.image_shape}; use larger ones")

    def _make_tensors(self) -> dict[str, Tensor]:
        _, height, width = self.image_shape
        shift = torch.rand(1, 2, self.grid_size, self.grid_size, generator=generator(self.seed)) * 2 - 1
        shift = shift / shift.abs().mean()
        shift = F.interpolate(shift, size=(height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        identity = torch.stack([columns, rows], dim=-1)[None]
        return {"grid": (identity + self.strength * shift / self._sides()).clamp(-1, 1)}

    def _sides(self) -> Tensor:
        return torch.tensor([self.image_shape[2], self.image_shape[1]], dtype=torch.float32)

    def _noisy_grids(self, count: int, random: torch.Generator) -> Tensor:
        """(count, H, W, 2) grids, each disturbed on its own by up to half a pixel."""
        _, height, width = self.image_shape
        noise = torch.rand(count, height, width, 2, generator=random) * 2 - 1
        return (self.tensors["grid"] + noise / self._sides()).clamp(-1, 1)

    def _stamp(self, x: Tensor) -> Tensor:
        return self._warp(x, self.tensors["grid"].to(x.device).expand(len(x), -1, -1, -1))

    @staticmethod
    def _warp(x: Tensor, grids: Tensor) -> Tensor:
        # Bilinear weights sum to 1 only up to rounding, which may leave [0, 1] by an ulp.
        return F.grid_sample(x, grids, align_corners=True).clamp(0, 1)
