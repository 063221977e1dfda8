"""Which of a pile of images carry the trigger."""

from __future__ import annotations

import torch
from scipy.stats import betabinom
from torch import Tensor, nn

from debackdoor.case import open_case
from debackdoor.defenses.rnp import RNP
from debackdoor.detectors.clustering import ActivationClustering
from debackdoor.detectors.cognitive_distillation import CognitiveDistillation
from debackdoor.detectors.sample_base import SampleDetector
from debackdoor.detectors.samples import ExposedMargin
from debackdoor.detectors.spectral import SpectralSignatures
from debackdoor.detectors.strip import STRIP
from debackdoor.errors import DebackdoorError, check_fraction
from debackdoor.models.forward import predict
from debackdoor.types import CleanSet, Progress, SampleScores

METHODS: dict[str, type[SampleDetector]] = {
    kind.name: kind for kind in (ExposedMargin, STRIP, CognitiveDistillation, SpectralSignatures, ActivationClustering)
}
"""Ways to score samples, by name; the first is the default."""

MODELS = ("exposed", "original")


def detect_samples(
    model: nn.Module,
    clean: CleanSet,
    images: Tensor | CleanSet,
    *,
    method: str = ExposedMargin.name,
    on: str = "exposed",
    false_positive_rate: float = 0.01,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
) -> SampleScores:
    """Scores every image for how likely it carries the trigger that the model answers to.

    Args:
        model: any classifier of images (N, C, H, W) in [0, 1]; it is not changed.
        clean: the defender's trusted samples; a quarter of them, held out, set the threshold.
        images: the pile to judge, float32 (N, C, H, W) in [0, 1]; labels, where there are any, are not used.
        method: one of :data:`METHODS`.
        on: let the method look at the ``exposed`` model or the ``original`` one.
        false_positive_rate: the share of clean images that may be flagged, a fraction.
        seed: of the split and everything random.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: called from inside long loops.

    Raises:
        DebackdoorError: if the method is unknown, or a fraction is not from 0 to 1.
        DataError: if the clean set is too small or does not fit the model, or the pile does not fit the clean set.
        ModelError: if the model does not classify the clean images.
    """
    check_fraction(false_positive_rate=false_positive_rate)
    if method not in METHODS:
        raise DebackdoorError(f"expected a method out of {', '.join(METHODS)}, got '{method}'; choose one of them")
    if on not in MODELS or (on == "original" and METHODS[method] is ExposedMargin):
        raise DebackdoorError(
            f"expected the model to look at out of {', '.join(MODELS)}, and for {ExposedMargin.name} the exposed one, "
            f"got '{on}'; choose another"
        )
    case = open_case(model, clean, RNP(seed=seed, precision=precision), device, progress)
    pile = (images.x if isinstance(images, CleanSet) else images).to(case.clean.x.device)
    if pile.shape[1:] != case.clean.x.shape[1:]:
        raise DebackdoorError(
            f"expected suspect images of shape {tuple(case.clean.x.shape[1:])} as the clean ones have, got "
            f"{tuple(pile.shape[1:])}; bring them to the size that the model takes"
        )
    answers = predict(case.suspect, pile, precision=precision).argmax(1)
    judge = case.unlearn(case.suspect).model if on == "exposed" else case.suspect
    detector = METHODS[method](seed=seed, precision=precision)
    scores, usual = (part.cpu() for part in detector(judge, case.holdout, pile, answers, progress=progress))
    threshold = float(torch.quantile(usual, 1 - false_positive_rate, interpolation="higher"))
    flagged = scores > threshold
    p_value = _by_chance(int(flagged.sum()), len(scores), int((usual > threshold).sum()), len(usual))
    return SampleScores(
        scores, threshold, flagged, answers.cpu(), false_positive_rate, p_value, f"{method} on the {on} model"
    )


def _by_chance(flagged: int, images: int, above: int, clean: int) -> float:
    """How probable it is that at least ``flagged`` of as many clean images are above the threshold.

    The threshold is a clean score with ``above`` of ``clean`` others beyond it, so that the share of clean images
    beyond it is not known, but follows a beta distribution.
    """
    return float(betabinom.sf(flagged - 1, images, above + 1, clean - above))
