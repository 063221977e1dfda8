"""Universal perturbations: one change for all images, of the kinds that triggers are of.

Additive patterns of small norm (Moosavi-Dezfooli et al., "Universal Adversarial Perturbations", CVPR 2017), patches of
few pixels (Wang et al., "Neural Cleanse", IEEE S&P 2019, section IV) and smooth warps (Nguyen and Tran, "WaNet", ICLR
2021, section 3). Each class holds several of one kind.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a perturbation may be.

    Attributes:
        additive: root mean square of an additive pattern, in pixel values of [0, 1].
        patch: sum of a patch's mask, as a share of the image's pixels.
        warp: largest displacement, as a share of the image's width.
    """

    additive: float = 0.018
    patch: float = 1 / 50
    warp: float = 0.047

    def halved(self, kinds: Sequence[str]) -> Sizes:
        """The same with half the size for some kinds."""
        return replace(self, **{kind: getattr(self, kind) / 2 for kind in kinds})


class Perturbations(ABC):
    """Several perturbations of one kind, to be learned.

    Attributes:
        kind: its name.
        lr: step size of Adam on the parameters.
        parameters: leaf tensors, each with one entry a perturbation along its first dimension.
    """

    kind: ClassVar[str]
    lr: ClassVar[float]
    parameters: list[Tensor]

    @abstractmethod
    def __init__(self, count: int, shape: Sequence[int], sizes: Sizes, random: torch.Generator) -> None:
        """``count`` random perturbations of images of ``shape`` (C, H, W)."""

    @abstractmethod
    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        """The images (N, C, H, W) in [0, 1], each under the perturbation that ``index`` (N,) names."""

    def loosen(self, times: float) -> None:  # noqa: B027 -- only some kinds gain by it
        """Allows for a size ``times`` as large, until told otherwise."""

    def project(self) -> None:  # noqa: B027 -- only some kinds need it
        """Brings the parameters back into their bounds after a step."""

    def to(self, device: torch.device) -> Perturbations:
        """Moves the parameters, before the first step."""
        self.parameters = [value.detach().to(device).requires_grad_() for value in self.parameters]
        return self


class Additive(Perturbations):
    """``x + pattern``, the pattern in a ball of the L2 norm."""

    kind, lr = "additive", 0.01

    def __init__(self, count: int, shape: Sequence[int], sizes: Sizes, random: torch.Generator) -> None:
        self.radius = sizes.additive * math.sqrt(math.prod(shape))
        self.parameters = [(0.02 * torch.randn(count, *shape, generator=random)).requires_grad_()]

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        return (x + self.parameters[0][index]).clamp(0, 1)

    def project(self) -> None:
        (pattern,) = self.parameters
        norm = pattern.flatten(1).norm(dim=1).clamp(min=self.radius)
        with torch.no_grad():
            pattern *= (self.radius / norm)[:, None, None, None]


class Patch(Perturbations):
    """``(1 - mask) * x + mask * pattern``, the mask's sum bounded."""

    kind, lr = "patch", 0.2

    def __init__(self, count: int, shape: Sequence[int], sizes: Sizes, random: torch.Generator) -> None:
        _, height, width = shape
        self.pixels = self.final_pixels = sizes.patch * height * width
        mask = 0.5 * torch.randn(count, 1, height, width, generator=random) - 2
        self.parameters = [value.requires_grad_() for value in (mask, torch.randn(count, *shape, generator=random))]

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        mask, pattern = (value[index].sigmoid() for value in self.parameters)
        total = mask.flatten(1).sum(1).clamp(min=self.pixels)
        mask = mask * (self.pixels / total)[:, None, None, None]
        return (1 - mask) * x + mask * pattern

    def loosen(self, times: float) -> None:
        self.pixels = times * self.final_pixels


class Warp(Perturbations):
    """Every pixel moved along a smooth field, interpolated from a grid of ``GRID`` by ``GRID`` displacements."""

    kind, lr = "warp", 0.1
    GRID: ClassVar[int] = 5

    def __init__(self, count: int, shape: Sequence[int], sizes: Sizes, random: torch.Generator) -> None:
        self.reach = 2 * sizes.warp  # grid_sample's coordinates run from -1 to 1
        self.parameters = [(0.3 * torch.randn(count, 2, self.GRID, self.GRID, generator=random)).requires_grad_()]

    def apply(self, x: Tensor, index: Tensor) -> Tensor:
        field = self.reach * self.parameters[0].tanh()[index]
        still = torch.eye(2, 3, device=x.device).expand(len(x), 2, 3)
        with torch.autocast(x.device.type, enabled=False):  # in half precision every pixel would be a little elsewhere
            moved = (field.flatten(2) @ self._interpolation(x)).view(len(x), 2, *x.shape[-2:])
            grid = F.affine_grid(still, list(x.shape), align_corners=False) + moved.permute(0, 2, 3, 1)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    def _interpolation(self, like: Tensor) -> Tensor:
        """Bicubic interpolation as a matrix (GRID * GRID, H * W).

        On a GPU the gradient of torch's own adds up in any order, and no two runs give the same numbers.
        """
        points = torch.eye(self.GRID**2, device=like.device).view(-1, 1, self.GRID, self.GRID)
        return F.interpolate(points, size=like.shape[-2:], mode="bicubic", align_corners=True).flatten(1)


KINDS: tuple[type[Perturbations], ...] = (Additive, Patch, Warp)
