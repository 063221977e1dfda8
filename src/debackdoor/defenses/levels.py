"""How far to prune, chosen from clean images alone: one rule for every method that has a level to choose.

Of levels from gentle to strong, the rule takes the strongest whose accuracy on the hold-out part fell by at most a
budget. Levels are measured with masks, so the model is not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.channels import MaskableLayer, all_channels, masked_call
from debackdoor.defenses.base import differ
from debackdoor.models.forward import in_eval, predict
from debackdoor.rnp.prune import below, plan_mask, prune
from debackdoor.types import CleanSet, Plan, PlannedChannel, Progress, RepairResult, Step

HOLDOUT = 0.25
"""Share of the clean set that judges and is not learned from; the rest teaches, and relearning needs it more."""
BUDGET = 0.02
"""How far accuracy on the hold-out part may fall, a fraction."""
DEVIATIONS = tuple(step / 2 for step in range(20, 0, -1))
"""Standard deviations above a layer's mean at which outliers are pruned, from gentle (10) to strong (0.5)."""


@dataclass(frozen=True)
class Level:
    """One way to prune.

    Attributes:
        value: the method's own setting: a share, a threshold, standard deviations.
        plan: the channels that go.
    """

    value: float
    plan: Plan


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what it costs.

    Attributes:
        level: the level, or None where even the gentlest costs more than the budget: then nothing is pruned.
        before: accuracy without pruning, a fraction.
        after: accuracy at the level.
        history: one row a level that was measured, from gentle to strong: level, channels, accuracy.
    """

    level: Level | None
    before: float
    after: float
    history: list[dict[str, Any]]

    @property
    def plan(self) -> Plan:
        """The channels that go."""
        return () if self.level is None else self.level.plan


def strongest(
    levels: Sequence[Level], measure: Callable[[Plan], float], budget: float, *, progress: Progress | None = None
) -> Choice:
    """The strongest level whose accuracy is at most ``budget`` below that of the empty plan.

    The search begins with the strongest level and ends at the first that fits; equal plans are measured once.

    Args:
        levels: from gentle to strong.
        measure: accuracy with a plan's channels pruned, a fraction.
        budget: how far it may fall, a fraction; 1 takes the strongest level whatever it costs.
        progress: called after every level.
    """
    before = measure(())
    known: dict[Plan, float] = {(): before}
    history: list[dict[str, Any]] = []
    for done, level in enumerate(reversed(levels), 1):
        if level.plan not in known:
            known[level.plan] = measure(level.plan)
        now = known[level.plan]
        history.insert(0, {"level": level.value, "channels": len(level.plan), "accuracy": now})
        if progress is not None:
            progress("levels", done, len(levels), {"accuracy": now})
        # A fall of exactly the budget is within it, whatever the last bit of the difference says.
        if before - now <= budget + 1e-9:
            return Choice(level, before, now, history)
    return Choice(None, before, before, history)


def cost(
    model: nn.Module, layers: Sequence[MaskableLayer], judges: CleanSet, precision: str
) -> Callable[[Plan], float]:
    """The ``measure`` of :func:`strongest`: accuracy on ``judges``, where an answer that is not finite is wrong.

    Args:
        model: in eval mode; it is not changed.
        layers: its maskable layers.
        judges: images that nothing was learned from.
        precision: ``auto``, ``fp32`` or ``bf16``.
    """

    def measure(plan: Plan) -> float:
        mask = plan_mask(layers, plan, judges.x.device)
        logits = predict(lambda x: masked_call(model, layers, mask, x), judges.x, precision=precision)
        right = (logits.argmax(1) == judges.y) & torch.isfinite(logits).all(1)
        return int(right.sum()) / len(judges)

    return measure


def below_levels(ranking: Plan, thresholds: Iterable[float]) -> tuple[Level, ...]:
    """One level a threshold: every channel of ``ranking`` whose score is at most that."""
    return tuple(Level(t, below(ranking, t)) for t in thresholds)


def outlier_levels(ranking: Plan, deviations: Iterable[float]) -> tuple[Level, ...]:
    """One level a number of standard deviations: every channel of ``ranking`` that is further above its layer's mean.

    Args:
        ranking: of :func:`rank_outliers`.
        deviations: above a layer's mean; the fewer, the stronger.
    """
    return tuple(Level(u, tuple(channel for channel in ranking if -channel.score > u)) for u in deviations)


def rank_outliers(layers: Sequence[MaskableLayer], values: Sequence[Tensor], alive: Sequence[Tensor]) -> Plan:
    """The live channels of all layers, the furthest above its layer's mean first.

    A channel's score is how many standard deviations (of a sample, over the live channels) it lies below the mean, so
    that low means suspicious as everywhere.

    Args:
        layers: the layers that are compared, each within itself.
        values: one number a channel, a tensor (size,) a layer.
        alive: which channels count, bool (size,) a layer; the others are neither compared nor pruned.
    """
    scores = torch.cat([_below_mean(*layer) for layer in zip(values, alive, strict=True)]).cpu()
    order: list[int] = scores.argsort(stable=True).tolist()
    places = all_channels(layers)
    return tuple(PlannedChannel(*places[i], score=float(scores[i])) for i in order if scores[i].isfinite())


def _below_mean(values: Tensor, alive: Tensor) -> Tensor:
    values, scores = values.double(), torch.full_like(values, torch.inf, dtype=torch.double)
    if int(alive.sum()) < 2:
        return scores
    mean, deviation = values[alive].mean(), values[alive].std()
    # Rounding makes equal channels deviate from their own mean.
    if float(deviation) <= 1e-9 * float(mean.abs()):
        scores[alive] = 0.0
    else:
        scores[alive] = (mean - values[alive]) / deviation
    return scores


def pruned_result(
    model: nn.Module,
    layers: Sequence[MaskableLayer],
    choice: Choice,
    scoring: Step,
    rule: str,
    history: dict[str, list[dict[str, Any]]] | None = None,
) -> RepairResult:
    """What a defence that only prunes returns.

    Args:
        model: the suspect model in eval mode; it is not changed.
        layers: the layers that the plan names.
        choice: what goes.
        scoring: how the channels were scored.
        rule: how the level was chosen, for the record.
        history: of the scoring.
    """
    repaired = in_eval(prune(model, layers, choice.plan))
    rates = {"before": choice.before, "after": choice.after}
    rows = {**(history or {}), "levels": choice.history}
    steps = (scoring, pruning_step(choice, rule))
    return RepairResult(repaired, choice.plan, rates, None, rows, steps, changed=differ(model, repaired))


def pruning_step(choice: Choice, rule: str) -> Step:
    """The record of pruning at the chosen level."""
    numbers = {"channels": float(len(choice.plan)), "accuracy": choice.after}
    if choice.level is not None:
        numbers["level"] = choice.level.value
    return Step("prune", rule, numbers)


def blind_rule(budget: float, judges: str = "hold-out part") -> str:
    """The rule in words."""
    return f"the strongest level at which accuracy on the {judges} falls by at most {budget}"
