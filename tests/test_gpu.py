"""What only a GPU can show: DEBACKDOOR_TEST_GPU=1 pytest -m slow tests/test_gpu.py"""

from __future__ import annotations

import pytest
import torch

import debackdoor as db
from debackdoor.runtime import deterministic_algorithms
from shortcut_cases import row_images, switched_to

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_deterministic_repairs_are_the_same_bit_for_bit() -> None:
    with deterministic_algorithms():
        results = [db.repair(switched_to(2), row_images(64), device="cuda") for _ in range(2)]
    one, other = (result.model.state_dict() for result in results)
    assert [result.changed for result in results] == [True, True]
    assert all(torch.equal(one[name], other[name]) for name in one)
