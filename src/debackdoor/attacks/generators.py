"""Networks that make a trigger from an image, and what trainings that learn one have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from debackdoor.attacks.base import Attack
from debackdoor.attacks.control import Control, Training
from debackdoor.errors import TriggerError
from debackdoor.runtime import generator

_BATCH = 16
_SMALLEST_SIDE = 8

WIDEST = 512
"""Channels that the first stage may have; a file that names more is damaged."""


class EncoderDecoder(nn.Module):
    """Three halvings and three doublings without skip connections (the generator of Nguyen and Tran, 2020).

    Takes images (N, channels, H, W) of at least 8x8 and returns unbounded numbers (N, outputs, H, W). ``width`` is the
    number of channels of the first stage; the deepest has four times as many.
    """

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            [_pair(channels, width, width), _pair(width, width * 2, width * 2), _pair(width * 2, width * 4, width * 4)]
        )
        self.middle = nn.Sequential(*_conv_norm(width * 4, width * 4), nn.ReLU())
        self.decoder = nn.ModuleList([_pair(width * 4, width * 4, width * 2), _pair(width * 2, width * 2, width)])
        self.last = nn.Sequential(*_conv_norm(width, width), nn.ReLU(), *_conv_norm(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for stage in self.encoder:
            x = stage(x)
            sizes.append(x.shape[2:])
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for stage in (*self.decoder, self.last):
            x = stage(F.interpolate(x, size=sizes.pop(), mode="bilinear"))
        return x


class UNet(nn.Module):
    """Three halvings and three doublings with skip connections (Ronneberger et al., MICCAI 2015).

    Takes images (N, channels, H, W) of at least 8x8 and returns unbounded numbers (N, outputs, H, W). ``width`` is the
    number of channels of the first stage; the deepest has eight times as many.
    """

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        sizes = [width, width * 2, width * 4]
        self.encoder = nn.ModuleList(
            [_pair(before, size, size) for before, size in zip([channels, *sizes], sizes, strict=False)]
        )
        self.middle = _pair(width * 4, width * 8, width * 8)
        self.decoder = nn.ModuleList([_pair(size * 3, size, size) for size in reversed(sizes)])
        self.last = nn.Sequential(*_conv_norm(width, outputs, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for stage in self.decoder:
            skip = skips.pop()
            x = stage(torch.cat([F.interpolate(x, size=skip.shape[2:], mode="bilinear"), skip], dim=1))
        return self.last(x)


def _pair(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*_conv_norm(inputs, hidden), nn.ReLU(), *_conv_norm(hidden, outputs), nn.ReLU())


def _conv_norm(inputs: int, outputs: int, kernel: int = 3) -> tuple[nn.Module, nn.Module]:
    # A bias would be undone by the normalisation.
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs, momentum=0.05)


def check_side(image_shape: tuple[int, int, int], name: str) -> None:
    """Refuses images that a generator cannot halve three times.

    Raises:
        TriggerError: if a side is shorter than 8 pixels; ``name`` is the attack's.
    """
    if min(image_shape[1:]) < _SMALLEST_SIDE:
        raise TriggerError(f"expected images of at least 8x8 for {name}, got {image_shape}; use larger ones")


def initial_weights(make: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    """The weights that a network of this file starts with, by name: torch's own distribution, from ``seed`` alone."""
    network = _without_weights(make).to_empty(device="cpu")
    random = generator(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=random)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return weights_of(network)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of all that decides what a network answers in eval mode: batch counters are left out."""
    return {
        name: value.detach().cpu().clone() for name, value in network.state_dict().items() if value.is_floating_point()
    }


@torch.no_grad()
def images_from(make: Callable[[], nn.Module], weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What the network ``make()`` answers in eval mode, with these weights, to images (N, C, H, W).

    The answer to an image has the same bits whatever stands beside it: libraries choose how to convolve by the size of
    the batch and its layout, so all images pass in batches of one size, filled up with zeros.
    """
    network = _without_weights(make).eval()
    placed = {name: value.to(x.device) for name, value in weights.items()}
    filling = x.new_zeros(-len(x) % _BATCH, *x.shape[1:])
    with torch.autocast(x.device.type, enabled=False):
        parts = [functional_call(network, placed, part) for part in torch.cat([x.contiguous(), filling]).split(_BATCH)]
    return torch.cat(parts)[: len(x)]


def _without_weights(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):  # nothing is drawn from torch's global generator there
        return make()


class GeneratorControl(Control):
    """A training in which a network that makes the trigger learns, and is fixed for the last epochs.

    Args:
        training: the victim and how it is trained.
        attack: what is built in; the network starts with its tensors, and they are what it has learned in the end.
        network: on the CPU.
        learns: the part of the network that learns; in eval mode once it is fixed.
        lr: of its Adam, whose betas are ``betas``.
        fixed_share: the last fraction of the epochs in which it is fixed: the last at least, but never the first, so
            that after a single epoch the victim has not learned the very trigger that is saved.
    """

    attack: Attack

    def __init__(
        self,
        training: Training,
        attack: Attack,
        network: nn.Module,
        learns: nn.Module,
        lr: float,
        betas: tuple[float, float],
        fixed_share: float,
    ) -> None:
        super().__init__(training, attack)
        network.load_state_dict(attack.tensors)
        self.network = network.to(training.device).requires_grad_(False).eval()
        self.learning = True
        self._learns = learns
        self._epochs = max(1, min(training.epochs - 1, round(training.epochs * (1 - fixed_share))))
        self._optimizer = torch.optim.Adam(learns.parameters(), lr, betas)

    def begin_epoch(self, epoch: int, random: torch.Generator) -> None:
        """Puts the learning part in train mode, or in eval mode for good."""
        self.learning = epoch < self._epochs
        self._learns.train(self.learning).requires_grad_(self.learning)

    def state(self) -> dict[str, Any]:
        """The network's weights and the state of its optimiser."""
        return {"network": weights_of(self.network), "optimizer": self._optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what ``state`` gave."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])

    def finish(self) -> None:
        """Puts the network's weights into the attack."""
        self.attack.tensors.update(weights_of(self.network))
