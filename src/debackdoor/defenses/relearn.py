"""After pruning: the model learns the clean task again and unlearns the triggers that a search finds in it.

Pruning takes the channels that serve the backdoor alone; channels that serve both tasks stay. Universal perturbations
towards the suspect labels stand in for the trigger: they are searched for and, stamped on clean images, unlearned in
the same steps (Wang et al., "Neural Cleanse", IEEE S&P 2019, section V, for one fixed trigger; Zeng et al., "I-BAU",
ICLR 2022, for a moving one). The pruned model's answers on clean images keep what it knew of the clean task (Hinton et
al., "Distilling the Knowledge in a Neural Network", 2015). The suspect model's own would teach the backdoor along with
that: it brought WaNet back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.channels import MaskableLayer
from debackdoor.defenses.lesson import Lesson, RelearnSettings
from debackdoor.detectors.squares import Square
from debackdoor.detectors.universal import Aim
from debackdoor.models.forward import in_eval, predict
from debackdoor.rnp.prune import prune
from debackdoor.types import CleanSet, Plan, Progress

CERTAIN = 1.645
"""Standard errors above which one of twenty falls is chance: the one-sided 95 % point of the normal distribution."""


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
    pruned: nn.Module | None = None,
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
        pruned: ``model`` without the plan, in eval mode, where there is one already, so that memory holds no other; it
            is not changed.
        progress: called after every few steps.
    """
    s = settings or RelearnSettings()
    right = _right(model, holdout, precision)
    pruned = in_eval(prune(model, layers, plan)) if pruned is None else pruned
    history: list[dict[str, Any]] = []
    for attempt in range(s.tries):
        tried = replace(s, lr=s.lr / 2**attempt)
        lesson = Lesson(model, pruned, layers, plan, fit, aims, stamps, tried, seed, precision)
        student = lesson.teach(history, progress)
        now = _right(student, holdout, precision)
        if _affordable(right, now, budget):
            return Relearned(student, tried.lr, float(now.mean()), history)
        del lesson, student  # before there are others: a large network would not fit twice
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
