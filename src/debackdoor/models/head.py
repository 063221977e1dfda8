"""The number of classes, from the weights alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from debackdoor.errors import CheckpointError

_HEAD = re.compile(r"(?:^|_)(?:fc|linear|classifier|head|heads|logits|output)$")
_TABLE = re.compile(r"embed|position|table")


def infer_num_classes(state_dict: Mapping[str, Tensor]) -> int:
    """How many outputs the last layer has.

    Among the linear weights (2-D; without any, the 1x1 convolutions) it takes those in a part with a usual name such
    as ``fc`` or ``classifier``, if there are any, and of these the one whose outputs no other consumes. The order in
    the file plays no part: safetensors keeps none.

    Raises:
        CheckpointError: if that leaves no layer, or layers of different sizes.
    """
    weights = {
        name: value.shape
        for name, value in state_dict.items()
        if name.split(".")[-1] == "weight" and not _TABLE.search(name)
    }
    linear = {name: shape for name, shape in weights.items() if len(shape) == 2}
    pointwise = {name: shape for name, shape in weights.items() if len(shape) == 4 and shape[2:] == (1, 1)}
    layers = linear or pointwise
    depth = _common_depth(list(state_dict))
    named = {name: shape for name, shape in layers.items() if _HEAD.search(name.split(".")[depth])}
    ends = _unconsumed(named or layers)
    sizes = set(ends.values())
    if len(sizes) != 1:
        found = ", ".join(f"{name} with {size}" for name, size in list(ends.items())[:4]) or "no linear layer"
        raise CheckpointError(f"expected one last layer to count the classes of, got {found}; give --num-classes")
    return sizes.pop()


def _unconsumed(layers: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Output counts of the layers that feed none of the others."""
    return {
        name: shape[0]
        for name, shape in layers.items()
        if not any(shape[0] == other[1] for key, other in layers.items() if key != name)
    }


def _common_depth(names: list[str]) -> int:
    """How many leading parts all names share, as ``backbone.`` in every name of a wrapped network."""
    paths = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(len(path) > depth + 1 for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    return depth
