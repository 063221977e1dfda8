"""Whether a model stays sure of an image's label when other images are laid over it.

Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019, https://arxiv.org/abs/1902.06531,
section 4: a trigger wins over whatever it is overlaid with, so the answers' entropy stays low. Overlays are added with
weight 1 and saturate, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from debackdoor.detectors.sample_base import SampleDetector, checked_numbers, checked_pile
from debackdoor.errors import DataError, check_count
from debackdoor.models.forward import eval_mode, predict
from debackdoor.runtime import generator
from debackdoor.types import CleanSet, Progress


@dataclass(frozen=True, kw_only=True)
class STRIP(SampleDetector):
    """Minus the mean entropy of the answers under overlays, in nats: 0 where the model stays sure, -log K at worst.

    Attributes:
        overlays: clean images laid over each image, drawn without repetition; fewer where there are not that many.
        batch_size: overlaid images that go through the model at once.

    Example:
        >>> scores, of_clean = STRIP()(model, clean, images, answers)  # doctest: +SKIP
    """

    name: ClassVar[str] = "strip"

    overlays: int = 100
    batch_size: int = 500

    def __post_init__(self) -> None:
        check_count(overlays=self.overlays, batch_size=self.batch_size)

    def __call__(
        self,
        model: nn.Module,
        clean: CleanSet,
        images: Tensor,
        answers: Tensor,
        *,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor]:
        checked_pile(clean, images, answers)
        if len(clean) < 2:
            raise DataError(
                f"{clean.source}: expected at least 2 clean images, for one is not laid over itself, got {len(clean)}; "
                "add clean images"
            )
        # As many for the pile as for the clean images, of which each has one overlay less to choose from.
        count = min(self.overlays, len(clean) - 1)
        ranks = torch.rand(len(images) + len(clean), len(clean), generator=generator(self.seed))
        ranks[len(images) :].fill_diagonal_(2.0)
        chosen = ranks.argsort(1)[:, :count]
        both = torch.cat([images, clean.x])
        with eval_mode(model):
            scores = checked_numbers(self._scores(model, both, clean.x, chosen, progress))
        return scores[: len(images)], scores[len(images) :]

    def _scores(
        self, model: nn.Module, x: Tensor, overlays: Tensor, chosen: Tensor, progress: Progress | None
    ) -> Tensor:
        """The scores (N,) of ``x``, each image under those of the overlays that its row of ``chosen`` names."""
        at_once, found = max(1, self.batch_size // chosen.shape[1]), []
        for part, index in zip(x.split(at_once), chosen.to(x.device).split(at_once), strict=True):
            laid = (part[:, None] + overlays[index]).clamp(max=1).flatten(0, 1)
            logs = predict(model, laid, batch_size=self.batch_size, precision=self.precision).log_softmax(1)
            found.append((logs.exp() * logs).sum(1).view(len(part), -1).mean(1))
            if progress is not None:
                progress("strip", sum(map(len, found)), len(x), {})
        return torch.cat(found)
