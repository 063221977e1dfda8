"""What the last layer of any classifier sees, the directions in which that varies, and detectors that judge by it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.detectors.sample_base import SampleDetector, checked_numbers, checked_pile
from debackdoor.errors import check_count
from debackdoor.models.forward import eval_mode, predict
from debackdoor.runtime import answered_at_once, at_most
from debackdoor.types import CleanSet, Progress


def penultimate_features(
    model: nn.Module, x: Tensor, *, batch_size: int | None = None, precision: str = "auto"
) -> Tensor:
    """Float32 features (N, D) of images (N, C, H, W) in [0, 1]: the flattened input of the layer that gives the logits.

    That is the last linear layer or 1x1 convolution called that has an output a class; without one, the last linear
    layer called. The logits themselves stand in where there is neither, or its input has no row an image.

    The model is used in the mode it is in; its hooks are taken off again, also after an error.
    """
    tap = _Tap()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) or _is_pointwise(module)]
    handles = [layer.register_forward_pre_hook(tap.note, with_kwargs=True) for layer in layers]
    parts = []
    try:
        # What predict would take apart, the tap would see the last part of.
        for batch in x.split(answered_at_once(x.device) if batch_size is None else at_most(batch_size)):
            tap.clear()
            logits = predict(model, batch, batch_size=batch_size, precision=precision)
            parts.append(tap.head_input(logits).detach().float().flatten(1))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(parts)


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


class _Tap:
    """Remembers the latest input of the layers, by how many outputs they have: keeping all would not fit in memory."""

    def __init__(self) -> None:
        self.by_outputs: dict[int, Tensor] = {}
        self.linear: Tensor | None = None

    def clear(self) -> None:
        self.by_outputs, self.linear = {}, None

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, nn.Linear):
            self.linear = given
            self.by_outputs[module.out_features] = given
        elif isinstance(module, nn.Conv2d):
            self.by_outputs[module.out_channels] = given

    def head_input(self, logits: Tensor) -> Tensor:
        found = self.by_outputs.get(logits.shape[1], self.linear)
        return logits if found is None or found.ndim < 2 or len(found) != len(logits) else found


@dataclass(frozen=True)
class Axes:
    """The main directions of a cloud of features.

    Attributes:
        mean: float64 (D,).
        directions: float64 (k, D), orthonormal, the widest first; k is 0 where the features do not vary.
        deviations: float64 (k,), the standard deviations along them.
    """

    mean: Tensor
    directions: Tensor
    deviations: Tensor

    def project(self, features: Tensor) -> Tensor:
        """Float64 coordinates (N, k) of features (N, D), relative to the mean."""
        return (features.double() - self.mean) @ self.directions.T


def principal_axes(features: Tensor, count: int) -> Axes:
    """The at most ``count`` widest directions of features (N, D), N at least 1; none in which they do not vary."""
    values = features.double()
    mean = values.mean(0)
    _, widths, directions = torch.linalg.svd(values - mean, full_matrices=False)
    # What rounding leaves of constant features is no direction; float32 features are exact to about 1e-7.
    noise = 1e-6 * max(float(values.norm()), 1e-30)
    kept = int((widths[:count] > noise).sum())
    return Axes(mean, directions[:kept], widths[:kept] / max(len(values) - 1, 1) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class FeatureDetector(SampleDetector):
    """A detector that looks at the features of the images that get one label, label by label.

    Classes are the answers on the pile, and what is learned of a class is learned from the pile alone. A clean image is
    scored with what was learned of its own label. Where the pile has too few images of a label, or they are all alike,
    the score is 0.

    Attributes:
        batch_size: images that go through the model at once.
    """

    batch_size: int = 500

    def __post_init__(self) -> None:
        check_count(batch_size=self.batch_size)

    @abstractmethod
    def learn(self, features: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What gives features (N, D) scores (N,), learned from the features of one class; None if nothing can be."""

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
            features, of_clean = (self._features(model, x) for x in (pile.x, clean.x))
        scores, clean_scores = torch.zeros(len(pile)), torch.zeros(len(clean))
        labels, clean_labels = pile.y.cpu(), clean.y.cpu()
        classes = labels.unique().tolist()
        for done, label in enumerate(classes):
            members = features[labels == label]
            score = self.learn(members)
            if score is not None:
                scores[labels == label] = score(members).float()
                clean_scores[clean_labels == label] = score(of_clean[clean_labels == label]).float()
            if progress is not None:
                progress(self.name, done + 1, len(classes), {})
        return checked_numbers(scores).to(images.device), checked_numbers(clean_scores).to(images.device)

    def _features(self, model: nn.Module, x: Tensor) -> Tensor:
        """On the CPU: the statistics of a class are small, and scikit-learn's."""
        found = penultimate_features(model, x, batch_size=self.batch_size, precision=self.precision)
        return checked_numbers(found).cpu()
