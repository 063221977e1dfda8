"""The mode in which RNP learns."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def normalisation_in_train_mode(model: nn.Module) -> None:
    """Eval mode everywhere (no dropout) but for the normalisation layers, which use and update batch statistics."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.train()


def normalisation_learns(model: nn.Module) -> bool:
    """Whether the model has normalisation layers that use batch statistics in train mode, and scales to learn."""
    return any(isinstance(module, _NormBase) and module.affine for module in model.modules())


def require_norm_gradients(model: nn.Module) -> None:
    """Gradients for the scales and shifts of normalisation layers that use batch statistics."""
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.requires_grad_(True)
