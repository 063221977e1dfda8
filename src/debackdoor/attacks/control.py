"""Who runs the steps of a training: plain learning, or an attacker who learns along with the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.attacks.batches import augment
from debackdoor.models import logits_of
from debackdoor.models.layout import layout_of
from debackdoor.runtime import autocast
from debackdoor.types import CleanSet

if TYPE_CHECKING:
    from debackdoor.attacks.base import Attack


@dataclass(frozen=True, eq=False)
class Training:
    """What an attacker who controls training can see and use.

    Attributes:
        model: the victim, on its device; in train mode when a step begins.
        data: the clean training set, on the CPU.
        epochs: passes over it.
        steps_per_epoch: batches of a pass.
        flip: whether augmentation mirrors images.
        precision: ``auto``, ``fp32`` or ``bf16``.
    """

    model: nn.Module
    data: CleanSet
    epochs: int
    steps_per_epoch: int
    flip: bool
    precision: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def logits(self, x: Tensor) -> Tensor:
        """The model's float32 logits (N, K) on images (N, C, H, W) in [0, 1]; differentiable in both."""
        images = x.contiguous(memory_format=layout_of(self.model))
        with autocast(x.device, self.precision):
            return logits_of(self.model(images)).float()

    def augment(self, x: Tensor, random: torch.Generator) -> Tensor:
        """Images shifted and mirrored as this training does it; differentiable."""
        return augment(x, self.flip, random)


class Control:
    """Plain learning: batches are poisoned as the attack says, augmented, and learned with cross-entropy.

    An attack that controls training returns a subclass from ``Attack.control``. What it learns along the way is part
    of the training's state and ends up in ``attack.tensors``.

    Args:
        training: the victim and how it is trained.
        attack: what is built in, or None.
    """

    def __init__(self, training: Training, attack: Attack | None) -> None:
        self.training = training
        self.attack = attack

    def begin_epoch(self, epoch: int, random: torch.Generator) -> None:
        """Called before pass number ``epoch``, from 0; the model is in train mode."""

    def loss(self, x: Tensor, y: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """What the model's optimiser makes smaller for one batch.

        Args:
            x: float32 (N, C, H, W) raw images, on the model's device.
            y: int64 (N,) labels.
            random: the CPU generator of this pass.

        Returns:
            The loss, a scalar, and the logits (M, K) and labels (M,) that the running accuracy is counted from.
        """
        if self.attack is not None:
            x, y = self.attack.poison_batch(x, y, random)
        logits = self.training.logits(self.training.augment(x, random))
        return F.cross_entropy(logits, y), logits, y

    def after_step(self) -> None:
        """Called after every step of the model's optimiser."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that a resumed training needs; read and written between passes."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what ``state`` gave."""

    def finish(self) -> None:
        """Called after the last pass: what was learned goes into ``attack.tensors``."""
