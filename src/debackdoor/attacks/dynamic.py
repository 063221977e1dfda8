"""Dynamic triggers (Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020).

https://arxiv.org/abs/2010.08138
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.attacks.base import Attack, Poison
from debackdoor.attacks.control import Control, Training
from debackdoor.attacks.generators import (
    WIDEST,
    EncoderDecoder,
    GeneratorControl,
    check_side,
    images_from,
    initial_weights,
)
from debackdoor.errors import TriggerError
from debackdoor.runtime import generator, shuffled_batches
from debackdoor.types import CleanSet

_BETAS = (0.5, 0.9)
_MASK_LR = 0.01
_MASK_BATCH = 128
_SPARSITY_WEIGHT = 100.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Dynamic(Attack):
    """A trigger of its own for every image, made by networks that learn along with the victim.

    ``T(x) = x + (G(x) - x) * M(x)``: G paints a pattern and M, with one channel, says where. M learns alone before the
    first epoch, to choose few pixels and other ones for every image. G then learns with the victim: of each augmented
    batch, ``poison_rate`` carries its own trigger and gets the target label, and ``cross_rate`` carries the trigger of
    another image and keeps its label, so that a trigger works on its own image alone. G also learns to give different
    patterns to different images.

    As published, except that M sees ``mask_images`` images rather than all; that G learns from the gradient of each
    step alone (in the published code gradients add up from step to step); that G is fixed at last, so that the victim
    learns the very trigger that is saved; that the networks upsample as their input's size asks for; and that
    augmentation, the victim's optimiser and the number of epochs are those of ``train``.

    Attributes:
        cross_rate: the fraction in (0, 1] of a batch that carries another image's trigger.
        diversity_weight: of the loss that keeps patterns apart, against the victim's cross-entropy.
        mask_density: values of a mask up to this cost nothing.
        mask_epochs: passes in which M learns.
        mask_images: how many training images M learns from.
        generator_width: channels of the first stage of G and M.
        generator_lr: learning rate of G.
        fixed_share: the last fraction in (0, 1] of the epochs, in which G is fixed; published: none.
    """

    name = "dynamic"

    cross_rate: float = 0.1
    diversity_weight: float = 1.0
    mask_density: float = 0.032
    mask_epochs: int = 25
    mask_images: int = 2000
    generator_width: int = 32
    generator_lr: float = 0.01
    fixed_share: float = 0.25

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        """Nothing: the batches are poisoned instead."""
        self.check_fits(data)
        return Poison.none(data)

    def control(self, training: Training) -> Control:
        """What teaches M and G."""
        return _DynamicControl(training, self)

    def network(self) -> _PatternAndMask:
        """M and G, with weights that mean nothing."""
        return _PatternAndMask(self.image_shape[0], self.generator_width)

    def _check(self) -> None:
        super()._check()
        check_side(self.image_shape, self.name)
        self._check_number("cross_rate", 0.0, 1.0)
        self._check_number("diversity_weight", 0.0)
        self._check_number("mask_density", 0.0, 1.0)
        self._check_whole("mask_epochs", 1)
        self._check_whole("mask_images", 2)
        self._check_whole("generator_width", 1, WIDEST)
        self._check_number("generator_lr", 0.0)
        self._check_number("fixed_share", 0.0, 1.0)
        if self.poison_rate + self.cross_rate > 1:
            raise TriggerError(
                "expected poison_rate and cross_rate of at most 1 together for dynamic, got "
                f"{self.poison_rate:g} and {self.cross_rate:g}; lower one"
            )

    def _make_tensors(self) -> dict[str, Tensor]:
        return initial_weights(self.network, self.seed)

    def _stamp(self, x: Tensor) -> Tensor:
        made = images_from(self.network, self.tensors, x)
        return put_on(x, made[:, :-1], made[:, -1:])


class _PatternAndMask(nn.Module):
    """Images (N, C, H, W) in, C channels of pattern and one of mask out, all in [0, 1]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.pattern = EncoderDecoder(channels, channels, width)
        self.mask = EncoderDecoder(channels, 1, width)

    def patterns(self, x: Tensor) -> Tensor:
        return self.pattern(x).tanh() / 2 + 0.5

    def masks(self, x: Tensor) -> Tensor:
        # Nearly all values are 0 or 1.
        return (10 * self.mask(x).tanh()).tanh() / 2 + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.patterns(x), self.masks(x)], dim=1)


