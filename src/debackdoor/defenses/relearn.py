"""After pruning: the model learns the clean task again and unlearns the triggers that a search finds in it.

Pruning takes the channels that serve the backdoor alone; channels that serve both tasks stay. Universal perturbations
towards the suspect labels stand in for the trigger: they are searched for and, stamped on clean images, unlearned in
the same steps (Wang et al., "Neural Cleanse", IEEE S&P 2019, section V, for one fixed trigger; Zeng et al., "I-BAU",
ICLR 2022, for a moving one). The pruned model's answers on clean images keep what it knew of the clean task (Hinton et
al., "Distilling the Knowledge in a Neural Network", 2015). The suspect model's own would teach the backdoor along with
that: it brought WaNet back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.channels import MaskableLayer, masked_call
from debackdoor.data.augment import mixed, random_shift, random_view
from debackdoor.detectors.perturbations import Sizes
from debackdoor.detectors.squares import Square, stamped
from debackdoor.detectors.universal import Aim, UniversalSearch
from debackdoor.errors import check_positive
from debackdoor.models.forward import accuracy, logits_of, predict
from debackdoor.rnp.modes import normalisation_in_train_mode
from debackdoor.rnp.prune import plan_mask, prune
from debackdoor.runtime import autocast, generator, shuffled_batches
from debackdoor.types import CleanSet, Plan, Progress

CERTAIN = 1.645
"""Standard errors above which one of twenty falls is chance: the one-sided 95 % point of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class RelearnSettings:
    """Hyper-parameters of relearning.

    Attributes:
        lr: largest step size of SGD with Nesterov momentum; it rises over the first ``warm_up`` of the steps and falls
            to 0 along a cosine.
        momentum: of SGD.
        weight_decay: of SGD.
        clip: largest gradient norm.
        steps: how many, whatever the size of the fit part.
        warm_up: a fraction of the steps.
        batch_size: clean images a step; as many mixed ones come along.
        temperature: at which the answers of the pruned model are learned.
        labels: weight of the cross-entropy with the labels.
        answers: weight of the distance from the pruned model's answers.
        triggers: weight of the two, half each, on images with a trigger.
        triggered: how many of these a step; as many again with a plain square, where one was found.
        head_start: steps that the search for triggers is ahead.
        sizes: of these triggers.
        shift: largest random shift, a fraction of the image's width.
        tries: how often learning begins anew, each time with half the step size, when it costs too much accuracy.
    """

    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 5.0
    steps: int = 120
    warm_up: float = 0.15
    batch_size: int = 64
    temperature: float = 2.0
    labels: float = 0.5
    answers: float = 2.0
    triggers: float = 0.3
    triggered: int = 16
    head_start: int = 60
    sizes: Sizes = field(default_factory=lambda: Sizes(additive=0.036))
    shift: float = 0.125
    tries: int = 4

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, clip=self.clip, steps=self.steps, warm_up=self.warm_up, batch_size=self.batch_size)
        check_positive(temperature=self.temperature, tries=self.tries)


@dataclass(frozen=True)
class Relearned:
    """What relearning ends with.

    Attributes:
        model: a new object in eval mode, its pruned channels still zero; None where every try cost too much.
        lr: the step size that was small enough, or the last that was not.
        accuracy: on the hold-out part, a fraction.
        history: one row a step: lr, step, loss.
    """

    model: nn.Module | None
    lr: float
    accuracy: float
    history: list[dict[str, Any]]


