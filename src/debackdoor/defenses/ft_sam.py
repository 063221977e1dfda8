"""Fine-tuning with sharpness-aware minimisation (FT-SAM).

Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023,
https://arxiv.org/abs/2304.11823. Weights take the step that would lower the error where it is worst nearby. "Nearby" is
measured in units of each weight (Kwon et al., "ASAM", ICML 2021), so large weights, where backdoors tend to sit, are
pushed furthest and shrink, while plain fine-tuning stays where it started.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.defenses.tuning import Tuned, Tuning
from debackdoor.errors import check_fraction, check_positive
from debackdoor.models.forward import logits_of
from debackdoor.models.stateless import call_with
from debackdoor.runtime import autocast
from debackdoor.types import CleanSet, Progress, Step


@dataclass(frozen=True, kw_only=True)
class FTSAM(Tuning):
    """SGD with the gradients at the worst point nearby, all weights.

    Published: SGD 0.01, 0.9, 5e-4, batches of 256 out of 2,500 images, 100 epochs on CIFAR-10 (50 on GTSRB). A few
    hundred images are learned by heart long before that, so the defaults are 20 epochs in batches of 64, those of
    :class:`FineTuning`: whatever is better than there is better for the sharpness alone. The step size falls along a
    cosine over the epochs; BackdoorBench steps it after every batch, so that it swings.

    Attributes:
        rho: how far away the worst point is looked for, relative to the weights (published: 2, on GTSRB 8).
        smoothing: of the labels, a fraction (published: 0.1, on GTSRB 0).
    """

    name: ClassVar[str] = "ft-sam"

    rho: float = 2.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(rho=self.rho)
        check_fraction(smoothing=self.smoothing)

    def _tune(self, model: nn.Module, fit: CleanSet, progress: Progress | None) -> Tuned:
        model.train()

        def loss_of(x: Tensor, y: Tensor, buffers: dict[str, Tensor]) -> Tensor:
            with autocast(x.device, self.precision):
                logits = logits_of(call_with(model, buffers, x.clone())).float()  # it may work in place
            return F.cross_entropy(logits, y, label_smoothing=self.smoothing)

        def backward(x: Tensor, y: Tensor) -> Tensor:
            loss = loss_of(x, y, {})
            loss.backward()
            here = [parameter for parameter in model.parameters() if parameter.grad is not None]
            kept = [parameter.detach().clone() for parameter in here]
            moves = perturbation(kept, [parameter.grad for parameter in here], self.rho)
            _move(here, [weight + move for weight, move in zip(kept, moves, strict=True)])
            model.zero_grad(set_to_none=True)
            # Statistics belong to the weights that are kept, so the second pass updates copies of them.
            loss_of(x, y, {name: value.clone() for name, value in model.named_buffers()}).backward()
            _move(here, kept)
            return loss.detach()

        history = self._descend(self.name, model.parameters(), fit, backward, progress)
        step = Step("fine-tune", f"{self.epochs} epochs against the worst case within {self.rho}", history[-1])
        return Tuned(model, {self.name: history}, (step,))


def perturbation(weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rho: float) -> list[Tensor]:
    """Where the loss rises most, for a step of length ``rho`` in units of the weights.

    With weights w and gradients g this is ``rho * w^2 g / ||w g||``, the norm over all tensors together (ASAM, equation
    6, for an operator that multiplies by ``|w|``); a weight of 0 stays.
    """
    known = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    norm = torch.stack([(w * g).norm() for w, g in zip(weights, known, strict=True)]).norm()
    return [rho * w.square() * g / (norm + 1e-12) for w, g in zip(weights, known, strict=True)]


@torch.no_grad()
def _move(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
