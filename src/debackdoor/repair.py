"""From a suspect model and a clean set to a repaired model, and a check of the repair.

Everything is chosen from the clean set alone: its fit part teaches, its hold-out part decides.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from debackdoor.data import check_clean_set, split_clean
from debackdoor.defenses.rnp import RNP, Exposure
from debackdoor.detectors.comparison import TriggerComparison, TriggerSizes
from debackdoor.detectors.label import PileUp, largest_pile_up
from debackdoor.detectors.margin import Margins, largest_margins
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.models.forward import accuracy, predict
from debackdoor.rnp.modes import uses_batch_statistics
from debackdoor.rnp.relearn import relearn
from debackdoor.rnp.unlearn import Unlearned
from debackdoor.runtime import resolve_device
from debackdoor.types import CleanSet, Progress, RepairResult, Step, Verification

EXPOSED_SHARE = 0.45
"""How far above chance (1 / K) the share of answers on one label must be for a backdoor to count as exposed.

Only where batch normalisation holds activations in place while the clean task is forgotten: the answers of a plain
VGG gathered on a label that was no backdoor's, with a backdoor and without.
"""

EASY = 2.0
"""A label whose smallest trigger is this many times smaller than the others' median is easy to reach."""

RARE = 0.01
"""A largest margin that is no more probable than this without a backdoor counts as one."""

HOLDOUT = 0.25
"""The share of the clean set that decides; the rest teaches, and relearning needs it more."""


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
    """Removes the backdoor from a copy of ``model``, if unlearning, a small trigger or a large margin shows one.

    Args:
        model: any classifier of images (N, C, H, W) in [0, 1]; it is not changed.
        clean: the defender's trusted samples.
        budget: how far accuracy on the hold-out part may fall, a fraction; relearning may add one standard error.
        seed: of the split, the order of the samples and the trigger search.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called from inside long loops.

    Raises:
        DataError: if the clean set is too small, holds one class only, or has labels the model does not know.
        ModelError: if the model's answers do not depend on the image, or are no better than chance.
    """
    if seed < 0:
        raise DebackdoorError(f"expected a seed of at least 0, got {seed}; correct it")
    place, home = resolve_device(device), _device_of(model)
    suspect, clean = copy.deepcopy(model).to(place).eval(), clean.to(place)
    check_works(suspect, clean, precision)
    method = RNP(budget=budget, seed=seed, precision=precision)
    fit, holdout = split_clean(clean, HOLDOUT, seed)
    exposure = method.expose(suspect, fit, progress=progress)
    classes = len(exposure.unlearned.label_shares)
    examine = _Examination(fit, holdout, classes, seed, precision, progress)
    pile_up = largest_pile_up(exposure.unlearned.history)
    before = examine(suspect, pile_up.label)
    piled_up = pile_up.share >= 1 / classes + EXPOSED_SHARE and uses_batch_statistics(suspect)
    exposed = piled_up or before.by_size or before.by_margin
    plan = method.choose(suspect, exposure, holdout) if exposed else ()
    result, after = method.remove(suspect, exposure, plan, holdout), before
    if exposed:
        pruned, result = result, _relearned(result, suspect, exposure, (fit, holdout), method, progress)
        after = examine(result.model, pile_up.label, before.label)
        if not _gone(before, after) and pruned.changed and result is not pruned:
            # Relearning can wake what pruning had put to sleep; then pruning alone is the better repair.
            alone = examine(pruned.model, pile_up.label, before.label)
            if _gone(before, alone):
                step = Step("take back", "relearning brought the backdoor back; pruning alone is kept")
                result, after = replace(pruned, history=result.history, steps=(*result.steps, step)), alone
    verification = _judge(exposed, exposure.unlearned, pile_up, before, after)
    steps = (*result.steps, Step("verify", verification.message))
    return replace(result, model=result.model.to(home), verification=verification, steps=steps)


