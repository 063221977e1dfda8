"""CL (Turner et al., "Label-Consistent Backdoor Attacks", 2019).

https://arxiv.org/abs/1912.02771
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.attacks.base import ALL_TO_ONE, Attack, Poison
from debackdoor.attacks.surrogate import BATCH_SIZE, Surrogate, descend
from debackdoor.errors import TriggerError
from debackdoor.runtime import generator
from debackdoor.types import CleanSet


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelConsistent(Attack):
    """A 3x3 pattern in the four corners of target-class images that are hard to recognise; labels stay (section 4).

    A clean model's loss on the chosen images is raised within ``eps`` (PGD with a random start), so that the victim
    learns the pattern instead. A test image gets the pattern alone. ``poison_rate`` is a fraction of the target class.

    ``poison_rate`` and ``eps`` are those with which the Adversarial Neuron Pruning paper (NeurIPS 2021) builds this
    attack. The authors' own images were moved within an L2 ball of 300/255. Public reimplementations take 7 to 100
    ``iterations``; a few long steps are enough to make nearly every image misread, by other models as well.

    Attributes:
        eps: the largest change of a pixel before the pattern is put on, in units of the pixel range.
        step: of one iteration, in the same units.
        iterations: gradient steps an image.
        amplitude: how much lighter or darker the pattern makes a pixel, in (0, 1]; at 1 it is black and white.
    """

    name = "cl"
    modes = (ALL_TO_ONE,)
    needs_clean_model = True

    poison_rate: float = 0.8
    eps: float = 16 / 255
    step: float = 4 / 255
    iterations: int = 7
    amplitude: float = 1.0

    def candidates(self, y: Tensor) -> Tensor:
        """Indices of the samples of the target class."""
        return (y == self.target).nonzero()[:, 0]

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        """``poison_rate`` of the target class, made hard for ``clean_model`` and then triggered.

        Raises:
            TriggerError, DataError: if the images or labels do not fit, or not one sample would be poisoned.
            ModelError: if there is no clean model, or it does not fit.
        """
        self.check_fits(data)
        surrogate = Surrogate(clean_model, data.x[:1], self.num_classes, precision)
        indices = self._chosen(data)
        x, y = data.x[indices], data.y[indices]
        start = x + self.eps * (2 * torch.rand(x.shape, generator=generator(self.seed)) - 1)
        hard = [
            self._hardened(surrogate, *(part.to(surrogate.device) for part in batch)).cpu()
            for batch in zip(x.split(BATCH_SIZE), start.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True)
        ]
        return Poison(indices, self.apply(torch.cat(hard)), y)

    def _hardened(self, surrogate: Surrogate, x: Tensor, start: Tensor, y: Tensor) -> Tensor:
        def loss(moved: Tensor) -> Tensor:
            return -F.cross_entropy(surrogate.logits(moved), y, reduction="sum")

        return descend(x, start, loss, eps=self.eps, step=self.step, iterations=self.iterations)

    def _check(self) -> None:
        super()._check()
        for name in ("eps", "step", "amplitude"):
            self._check_number(name, 0.0, 1.0)
        self._check_whole("iterations", 1)
        if min(self.image_shape[1:]) < 6:
            raise TriggerError(f"expected images of at least 6x6 for cl, got {self.image_shape}; use larger ones")

    def _make_tensors(self) -> dict[str, Tensor]:
        signs = torch.tensor([[-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
        signal = torch.zeros(self.image_shape[1:])
        # Mirrored from corner to corner, so that a flipped image carries the same pattern.
        signal[-3:, -3:], signal[-3:, :3] = signs, signs.flip(1)
        signal[:3, -3:], signal[:3, :3] = signs.flip(0), signs.flip(0, 1)
        return {"signal": self.amplitude * signal}

    def _stamp(self, x: Tensor) -> Tensor:
        return (x + self.tensors["signal"].to(x.device)).clamp(0, 1)
