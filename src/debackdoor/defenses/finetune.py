"""Fine-tuning on the clean set: what everybody tries first, and what a repaired model goes through later.

Settings as in Wu et al., "BackdoorBench", NeurIPS 2022 (SGD, cosine), with the 20 epochs of Li et al., "Neural
Attention Distillation", ICLR 2021.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from debackdoor.data import split_clean
from debackdoor.data.augment import random_shift
from debackdoor.defenses.base import Defense
from debackdoor.errors import check_positive
from debackdoor.models.forward import accuracy, logits_of, predict
from debackdoor.runtime import autocast, generator, shuffled_batches
from debackdoor.types import CleanSet, Progress, RepairResult, Step


@dataclass(frozen=True, kw_only=True)
class FineTuning(Defense):
    """SGD on the labels of the clean set, all weights, the step size falling to 0 along a cosine.

    Attributes:
        lr: first step size.
        momentum: of SGD.
        weight_decay: of SGD.
        epochs: passes over the fit part.
        batch_size: images a step.
        shift: largest random shift, a fraction of the image's width.
        holdout: share of the clean set that is not learned from and tells what fine-tuning costs; 0 learns from all.
    """

    name: ClassVar[str] = "ft"

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 20
    batch_size: int = 64
    shift: float = 0.125
    holdout: float = 0.0

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, epochs=self.epochs, batch_size=self.batch_size)

    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        fit, judges = split_clean(clean, self.holdout, self.seed) if self.holdout else (clean, clean)
        tuned = copy.deepcopy(model).requires_grad_(True)
        # Dropout draws from the global generator; it is set for this and then put back.
        with torch.random.fork_rng(devices=[fit.x.device] if fit.x.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            history = self._train(tuned, fit, progress)
        for name, parameter in model.named_parameters():
            tuned.get_parameter(name).requires_grad_(parameter.requires_grad)
        before, after = (
            accuracy(predict(m, judges.x, precision=self.precision), judges.y)
            for m in (copy.deepcopy(model).eval(), tuned.eval())
        )
        step = Step("fine-tune", f"{self.epochs} epochs at a step size of {self.lr}", {"accuracy": after})
        rates = {"before": before, "after": after}
        return RepairResult(tuned, (), rates, None, {"fine-tune": history}, (step,), changed=True)

    def _train(self, model: nn.Module, fit: CleanSet, progress: Progress | None) -> list[dict[str, Any]]:
        random, history = generator(self.seed), list[dict[str, Any]]()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        model.train()
        for epoch in range(self.epochs):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
            loss_sum = seen = 0.0
            for index in shuffled_batches(len(fit), self.batch_size, random):
                x = random_shift(fit.x[index], round(self.shift * fit.x.shape[-1]), random)
                with autocast(x.device, self.precision):
                    logits = logits_of(model(x)).float()
                loss = F.cross_entropy(logits, fit.y[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                loss_sum, seen = loss_sum + loss.item() * len(index), seen + len(index)
            history.append({"epoch": epoch + 1, "loss": loss_sum / seen})
            if progress is not None:
                progress("fine-tune", epoch + 1, self.epochs, {"loss": loss_sum / seen})
        return history