def _relearned(
    result: RepairResult,
    suspect: nn.Module,
    exposure: Exposure,
    parts: tuple[CleanSet, CleanSet],
    method: RNP,
    progress: Progress | None,
) -> RepairResult:
    """The result with the kept channels taught anew, or with pruning alone where that costs too much accuracy."""
    learned = relearn(
        suspect,
        exposure.layers,
        result.plan,
        *parts,
        method.budget,
        seed=method.seed,
        precision=method.precision,
        progress=progress,
    )
    numbers = {"lr": learned.lr, "accuracy": learned.accuracy}
    history = {**result.history, "relearn": learned.history}
    if learned.model is None:
        step = Step("relearn", "given up: every step size costs more accuracy than the budget", numbers)
        return replace(result, history=history, steps=(*result.steps, step))
    step = Step("relearn", "the kept channels, from labels and the pruned model's answers on clean images", numbers)
    rates = {**result.clean_accuracy, "after": learned.accuracy}
    steps = (*result.steps, step)
    return replace(result, model=learned.model, clean_accuracy=rates, history=history, steps=steps, changed=True)


@dataclass(frozen=True)
class _Finding:
    """What the searches on one model say of one label."""

    label: int
    margins: Margins
    sizes: TriggerSizes

    @property
    def by_size(self) -> bool:
        return self.sizes.ease >= EASY

    @property
    def by_margin(self) -> bool:
        return self.margins.p_value <= RARE and self.margins.label == self.label


@dataclass(frozen=True)
class _Examination:
    """The same searches for every model, before and after."""

    fit: CleanSet
    holdout: CleanSet
    num_classes: int
    seed: int
    precision: str
    progress: Progress | None

    def __call__(self, model: nn.Module, piled_up: int, label: int | None = None) -> _Finding:
        """Examines ``label``; without one, the label whose margin stands out or else that of the pile-up."""
        margins = largest_margins(
            model,
            self.fit.x,
            self.num_classes,
            seed=self.seed,
            precision=self.precision,
            progress=self.progress,
        )
        if label is None:
            label = margins.label if margins.p_value <= RARE else piled_up
        search = TriggerComparison(label, self.fit, self.holdout, self.seed, self.precision, self.progress)
        return _Finding(label, margins, search(model))


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


def _gone(before: _Finding, after: _Finding) -> bool:
    """Whether the label that stood out before no longer does."""
    # A label that was learnt from triggers stays a little ahead after its backdoor is gone; by how much less counts.
    still_ahead = after.margins.ratio - 1 > (before.margins.ratio - 1) / 2
    return not (after.by_size or (after.by_margin and still_ahead))


def _judge(exposed: bool, unlearned: Unlearned, pile_up: PileUp, before: _Finding, after: _Finding) -> Verification:
    """Whether the exposed label still stands out, by a fresh search of triggers and of margins."""
    evidence = {"exposed_label": pile_up.label, "exposed_share": pile_up.share}
    for when, found in (("before", before), ("after", after)):
        evidence |= {
            f"margin_ratio_{when}": found.margins.ratio,
            f"margin_p_value_{when}": found.margins.p_value,
            f"trigger_pixels_{when}": found.sizes.pixels,
            f"trigger_success_{when}": found.sizes.success_rate,
            f"other_trigger_pixels_{when}": found.sizes.other_pixels,
        }
    label = before.label
    where = f"label {pile_up.label}: {pile_up.share:.0%} of the answers gather on it while the clean task is forgotten"
    where += f"; label {before.margins.label}: its largest margin is {before.margins.ratio:.1f} times the others'"
    if not exposed:
        if unlearned.reason in ("steps", "stuck"):
            message = (
                f"inconclusive: the clean task was not unlearned (accuracy {unlearned.accuracy:.0%}), so nothing could "
                "be exposed; give more clean images"
            )
            return Verification(False, None, evidence, message, conclusive=False)
        effort = f"a trigger to label {label} takes {before.sizes.pixels:.0f} pixels, to others "
        effort += f"{before.sizes.other_pixels:.0f}"
        return Verification(True, None, evidence, f"nothing is exposed; {where}, {effort}; the model is left as it is")
    passed = _gone(before, after)
    message = (
        f"{where}; now a trigger to label {label} takes {after.sizes.pixels:.0f} pixels ({before.sizes.pixels:.0f} "
        f"before), to others {after.sizes.other_pixels:.0f}, and the largest margin is {after.margins.ratio:.1f} times "
        f"the others': {'the label is no easier to reach' if passed else 'the backdoor is still there'}"
    )
    return Verification(passed, label, evidence, message)


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
