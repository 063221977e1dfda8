"""What every sample detector shares: hyper-parameters in the constructor, model and images in the call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from debackdoor.errors import DataError, ModelError
from debackdoor.types import CleanSet, Progress


@dataclass(frozen=True, kw_only=True)
class SampleDetector(ABC):
    """A way to find triggered images in a pile, from the model and a few clean images.

    Attributes:
        seed: of every random choice the method makes.
        precision: ``auto``, ``fp32`` or ``bf16``.
    """

    name: ClassVar[str]

    seed: int = 0
    precision: str = "auto"

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        clean: CleanSet,
        images: Tensor,
        answers: Tensor,
        *,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Finite float32 scores (N,) of the images and (M,) of the clean ones; higher is more likely triggered.

        Args:
            model: the suspect model or the exposed one, taking images (N, C, H, W) in [0, 1]; it is not changed.
            clean: M trusted images on the model's device, best of all ones that nothing was taught on.
            images: the pile to judge, float32 (N, C, H, W) in [0, 1], on the model's device.
            answers: int64 (N,), the labels that the suspect model gives the pile.
            progress: called from inside long loops.

        Raises:
            DataError: if images or answers are not as above.
            ModelError: if the model gives numbers that are not finite.
        """


def checked_pile(clean: CleanSet, images: Tensor, answers: Tensor) -> CleanSet:
    """The pile with the answers as its labels.

    Raises:
        DataError: if a shape, dtype or value range is wrong, or the pile's images are of another shape than the clean
            ones.
    """
    pile = CleanSet(images, answers, source="the pile to judge")
    if images.shape[1:] != clean.x.shape[1:]:
        raise DataError(
            f"{pile.source}: expected images of shape {tuple(clean.x.shape[1:])} as the clean ones have, got "
            f"{tuple(images.shape[1:])}; bring them to the size that the model takes"
        )
    return pile


def checked_numbers(values: Tensor) -> Tensor:
    """The values as float32, if all are finite.

    Raises:
        ModelError: if not.
    """
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            "expected finite outputs on every image, got NaN or infinity; check the checkpoint, or try precision fp32"
        )
    return values.float()
