"""What scan, repair and sample detection begin with: a copy of the suspect model, and the clean images in two parts.

Everything is chosen from the clean set alone: its fit part teaches, its hold-out part decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from debackdoor.data import check_clean_set, split_clean
from debackdoor.defenses.levels import HOLDOUT
from debackdoor.defenses.rnp import RNP, Exposure
from debackdoor.detectors.evidence import FAINT, Evidence
from debackdoor.detectors.examination import Examination
from debackdoor.detectors.label import RUNS, largest_pile_up, most_repeated, repeated_shares, unlearn_parts
from debackdoor.detectors.margin import FEWEST_CLASSES
from debackdoor.errors import ChanceError, DebackdoorError, ModelError, TooFewError, UnsupportedError, check_positive
from debackdoor.memory import DEFAULT, images_within
from debackdoor.models.copying import apart, standalone_copy
from debackdoor.models.forward import (
    accuracy,
    check_finite,
    in_eval,
    logits_of,
    predict,
    predict_of_any,
    trusted_precision,
)
from debackdoor.models.layout import to_faster_layout
from debackdoor.rnp.modes import norms_that_learn
from debackdoor.rnp.unlearn import Unlearned, unlearn
from debackdoor.runtime import at_once, device_name, has_fast_bf16, learning, resolve_device, seeded
from debackdoor.stages import Keep, Stages, anew, stages_in
from debackdoor.types import CleanSet, Progress

FEWEST_NORMS = 8
"""Batch normalisations from which on a pile-up tells anything.