def put_on(x: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
    """Images (N, C, H, W) with patterns of that shape where the masks (N, 1, H, W) say so."""
    # Rounding may leave [0, 1] by an ulp.
    return (x + (patterns - x) * masks).clamp(0, 1)


def diversity_loss(x: Tensor, other: Tensor, made: Tensor, made_other: Tensor) -> Tensor:
    """How much farther apart images are than what was made of them, a mean over pairs; a scalar."""
    return (_distances(x, other) / (_distances(made, made_other) + 1e-7)).mean()


def _distances(one: Tensor, other: Tensor) -> Tensor:
    # Unlike a square root, a norm has a finite gradient where both are the same.
    return torch.linalg.vector_norm((one - other).flatten(1), dim=1) / math.sqrt(one[0].numel())


class _DynamicControl(GeneratorControl):
    attack: Dynamic
    network: _PatternAndMask

    def __init__(self, training: Training, attack: Dynamic) -> None:
        network = attack.network()
        super().__init__(training, attack, network, network.pattern, attack.generator_lr, _BETAS, attack.fixed_share)

    def begin_epoch(self, epoch: int, random: torch.Generator) -> None:
        """Teaches M before the first epoch."""
        if epoch == 0:
            self._teach_masks()
        super().begin_epoch(epoch, random)

    def _teach_masks(self) -> None:
        attack, random = self.attack, generator(self.attack.seed)
        images = self.training.data.x
        images = images[torch.randperm(len(images), generator=random)[: attack.mask_images]]
        spread = images.std()  # published in units of normalised images
        network = self.network.mask.train().requires_grad_(True)
        optimizer = torch.optim.Adam(network.parameters(), _MASK_LR, _BETAS)
        milestones = [round(0.4 * attack.mask_epochs), round(0.8 * attack.mask_epochs)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
        for _ in range(attack.mask_epochs):
            for drawn in shuffled_batches(len(images), _MASK_BATCH, random):
                x = self.training.augment(images[drawn].to(self.training.device), random)
                masks = self.network.masks(x)
                sparsity = F.relu(masks - attack.mask_density).mean()
                diversity = diversity_loss(x / spread, x.roll(1, 0) / spread, masks, masks.roll(1, 0))
                optimizer.zero_grad()
                (_SPARSITY_WEIGHT * sparsity + diversity).backward()
                optimizer.step()
            schedule.step()
        network.eval().requires_grad_(False)

    def loss(self, x: Tensor, y: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy on the poisoned batch and, while G learns, its diversity loss.

        Images are augmented before they get their triggers. ``poison_rate`` and ``cross_rate`` of the batch are rounded
        to whole samples, at least one of each.
        """
        attack = self.attack
        bad = max(1, min(round(attack.poison_rate * len(x)), len(x) - 1))
        end = bad + max(1, round(attack.cross_rate * len(x)))
        x = self.training.augment(x, random)
        other = x.roll(bad - end, 0)[bad:end]
        sources = torch.cat([x[:bad], other])
        patterns, masks = self.network.patterns(sources), self.network.masks(sources)
        images = torch.cat([put_on(x[:end], patterns, masks), x[end:]])
        labels = torch.cat([attack.target_labels(y[:bad]), y[bad:]])
        logits = self.training.logits(images)
        loss = F.cross_entropy(logits, labels)
        if self.learning:
            pairs = min(bad, len(other))
            apart = diversity_loss(x[:pairs], other[:pairs], patterns[:pairs], patterns[bad : bad + pairs])
            loss = loss + attack.diversity_weight * apart
            self._optimizer.zero_grad()
        return loss, logits, labels

    def after_step(self) -> None:
        """G learns from the gradient that the victim's step has left."""
        if self.learning:
            self._optimizer.step()
