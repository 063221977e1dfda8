"""After pruning: the kept channels learn the clean task again, and what triggers stirred in them is lost.

Pruning takes the channels that serve the backdoor alone; channels that serve both tasks stay. Fine-tuning with large
steps shakes the backdoor out of these, as in NAD (Li et al., "Neural Attention Distillation", ICLR 2021), and the
pruned model's own answers on clean images (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015) keep
what it knew of the clean task. The suspect model would teach the backdoor along with that: on digits its answers
brought back what pruning had removed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.channels import MaskableLayer, masked_call
from debackdoor.data.augment import mixed, random_shift, random_view
from debackdoor.errors import check_positive
from debackdoor.models.forward import accuracy, logits_of, predict
from debackdoor.rnp.modes import normalisation_in_train_mode
from debackdoor.rnp.prune import plan_mask, prune
from debackdoor.runtime import autocast, generator, shuffled_batches
from debackdoor.types import CleanSet, Plan, Progress


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
        shift: largest random shift, a fraction of the image's width.
        tries: how often learning begins anew, each time with half the step size, when it costs too much accuracy.
    """

    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 5.0
    steps: int = 120
    warm_up: float = 0.15
    batch_size: int = 64
    temperature: float = 2.0
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
        history: one row a step: try, step, loss.
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
        budget: how far hold-out accuracy may fall, a fraction, beside one standard error of that fall.
        settings: hyper-parameters.
        seed: of order and augmentation.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called after every step.
    """
    s = settings or RelearnSettings()
    right = _right(model, holdout, precision)
    pruned = prune(model, layers, plan).eval()
    history: list[dict[str, Any]] = []
    for attempt in range(s.tries):
        tried = replace(s, lr=s.lr / 2**attempt)
        student = _teach(pruned, layers, plan, fit, tried, seed, precision, progress, history)
        now = _right(student, holdout, precision)
        if _affordable(right, now, budget):
            return Relearned(student, tried.lr, float(now.mean()), history)
    return Relearned(None, tried.lr, float(now.mean()), history)


def _right(model: nn.Module, data: CleanSet, precision: str) -> Tensor:
    logits = predict(model, data.x, precision=precision)
    return ((logits.argmax(1) == data.y) & torch.isfinite(logits).all(1)).double()


def _affordable(before: Tensor, after: Tensor, budget: float) -> bool:
    """Whether accuracy fell by no more than the budget and what chance may add to it.

    Without the latter, a good repair is thrown away whenever a small hold-out part happens to hold its errors.
    """
    fall = before - after
    error = float(fall.std(correction=0)) / math.sqrt(len(fall))
    return float(fall.mean()) <= budget + error + 1e-9


def _teach(
    teacher: nn.Module,
    layers: Sequence[MaskableLayer],
    plan: Plan,
    fit: CleanSet,
    settings: RelearnSettings,
    seed: int,
    precision: str,
    progress: Progress | None,
    history: list[dict[str, Any]],
) -> nn.Module:
    """One training from the pruned model, ``teacher``, with its answers; ``history`` gets its rows."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    mask = plan_mask(layers, plan, fit.x.device)
    parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
    optimizer = torch.optim.SGD(
        parameters.values(), settings.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=True
    )
    random, queue = generator(seed), list[Tensor]()
    normalisation_in_train_mode(student)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _schedule((step + 1) / settings.steps, settings.warm_up)
        queue = queue or shuffled_batches(len(fit), settings.batch_size, random)
        index = queue.pop()
        x = random_shift(fit.x[index], round(settings.shift * fit.x.shape[-1]), random)
        x = torch.cat([x, mixed(random_view(x, random), random)])
        with autocast(x.device, precision):
            with torch.no_grad():
                wanted = logits_of(teacher(x)).float()
            # Under the mask a pruned channel gets no gradient: it cannot grow again and bring the backdoor back.
            logits = masked_call(student, layers, mask, x, parameters, buffers).float()
        loss = F.cross_entropy(logits[: len(index)], fit.y[index]) + _distance(logits, wanted, settings.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
        optimizer.step()
        history.append({"lr": settings.lr, "step": step + 1, "loss": loss.item()})
        if progress is not None:
            right = accuracy(logits[: len(index)].detach(), fit.y[index])
            progress("relearn", step + 1, settings.steps, {"accuracy": right})
    for name, parameter in teacher.named_parameters():
        parameters[name].requires_grad_(parameter.requires_grad)
    return prune(student, layers, plan).eval()


def _schedule(done: float, warm_up: float) -> float:
    if done < warm_up:
        return done / warm_up
    return (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2


def _distance(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the wanted answers, in nats, times the squared temperature."""
    now, then = (F.log_softmax(values / temperature, 1) for values in (logits, wanted))
    return F.kl_div(now, then, reduction="batchmean", log_target=True) * temperature**2
