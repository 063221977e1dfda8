"""How fast unlearning and recovery learn, image for image, ours and published; and what the machine can do."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from debackdoor.channels import find_channels
from debackdoor.models.layout import to_faster_layout
from debackdoor.rnp.recover import RecoverSettings, recover
from debackdoor.rnp.unlearn import UnlearnSettings, unlearn
from debackdoor.types import CleanSet

sys.path.append(str(Path(__file__).parent.parent / "reproduce"))
import official_rnp as official

SIZE = 4096
"""Rows and columns of the matrices that the machine multiplies."""

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}

WAYS = {"unlearn": 3, "recover": 2}
"""How many times the arithmetic of a way forwards an image takes: recovery learns no weight."""

LONG_ENOUGH = 5.0
"""Seconds that a rate is measured over, about."""


def gemm_rates() -> dict[str, float]:
    """Floating point operations a second, by precision, over some seconds, since the loops take as long."""
    return {name: _gemm(kind) for name, kind in KINDS.items()}


def _gemm(kind: torch.dtype) -> float:
    a, b = (torch.randn(SIZE, SIZE).to(kind) for _ in range(2))
    a @ b
    count, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < LONG_ENOUGH / 2:
        a @ b
        count += 1
    return count * 2 * SIZE**3 / seconds


@dataclass(frozen=True)
class Loop:
    """One kind of learning.

    Attributes:
        run: learns for so many passes over the images.
        flops: of one image, forwards and backwards.
    """

    run: Callable[[int], object]
    flops: float


def our_loops(model: nn.Module, images: CleanSet, batch: int) -> dict[str, Loop]:
    """Stages 1 and 2 as a repair runs them, but for checks and stops."""
    model = copy.deepcopy(model)
    to_faster_layout(model, images.x[:2])
    layers = find_channels(model, images.x[:2])
    each = -(-len(images) // batch)

    def unlearning(passes: int) -> object:
        # Checked at the start and the end alone, and at a step size that changes nothing: what is timed is learning.
        settings = UnlearnSettings(
            lr=1e-9, stop_accuracy=0.0, past_peak=None, check_every=passes * each, largest_fall=1.0, max_passes=passes,
            least_steps=1, batch_size=batch,
        )  # fmt: skip
        return unlearn(model, images, settings)

    def recovery(passes: int) -> object:
        return recover(model, layers, images, RecoverSettings(passes=passes, batch_size=batch))

    return _loops(model, images, {"unlearn": unlearning, "recover": recovery})


def published_loops(model: nn.Module, images: CleanSet, batch: int) -> dict[str, Loop]:
    """The same as published: float32, contiguous, masks of batch norms alone; without any there is no recovery."""
    clock = official.Clock()

    def settings(passes: int) -> official.Settings:
        return official.Settings(1.0, batch, 1e-9, -1.0, passes, passes, 0)

    def unlearning(passes: int) -> object:
        return official.unlearn(copy.deepcopy(model), images, settings(passes), lambda _: {}, clock)

    def recovery(passes: int) -> object:
        return official.recover(copy.deepcopy(model), images, settings(passes), lambda _: {}, clock)

    runs: dict[str, Callable[[int], object]] = {"unlearn": unlearning}
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        runs["recover"] = recovery
    return _loops(model, images, runs)


def passes_for(loop: Loop) -> int:
    """How many passes take about long enough; the first, which is slower, is for warming up."""
    loop.run(1)
    return max(1, round(LONG_ENOUGH * rate(loop, 1, 1)))


def rate(loop: Loop, images: int, passes: int) -> float:
    """Images a second, without what a loop does once, whatever the number of passes: copies and checks."""
    once = _seconds(loop, 1)
    return images * passes / (_seconds(loop, 1 + passes) - once)


def _seconds(loop: Loop, passes: int) -> float:
    started = time.perf_counter()
    loop.run(passes)
    return time.perf_counter() - started


def _loops(model: nn.Module, images: CleanSet, runs: dict[str, Callable[[int], object]]) -> dict[str, Loop]:
    """With the arithmetic of an image: a way back costs a way forwards for the images, and one for the weights.

    Only the way forwards is counted: torch's counter takes grouped convolutions for full ones on the way back.
    """
    few = images.x[:4]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(few)
    forwards = counter.get_total_flops() / len(few)
    return {name: Loop(run, WAYS[name] * forwards) for name, run in runs.items()}
