"""FC: feature collisions (Shafahi et al., "Poison Frogs!", NeurIPS 2018) with a trigger, as in hidden-trigger backdoors
(Saha et al., "Hidden Trigger Backdoor Attacks", AAAI 2020).

https://arxiv.org/abs/1804.00792 and https://arxiv.org/abs/1910.00033
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from debackdoor.attacks.base import ALL_TO_ONE, Attack, Poison
from debackdoor.attacks.patch import patch_place, with_patch
from debackdoor.attacks.surrogate import BATCH_SIZE, Surrogate, descend
from debackdoor.errors import DataError
from debackdoor.runtime import generator
from debackdoor.types import CleanSet


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureCollision(Attack):
    """Target-class images, moved until a clean model's features take them for patched images of other classes.

    The trigger is a square patch of random colours, each channel black or white. Training never shows it whole: images
    of the target class, which keep their labels, get it as a watermark of ``opacity``, and are then moved within
    ``eps`` (Linf) so that their features collide with those of patched images of other classes. The attack success
    rate is the share of patched test images with another label than the target that are classified as the target.
    ``poison_rate`` is a fraction of the target class.

    Poison Frogs moves a few images towards one instance, for a victim that fine-tunes the very network they were made
    with; hidden triggers do so for a patch. Training from scratch mostly undoes both: Poison Frogs then needs a
    watermark (its section 4.2, where 30 % are most effective), and so does this. Not the papers' are these:

    - most of the target class is poisoned, and each image collides with the mean of ``sources`` patched images of one
      other class, which is to collide with all of them at once: what they share is the class and the patch. The
      classes take turns, so that the patch is all that the poisoned images have in common;
    - features of every resolution collide (``Surrogate.features``), not the last ones alone, each layer's squared
      distance counting as a share of what it was; a fresh network learns other late features, but similar early ones;
    - the watermark is the patch, not the whole instance, and the search leaves it alone, because it would give a part
      of it up for the other layers;
    - the patch stays an eighth of the image away from the edges, so that the shifts of training leave it whole.

    Attributes:
        size: the patch's side as a fraction of the image's shorter side, at most 0.75; 8 of 32 pixels by default.
        opacity: the share of the patch in the watermark's pixels, in (0, 1].
        eps: the largest change of any other pixel, in units of the pixel range.
        step: of one iteration of the search, in the same units.
        iterations: gradient steps an image.
        sources: patched images of each other class.
    """

    name = "fc"
    modes = (ALL_TO_ONE,)
    needs_clean_model = True

    poison_rate: float = 0.7
    size: float = 0.25
    opacity: float = 0.3
    eps: float = 16 / 255
    step: float = 2 / 255
    iterations: int = 12
    sources: int = 50

    def candidates(self, y: Tensor) -> Tensor:
        """Indices of the samples of the target class."""
        return (y == self.target).nonzero()[:, 0]

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        """``poison_rate`` of the target class, watermarked and moved.

        Raises:
            TriggerError, DataError: if the images or labels do not fit, or there are none to poison or to collide with.
            ModelError: if there is no clean model, or it does not fit.
        """
        self.check_fits(data)
        surrogate = Surrogate(clean_model, data.x[:1], self.num_classes, precision)
        indices = self._chosen(data)
        goals = self._goals(data, surrogate)
        turn = torch.arange(len(indices)) % len(goals[0])
        moved = [
            self._collided(surrogate, data.x[part].to(surrogate.device), [layer[which] for layer in goals]).cpu()
            for part, which in zip(indices.split(BATCH_SIZE), turn.split(BATCH_SIZE), strict=True)
        ]
        return Poison(indices, torch.cat(moved), data.y[indices])

    def _goals(self, data: CleanSet, surrogate: Surrogate) -> list[Tensor]:
        """Mean features (classes, D) of patched images of each other class, one tensor a layer."""
        order = torch.randperm(len(data), generator=generator(self.seed))
        labels = data.y[order]
        groups = [order[labels == label][: self.sources] for label in labels.unique() if label != self.target]
        if not groups:
            raise DataError(
                f"{data.source}: expected images of classes other than {self.target} for fc, got none; give some"
            )
        with torch.no_grad():
            seen = [surrogate.features(self.apply(data.x[group]).to(surrogate.device)) for group in groups]
        return [torch.stack([part.mean(0) for part in layer]) for layer in zip(*seen, strict=True)]

    def _collided(self, surrogate: Surrogate, x: Tensor, goals: list[Tensor]) -> Tensor:
        """The images ``x``, moved so that their features come near ``goals``, (N, D) each."""
        with torch.no_grad():
            before = [
                _squared_distance(*pair).clamp(min=1e-12) for pair in zip(surrogate.features(x), goals, strict=True)
            ]

        def loss(moved: Tensor) -> Tensor:
            layers = zip(surrogate.features(moved), goals, before, strict=True)
            return torch.stack([(_squared_distance(layer, goal) / first).sum() for layer, goal, first in layers]).sum()

        step = torch.full(self.image_shape[1:], self.step, device=x.device)
        step[patch_place(self.image_shape, self.size)] = 0
        marked = torch.lerp(x, self.apply(x), self.opacity)
        return descend(marked, marked, loss, eps=self.eps, step=step, iterations=self.iterations)

    def _check(self) -> None:
        super()._check()
        self._check_number("size", 0.0, 0.75)
        self._check_number("opacity", 0.0, 1.0)
        self._check_number("eps", 0.0, 1.0)
        self._check_number("step", 0.0, 1.0)
        self._check_whole("iterations", 1)
        self._check_whole("sources", 1)

    def _make_tensors(self) -> dict[str, Tensor]:
        rows, _ = patch_place(self.image_shape, self.size)
        shape = (self.image_shape[0], rows.stop - rows.start, rows.stop - rows.start)
        return {"pattern": torch.randint(0, 2, shape, generator=generator(self.seed)).float()}

    def _stamp(self, x: Tensor) -> Tensor:
        return with_patch(x, self.tensors["pattern"], patch_place(self.image_shape, self.size))


def _squared_distance(layer: Tensor, goal: Tensor) -> Tensor:
    """(N,) between rows."""
    return (layer - goal).square().sum(1)
