"""From a suspect model and a clean set to a repaired model, and a check of the repair.

Everything is chosen from the clean set alone: its fit part teaches, its hold-out part decides.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from debackdoor.data import check_clean_set, split_clean
from debackdoor.defenses.relearn import relearn
from debackdoor.defenses.rnp import RNP, Exposure
from debackdoor.detectors.evidence import Evidence, Examination, remains
from debackdoor.detectors.label import PileUp, largest_pile_up, peak_share
from debackdoor.errors import DebackdoorError, ModelError, check_fraction
from debackdoor.models.forward import accuracy, predict, set_layout, to_faster_layout
from debackdoor.rnp.modes import uses_batch_statistics
from debackdoor.rnp.unlearn import Unlearned, unlearn
from debackdoor.runtime import resolve_device
from debackdoor.types import CleanSet, Progress, RepairResult, Step, Verification

HOLDOUT = 0.25
"""The share of the clean set that decides; the rest teaches, and relearning needs it more."""

WORDS = {
    "pile-up": "the answers that gather on it while the clean task is forgotten",
    "margin": "its largest margin",
    "additive": "a faint universal pattern",
    "patch": "a small universal patch",
    "warp": "a slight universal warp",
}


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
    """Removes the backdoor from a copy of ``model``, if unlearning, a large margin or a shortcut shows one.

    Args:
        model: any classifier of images (N, C, H, W) in [0, 1]; it is not changed.
        clean: the defender's trusted samples.
        budget: how far accuracy on clean images may fall, a fraction: half of it by pruning, all of it by relearning,
            which is undone where the fall on the hold-out part is larger than that by more than chance.
        seed: of the split, the order of the samples and the searches.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called from inside long loops.

    Raises:
        DataError: if the clean set is too small, holds one class only, or has labels the model does not know.
        ModelError: if the model's answers do not depend on the image, or are no better than chance.
    """
    if seed < 0:
        raise DebackdoorError(f"expected a seed of at least 0, got {seed}; correct it")
    check_fraction(budget=budget)
    place, home = resolve_device(device), _device_of(model)
    suspect, clean = copy.deepcopy(model).to(place).eval(), clean.to(place)
    check_works(suspect, clean, precision)
    to_faster_layout(suspect, clean.x[:2])
    case = _Case(suspect, clean, RNP(budget=budget / 2, seed=seed, precision=precision), budget, progress)
    exposure = case.method.expose(suspect, case.fit, progress=progress)
    pile_up = largest_pile_up(exposure.unlearned.history)
    before = case.examine(suspect, pile_up.label)
    if uses_batch_statistics(suspect):
        before = replace(before, pile_up=pile_up)
    plan = case.method.choose(suspect, exposure, clean) if before.exposed else ()
    result = case.method.remove(suspect, exposure, plan, case.holdout)
    if before.exposed:
        result = case.relearned(result, exposure, before)
        after = case.examine_again(result.model, before)
        verification = _judge(before, after)
    else:
        verification = _nothing(exposure.unlearned, pile_up, before)
    steps = (*result.steps, Step("verify", verification.message))
    set_layout(result.model, torch.contiguous_format)
    return replace(result, model=result.model.to(home), verification=verification, steps=steps)


class _Case:
    """What every step of one repair works with."""

    def __init__(
        self, suspect: nn.Module, clean: CleanSet, method: RNP, budget: float, progress: Progress | None
    ) -> None:
        self.suspect, self.clean, self.method, self.budget, self.progress = suspect, clean, method, budget, progress
        self.fit, self.holdout = split_clean(clean, HOLDOUT, method.seed)
        self.classes = predict(suspect, clean.x[:2], precision=method.precision).shape[1]

    @property
    def examine(self) -> Examination:
        """The searches, the same before and after."""
        m = self.method
        return Examination(self.fit, self.holdout, self.classes, m.seed, m.precision, self.progress)

    def pile_up_again(self, model: nn.Module, label: int) -> PileUp:
        """How far the answers of another model gather on the label while it forgets the clean task."""
        m = self.method
        again = unlearn(model, self.fit, m.unlearning, seed=m.seed, precision=m.precision, progress=self.progress)
        return PileUp(label, peak_share(again.history, label))

    def relearned(self, result: RepairResult, exposure: Exposure, evidence: Evidence) -> RepairResult:
        """The result with triggers unlearned, or with pruning alone where that costs too much accuracy."""
        learned = relearn(
            self.suspect,
            exposure.layers,
            result.plan,
            self.fit,
            self.holdout,
            self.budget,
            evidence.aims,
            seed=self.method.seed,
            precision=self.method.precision,
            progress=self.progress,
        )
        numbers = {"lr": learned.lr, "accuracy": learned.accuracy, "triggers": len(evidence.aims)}
        history = {**result.history, "relearn": learned.history}
        if learned.model is None:
            step = Step("relearn", "given up: every step size costs more accuracy than the budget", numbers)
            return replace(result, history=history, steps=(*result.steps, step))
        why = "the clean task from labels and the pruned model's answers, and triggers that were searched for unlearned"
        rates = {**result.clean_accuracy, "after": learned.accuracy}
        steps = (*result.steps, Step("relearn", why, numbers))
        return replace(result, model=learned.model, clean_accuracy=rates, history=history, steps=steps, changed=True)

    def examine_again(self, model: nn.Module, before: Evidence) -> Evidence:
        """The same searches on the repaired model, and another unlearning where a pile-up alone had told a label."""
        after = self.examine.again(model, before)
        if before.pile_up is None or before.reasons.get(before.pile_up.label) != ("pile-up",):
            return after
        return replace(after, pile_up=self.pile_up_again(model, before.pile_up.label))


def check_works(model: nn.Module, clean: CleanSet, precision: str = "auto") -> None:
    """Checks that the clean set fits the model and that the model can classify it.

    Raises:
        DataError: if the clean set is too small, holds one class only, or has labels the model does not know.
        ModelError: if the model's answers do not depend on the image, are not finite, or are no better than chance.
    """
    try:
        logits = predict(model, clean.x, precision=precision)
    except DebackdoorError:
        raise
    except Exception as error:  # a model is anyone's code and may raise anything
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"expected the model to take images of shape {tuple(clean.x.shape[1:])}, got '{why}'; "
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


def _judge(before: Evidence, after: Evidence) -> Verification:
    """Whether what was suspect before still is, by a fresh search."""
    left = remains(before, after)
    passed = not left and not after.all_to_all
    found = [f"label {label} stands out by {_listed(why)}" for label, why in before.reasons.items()]
    if before.all_to_all:
        found.append(f"a small patch leads {before.shortcuts.away:.0%} of the images away from their labels, to many")
    if passed:
        now = "after the repair nothing of this is found any more"
    elif left:
        now = f"after the repair it is still there for label {', '.join(map(str, left))}"
    else:
        now = f"after the repair such a patch still leads {after.shortcuts.away:.0%} away"
    evidence = {**before.numbers("before"), **after.numbers("after")}
    return Verification(passed, before.label, evidence, f"{'; '.join(found)}; {now}")


def _nothing(unlearned: Unlearned, pile_up: PileUp, evidence: Evidence) -> Verification:
    """What there is to say of a model that is left as it is."""
    numbers = {"pile_up_label": pile_up.label, "pile_up_share": pile_up.share, **evidence.numbers("before")}
    if unlearned.reason in ("steps", "stuck"):
        message = (
            f"inconclusive: the clean task was not unlearned (accuracy {unlearned.accuracy:.0%}), so nothing could "
            "be exposed; give more clean images"
        )
        return Verification(False, None, numbers, message, conclusive=False)
    message = (
        f"nothing is exposed: {pile_up.share:.0%} of the answers gather on label {pile_up.label} while the clean task "
        f"is forgotten, the largest margin is {evidence.margins.ratio:.1f} times the others', and no small patch, "
        "pattern or warp leads far more often to one label than to others; the model is left as it is"
    )
    return Verification(True, None, numbers, message)


def _listed(reasons: Sequence[str]) -> str:
    *most, last = (WORDS[reason] for reason in reasons)
    return f"{', '.join(most)} and {last}" if most else last


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
