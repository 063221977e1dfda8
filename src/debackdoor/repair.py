"""From a suspect model and a clean set to a repaired model, and a check of the repair.

Everything is chosen from the clean set alone: its fit part teaches, its hold-out part decides.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from debackdoor.case import Case, device_of, open_case
from debackdoor.defenses.relearn import relearn
from debackdoor.defenses.rnp import RNP, Exposure
from debackdoor.detectors.evidence import SUSPICIOUS, Evidence, remains
from debackdoor.detectors.label import PileUp, largest_pile_up
from debackdoor.detectors.words import disagreement, findings, near, nothing_found
from debackdoor.errors import check_fraction
from debackdoor.memory import DEFAULT
from debackdoor.models.copying import copied
from debackdoor.models.forward import in_eval
from debackdoor.models.layout import set_layout
from debackdoor.rnp.unlearn import Unlearned
from debackdoor.types import CleanSet, Progress, RepairResult, Step, Verification

BUDGET = 0.02
"""How far accuracy on clean images may fall, a fraction, if nobody says otherwise."""


def repair(
    model: nn.Module,
    clean: CleanSet,
    budget: float = BUDGET,
    *,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    memory: float = DEFAULT,
    keep: str | Path | None = None,
    progress: Progress | None = None,
) -> RepairResult:
    """Removes the backdoor from a copy of ``model``, if unlearning, a large margin or a shortcut shows one.

    Args:
        model: any classifier of images (N, C, H, W) in [0, 1]; it is not changed.
        clean: the defender's trusted samples.
        budget: how far accuracy on clean images may fall, a fraction: half of it by pruning, all of it by relearning,
            which is undone where the fall on the hold-out part is larger than that by more than chance.
        seed: of the split, the order of the samples and the searches.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        memory: GiB that may be taken; where a step's images do not fit, they go through the model in parts, and batch
            normalisation takes statistics of these.
        keep: a folder that finished stages are kept in and, with the same arguments, taken from; None keeps none.
        progress: called from inside long loops.

    Raises:
        DataError: if the clean set is too small, holds one class only, or has labels the model does not know.
        ModelError: if the model's answers do not depend on the image, or are no better than chance.
    """
    check_fraction(budget=budget)
    case = open_case(model, clean, RNP(seed=seed, precision=precision), device, progress, memory=memory, keep=keep)
    with case.within_memory():
        exposure = case.expose()
        result = repair_case(case, exposure, case.evidence(exposure), budget)
    return handed_back(result, model)


def handed_back(result: RepairResult, model: nn.Module) -> RepairResult:
    """The result on the caller's device; of a model that was not changed, a copy in which no buffer has moved."""
    with torch.inference_mode(False):
        final = result.model if result.changed else in_eval(copied(model))
        return replace(result, model=final.to(device_of(model)))


def repair_case(case: Case, exposure: Exposure, before: Evidence, budget: float = BUDGET) -> RepairResult:
    """The same for a model that is exposed and examined already."""
    result = repair_unchecked(case, exposure, before, budget)
    verification = verify(case, exposure, before, result.model)
    steps = (*result.steps, Step("verify", verification.message))
    set_layout(result.model, torch.contiguous_format)
    return replace(result, verification=verification, steps=steps)


def verify(case: Case, exposure: Exposure, before: Evidence, model: nn.Module) -> Verification:
    """Whether ``model``, made from the suspect one, still shows what that did, or why nothing was to be done."""
    if not before.exposed:
        return _nothing(exposure.unlearned, before)
    return _judge(before, _examine_again(case, model, before))


def repair_unchecked(case: Case, exposure: Exposure, found: Evidence, budget: float = BUDGET) -> RepairResult:
    """A repair that nothing checks; its model is laid out in memory as the suspect one is."""
    method = replace(case.method, budget=budget / 2)
    choose = partial(method.choose, case.suspect, exposure, case.clean, progress=case.progress)
    plan = case.keep("prune", choose, exposure.ranking, budget) if found.exposed else ()
    result = method.remove(case.suspect, exposure, plan, case.holdout)
    return _relearned(case, result, exposure, found, budget) if found.exposed else result


