"""Wide ResNet (Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, section 2, table 1).

Parameter names follow the usual PyTorch layout (``block1.layer.0.conv1``, ``convShortcut``, ``bn1``, ``fc``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.errors import ModelError
from debackdoor.models.initialise import kaiming


class WideBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions, and a shortcut."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        kept = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + kept


class WideGroup(nn.Module):
    """Blocks of one resolution, under the name ``layer``."""

    def __init__(self, in_planes: int, planes: int, depth: int, stride: int) -> None:
        super().__init__()
        later = [WideBlock(planes, planes, 1) for _ in range(depth - 1)]
        self.layer = nn.Sequential(WideBlock(in_planes, planes, stride), *later)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-``depth``-``factor``: three groups of ``width * factor``, 2 and 4 times as many planes.

    Input (N, C, H, W), output (N, num_classes) logits.

    Raises:
        ModelError: if ``depth`` is not 6n + 4 with n of at least 1, or ``factor`` is below 1.
    """

    def __init__(self, depth: int, factor: int, num_classes: int = 10, width: int = 16, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4 or factor < 1:
            raise ModelError(
                f"expected wrnDEPTH-FACTOR with DEPTH = 10, 16, 22, 28, 34, 40, ..., got wrn{depth}-{factor}"
            )
        blocks, planes = (depth - 4) // 6, width * factor
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.block1 = WideGroup(width, planes, blocks, 1)
        self.block2 = WideGroup(planes, planes * 2, blocks, 2)
        self.block3 = WideGroup(planes * 2, planes * 4, blocks, 2)
        self.bn1 = nn.BatchNorm2d(planes * 4)
        self.fc = nn.Linear(planes * 4, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