In networks of two to six convolutions without a backdoor the answers often gathered on one label whatever part of the
images was forgotten.
"""

FEW = 4
"""Images that show whether there is a gradient."""

AT_FIRST = 32
"""Images that go through the model at once while it is not known how much memory they take."""


@dataclass(frozen=True)
class Case:
    """A suspect model and what it is examined with.

    Attributes:
        suspect: a copy of the caller's model, in eval mode, on the device that is computed on.
        clean: all clean images, on that device.
        fit: the part that teaches.
        holdout: the part that decides.
        classes: how many logits the model has.
        most: how many images may go through it at once.
        method: unlearns, recovers and prunes.
        progress: called from inside long loops.
        keep: has the finished stages of an earlier run, or keeps none.
    """

    suspect: nn.Module
    clean: CleanSet
    fit: CleanSet
    holdout: CleanSet
    classes: int
    most: int
    method: RNP
    progress: Progress | None
    keep: Keep = anew

    def within_memory(self) -> AbstractContextManager[None]:
        """A context in which no more images than may are computed on at once, and gradients are kept."""
        return _learning(self.most, self.method.seed, self.clean.x.device)

    @property
    def examine(self) -> Examination:
        """The searches, the same before and after a repair."""
        m = self.method
        return Examination(self.fit, self.holdout, self.classes, m.seed, m.precision, self.progress, self.keep)

    def unlearn(self, model: nn.Module) -> Unlearned:
        """Makes a copy of a model forget the clean task."""
        m = self.method
        return unlearn(model, self.fit, m.unlearning, seed=m.seed, precision=m.precision, progress=self.progress)

    def expose(self) -> Exposure:
        """Unlearns the clean task and recovers it."""
        return self.method.expose(self.suspect, self.fit, progress=self.progress, keep=self.keep)

    def unlearn_parts(self, model: nn.Module, runs: int) -> Iterator[Unlearned]:
        """Makes copies of a model forget parts of the clean task, by the normalisation layers alone."""
        m = self.method
        return unlearn_parts(model, self.fit, runs=runs, seed=m.seed, precision=m.precision, progress=self.progress)

    def pile_ups(self, model: nn.Module) -> list[float]:
        """For every label the share of the answers that gathers on it whatever part of the images is forgotten.

        A label of more than its part of the images has more of the answers to begin with: those are not counted.
        """
        even = 1 / self.classes

        def repeated() -> list[float]:
            # Unlike a generator expression, map does not hold on to the last model while the next one is made.
            histories = map(attrgetter("history"), self.unlearn_parts(model, RUNS))
            return repeated_shares(histories, least=FAINT + even)

        usual = torch.bincount(self.fit.y, minlength=self.classes).double() / len(self.fit)
        shares = self.keep("pile-ups", repeated, model)
        return [share - max(0.0, part - even) for share, part in zip(shares, usual.tolist(), strict=True)]

    def evidence(self, exposure: Exposure) -> Evidence:
        """All that speaks for a backdoor in the suspect model."""
        found = self._at_first(exposure)
        return found if found.exposed else self.examine.once_more(self.suspect, found)

    def _at_first(self, exposure: Exposure) -> Evidence:
        if self.classes < FEWEST_CLASSES or norms_that_learn(self.suspect) < FEWEST_NORMS:
            return self.examine(self.suspect, largest_pile_up(exposure.unlearned.history).label)
        pile_up = most_repeated(self.pile_ups(self.suspect))
        return replace(self.examine(self.suspect, pile_up.label), pile_up=pile_up)


def open_case(
    model: nn.Module,
    clean: CleanSet,
    method: RNP,
    device: str = "auto",
    progress: Progress | None = None,
    *,
    memory: float = DEFAULT,
    keep: str | Path | None = None,
) -> Case:
    """Copies the model, checks that the clean set fits it, and splits that.

    Args:
        model: any classifier of images (N, C, H, W) in [0, 1]; it is not changed.
        clean: the defender's trusted samples.
        method: unlearns, recovers and prunes; its seed is that of the split too.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: called from inside long loops.
        memory: GiB that may be taken.
        keep: a folder that finished stages are kept in, and taken from; None keeps none.

    Raises:
        DataError: if the clean set is too small, holds one class only, or has labels the model does not know.
        ModelError: if the model's answers do not depend on the image, or are no better than chance.
        DebackdoorError: if the memory does not suffice for the model, or the folder cannot be written to.
    """
    check_positive(memory=memory)
    if not isinstance(method.seed, int) or not 0 <= method.seed < 2**31:
        raise DebackdoorError(f"expected a seed from 0 to 2147483647, got {method.seed!r}; correct it")
    place = resolve_device(device)
    with _learning(AT_FIRST, method.seed, place):
        suspect, clean = in_eval(standalone_copy(model).to(place)), clean.to(place).detached()
        with apart(model):
            check_works(suspect, clean, "fp32" if method.precision == "auto" else method.precision)
        method = replace(method, precision=trusted_precision(suspect, clean.x[:AT_FIRST], method.precision))
        _check_gradient(suspect, clean.x[:FEW])
        to_faster_layout(suspect, clean.x[:2], method.precision)
        fit, holdout = split_clean(clean, HOLDOUT, method.seed)
        classes = predict(suspect, clean.x[:2], precision=method.precision).shape[1]
        most = images_within(memory, suspect, clean.x, method.precision)
        stages = anew if keep is None else _stages(keep, suspect, clean, method, most, progress)
    return Case(suspect, clean, fit, holdout, classes, most, method, progress, stages)


def _stages(
    folder: str | Path, suspect: nn.Module, clean: CleanSet, method: RNP, most: int, progress: Progress | None
) -> Stages:
    """Those that earlier jobs with the same model, images and settings have finished."""
    # A hash of code and weights knows nothing of hooks and imported functions; what they change, the answers show.
    answers = predict(suspect, clean.x, precision=method.precision).argmax(1)
    place = clean.x.device
    computed = (device_name(place), has_fast_bf16(place), torch.are_deterministic_algorithms_enabled())
    return stages_in(folder, suspect, clean.x, clean.y, answers, method, most, *computed, progress=progress)


@contextmanager
def _learning(most: int, seed: int, device: torch.device) -> Iterator[None]:
    """At most so many images at once, gradients, chance of its own and float32, whatever the caller has set."""
    with learning(), at_once(most), seeded(seed, device):
        yield


def _check_gradient(model: nn.Module, x: Tensor) -> None:
    """Checks that searches can find their way: rounding, or no_grad in the network, would leave them blind.

    Raises:
        UnsupportedError: if the logits say nothing of how to change the image.
    """
    image = x.clone().requires_grad_()
    total = logits_of(model(image.clone())).float().square().sum()
    found = torch.autograd.grad(total, image, allow_unused=True)[0] if total.requires_grad else None
    if found is None or not bool(found.any()):
        raise UnsupportedError(
            "expected logits that follow the image by gradient, got some that do not; take rounding, integer "
            "conversion, torch.no_grad() and detach() out of the network's forward"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def check_works(model: nn.Module, clean: CleanSet, precision: str = "auto") -> None:
    """Checks that the clean set fits the model and that the model can classify it.

    Raises:
        DataError: if the clean set is too small, holds one class only or hardly another, or has labels the model does
            not know.
        ModelError: if the model's answers do not depend on the image, or are not finite.
        ChanceError: if they are no better than chance.
    """
    logits = predict_of_any(model, clean.x, precision=precision)
    check_clean_set(clean, logits.shape[1])
    check_finite(logits)
    if bool((logits == logits[0]).all()):
        raise ModelError("expected outputs that depend on the image, got the same for all; the weights are not trained")
    reached, n = accuracy(logits, clean.y), len(clean)
    chance = float(torch.bincount(clean.y).max()) / n
    better = chance + 3 * math.sqrt(chance * (1 - chance) / n)
    if better >= 1:
        raise TooFewError(
            f"expected enough images of several classes to tell the model from chance, got {n}, of which {chance:.0%} "
            "are of one class; add images of the others"
        )
    height, width = clean.x.shape[-2:]
    if reached < better:
        raise ChanceError(
            f"expected the model to classify the clean images, got accuracy {reached:.1%}, no better than chance; "
            f"check the labels' order, --arch, whether the model is for images of {height}x{width} pixels, and whether "
            "it wants them normalised (--mean and --std)"
        )
