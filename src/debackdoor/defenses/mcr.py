"""Mode connectivity repair (MCR).

Zhao et al., "Bridging Mode Connectivity in Loss Landscapes and Adversarial Robustness", ICLR 2020,
https://arxiv.org/abs/2005.00060: two models are joined by a curve in weight space along which the clean task stays
learned, and a model on it is taken. The curve is that of Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast
Ensembling of DNNs", NeurIPS 2018. The paper joins two backdoored models; with a single one, its fine-tuned copy is the
other end (Wu et al., "BackdoorBench", NeurIPS 2022).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from debackdoor.data import split_clean
from debackdoor.data.augment import random_shift_by
from debackdoor.defenses.finetune import FineTuning
from debackdoor.defenses.levels import BUDGET, HOLDOUT
from debackdoor.defenses.tuning import Rows, Tuned, Tuning
from debackdoor.errors import check_count, check_fraction, check_positive
from debackdoor.models.copying import copied
from debackdoor.models.forward import accuracy, in_eval, logits_of, predict
from debackdoor.models.stateless import call_with
from debackdoor.rnp.modes import normalisation_in_train_mode
from debackdoor.runtime import autocast, generator, shuffled_batches
from debackdoor.types import CleanSet, Progress, Step

Weights = Mapping[str, Tensor]

PLACES = tuple(place / 20 for place in range(1, 11))
"""On the way to the middle of the curve, which is the furthest from both of its ends."""


@dataclass(frozen=True, kw_only=True)
class MCR(Tuning):
    """A model on the curve from the suspect model to its fine-tuned copy.

    Published for the curve: 600 epochs at 0.015 or 0.03; BackdoorBench 100 at 3e-5 in 20 steps each, with which the
    middle point stays where it started, between two models that are close to one another. A few hundred images give
    fewer steps an epoch, so the defaults are 100 epochs at 0.03. At t = 0.1 the suspect model still makes up 0.81 of
    the weights: with ends so close, a backdoor that fine-tuning leaves in place can survive there.

    Attributes:
        t: which: 0 is the suspect model, 1 the fine-tuned copy (published: 0.1); None takes the largest of its places
            up to the middle within the budget, on a quarter of the images, which do not teach then.
        budget: how far accuracy on these may fall, a fraction.
        lr: step size with which the curve's middle point is trained.
        epochs: how long.
        tuning_lr: first step size with which the other end is fine-tuned.
        tuning_epochs: how long.
    """

    name: ClassVar[str] = "mcr"

    t: float | None = 0.1
    budget: float = BUDGET
    lr: float = 0.03
    epochs: int = 100
    tuning_lr: float = 0.01
    tuning_epochs: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(t=self.t, budget=self.budget)
        check_positive(tuning_lr=self.tuning_lr)
        check_count(tuning_epochs=self.tuning_epochs)

    def _tune(self, model: nn.Module, fit: CleanSet, progress: Progress | None) -> Tuned:
        fit, judges = (fit, None) if self.t is not None else split_clean(fit, HOLDOUT, self.seed)
        suspect = copied(model)
        tuning = FineTuning(
            lr=self.tuning_lr, epochs=self.tuning_epochs, batch_size=self.batch_size, shift=self.shift,
            seed=self.seed, precision=self.precision,
        )  # fmt: skip
        tuned = tuning(model, fit, progress=progress)
        start, end = (
            {name: value.detach().clone() for name, value in m.named_parameters()} for m in (model, tuned.model)
        )
        middle, history = self._connect(model, start, end, fit, progress)

        def at(t: float) -> nn.Module:
            with torch.no_grad():
                for name, value in on_curve(start, middle, end, t).items():
                    model.get_parameter(name).copy_(value)
            self._measure_statistics(model, fit)
            return in_eval(model)

        t = self.t if judges is None else self._furthest(suspect, at, judges)
        steps = (
            Step("fine-tune", f"the other end, {self.tuning_epochs} epochs", tuned.steps[0].numbers),
            Step("connect", f"{self.epochs} epochs, {_taken(t)}", history[-1]),
        )
        return Tuned(suspect if t is None else at(t), {**tuned.history, self.name: history}, steps, judges)

    def _connect(
        self, model: nn.Module, start: Weights, end: Weights, fit: CleanSet, progress: Progress | None
    ) -> tuple[Weights, Rows]:
        """The curve's middle point, trained at places of the curve by chance."""
        middle = {name: ((value + end[name]) / 2).requires_grad_() for name, value in start.items()}
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        places = generator(self.seed)
        model.train()

        def backward(x: Tensor, y: Tensor) -> Tensor:
            t = torch.rand((), generator=places).item()
            with autocast(x.device, self.precision):
                here = {**buffers, **on_curve(start, middle, end, t)}
                logits = logits_of(call_with(model, here, x)).float()
            loss = F.cross_entropy(logits, y)
            loss.backward()
            return loss.detach()

        return middle, self._descend(self.name, middle.values(), fit, backward, progress)

    def _furthest(self, suspect: nn.Module, at: Callable[[float], nn.Module], judges: CleanSet) -> float | None:
        """The largest place within the budget; None where even the smallest costs more."""

        def right(model: nn.Module) -> float:
            return accuracy(predict(model, judges.x, precision=self.precision), judges.y)

        before = right(suspect)
        # A fall of exactly the budget is within it, whatever the last bit of the difference says.
        return next((t for t in reversed(PLACES) if before - right(at(t)) <= self.budget + 1e-9), None)

    @torch.no_grad()
    def _measure_statistics(self, model: nn.Module, fit: CleanSet) -> None:
        """Replaces running means and variances, which are another model's, by the averages over one pass.

        Its images are shifted as those are that the curve is trained on: networks store the statistics of such.
        """
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        kept = [(norm, norm.momentum, copy.deepcopy(norm.num_batches_tracked)) for norm in norms]
        if not kept:
            return
        normalisation_in_train_mode(model)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average
        random = generator(self.seed)
        for index in shuffled_batches(len(fit), self.batch_size, random, fit.x.device):
            with autocast(fit.x.device, self.precision):
                model(random_shift_by(fit.x[index], self.shift, random))
        for norm, momentum, tracked in kept:
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def _taken(t: float | None) -> str:
    return "and the suspect model kept: every place costs more than the budget" if t is None else f"taken at t = {t}"


def on_curve(start: Weights, middle: Weights, end: Weights, t: float) -> dict[str, Tensor]:
    """Weights at ``t`` in [0, 1]: ``(1 - t)^2 start + 2 t (1 - t) middle + t^2 end``, a Bezier curve."""
    return {
        name: (1 - t) ** 2 * value + 2 * t * (1 - t) * middle[name] + t**2 * end[name] for name, value in start.items()
    }
