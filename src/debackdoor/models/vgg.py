"""VGG for small images (Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, table 1).

The convolutions are the paper's; one linear layer follows them, as CIFAR-sized images need. Parameter names follow the
layout most public CIFAR checkpoints use (``features.0``, ``classifier``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.errors import ModelError
from debackdoor.models.initialise import kaiming

# Convolutions in each of the five stages.
_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_MULTIPLES = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """VGG-11, 13, 16 or 19, with or without BatchNorm; ``width`` is the first stage's. Input (N, C, H, W).

    Raises:
        ModelError: if ``depth`` is another number.
    """

    def __init__(
        self, depth: int, batch_norm: bool, num_classes: int = 10, width: int = 64, in_channels: int = 3
    ) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise ModelError(f"expected VGG of depth {', '.join(map(str, _DEPTHS))}, got {depth}")
        layers: list[nn.Module] = []
        planes = in_channels
        for count, multiple in zip(_DEPTHS[depth], _MULTIPLES, strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(planes, width * multiple, 3, padding=1))
                planes = width * multiple
                if batch_norm:
                    layers.append(nn.BatchNorm2d(planes))
                layers.append(nn.ReLU())
            # Rounding up keeps a pixel for images below 32x32, and changes nothing at 32.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(planes, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
