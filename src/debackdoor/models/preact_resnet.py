"""Pre-activation ResNet (He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, section 4).

As in the CIFAR networks that backdoor studies share, no norm follows the last block. Parameter names follow their
layout (``conv1``, ``layer1.0.bn1``, ``shortcut.0``, ``linear``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.models.initialise import kaiming


class PreActBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions; a projected shortcut starts from the activated input."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + kept


class PreActResNet(nn.Module):
    """Stages of ``width``, 2, 4 and 8 times ``width`` planes. Input (N, C, H, W), output (N, num_classes) logits."""

    def __init__(self, depths: Sequence[int], num_classes: int = 10, width: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = _stage(width, width, depths[0], 1)
        self.layer2 = _stage(width, width * 2, depths[1], 2)
        self.layer3 = _stage(width * 2, width * 4, depths[2], 2)
        self.layer4 = _stage(width * 4, width * 8, depths[3], 2)
        self.linear = nn.Linear(width * 8, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(in_planes: int, planes: int, depth: int, stride: int) -> nn.Sequential:
    later = [PreActBlock(planes, planes, 1) for _ in range(depth - 1)]
    return nn.Sequential(PreActBlock(in_planes, planes, stride), *later)


def preactresnet18(num_classes: int = 10, width: int = 64, in_channels: int = 3) -> PreActResNet:
    """Pre-activation ResNet-18; 11.2 M parameters at width 64."""
    return PreActResNet((2, 2, 2, 2), num_classes, width, in_channels)
