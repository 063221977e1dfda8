"""Initial weights that let deep networks without normalisation train."""

from __future__ import annotations

from torch import nn


def kaiming(network: nn.Module) -> None:
    """Draws every convolution's weights so that ReLU layers keep the scale of their input, in place.

    He et al., "Delving Deep into Rectifiers", ICCV 2015, section 2.2, forward case. Biases start at zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
