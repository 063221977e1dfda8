"""Device, precision and random generators."""

import os

import pytest
import torch

from debackdoor.errors import DebackdoorError
from debackdoor.runtime import (
    autocast,
    deterministic_algorithms,
    generator,
    has_fast_bf16,
    resolve_device,
    shuffled_batches,
)

CPU = torch.device("cpu")


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == CPU
    assert resolve_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device(torch.device("cuda", 1)) == torch.device("cuda:1")
    with pytest.raises(DebackdoorError, match="expected a CUDA device, got only 2"):
        resolve_device("cuda:2")
    assert resolve_device("cpu:0") == CPU
    assert resolve_device("cpu") == CPU


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DebackdoorError, match="none on this machine; use --device cpu"):
        resolve_device("cuda")
    with pytest.raises(DebackdoorError, match="auto, cpu, cuda, got 'tpu'"):
        resolve_device("tpu")
    with pytest.raises(DebackdoorError, match="auto, fp32, bf16, got 'fp8'"):
        autocast(CPU, "fp8")


@pytest.mark.parametrize("fast", [True, False])
def test_precision_decides_the_dtype_of_a_product(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("debackdoor.runtime.has_fast_bf16", lambda device: fast)
    x = torch.ones(2, 2)
    found = {}
    for precision in ("fp32", "bf16", "auto"):
        with autocast(CPU, precision):
            found[precision] = (x @ x).dtype
    assert (x @ x).dtype == torch.float32
    assert found == {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "auto": torch.bfloat16 if fast else torch.float32,
    }


def test_inside_the_callers_own_autocast_weights_that_change_count() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with autocast(CPU, "bf16"):
            before = layer(x).detach()
        with torch.no_grad():
            layer.weight.mul_(5)
            layer.bias.mul_(5)
        with autocast(CPU, "bf16"):
            after = layer(x).detach()
    assert torch.allclose(after.float(), 5 * before.float(), rtol=0.05)


def test_no_backend_no_fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(has_fast_bf16(CPU), bool)
    assert has_fast_bf16(torch.device("meta")) is False
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert has_fast_bf16(CPU) is False


@pytest.mark.parametrize(("avx", "amx"), [(False, False), (True, False), (False, True)])
def test_x86_without_the_arithmetic_emulates_it(avx: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_fast_bf16(CPU) is (torch.backends.mkldnn.is_available() and (avx or amx))


def test_generators_are_their_own() -> None:
    state = torch.get_rng_state()
    one, two = (torch.rand(3, generator=generator(seed)) for seed in (5, 5))
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.rand(3, generator=generator(6)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("count", "sizes"), [(8, [4, 4]), (10, [4, 4, 2]), (9, [4, 4]), (5, [4]), (3, [3]), (1, [1]), (4, [4])]
)
def test_batches_hold_every_sample_once_but_for_a_single_last_one(count: int, sizes: list[int]) -> None:
    random = generator(0)
    batches = shuffled_batches(count, 4, random)
    assert [len(batch) for batch in batches] == sizes
    seen = torch.cat(batches).tolist()
    assert len(set(seen)) == len(seen) == sum(sizes)
    assert set(seen) <= set(range(count))
    assert all(batch.dtype == torch.int64 for batch in batches)


def test_every_pass_has_an_order_of_its_own() -> None:
    random = generator(0)
    first, second = (torch.cat(shuffled_batches(50, 10, random)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.cat(shuffled_batches(50, 10, generator(0))))


def test_batches_may_be_elsewhere() -> None:
    found = shuffled_batches(8, 4, generator(0), torch.device("meta"))
    assert [batch.device.type for batch in found] == ["meta", "meta"]


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_determinism_is_put_back(before: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    def now() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    try:
        with deterministic_algorithms(False):
            assert now() == before
        with deterministic_algorithms():
            assert now() == (True, True)
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark
        assert now() == before
        with pytest.raises(KeyError), deterministic_algorithms():
            raise KeyError
        assert now() == before
    finally:
        torch.use_deterministic_algorithms(False)
