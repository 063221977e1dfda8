"""Whether an image lies far out along the direction in which its class varies most.

Tran et al., "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, https://arxiv.org/abs/1811.00636, algorithm 1: a
minority of triggered images in a class leaves a trace in the top singular vector of the class's centred features.
Where they are the majority of what gets a label, the clean images lie farther out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from debackdoor.detectors.features import FeatureDetector, principal_axes


@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(FeatureDetector):
    """The squared projection of an image's features, relative to its class's mean, on the class's widest direction.

    Example:
        >>> scores, of_clean = SpectralSignatures()(model, clean, images, answers)  # doctest: +SKIP
    """

    name: ClassVar[str] = "spectral"

    def learn(self, features: Tensor) -> Callable[[Tensor], Tensor] | None:
        axes = principal_axes(features, 1)
        return lambda others: axes.project(others).square().sum(1)
