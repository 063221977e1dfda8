"""MobileNetV2 for small images (Sandler et al., CVPR 2018, table 2).

The first two strides of the paper's network are 1, as CIFAR-sized images need. Parameter names follow the layout most
public CIFAR checkpoints use (``layers.0.conv1``, ``shortcut.0``, ``conv2``, ``linear``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.models.initialise import kaiming

# Expansion, planes at width 32, blocks, stride of the first block.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """Expanding 1x1, depthwise 3x3 and projecting 1x1 convolutions; a shortcut where the stride is 1."""

    def __init__(self, in_planes: int, planes: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = in_planes * expansion
        self.stride = stride
        self.conv1 = nn.Conv2d(in_planes, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride == 1 and in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class MobileNetV2(nn.Module):
    """``width`` planes in the stem, all others in proportion. Input (N, C, H, W), output (N, num_classes) logits."""

    def __init__(self, num_classes: int = 10, width: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        before = width
        for expansion, full, count, first in _STAGES:
            planes = max(1, round(full * width / 32))
            for stride in [first] + [1] * (count - 1):
                blocks.append(InvertedResidual(before, planes, expansion, stride))
                before = planes
        self.layers = nn.Sequential(*blocks)
        last = 1280 * width // 32
        self.conv2 = nn.Conv2d(before, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def mobilenetv2(num_classes: int = 10, width: int = 32, in_channels: int = 3) -> MobileNetV2:
    """MobileNetV2; 2.3 M parameters at width 32."""
    return MobileNetV2(num_classes, width, in_channels)
