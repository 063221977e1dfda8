"""Stage 1 of RNP: make the model forget its clean task, so that what else it learnt stands alone.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, section 3.2 (neuron-level unlearning).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.data.augment import random_shift_by
from debackdoor.errors import check_positive
from debackdoor.models.copying import copied
from debackdoor.models.forward import accuracy, hits, in_eval, label_shares, logits_of, predict
from debackdoor.rnp.modes import normalisation_in_train_mode, require_norm_gradients
from debackdoor.runtime import autocast, generator, parts, shuffled_batches
from debackdoor.types import CleanSet, Progress

STILL_KNOWN = 0.75
"""Where more than this part of the accuracy is left, the answers are spread as the images' labels are."""


@dataclass(frozen=True)
class Unlearned:
    """What unlearning ends with.

    Attributes:
        model: the exposed model, a new object in eval mode.
        reason: why it stopped: ``forgotten`` (accuracy at or below the target), ``piled up`` (the answers had gathered
            on one label and begun to spread again), ``steps`` (none left) or ``stuck`` (no step was small enough to
            keep accuracy from falling too far at once).
        accuracy: of the exposed model on the images of a check, eval mode, a fraction.
        label_shares: how its answers on these spread over the labels, K fractions.
        history: one row a check: step, loss, accuracy, lr, label_shares, and whether the steps were taken back.
    """

    model: nn.Module
    reason: str
    accuracy: float
    label_shares: list[float]
    history: list[dict[str, Any]]

    @property
    def forgot(self) -> bool:
        """Whether the clean task was unlearned; else nothing is exposed."""
        return self.reason not in ("steps", "stuck")


@dataclass(frozen=True, kw_only=True)
class UnlearnSettings:
    """Hyper-parameters of unlearning.

    Attributes:
        lr: step size of SGD; halved whenever accuracy falls by more than ``largest_fall`` between two checks.
        momentum: of SGD.
        weight_decay: of SGD.
        clip: largest gradient norm, applied after backward; None clips nothing.
        stop_accuracy: unlearning ends at this accuracy in a check; None is a tenth above chance, 1 / K.
        past_peak: unlearning ends when, with half of the accuracy gone, the largest label share has fallen this far
            below its peak, with the model as it was at the peak; None goes on.
        check_every: steps between two checks; None checks once a pass.
        checked: images of the fit part that a check asks at most: a large fit part tells no more, and takes longer.
        largest_fall: how far accuracy may fall between two checks before the steps are taken back; 1 never takes back.
        max_passes: passes over the fit part at most,
        least_steps: unless they are fewer steps than this: a small fit part needs as many steps as a large one.
        batch_size: images a step.
        shift: largest random shift, a fraction of the image's height and width.
        decay_at: passes after which the step size is divided by ten.
        norm_only: whether the scales and shifts of normalisation layers alone learn.
        running: whether the accuracy that ends it is the average over the steps since the last check, in train mode, as
            in the authors' code; else it is that of the check, in eval mode.
    """

    lr: float = 0.002
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = 20.0
    stop_accuracy: float | None = None
    past_peak: float | None = 0.1
    check_every: int | None = 2
    checked: int = 512
    largest_fall: float = 0.3
    max_passes: int = 60
    least_steps: int = 240
    batch_size: int = 128
    shift: float = 0.125
    decay_at: tuple[int, ...] = ()
    norm_only: bool = False
    running: bool = False

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, max_passes=self.max_passes, batch_size=self.batch_size, clip=self.clip)
        check_positive(check_every=self.check_every, checked=self.checked)


