"""The built-in architectures by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from debackdoor.models.mobilenet_v2 import mobilenetv2
from debackdoor.models.preact_resnet import preactresnet18
from debackdoor.models.resnet import resnet18, resnet34, resnet50
from debackdoor.models.vgg import VGG
from debackdoor.models.wrn import WideResNet


@dataclass(frozen=True)
class BuiltIn:
    """An architecture: how to build it, and the stem, whose weight's shape is (width, in_channels, 3, 3).

    ``build`` takes ``num_classes``, and may be given ``width`` and ``in_channels``.
    """

    build: Callable[..., nn.Module]
    stem: str = "conv1.weight"


_TABLE = {
    "resnet18": BuiltIn(resnet18),
    "resnet34": BuiltIn(resnet34),
    "resnet50": BuiltIn(resnet50),
    "preactresnet18": BuiltIn(preactresnet18),
    "mobilenetv2": BuiltIn(mobilenetv2),
    **{f"wrn{d}-{k}": BuiltIn(partial(WideResNet, d, k)) for d, k in ((16, 1), (16, 2), (28, 10), (40, 2))},
    **{f"vgg{d}": BuiltIn(partial(VGG, d, False), "features.0.weight") for d in (11, 13, 16, 19)},
    **{f"vgg{d}_bn": BuiltIn(partial(VGG, d, True), "features.0.weight") for d in (11, 13, 16, 19)},
}

BUILT_IN_NAMES = tuple(_TABLE)
"""Names for messages; Wide ResNets of other depths and factors have names of the same form."""


def find_built_in(name: str) -> BuiltIn | None:
    """The architecture with this name (without a width suffix), or None.

    A Wide ResNet of a depth that does not exist is found here, and says so when it is built.
    """
    wide = re.fullmatch(r"wrn(\d+)-(\d+)", name)
    if wide:
        return BuiltIn(partial(WideResNet, int(wide[1]), int(wide[2])))
    return _TABLE.get(name)
