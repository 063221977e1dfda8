"""From a suspect model and a clean set to a repaired model, and a check of the repair.

Everything is chosen from the clean set alone: its fit part teaches, its hold-out part decides.
"""

from __future__ import annotations

import copy
import math
from statistics import median

import torch
from torch import nn

from debackdoor.data import check_clean_set, split_clean
from debackdoor.defenses.rnp import RNP
from debackdoor.detectors.label import PileUp, largest_pile_up
from debackdoor.detectors.trigger import RecoveredTrigger, search_triggers
from debackdoor.errors import ModelError
from debackdoor.rnp.batches import accuracy, predict
from debackdoor.runtime import resolve_device
from debackdoor.types import CleanSet, Progress, RepairResult, Step, Verification

EXPOSED_SHARE = 0.5
"""The share of answers on one label from which a backdoor counts as exposed."""

EASY = 2.0
"""A label whose smallest trigger is this many times smaller than the others' median is easy to reach."""

COMPARED_LABELS = 3
"""How many other labels' triggers the suspect's is compared with."""


def repair(
    model: nn.Module,
    clean: CleanSet,
    budget: float = 0.02,
    *,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
) -> RepairResult:
    """Removes the backdoor from a copy of ``model``, if unlearning exposes one.

    Args:
        model: any classifier of images (N, C, H, W) in [0, 1]; it is not changed.
        clean: the defender's trusted samples.
        budget: how far accuracy on the hold-out part may fall, a fraction.
        seed: of the split, the order of the samples and the trigger search.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called from inside long loops.

    Raises:
        DataError: if the clean set is too small, holds one class only, or has labels the model does not know.
        ModelError: if the model's answers do not depend on the image, or are no better than chance.
    """
    place, home = resolve_device(device), _device_of(model)
    suspect, clean = copy.deepcopy(model).to(place).eval(), clean.to(place)
    check_works(suspect, clean, precision)
    method = RNP(budget=budget, seed=seed, precision=precision)
    fit, holdout = split_clean(clean, seed=seed)
    exposure = method.expose(suspect, fit, progress=progress)
    pile_up = largest_pile_up(exposure.unlearned.history)
    exposed = pile_up.share >= EXPOSED_SHARE
    plan = method.choose(suspect, exposure, holdout) if exposed else ()
    result = method.remove(suspect, exposure, plan, holdout)
    if not exposed:
        verification = _nothing_exposed(pile_up)
    else:
        verification = _verify(suspect, result.model, fit, holdout, pile_up, seed, precision, progress)
    steps = (*result.steps, Step("verify", verification.message, verification.evidence))
    return RepairResult(
        model=result.model.to(home),
        plan=result.plan,
        clean_accuracy=result.clean_accuracy,
        verification=verification,
        history=result.history,
        steps=steps,
        changed=result.changed,
    )


def check_works(model: nn.Module, clean: CleanSet, precision: str = "auto") -> None:
    """Checks that the clean set fits the model and that the model can classify it.

    Raises:
        DataError: if the clean set is too small, holds one class only, or has labels the model does not know.
        ModelError: if the model's answers do not depend on the image, are not finite, or are no better than chance.
    """
    try:
        logits = predict(model, clean.x, precision=precision)
    except RuntimeError as error:
        shape = tuple(clean.x.shape[1:])
        raise ModelError(
            f"expected the model to take images of shape {shape}, got '{str(error).splitlines()[0]}'; "
            "check --arch and the image size"
        ) from error
    check_clean_set(clean, logits.shape[1])
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("expected finite outputs on the clean images, got NaN or infinity; the weights are damaged")
    if bool((logits == logits[0]).all()):
        raise ModelError("expected outputs that depend on the image, got the same for all; the weights are not trained")
    reached, n = accuracy(logits, clean.y), len(clean)
    chance = float(torch.bincount(clean.y).max()) / n
    if reached < chance + 3 * math.sqrt(chance * (1 - chance) / n):
        raise ModelError(
            f"expected the model to classify the clean images, got accuracy {reached:.1%}, no better than chance; "
            "check the labels' order, --arch, and whether the model wants normalised images (--mean and --std)"
        )


def _verify(
    before: nn.Module,
    after: nn.Module,
    fit: CleanSet,
    holdout: CleanSet,
    pile_up: PileUp,
    seed: int,
    precision: str,
    progress: Progress | None,
) -> Verification:
    """Whether a trigger to the exposed label is as hard to find as to other labels, searched for before and after."""
    others = [label for label in fit.y.unique().tolist() if label != pile_up.label]
    labels = [pile_up.label, *others[:: math.ceil(len(others) / COMPARED_LABELS)]]
    evidence = {"exposed_share": pile_up.share}
    for when, model in (("before", before), ("after", after)):
        triggers = search_triggers(model, fit, holdout, labels, seed=seed, precision=precision, progress=progress)
        evidence |= {
            f"trigger_pixels_{when}": triggers[0].l1,
            f"trigger_success_{when}": triggers[0].success_rate,
            f"other_trigger_pixels_{when}": median(found.l1 for found in triggers[1:]),
            f"ease_{when}": _ease(triggers),
        }
    passed = evidence["ease_after"] < EASY
    message = (
        f"a trigger to label {pile_up.label} takes {evidence['trigger_pixels_after']:.1f} pixels "
        f"({evidence['trigger_pixels_before']:.1f} before), to other labels "
        f"{evidence['other_trigger_pixels_after']:.1f}: "
        + ("none is easier to find than elsewhere" if passed else "the backdoor is still there")
    )
    return Verification(passed, pile_up.label, evidence, message)


def _ease(triggers: list[RecoveredTrigger]) -> float:
    """How many times smaller the first label's trigger is than the others' median."""
    return median(found.l1 for found in triggers[1:]) / max(triggers[0].l1, 1e-3)


def _nothing_exposed(pile_up: PileUp) -> Verification:
    message = (
        f"nothing is exposed: at most {pile_up.share:.0%} of the answers gather on one label while the clean task is "
        "forgotten; the model is left as it is"
    )
    return Verification(True, None, {"exposed_share": pile_up.share}, message)


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
