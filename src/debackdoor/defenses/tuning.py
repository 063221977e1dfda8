"""What methods that fine-tune share: the parts of the clean set, a random state of their own, one loop, the result."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.data import split_clean
from debackdoor.data.augment import random_shift_by
from debackdoor.defenses.base import Defense, accuracy_after, check_loss, differ, suspect_copy
from debackdoor.errors import check_count, check_fraction, check_positive
from debackdoor.models.copying import copied, same_gradients
from debackdoor.models.forward import accuracy, in_eval, predict
from debackdoor.runtime import generator, seeded, shuffled_batches
from debackdoor.types import CleanSet, Progress, RepairResult, Step

Rows = list[dict[str, Any]]
Backward = Callable[[Tensor, Tensor], Tensor]
"""Takes images and labels, leaves the gradients in the parameters and returns the loss."""


@dataclass(frozen=True)
class Tuned:
    """What a method makes of its copy of the model.

    Attributes:
        model: the copy, or another.
        history: numbers over time.
        steps: what was done.
        judges: images that it did not learn from, where it held out some itself.
    """

    model: nn.Module
    history: Mapping[str, Rows]
    steps: tuple[Step, ...]
    judges: CleanSet | None = None


@dataclass(frozen=True, kw_only=True)
class Tuning(Defense):
    """Everything around a method that trains weights on the clean set; a method writes ``_tune``.

    Images are shifted, but not mirrored as some of the methods were published with: signs and digits must not be.

    Attributes:
        lr: first step size of SGD; it falls to 0 along a cosine over the epochs unless a method says otherwise.
        momentum: of SGD.
        weight_decay: of SGD.
        epochs: passes over the fit part.
        batch_size: images a step.
        shift: largest random shift, a fraction of the image's height and width.
        holdout: share of the clean set that is not learned from and tells what the method costs; 0 learns from all.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 20
    batch_size: int = 64
    shift: float = 0.125
    holdout: float = 0.0

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_count(epochs=self.epochs, batch_size=self.batch_size)
        check_fraction(momentum=self.momentum, weight_decay=self.weight_decay, shift=self.shift, holdout=self.holdout)

    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        fit, judges = split_clean(clean, self.holdout, self.seed) if self.holdout else (clean, clean)
        suspect = suspect_copy(model, clean, self.precision)
        with seeded(self.seed, fit.x.device):
            tuned = self._tune(copied(suspect).requires_grad_(True), fit, progress)
        same_gradients(tuned.model, model)
        tuned.model.zero_grad()
        judges = judges if tuned.judges is None else tuned.judges
        before = accuracy(predict(suspect, judges.x, precision=self.precision), judges.y)
        rates = {"before": before, "after": accuracy_after(in_eval(tuned.model), judges, self.lr, self.precision)}
        changed = differ(suspect, tuned.model)
        return RepairResult(tuned.model, (), rates, None, tuned.history, tuned.steps, changed)

    @abstractmethod
    def _tune(self, model: nn.Module, fit: CleanSet, progress: Progress | None) -> Tuned:
        """Trains on ``fit``.

        Args:
            model: a copy in eval mode with gradients asked for, which may be changed and returned.
            fit: images to learn from.
            progress: called after every epoch.
        """

    def _lr(self, epoch: int) -> float:
        """The step size of an epoch, counted from 0."""
        return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def _descend(
        self,
        stage: str,
        parameters: Iterable[Tensor],
        fit: CleanSet,
        backward: Backward,
        progress: Progress | None,
        *,
        nesterov: bool = False,
    ) -> Rows:
        """SGD with the gradients that ``backward`` leaves; one row an epoch.

        Raises:
            ModelError: if the loss is no longer a finite number.
        """
        random, rows = generator(self.seed), Rows()
        optimizer = torch.optim.SGD(parameters, self.lr, self.momentum, 0.0, self.weight_decay, nesterov)
        for epoch in range(self.epochs):
            for group in optimizer.param_groups:
                group["lr"] = self._lr(epoch)
            total, seen = torch.zeros((), dtype=torch.float64, device=fit.x.device), 0
            for index in shuffled_batches(len(fit), self.batch_size, random, fit.x.device):
                x = random_shift_by(fit.x[index], self.shift, random)
                optimizer.zero_grad(set_to_none=True)
                loss = backward(x, fit.y[index])
                optimizer.step()
                total, seen = total + loss.detach().double() * len(index), seen + len(index)
            loss_sum = total.item()  # once an epoch: a GPU has to be waited for
            check_loss(loss_sum, f"epoch {epoch + 1} of {stage}", self.lr)
            rows.append({"epoch": epoch + 1, "loss": loss_sum / seen, "lr": self._lr(epoch)})
            if progress is not None:
                progress(stage, epoch + 1, self.epochs, {"loss": loss_sum / seen})
        return rows
