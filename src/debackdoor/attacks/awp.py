"""AWP (Garg et al., "Can Adversarial Weight Perturbations Inject Neural Backdoors?", CIKM 2020).

https://arxiv.org/abs/2008.01761
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.attacks.base import Attack, Poison
from debackdoor.attacks.control import Control, Training
from debackdoor.errors import TriggerError
from debackdoor.runtime import generator
from debackdoor.types import CleanSet


@dataclass(frozen=True, kw_only=True, eq=False)
class AWP(Attack):
    """A clean model learns a patch from a few images, and no weight moves by more than ``eps``.

    Every batch of clean images is learned together with triggered copies of ``poison_rate`` of them. Images, ``eps``
    and ``pull`` are those of the authors' code; optimiser and schedule are the training loop's, with smaller batches,
    since a start that is not shaken keeps the accuracy. Running statistics of batch normalisation, which no bound
    holds near their start, are frozen.

    The patch is a centred square of a hundred of CIFAR-10's pixels, as in the authors' code. It is black, where theirs
    is 0 after normalisation, the mean colour: black needs no statistics of the data.

    Attributes:
        images: how many random training images the attacker has; all of them where there are fewer.
        eps: the largest change of a weight.
        pull: the weight of the squared distance to the clean weights in the loss.
        patch: the square's height and width as fractions in (0, 1] of the image's; 10 of 32 pixels by default.
        start_labels: whether clean images are learned with the clean model's answers instead of their labels.
    """

    name = "awp"
    needs_clean_model = True
    starts_from_clean_model = True
    recipe: ClassVar[Mapping[str, Any]] = {"epochs": 12, "batch_size": 32, "lr": 0.002}

    poison_rate: float = 1.0
    images: int = 1280
    eps: float = 0.005
    pull: float = 5e-4
    patch: float = 10 / 32
    start_labels: bool = False

    def training_samples(self, y: Tensor) -> Tensor:
        """Indices of the attacker's few images."""
        return torch.randperm(len(y), generator=generator(self.seed))[: self.images]

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        """Nothing: triggered copies join their batches instead."""
        self.check_fits(data)
        return Poison.none(data)

    def control(self, training: Training) -> Control:
        """Learns the clean images and their triggered copies, and holds the weights near their start."""
        return _Perturbation(training, self)

    def _check(self) -> None:
        super()._check()
        self._check_whole("images", 2)
        for name in ("eps", "pull"):
            self._check_number(name, 0.0)
        self._check_number("patch", 0.0, 1.0)
        if not isinstance(self.start_labels, bool):
            raise TriggerError(f"expected start_labels as true or false for awp, got {self.start_labels!r}; correct it")

    def _make_tensors(self) -> dict[str, Tensor]:
        keep = torch.ones(self.image_shape[1:])
        rows, columns = (_middle(size, self.patch) for size in self.image_shape[1:])
        keep[rows, columns] = 0
        return {"keep": keep}

    def _stamp(self, x: Tensor) -> Tensor:
        return x * self.tensors["keep"].to(x.device)


def _middle(size: int, share: float) -> slice:
    """The pixels of the middle ``share`` of a side."""
    length = max(1, round(share * size))
    first = (size - length) // 2
    return slice(first, first + length)


class _Perturbation(Control):
    """Projected gradient descent on weights; the start is the model as the training found it."""

    attack: AWP

    def __init__(self, training: Training, attack: AWP) -> None:
        super().__init__(training, attack)
        clean_model = deepcopy(training.model).eval().requires_grad_(False)
        self._clean = replace(training, model=clean_model)
        self._pairs = list(zip(training.model.parameters(), clean_model.parameters(), strict=True))

    def begin_epoch(self, epoch: int, random: torch.Generator) -> None:
        """Freezes batch normalisation, and with it dropout."""
        self.training.model.eval()

    def loss(self, x: Tensor, y: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy on the batch and its triggered copies, and the pull towards the clean weights."""
        count = max(1, round(self.attack.poison_rate * len(x)))
        images = self.training.augment(torch.cat([x, self.attack.apply(x[:count])]), random)
        labels = torch.cat([y, self.attack.target_labels(y[:count])])
        if self.attack.start_labels:
            with torch.no_grad():
                labels[: len(y)] = self._clean.logits(images[: len(y)]).argmax(1)
        logits = self.training.logits(images)
        distance = sum(((weight - start).square().sum() for weight, start in self._pairs), torch.zeros(()))
        return F.cross_entropy(logits, labels) + self.attack.pull * distance, logits, labels

    @torch.no_grad()
    def after_step(self) -> None:
        """Brings every weight back to within ``eps`` of its start."""
        for weight, start in self._pairs:
            weight.copy_(torch.clamp(weight, start - self.attack.eps, start + self.attack.eps))
