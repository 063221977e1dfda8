"""How little of an image is enough for the model's answer.

Huang et al., "Distilling Cognitive Backdoor Patterns within an Image", ICLR 2023, https://openreview.net/forum?id=S3D9NLzjnQ5,
section 3: a mask is learned that keeps the logits and is as small as it can be; a trigger leaves it next to nothing.
This is the variant on logits (CD-L), with the paper's weight of the total variation, 10 (the authors' code has 1 as its
default and 10 in its README).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from debackdoor.detectors.sample_base import SampleDetector, checked_numbers, checked_pile
from debackdoor.errors import DebackdoorError, check_count, check_positive
from debackdoor.models.forward import eval_mode, logits_of, predict
from debackdoor.runtime import at_most, autocast, contiguous, generator, learning, sent
from debackdoor.types import CleanSet, Progress


@dataclass(frozen=True, kw_only=True)
class CognitiveDistillation(SampleDetector):
    """Minus the mask's sum, in pixels: 0 where nothing of the image is needed, -H * W where all of it is.

    Attributes:
        steps: of Adam (betas 0.1, 0.1) on the masks.
        lr: its step size, on the masks before the squashing tanh.
        sparsity: weight of the mask's L1 norm, a pixel (the paper's alpha).
        smoothness: weight of the mask's mean squared difference between neighbours (the paper's beta).
        batch_size: images whose masks are learned at once.

    Example:
        >>> scores, of_clean = CognitiveDistillation()(model, clean, images, answers)  # doctest: +SKIP
    """

    name: ClassVar[str] = "cognitive-distillation"

    steps: int = 100
    lr: float = 0.1
    sparsity: float = 0.01
    smoothness: float = 10.0
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_count(steps=self.steps, batch_size=self.batch_size)
        check_positive(lr=self.lr, sparsity=self.sparsity)
        if not self.smoothness >= 0:
            raise DebackdoorError(f"expected smoothness of at least 0, got {self.smoothness}; correct it")

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
        random, found = generator(self.seed), []
        with learning(), eval_mode(model):
            both = torch.cat([contiguous(images.detach()), contiguous(clean.x.detach())])
            for batch in both.split(at_most(self.batch_size)):
                masks = self.distil(model, batch, random)
                found.append(-masks.flatten(1).sum(1))
                if progress is not None:
                    progress("distil", sum(map(len, found)), len(both), {"pixels": -float(found[-1].mean())})
        scores = torch.cat(found)
        return scores[: len(images)], scores[len(images) :]

    def distil(self, model: nn.Module, x: Tensor, random: torch.Generator) -> Tensor:
        """The masks (N, 1, H, W) in [0, 1] of images (N, C, H, W); the model is used in the mode it is in.

        Where the mask is 0, the image is replaced by a colour that is drawn anew at every step.
        """
        goal = checked_numbers(predict(model, x, batch_size=self.batch_size, precision=self.precision))
        raw = torch.ones(len(x), 1, *x.shape[2:], device=x.device, requires_grad=True)
        optimizer = torch.optim.Adam([raw], lr=self.lr, betas=(0.1, 0.1))
        for _ in range(self.steps):
            colour = sent(torch.rand(len(x), x.shape[1], 1, 1, generator=random), x.device)
            with torch.enable_grad():
                loss = self._loss(model, x, (raw.tanh() + 1) / 2, colour, goal)
                (raw.grad,) = torch.autograd.grad(loss, raw)
            optimizer.step()
        return checked_numbers((raw.detach().tanh() + 1) / 2)

    def _loss(self, model: nn.Module, x: Tensor, mask: Tensor, colour: Tensor, goal: Tensor) -> Tensor:
        """Summed over the images, so that each mask is learned as if it were alone."""
        with autocast(x.device, self.precision):
            logits = logits_of(model(x * mask + colour * (1 - mask))).float()
        kept = (logits - goal).abs().mean(1)
        rough = mask.diff(dim=2).square().sum((1, 2, 3)) + mask.diff(dim=3).square().sum((1, 2, 3))
        small = mask.sum((1, 2, 3))
        return (kept + self.sparsity * small + self.smoothness * rough / mask[0].numel()).sum()
