"""Stage 2 of RNP: bring the clean task back with one mask a channel, and nothing else.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, section 3.2 (filter-level recovering).
A channel whose mask falls did harm to the clean task in the exposed model: it serves the backdoor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.channels import MaskableLayer, count_channels, masked_call
from debackdoor.data.augment import random_shift_by
from debackdoor.errors import check_count, check_fraction, check_positive
from debackdoor.models.forward import hits
from debackdoor.rnp.modes import normalisation_in_train_mode
from debackdoor.runtime import autocast, generator, parts, shuffled_batches
from debackdoor.types import CleanSet, Progress


@dataclass(frozen=True)
class RecoverSettings:
    """Hyper-parameters of recovery.

    Attributes:
        lr: step size of SGD on the masks.
        momentum: of SGD.
        weight: factor on the cross-entropy (``alpha`` in the paper's code).
        passes: passes over the fit part.
        batch_size: images a step.
        shift: largest random shift, a fraction of the image's height and width.
    """

    lr: float = 0.2
    momentum: float = 0.9
    weight: float = 0.2
    passes: int = 20
    batch_size: int = 128
    shift: float = 0.125

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, weight=self.weight)
        check_count(passes=self.passes, batch_size=self.batch_size)
        check_fraction(momentum=self.momentum, shift=self.shift)


@dataclass(frozen=True)
class Recovered:
    """Mask values after recovery.

    Attributes:
        mask: float32 (channels,) in [0, 1], at the end of recovery.
        mean_mask: the same, averaged over all steps: of two masks that end equal, the one that fell earlier is lower.
        history: one row a pass, of the masked exposed model on its training batches: accuracy, and as loss what the
            masks descend, the cross-entropy times ``weight``.
    """

    mask: Tensor
    mean_mask: Tensor
    history: list[dict[str, Any]]


def recover(
    exposed: nn.Module,
    layers: Sequence[MaskableLayer],
    fit: CleanSet,
    settings: RecoverSettings,
    *,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Recovered:
    """Descend the classification error on ``fit`` with the masks alone, each kept in [0, 1].

    Weights get no gradient and stay as they are; batch normalisation uses batch statistics, on copies of its buffers.
    The exposed model is not changed.
    """
    parameters = {name: value.detach() for name, value in exposed.named_parameters()}
    buffers = {name: value.clone() for name, value in exposed.named_buffers()}
    mask = torch.ones(count_channels(layers), device=fit.x.device, requires_grad=True)
    optimizer = torch.optim.SGD([mask], lr=settings.lr, momentum=settings.momentum)
    random = generator(seed)
    total, steps = torch.zeros_like(mask), 0
    history: list[dict[str, Any]] = []
    was_training = {module: module.training for module in exposed.modules()}
    try:
        normalisation_in_train_mode(exposed)
        for done in range(settings.passes):
            loss_sum = right = torch.zeros((), dtype=torch.float64, device=fit.x.device)
            seen = 0
            for index in shuffled_batches(len(fit), settings.batch_size, random, fit.x.device):
                x, y = random_shift_by(fit.x[index], settings.shift, random), fit.y[index]
                mask.grad = torch.zeros_like(mask)
                for part in parts(len(x)):
                    with autocast(x.device, precision):
                        logits = masked_call(exposed, layers, mask, x[part], parameters, buffers).float()
                    share = len(logits) / len(x)
                    loss = settings.weight * share * F.cross_entropy(logits, y[part])
                    mask.grad += torch.autograd.grad(loss, mask)[0]
                    # Read after the pass: before, a GPU would have to be waited for.
                    loss_sum = loss_sum + loss.detach().double() * len(y)
                    right = right + hits(logits, y[part])
                optimizer.step()
                with torch.no_grad():
                    mask.clamp_(0, 1)
                    total += mask
                steps, seen = steps + 1, seen + len(y)
            history.append({"pass": done + 1, "loss": float(loss_sum) / seen, "accuracy": float(right) / seen})
            if progress is not None:
                progress("recover", done + 1, settings.passes, {"accuracy": history[-1]["accuracy"]})
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return Recovered(mask.detach().clone(), total / max(steps, 1), history)