def unlearn(
    model: nn.Module,
    fit: CleanSet,
    settings: UnlearnSettings,
    *,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Unlearned:
    """Climbs the classification error on ``fit`` with every weight, until the clean task is forgotten.

    Batch normalisation runs in train mode and dropout is off: with frozen statistics the same loss is reached by a
    model that has lost the backdoor too. The caller's model is not changed.
    """
    climb = _Climb(model, fit, settings, seed, precision)
    limit = max(settings.max_passes * climb.steps_a_pass, settings.least_steps)
    reason = None
    while reason is None:
        climb.advance(settings.check_every or climb.steps_a_pass)
        climb.check()
        reason = climb.reason_to_stop(limit)
        if progress is not None:
            progress("unlearn", climb.steps, limit, {"accuracy": climb.now.accuracy})
    end = climb.peak if reason == "piled up" and climb.peak is not None else climb.now
    climb.model.load_state_dict(end.weights)
    return Unlearned(in_eval(climb.model), reason, end.accuracy, end.shares, climb.history)


@dataclass(frozen=True)
class _State:
    """The model at one check."""

    weights: dict[str, Tensor]
    accuracy: float
    shares: list[float]
    finite: bool

    @property
    def largest(self) -> float:
        return max(self.shares)


class _Climb:
    """Gradient ascent that can go back to the last good check."""

    def __init__(self, model: nn.Module, fit: CleanSet, settings: UnlearnSettings, seed: int, precision: str) -> None:
        self.model = copied(model).requires_grad_(not settings.norm_only)
        if settings.norm_only:
            require_norm_gradients(self.model)
        self.learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.fit, self.settings, self.precision = fit, settings, precision
        self.random = generator(seed)
        self.asked = fit.subset(torch.randperm(len(fit), generator=generator(seed))[: settings.checked].sort().values)
        self.steps_a_pass = len(shuffled_batches(len(fit), settings.batch_size, generator(seed)))
        self.queue: list[Tensor] = []
        self.steps, self.lr = 0, settings.lr
        self.loss = torch.zeros((), device=fit.x.device)  # of the last step; only a check reads it
        self.history: list[dict[str, Any]] = []
        self.right, self.seen = torch.zeros((), dtype=torch.int64, device=fit.x.device), 0
        self.now = self._measure()
        self.known = self.reached = self.now.accuracy
        self.peak: _State | None = None
        self._restart()

    def _measure(self) -> _State:
        logits = predict(in_eval(self.model), self.asked.x, precision=self.precision)
        weights = copy.deepcopy(self.model.state_dict())
        return _State(weights, accuracy(logits, self.asked.y), label_shares(logits), bool(torch.isfinite(logits).all()))

    def _restart(self) -> None:
        """A fresh optimiser: momentum from a direction that overshot would overshoot again."""
        s = self.settings
        self.optimizer = torch.optim.SGD(self.learning, lr=self.lr, momentum=s.momentum, weight_decay=s.weight_decay)

    def advance(self, count: int) -> None:
        normalisation_in_train_mode(self.model)
        for _ in range(count):
            if not self.queue:
                self.queue = shuffled_batches(len(self.fit), self.settings.batch_size, self.random, self.fit.x.device)
            self._step(self.queue.pop())
            self.steps += 1
            if self.steps in (passes * self.steps_a_pass for passes in self.settings.decay_at):
                self._set_lr(self.lr / 10)

    def _step(self, index: Tensor) -> None:
        x = random_shift_by(self.fit.x[index], self.settings.shift, self.random)
        y, total = self.fit.y[index], torch.zeros_like(self.loss)
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts(len(x)):
            with autocast(x.device, self.precision):
                logits = logits_of(self.model(x[part])).float()
            loss = F.cross_entropy(logits, y[part]) * (len(logits) / len(x))
            (-loss).backward()
            if self.settings.running:
                self.right += hits(logits.detach(), y[part])
                self.seen += len(logits)
            total += loss.detach()
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self.learning, self.settings.clip)
        self.optimizer.step()
        self.loss = total

    def _set_lr(self, lr: float) -> None:
        self.lr = lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def check(self) -> None:
        """Measures, and takes the last steps back with half the step size where accuracy fell too far at once."""
        new, loss = self._measure(), self.loss.item()
        over_the_pass = int(self.right) / self.seen if self.settings.running else new.accuracy
        self.right.zero_()
        self.seen = 0
        broken = not (new.finite and math.isfinite(loss))
        overshot = broken or self.now.accuracy - new.accuracy > self.settings.largest_fall
        self.history.append(
            {
                "step": self.steps,
                "loss": loss,
                "accuracy": new.accuracy,
                "lr": self.lr,
                "label_shares": new.shares,
                "taken_back": overshot,
            }
        )
        if overshot:
            self.model.load_state_dict(self.now.weights)
            self.lr /= 2
            self._restart()
            return
        self.now, self.reached = new, over_the_pass
        if new.accuracy <= STILL_KNOWN * self.known and (not self.peak or new.largest > self.peak.largest):
            self.peak = new

    def reason_to_stop(self, limit: int) -> str | None:
        s = self.settings
        stop = 1 / len(self.now.shares) + 0.1 if s.stop_accuracy is None else s.stop_accuracy
        if self.reached <= stop:
            return "forgotten"
        half_gone = self.now.accuracy <= self.known / 2
        if s.past_peak is not None and half_gone and self.peak and self.now.largest < self.peak.largest - s.past_peak:
            return "piled up"
        if self.lr < s.lr / 1024 and not s.decay_at:
            return "stuck"
        return "steps" if self.steps >= limit else None
