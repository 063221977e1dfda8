"""The mode in which RNP learns."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


def normalisation_in_train_mode(model: nn.Module) -> None:
    """Eval mode everywhere (no dropout) but for the normalisation layers, which use and update batch statistics."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.train()


def norms_that_learn(model: nn.Module) -> int:
    """How many batch normalisations the model has that have scales and shifts to learn."""
    return sum(isinstance(module, _BatchNorm) and module.affine for module in model.modules())


def normalisation_learns(model: nn.Module) -> bool:
    """Whether the model has batch normalisation, with scales and shifts to learn."""
    return norms_that_learn(model) > 0


def require_norm_gradients(model: nn.Module) -> None:
    """Gradients for the scales and shifts of batch normalisation."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(True)