def relearn(
    model: nn.Module,
    layers: Sequence[MaskableLayer],
    plan: Plan,
    fit: CleanSet,
    holdout: CleanSet,
    budget: float,
    aims: Sequence[Aim] = (),
    stamps: Sequence[Square] = (),
    settings: RelearnSettings | None = None,
    *,
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Relearned:
    """Prunes the plan from a copy of ``model`` and teaches the rest, in steps small enough for the budget.

    Args:
        model: the suspect model, in eval mode; it is not changed.
        layers: its maskable layers.
        plan: channels that stay at zero.
        fit: images to learn from.
        holdout: images that judge.
        budget: how far hold-out accuracy may fall, a fraction; more is too much where chance does not explain it.
        aims: of the triggers to search for and unlearn.
        stamps: plain squares to unlearn, too; they need ``aims`` beside them.
        settings: hyper-parameters.
        seed: of order, augmentation and search.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called after every step.
    """
    s = settings or RelearnSettings()
    right = _right(model, holdout, precision)
    pruned = prune(model, layers, plan).eval()
    history: list[dict[str, Any]] = []
    for attempt in range(s.tries):
        tried = replace(s, lr=s.lr / 2**attempt)
        lesson = _Lesson(pruned, layers, plan, fit, aims, stamps, tried, seed, precision)
        student = lesson.teach(history, progress)
        now = _right(student, holdout, precision)
        if _affordable(right, now, budget):
            return Relearned(student, tried.lr, float(now.mean()), history)
    return Relearned(None, tried.lr, float(now.mean()), history)


def _right(model: nn.Module, data: CleanSet, precision: str) -> Tensor:
    logits = predict(model, data.x, precision=precision)
    return ((logits.argmax(1) == data.y) & torch.isfinite(logits).all(1)).double()


def _affordable(before: Tensor, after: Tensor, budget: float) -> bool:
    """Whether accuracy fell by no more than the budget and what chance adds to it in one of twenty cases.

    Without the latter, a good repair is thrown away whenever a small hold-out part happens to hold its errors.
    """
    fall = before - after
    error = float(fall.std(correction=0)) / math.sqrt(len(fall))
    return float(fall.mean()) <= budget + CERTAIN * error + 1e-9


@dataclass(frozen=True)
class _Batch:
    """Images as the student sees them, as its teacher does, and the labels of all but the mixed ones.

    The parts are clean images, as many mixed ones, images with a trigger, whose perturbation ``trigger`` names, and
    images with a plain square.
    """

    seen: Tensor
    taught: Tensor
    y: Tensor
    triggered_y: Tensor
    trigger: Tensor


class _Lesson:
    """One training from the pruned model, with its answers and with triggers that keep up with the student."""

    def __init__(
        self,
        teacher: nn.Module,
        layers: Sequence[MaskableLayer],
        plan: Plan,
        fit: CleanSet,
        aims: Sequence[Aim],
        stamps: Sequence[Square],
        settings: RelearnSettings,
        seed: int,
        precision: str,
    ) -> None:
        self.teacher, self.layers, self.plan, self.fit, self.stamps = teacher, layers, plan, fit, stamps
        self.settings, self.precision = settings, precision
        self.random, self.queue = generator(seed), list[Tensor]()
        self.mask = plan_mask(layers, plan, fit.x.device)
        self.triggers = UniversalSearch(aims, fit.x, settings.sizes, seed) if aims else None
        self.student = copy.deepcopy(teacher).requires_grad_(True)
        self.parameters = dict(self.student.named_parameters())
        self.buffers = dict(self.student.named_buffers())
        self.optimizer = torch.optim.SGD(
            self.parameters.values(),
            settings.lr,
            settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )

    def teach(self, history: list[dict[str, Any]], progress: Progress | None) -> nn.Module:
        """The student, its pruned channels zero, in eval mode; ``history`` gets a row a step."""
        s = self.settings
        if self.triggers is not None:
            self.triggers.run(self.teacher, self.fit, s.head_start, precision=self.precision, progress=progress)
        normalisation_in_train_mode(self.student)
        for step in range(1, s.steps + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = s.lr * _schedule(step / s.steps, s.warm_up)
            loss, right = self._step(self._draw())
            history.append({"lr": s.lr, "step": step, "loss": loss})
            if progress is not None:
                progress("relearn", step, s.steps, {"accuracy": right})
        for name, parameter in self.teacher.named_parameters():
            self.parameters[name].requires_grad_(parameter.requires_grad)
        return prune(self.student, self.layers, self.plan).eval()

    def _draw(self) -> _Batch:
        s, fit = self.settings, self.fit
        self.queue = self.queue or shuffled_batches(len(fit), s.batch_size, self.random)
        index = self.queue.pop()
        clean = self._shifted(index)
        clean = torch.cat([clean, mixed(random_view(clean, self.random), self.random)])
        if self.triggers is None:
            none = index[:0].to(clean.device)
            return _Batch(clean, clean, fit.y[index], fit.y[none], none)
        count = s.triggered * (2 if self.stamps else 1)
        others = torch.randint(len(fit), (count,), generator=self.random)
        trigger = torch.randint(len(self.triggers), (s.triggered,), generator=self.random).to(clean.device)
        plain = self._shifted(others)
        seen = [clean, self.triggers.apply(plain[: s.triggered], trigger)]
        if self.stamps:
            seen.append(stamped(plain[s.triggered :], self.stamps, self.random))
        return _Batch(torch.cat(seen), torch.cat([clean, plain]), fit.y[index], fit.y[others], trigger)

    def _shifted(self, index: Tensor) -> Tensor:
        x = self.fit.x[index]
        return random_shift(x, round(self.settings.shift * x.shape[-1]), self.random)

    def _step(self, batch: _Batch) -> tuple[float, float]:
        """One step of the student and one of the triggers against it; the loss, and the accuracy on clean images."""
        s, count = self.settings, len(batch.y)
        with autocast(batch.seen.device, self.precision):
            with torch.no_grad():
                wanted = logits_of(self.teacher(batch.taught)).float()
            # Under the mask a pruned channel gets no gradient: it cannot grow again and bring the backdoor back.
            seen = batch.seen
            logits = masked_call(self.student, self.layers, self.mask, seen, self.parameters, self.buffers).float()
        clean, triggered = logits[: 2 * count], logits[2 * count :]
        loss = s.labels * F.cross_entropy(clean[:count], batch.y)
        loss = loss + s.answers * _distance(clean, wanted[: 2 * count], s.temperature)
        moves = None
        if self.triggers is not None:
            away = F.cross_entropy(triggered, batch.triggered_y)
            away = (away + _distance(triggered, wanted[2 * count :], s.temperature)) / 2
            loss = loss + s.triggers * away
            # Every trigger is drawn a few times in a batch; the sum is brought to one image each.
            searched = len(batch.trigger)
            attack = self.triggers.loss(triggered[:searched], batch.triggered_y[:searched], batch.trigger)
            attack = attack * len(self.triggers) / searched
            moves = torch.autograd.grad(attack, self.triggers.parameters, retain_graph=True, allow_unused=True)
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.parameters.values(), s.clip)
        self.optimizer.step()
        if self.triggers is not None and moves is not None:
            self.triggers.step(moves)
        return loss.item(), accuracy(clean[:count].detach(), batch.y)


def _schedule(done: float, warm_up: float) -> float:
    if done < warm_up:
        return done / warm_up
    return (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2


def _distance(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the wanted answers, in nats, times the squared temperature."""
    now, then = (F.log_softmax(values / temperature, 1) for values in (logits, wanted))
    return F.kl_div(now, then, reduction="batchmean", log_target=True) * temperature**2
