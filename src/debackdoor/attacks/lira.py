"""LIRA (Doan et al., "LIRA: Learnable, Imperceptible and Robust Backdoor Attacks", ICCV 2021).

https://openaccess.thecvf.com/content/ICCV2021/html/Doan_LIRA_Learnable_Imperceptible_and_Robust_Backdoor_Attacks_ICCV_2021_paper.html
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.attacks.base import Attack, Poison
from debackdoor.attacks.control import Control, Training
from debackdoor.attacks.generators import WIDEST, GeneratorControl, UNet, check_side, images_from, initial_weights
from debackdoor.errors import TriggerError
from debackdoor.types import CleanSet


@dataclass(frozen=True, kw_only=True, eq=False)
class LIRA(Attack):
    """An invisible disturbance of its own for every image, from a network that learns to fool the victim as it learns.

    ``T(x) = clip(x + epsilon * tanh(G(x)))``. In the first stage a network G' learns, batch by batch, to disturb images
    so that the victim answers the target label, and the victim learns clean images and their twins T(x) with the
    target label; G, which makes the twins, becomes G' as each epoch begins. In the second stage G is fixed.

    As published, except that ``poison_rate`` of a batch rather than all of it gets twins (a step then costs about two
    plain ones instead of four), so that clean images and twins pass the victim together, that the victim is in eval
    mode while G' learns, which leaves its statistics alone, and that one epsilon and one learning rate serve both
    stages. The published stages take 50 and 250 to 500 epochs of the victim with learning rate 1e-4 for G'.

    Attributes:
        epsilon: the largest change of a pixel. Published in units of normalised images, whose standard deviation is
            about a quarter of the pixel range: 0.1 in the first stage and 0.01 in the second, here 0.025 and 0.0025.
        alpha: weight in (0, 1) of the clean images' loss; the twins' has the rest.
        generator_width: channels of the first stage of G; the authors' code has 64.
        generator_lr: learning rate of G'.
        fixed_share: the last fraction in (0, 1] of the epochs, the second stage.
    """

    name = "lira"

    poison_rate: float = 0.4
    epsilon: float = 0.025
    alpha: float = 0.5
    generator_width: int = 32
    generator_lr: float = 1e-3
    fixed_share: float = 1 / 3

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        """Nothing: the batches are poisoned instead."""
        self.check_fits(data)
        return Poison.none(data)

    def control(self, training: Training) -> Control:
        """What teaches G."""
        return _LiraControl(training, self)

    def network(self) -> UNet:
        """G, with weights that mean nothing."""
        return UNet(self.image_shape[0], self.image_shape[0], self.generator_width)

    def disturb(self, x: Tensor, made: Tensor) -> Tensor:
        """T(x) for images (N, C, H, W), from what G has made of them."""
        return (x + self.epsilon * made.tanh()).clamp(0, 1)

    def _check(self) -> None:
        super()._check()
        check_side(self.image_shape, self.name)
        self._check_number("epsilon", 0.0, 1.0)
        self._check_number("alpha", 0.0, 1.0)
        if self.alpha == 1:
            raise TriggerError("expected alpha below 1 for lira, got 1, with which no backdoor is learned; lower it")
        self._check_whole("generator_width", 1, WIDEST)
        self._check_number("generator_lr", 0.0)
        self._check_number("fixed_share", 0.0, 1.0)

    def _make_tensors(self) -> dict[str, Tensor]:
        return initial_weights(self.network, self.seed)

    def _stamp(self, x: Tensor) -> Tensor:
        return self.disturb(x, images_from(self.network, self.tensors, x))


class _LiraControl(GeneratorControl):
    attack: LIRA

    def __init__(self, training: Training, attack: LIRA) -> None:
        network = attack.network()
        super().__init__(training, attack, network, network, attack.generator_lr, (0.9, 0.999), attack.fixed_share)

    def begin_epoch(self, epoch: int, random: torch.Generator) -> None:
        """G becomes G'."""
        super().begin_epoch(epoch, random)
        self._used = deepcopy(self.network).eval().requires_grad_(False)

    def loss(self, x: Tensor, y: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted cross-entropy on the clean batch and on its twins, after a step of G' in the first stage.

        Images are augmented before they are disturbed. ``poison_rate`` of the batch is rounded to whole samples, at
        least the two that normalisation needs.
        """
        attack, count = self.attack, max(2, round(self.attack.poison_rate * len(x)))
        x = self.training.augment(x, random)
        sources, wanted = x[:count], attack.target_labels(y[:count])
        if self.learning:
            self._teach(sources, wanted)
        logits = self.training.logits(torch.cat([x, attack.disturb(sources, self._used(sources))]))
        clean, twins = logits[: len(x)], logits[len(x) :]
        loss = attack.alpha * F.cross_entropy(clean, y) + (1 - attack.alpha) * F.cross_entropy(twins, wanted)
        return loss, logits, torch.cat([y, wanted])

    def _teach(self, x: Tensor, wanted: Tensor) -> None:
        """A step of G' against the victim, of which nothing changes."""
        self.training.model.eval()
        loss = F.cross_entropy(self.training.logits(self.attack.disturb(x, self.network(x))), wanted)
        self.training.model.train()
        self._optimizer.zero_grad()
        loss.backward(inputs=list(self.network.parameters()))
        self._optimizer.step()
