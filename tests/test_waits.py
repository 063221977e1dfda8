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
from debackdoor.detectors.trigger import SearchSettings, search_triggers
from debackdoor.rnp.recover import RecoverSettings, recover
from debackdoor.rnp.unlearn import UnlearnSettings, unlearn
from debackdoor.types import RecoveredTrigger
from defense_cases import corner_set, corner_victim

READING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class Reads(TorchDispatchMode):
    """Counts what waits: ``.item()``, ``float()``, ``bool()`` or ``int()`` of a tensor, and choosing by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = args[1] if func in INDEXING else ()
        self.count += func in READING or any(index is not None and index.dtype == torch.bool for index in chosen)
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

    assert reads(lambda: work(16)) == reads(lambda: work(80)) > 0


def test_choosing_by_a_mask_counts() -> None:
    x = torch.arange(4)
    assert reads(lambda: x[x > 1]) == reads((x > 1).nonzero) == reads(lambda: bool(x[0])) == 1
    assert reads(lambda: x[torch.tensor([0, 2])]) == 0


def test_the_search_for_a_trigger_chooses_by_no_mask() -> None:
    """Its optimiser reads its own count of steps, which is on the CPU, twice a step."""

    def work(steps: int) -> object:
        data = corner_set()
        return search_triggers(corner_victim().eval(), data, data, [0, 1], SearchSettings(steps=steps, batch_size=8))

    assert reads(lambda: work(9)) - reads(lambda: work(4)) == 2 * 5
