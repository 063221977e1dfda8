"""Poison made with the help of a clean model: what its layers see, and images moved within a small distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from debackdoor.errors import ModelError
from debackdoor.models import logits_of
from debackdoor.models.forward import predict, predict_of_any
from debackdoor.models.layout import memory_format
from debackdoor.runtime import autocast

BATCH_SIZE = 250
"""Images that go through a surrogate at once."""


class Surrogate:
    """A clean classifier that poison is made with; its weights and its mode stay as they are.

    Args:
        model: takes images in [0, 1]; in eval mode.
        image: (1, C, H, W), to find its layers with.
        num_classes: how many logits it must have.
        precision: ``auto``, ``fp32`` or ``bf16``.

    Attributes:
        device: where the model is, and where images given to it must be.
        head: the linear layer that the logits come from.

    Raises:
        ModelError: if there is no model, it does not take the image, has another number of classes, or no linear layer
            at its end.
    """

    def __init__(self, model: nn.Module | None, image: Tensor, num_classes: int, precision: str = "auto") -> None:
        if model is None:
            raise ModelError(
                "expected a clean model to make the poison with, got none; "
                "train one with the attack 'clean' and give it"
            )
        self._model = model
        self.device = next(model.parameters()).device
        self._precision = precision
        image = image.to(self.device)
        self._layout = self._fastest_layout(image)
        convolutions: dict[torch.Size, nn.Module] = {}
        linear: list[nn.Linear] = []

        def note(module: nn.Module, given: Tensor) -> None:
            if isinstance(module, nn.Linear):
                linear.append(module)
            else:
                convolutions[given.shape[2:]] = module

        layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        with torch.no_grad():
            classes = self._hooked(layers, note, image).shape[1]
        if classes != num_classes or not linear or linear[-1].out_features != classes:
            end = f"{type(linear[-1]).__name__} of {linear[-1].out_features}" if linear else "no linear layer"
            raise ModelError(
                f"expected a clean model whose last layer is linear, with {num_classes} classes, got {classes} classes "
                f"from {end}; give one that was trained on this data"
            )
        self.head = linear[-1]
        self._layers = [*convolutions.values(), self.head]

    def _fastest_layout(self, image: Tensor) -> torch.memory_format:
        """The layout of images, which need not be that of the weights: these are somebody else's."""
        predict_of_any(self._model, image, precision=self._precision)
        layout = memory_format(self._model, self.device)
        try:
            predict(self._model, image.contiguous(memory_format=layout), precision=self._precision)
        except RuntimeError:  # a network that calls .view on feature maps
            return torch.contiguous_format
        return layout

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits (N, K) on images (N, C, H, W) in [0, 1]; differentiable in the images."""
        with autocast(self.device, self._precision):
            return logits_of(self._model(x.contiguous(memory_format=self._layout))).float()

    def features(self, x: Tensor) -> list[Tensor]:
        """What goes into the last convolution at every resolution and, at the end of the list, into ``head``.

        Args:
            x: (N, C, H, W) in [0, 1].

        Returns:
            Float32 (N, D), one a layer, in the order in which the resolutions come up; differentiable in the images.
        """
        seen: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, given: Tensor) -> None:
            seen[module] = given.float().flatten(1)

        self._hooked(self._layers, keep, x)
        return [seen[layer] for layer in self._layers]

    def _hooked(self, layers: Sequence[nn.Module], use: Callable[[nn.Module, Tensor], None], x: Tensor) -> Tensor:
        """The logits for ``x``; ``use`` is called with each layer and what it is given."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            use(module, args[0] if args else kwargs["input"])

        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            return self.logits(x)
        finally:
            for handle in handles:
                handle.remove()


def descend(
    x: Tensor, start: Tensor, loss: Callable[[Tensor], Tensor], *, eps: float, step: float | Tensor, iterations: int
) -> Tensor:
    """Images near ``x`` with a small loss, by projected signed gradient steps.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, section 2.1.

    Args:
        x: (N, C, H, W) in [0, 1]; the result differs from it by at most ``eps`` in every value, and is in [0, 1], too.
        start: where to begin; brought into these bounds first.
        loss: one number for a batch, a sum over its images.
        eps: in units of the pixel range.
        step: of one iteration, in the same units; a tensor (H, W) where pixels have steps of their own.
        iterations: how many steps.
    """
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    moved = start.clamp(low, high)
    for _ in range(iterations):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(moved), moved)
        moved = (moved.detach() - step * gradient.sign()).clamp(low, high)
    return moved
