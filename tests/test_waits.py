"""Steps of learning read no number back: on a GPU that would wait until it has computed everything asked so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from debackdoor.channels import find_channels
from debackdoor.defenses import ANP, FineTuning, NCUnlearning
from debackdoor.rnp.recover import RecoverSettings, recover
from debackdoor.rnp.unlearn import UnlearnSettings, unlearn
from debackdoor.types import RecoveredTrigger
from defense_cases import corner_set, corner_victim


class Reads(TorchDispatchMode):
    """Counts tensors whose number is read: by ``.item()``, ``float()``, ``bool()`` or ``int()``."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(work: Callable[[], object]) -> int:
    with Reads() as mode:
        work()
    return mode.count


def unlearning(steps: int) -> object:
    settings = UnlearnSettings(lr=1e-6, check_every=None, max_passes=1, least_steps=1, batch_size=16)
    return unlearn(corner_victim(), corner_set(16 * steps), settings)


def recovery(steps: int) -> object:
    model, data = corner_victim(), corner_set(16 * steps)
    return recover(model, find_channels(model, data.x[:2]), data, RecoverSettings(passes=1, batch_size=16))


def tuning(steps: int) -> object:
    return FineTuning(epochs=1, batch_size=16)(corner_victim(), corner_set(16 * steps))


def masks_against_noise(steps: int) -> object:
    model, data = corner_victim(), corner_set()
    return replace(ANP(), iterations=steps).learn(model, find_channels(model, data.x[:2]), data)


@pytest.mark.parametrize("learn", [unlearning, recovery, tuning, masks_against_noise])
def test_more_steps_read_no_more(learn: Callable[[int], object]) -> None:
    assert reads(lambda: learn(2)) == reads(lambda: learn(8)) > 0


def test_the_tuning_against_a_trigger_reads_once_an_epoch() -> None:
    data = corner_set()
    trigger = RecoveredTrigger(0, torch.zeros(data.x[:1, :1].shape[1:]), torch.zeros(data.x.shape[1:]), 0.0, 0.0)

    def work(batch_size: int) -> object:
        defense = NCUnlearning(epochs=1, batch_size=batch_size)
        return defense._fine_tune(corner_victim(), data, trigger, None)

    assert reads(lambda: work(16)) == reads(lambda: work(80))
