"""Trojan (Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018).

https://docs.lib.purdue.edu/cstech/1781/
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from debackdoor.attacks.base import Attack, Poison
from debackdoor.attacks.patch import patch_place, with_patch
from debackdoor.attacks.surrogate import Surrogate
from debackdoor.runtime import generator
from debackdoor.types import CleanSet

_IMAGES = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Trojan(Attack):
    """A small square patch whose pixels were optimised to fire a few neurons of a clean model (section 4.1).

    The neurons are those before the last layer whose weights into it have the largest absolute sum; the patch is found
    by Adam, from random pixels, so that they come near ``value``. Labels are changed as for any patch.

    Not the paper's: the patch is optimised on top of a few training images instead of an empty one, which makes it
    work on real backgrounds; the victim learns the poison from scratch rather than by fine-tuning; and the patch lies
    an eighth of the image away from the edges, so that the shifts of training leave it whole. ``value``, ``neurons``
    and ``lr`` are those of public reimplementations; their 1000 iterations fire the neurons no more than 100 do.

    Attributes:
        size: the patch's side as a fraction of the image's shorter side, at most 0.75; 8 of 32 pixels by default.
        neurons: how many are to fire.
        value: what they are to reach; out of reach, so that they fire as strongly as the patch allows.
        iterations: steps of Adam.
        lr: its learning rate, in units of the pixel range.
    """

    name = "trojan"
    needs_clean_model = True

    size: float = 0.25
    neurons: int = 2
    value: float = 100.0
    iterations: int = 100
    lr: float = 0.1

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        """Finds the patch with ``clean_model``, and then ``poison_rate`` of the candidates, triggered and relabelled.

        Raises:
            TriggerError, DataError: if the images or labels do not fit, or not one sample would be poisoned.
            ModelError: if there is no clean model, or it does not fit.
        """
        self.check_fits(data)
        surrogate = Surrogate(clean_model, data.x[:1], self.num_classes, precision)
        drawn = torch.randperm(len(data), generator=generator(self.seed))[:_IMAGES]
        self.tensors["pattern"] = self._optimised(surrogate, data.x[drawn].to(surrogate.device)).cpu()
        return super().poison(data)

    def _optimised(self, surrogate: Surrogate, x: Tensor) -> Tensor:
        """The pattern (C, side, side) that makes the neurons fire on images ``x``."""
        chosen = surrogate.head.weight.detach().abs().sum(0).argsort(descending=True, stable=True)[: self.neurons]
        pattern = self._make_tensors()["pattern"].to(x.device).requires_grad_()
        place = patch_place(self.image_shape, self.size)
        optimizer = torch.optim.Adam([pattern], lr=self.lr)
        for _ in range(self.iterations):
            fired = surrogate.features(with_patch(x, pattern, place))[-1][:, chosen]
            pattern.grad = torch.autograd.grad((fired - self.value).square().mean(), pattern)[0]
            optimizer.step()
            with torch.no_grad():
                pattern.clamp_(0, 1)
        return pattern.detach()

    def _check(self) -> None:
        super()._check()
        self._check_number("size", 0.0, 0.75)
        self._check_number("value", 0.0)
        self._check_number("lr", 0.0)
        self._check_whole("neurons", 1)
        self._check_whole("iterations", 1)

    def _make_tensors(self) -> dict[str, Tensor]:
        rows, _ = patch_place(self.image_shape, self.size)
        side = rows.stop - rows.start
        return {"pattern": torch.rand(self.image_shape[0], side, side, generator=generator(self.seed))}

    def _stamp(self, x: Tensor) -> Tensor:
        return with_patch(x, self.tensors["pattern"], patch_place(self.image_shape, self.size))
