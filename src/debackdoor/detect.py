"""Which of a pile of images carry the trigger."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import betabinom
from torch import Tensor, nn

from debackdoor.case import Case, open_case
from debackdoor.defenses.rnp import RNP
from debackdoor.detectors.clustering import ActivationClustering
from debackdoor.detectors.cognitive_distillation import CognitiveDistillation
from debackdoor.detectors.sample_base import SampleDetector, checked_pile
from debackdoor.detectors.samples import ExposedMargin, smallest
from debackdoor.detectors.shift import REPAIR_SHIFT, repair_shift
from debackdoor.detectors.spectral import SpectralSignatures
from debackdoor.detectors.strip import STRIP
from debackdoor.errors import DebackdoorError, check_fraction
from debackdoor.memory import DEFAULT
from debackdoor.models.forward import predict
from debackdoor.repair import repair_unchecked
from debackdoor.rnp.modes import normalisation_learns
from debackdoor.rnp.unlearn import Unlearned
from debackdoor.runtime import contiguous
from debackdoor.types import CleanSet, Progress, SampleScores

DETECTORS: dict[str, type[SampleDetector]] = {
    kind.name: kind for kind in (ExposedMargin, STRIP, CognitiveDistillation, SpectralSignatures, ActivationClustering)
}
"""Ways to score samples with one model, by name."""

OWN = (REPAIR_SHIFT, ExposedMargin.name)
"""Ways that look at models of their own."""

MODELS = ("exposed", "original")

SEVERAL = 4
"""As many exposed models have to agree on a sample."""


def detect_samples(
    model: nn.Module,
    clean: CleanSet,
    images: Tensor | CleanSet,
    *,
    method: str = REPAIR_SHIFT,
    on: str = "exposed",
    false_positive_rate: float = 0.01,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    memory: float = DEFAULT,
    keep: str | Path | None = None,
    progress: Progress | None = None,
) -> SampleScores:
    """Scores every image for how likely it carries the trigger that the model answers to.

    Args:
        model: any classifier of images (N, C, H, W) in [0, 1]; it is not changed.
        clean: the defender's trusted samples; a quarter of them, held out, set the threshold.
        images: the pile to judge, float32 (N, C, H, W) in [0, 1]; labels, where there are any, are not used.
        method: ``repair-shift``, or one of :data:`DETECTORS`; ``exposed-margin`` also takes its place where a repair
            finds nothing and leaves the model as it is.
        on: let a published method look at the ``exposed`` model or the ``original`` one.
        false_positive_rate: the share of clean images that may be flagged, a fraction.
        seed: of the split and everything random.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        memory: GiB that may be taken.
        keep: a folder that finished stages are kept in and, with the same arguments, taken from; None keeps none.
        progress: called from inside long loops.

    Raises:
        DebackdoorError: if the method is unknown, or a fraction is not from 0 to 1.
        DataError: if the clean set is too small or does not fit the model, or the pile does not fit the clean set.
        ModelError: if the model does not classify the clean images.
    """
    check_fraction(false_positive_rate=false_positive_rate)
    if method != REPAIR_SHIFT and method not in DETECTORS:
        known = ", ".join((REPAIR_SHIFT, *DETECTORS))
        raise DebackdoorError(f"expected a method out of {known}, got '{method}'; choose one of them")
    if on not in MODELS or (on == "original" and method in OWN):
        raise DebackdoorError(
            f"expected the model to look at out of {', '.join(MODELS)}, and for {' and '.join(OWN)} the exposed one, "
            f"got '{on}'; choose another"
        )
    pile = images.x if isinstance(images, CleanSet) else images
    checked_pile(clean, pile, torch.zeros(pile.shape[:1], dtype=torch.int64, device=pile.device))
    case = open_case(model, clean, RNP(seed=seed, precision=precision), device, progress, memory=memory, keep=keep)
    with case.within_memory():
        return _judge(case, contiguous(pile.detach().to(case.clean.x.device)), method, on, false_positive_rate)


def _judge(case: Case, pile: Tensor, method: str, on: str, false_positive_rate: float) -> SampleScores:
    precision = case.method.precision
    answers = predict(case.suspect, pile, precision=precision).argmax(1)
    if method == REPAIR_SHIFT and (repaired := repaired_model(case)) is not None:
        found = [repair_shift(case.suspect, repaired, x, precision=precision) for x in (pile, case.holdout.x)]
        name, conclusive = method, True
    else:
        method = ExposedMargin.name if method == REPAIR_SHIFT else method
        found, conclusive = _score(case, pile, answers, method, on)
        name = f"{method} on the {on} model"
    scores, usual = (part.cpu() for part in found)
    threshold, rate = clean_threshold(usual, false_positive_rate)
    flagged = scores > threshold
    p_value = _by_chance(int(flagged.sum()), len(scores), int((usual > threshold).sum()), len(usual))
    return SampleScores(scores, threshold, flagged, answers.cpu(), rate, p_value, name, conclusive)


def clean_threshold(usual: Tensor, rate: float) -> tuple[float, float]:
    """The clean score above which a further clean one is with this probability at most, and that probability.

    A further score falls in each of the gaps between n others with a probability of 1 / (n + 1): of few scores even the
    highest is exceeded more often than may be, and is taken all the same.
    """
    n = len(usual)
    place = min(n, max(1, math.ceil((1 - rate) * (n + 1) - 1e-9)))
    return float(usual.sort().values[place - 1]), max(rate, 1 / (n + 1))


def _score(case: Case, pile: Tensor, answers: Tensor, method: str, on: str) -> tuple[list[Tensor], bool]:
    """Scores of the pile and of the held-out clean images, and whether the clean task was unlearned for them."""
    precision = case.method.precision
    # Clean images are scored as those of the pile are, with the model's answers, right or wrong, as their labels.
    holdout = replace(case.holdout, y=predict(case.suspect, case.holdout.x, precision=precision).argmax(1))
    exposed = [] if on == "original" else expose_several(case, DETECTORS[method] is ExposedMargin)
    judges = [unlearned.model for unlearned in exposed] or [case.suspect]
    detector = DETECTORS[method](seed=case.method.seed, precision=precision)
    found = smallest(detector, judges, holdout, pile, answers, progress=case.progress)
    return list(found), all(unlearned.forgot for unlearned in exposed)


def repaired_model(case: Case) -> nn.Module | None:
    """The model with the backdoor removed, unchecked; None where nothing was found and all is left as it was."""
    exposure = case.expose()
    result = repair_unchecked(case, exposure, case.evidence(exposure))
    return result.model if result.changed else None


def expose_several(case: Case, several: bool) -> list[Unlearned]:
    """Several models exposed by their normalisation layers, where these learn, or one exposed by all weights."""
    if several and normalisation_learns(case.suspect):
        return case.keep("unlearn-parts", lambda: list(case.unlearn_parts(case.suspect, SEVERAL)), SEVERAL)
    return [case.keep("unlearn", lambda: case.unlearn(case.suspect))]


def _by_chance(flagged: int, images: int, above: int, clean: int) -> float:
    """How probable it is that at least ``flagged`` of as many clean images are above the threshold.

    The threshold is a clean score with ``above`` of ``clean`` others beyond it, so that the share of clean images
    beyond it is not known, but follows a beta distribution.
    """
    return float(betabinom.sf(flagged - 1, images, above + 1, clean - above))