def _relearned(case: Case, result: RepairResult, exposure: Exposure, evidence: Evidence, budget: float) -> RepairResult:
    """The result with triggers unlearned, or with pruning alone where that costs too much accuracy."""
    teach = partial(
        relearn,
        case.suspect,
        exposure.layers,
        result.plan,
        case.fit,
        case.holdout,
        budget,
        evidence.aims,
        evidence.stamps,
        seed=case.method.seed,
        precision=case.method.precision,
        pruned=result.model,
        progress=case.progress,
    )
    learned = case.keep("relearn", teach, result.plan, evidence.aims, evidence.stamps, budget)
    numbers = {"lr": learned.lr, "accuracy": learned.accuracy, "triggers": len(evidence.aims) + len(evidence.stamps)}
    history = {**result.history, "relearn": learned.history}
    if learned.model is None:
        step = Step("relearn", "given up: every step size costs more accuracy than the budget", numbers)
        return replace(result, history=history, steps=(*result.steps, step))
    why = "the clean task from labels and the pruned model's answers, and triggers that were searched for unlearned"
    rates = {**result.clean_accuracy, "after": learned.accuracy}
    steps = (*result.steps, Step("relearn", why, numbers))
    return replace(result, model=learned.model, clean_accuracy=rates, history=history, steps=steps, changed=True)


def _examine_again(case: Case, model: nn.Module, before: Evidence) -> Evidence:
    """The same searches on the repaired model, and what is found on the suspect one tried on it.

    Unlearnings, too, are made anew where no search had led to the pile-up's label.
    """
    after = case.examine.again(model, before)
    after = replace(after, carried=case.examine.carried(case.suspect, model, before))
    if before.pile_up is None or before.pile_up.label not in before.unseen:
        return after
    label = before.pile_up.label
    return replace(after, pile_up=PileUp(label, case.pile_ups(model)[label]))


def _judge(before: Evidence, after: Evidence) -> Verification:
    """Whether what was suspect before still is."""
    left = remains(before, after)
    away = [carried.after for carried in after.carried if carried.label is None and carried.left]
    if after.all_to_all and after.shortcuts.away is not None:
        away.append(after.shortcuts.away)
    passed = not left and not away
    if passed:
        now = "after the repair searches find nothing that speaks against it"
    elif left:
        now = f"after the repair it is still there for label {', '.join(map(str, left))}"
    else:
        now = f"after the repair such a patch still leads {max(away):.0%} away"
    evidence = {**before.numbers("before"), **after.numbers("after")}
    return Verification(passed, before.label, evidence, f"{'; '.join(findings(before))}; {now}")


def _nothing(unlearned: Unlearned, evidence: Evidence) -> Verification:
    """What there is to say of a model that is left as it is."""
    pile_up = largest_pile_up(unlearned.history)
    numbers = {"pile_up_label": pile_up.label, "pile_up_share": pile_up.share, **evidence.numbers("before")}
    if evidence.disagree:
        message = (
            f"inconclusive: {disagreement(evidence)}; the model is left as it is; give more clean images or another "
            "seed"
        )
        return Verification(False, None, numbers, message, conclusive=False)
    if not unlearned.forgot:
        message = (
            f"inconclusive: the clean task was not unlearned (accuracy {unlearned.accuracy:.0%}), so nothing could "
            "be exposed; give more clean images"
        )
        return Verification(False, None, numbers, message, conclusive=False)
    if evidence.score >= SUSPICIOUS:
        message = (
            f"inconclusive: {near(evidence)}, but too little for a repair; the model is left as it is; give more clean "
            "images or another seed"
        )
        return Verification(False, None, numbers, message, conclusive=False)
    message = f"{nothing_found(evidence)}; the model is left as it is"
    return Verification(True, None, numbers, message)
