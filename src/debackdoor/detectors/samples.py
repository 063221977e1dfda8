"""Which images carry the trigger, told by the exposed model.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, abstract: the model that has forgotten the
clean task still answers to the trigger, and to hardly anything else. What another part of the images would have made
the model forget, each of several exposed models forgets in its own way; the trigger is what all of them answer to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from debackdoor.detectors.sample_base import SampleDetector, checked_numbers, checked_pile
from debackdoor.models.forward import eval_mode, margins_of, predict
from debackdoor.types import CleanSet, Progress


@dataclass(frozen=True, kw_only=True)
class ExposedMargin(SampleDetector):
    """How far the suspect model's answer still leads on the exposed model, in logits.

    Unlearning drives the answers to clean images below all others; a triggered image keeps its own. That needs neither
    the trigger nor the label, and each image is judged for itself.
    """

    name: ClassVar[str] = "exposed-margin"

    def __call__(
        self,
        model: nn.Module,
        clean: CleanSet,
        images: Tensor,
        answers: Tensor,
        *,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor]:
        pile = checked_pile(clean, images, answers)
        with eval_mode(model):
            found = [
                checked_numbers(margins_of(predict(model, part.x, precision=self.precision), part.y))
                for part in (pile, clean)
            ]
        if progress is not None:
            progress("score samples", 1, 1, {})
        return found[0], found[1]


def smallest(
    detector: SampleDetector,
    models: Sequence[nn.Module],
    clean: CleanSet,
    images: Tensor,
    answers: Tensor,
    *,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The smallest score that an image gets with any of several exposed models; (N,) of the pile and (M,) of the clean.

    Args:
        detector: scores samples with one model.
        models: at least one.
        clean: as for the detector.
        images: as for the detector.
        answers: as for the detector.
        progress: called from inside long loops.
    """
    found = [detector(model, clean, images, answers, progress=progress) for model in models]
    of_images, of_clean = zip(*found, strict=True)
    return torch.stack(of_images).amin(0), torch.stack(of_clean).amin(0)
