"""Whether an image belongs to the smaller of two clusters into which its class falls.

Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI 2019,
https://arxiv.org/abs/1811.03728, sections 4 and 5: in features reduced to ten independent components, a minority of
triggered images is a cluster of its own. Where they are the majority of what gets a label, the clean images are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from debackdoor.detectors.features import Axes, FeatureDetector, principal_axes
from debackdoor.errors import check_count

FEWEST = 3
"""Images of a class below which two clusters tell nothing."""


@dataclass(frozen=True, kw_only=True)
class ActivationClustering(FeatureDetector):
    """How much nearer an image's features are to its class's smaller cluster, times the clusters' silhouette.

    The paper calls a whole cluster poisoned or clean; this makes a score of what it decides by: the place between the
    two centres ranks the images of a class, and the silhouette the classes.

    Attributes:
        components: dimensions that the features of a class are reduced to, at most.

    Example:
        >>> scores, of_clean = ActivationClustering()(model, clean, images, answers)  # doctest: +SKIP
    """

    name: ClassVar[str] = "clustering"

    components: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(components=self.components)

    def learn(self, features: Tensor) -> Callable[[Tensor], Tensor] | None:
        # The paper's independent components are a rotation of whitened principal ones, which no distance notices.
        axes = principal_axes(features, self.components)
        if len(features) < FEWEST or len(axes.deviations) == 0:
            return None
        # Imported here: importing it changes the state of Python's random numbers.
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score

        places = _whitened(axes, features).numpy()
        found = KMeans(2, n_init=10, random_state=self.seed).fit(places)
        small, large = np.argsort(np.bincount(found.labels_, minlength=2), kind="stable")
        silhouette = max(float(silhouette_score(places, found.labels_)), 0.0)
        centres = torch.from_numpy(found.cluster_centers_)
        return lambda others: silhouette * _between(_whitened(axes, others), centres[large], centres[small])


def _whitened(axes: Axes, features: Tensor) -> Tensor:
    return axes.project(features) / axes.deviations


def _between(places: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Where (N,) the places (N, k) are: -1 at ``start``, 1 at ``end``, never beyond."""
    nearer = (places - start).norm(dim=1) - (places - end).norm(dim=1)
    return nearer / (end - start).norm()
