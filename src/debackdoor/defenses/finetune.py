"""Fine-tuning on the clean set: what everybody tries first, and what a repaired model goes through later.

Settings as in Wu et al., "BackdoorBench", NeurIPS 2022 (SGD, cosine), with the 20 epochs of Li et al., "Neural
Attention Distillation", ICLR 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.defenses.tuning import Tuned, Tuning
from debackdoor.models.forward import logits_of
from debackdoor.runtime import autocast
from debackdoor.types import CleanSet, Progress, Step


@dataclass(frozen=True, kw_only=True)
class FineTuning(Tuning):
    """SGD on the labels of the clean set, all weights, the step size falling to 0 along a cosine."""

    name: ClassVar[str] = "ft"

    def _tune(self, model: nn.Module, fit: CleanSet, progress: Progress | None) -> Tuned:
        model.train()

        def backward(x: Tensor, y: Tensor) -> Tensor:
            with autocast(x.device, self.precision):
                logits = logits_of(model(x)).float()
            loss = F.cross_entropy(logits, y)
            loss.backward()
            return loss.detach()

        history = self._descend("fine-tune", model.parameters(), fit, backward, progress)
        step = Step("fine-tune", f"{self.epochs} epochs at a step size of {self.lr}", history[-1])
        return Tuned(model, {"fine-tune": history}, (step,))
