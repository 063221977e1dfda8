"""Untrusted checkpoints in: what is read, and what is refused."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from checkpoint_cases import Payload, ShellPayload, refusal, same_bits, small
from debackdoor.checkpoint import load_into, read_checkpoint, write_checkpoint
from debackdoor.errors import CheckpointError
from debackdoor.files import sha256_of

# --- reading what is good


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".anything"])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_content_not_suffix_decides_how_a_file_is_read(tmp_path: Path, form: str, suffix: str) -> None:
    path, weights = tmp_path / f"model{suffix}", small().state_dict()
    if form == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form == "zip")
    checkpoint = read_checkpoint(path)
    assert same_bits({key: checkpoint.state_dict[key] for key in weights}, dict(weights))
    assert len(checkpoint.state_dict) == len(weights)
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"net": weights, "acc": 93.1},
        lambda weights: {"model": weights, "scale": torch.tensor(2.0)},
        lambda weights: {"model_state_dict": weights, "optimizer_state_dict": {"state": {0: torch.zeros(2)}}},
        lambda weights: {"model": {"state_dict": weights}},
    ],
)
def test_state_dict_is_found_under_every_usual_name(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    weights = small().state_dict()
    torch.save(wrap(weights), tmp_path / "model.pt")
    assert same_bits(read_checkpoint(tmp_path / "model.pt").state_dict, dict(weights))


@pytest.mark.parametrize("legacy", [False, True])
def test_benign_objects_beside_the_weights_are_skipped(tmp_path: Path, legacy: bool) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 1, 1, 1)).sum().backward()
    optimizer.step()
    extras = {
        "optimizer": optimizer.state_dict(),
        "best_acc": np.float64(0.93),
        "history": np.arange(3, dtype=np.float32),
        "epoch": np.int64(7),
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
    }
    allowed = set(torch.serialization.get_safe_globals())
    torch.save({"net": model.state_dict(), **extras}, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    assert same_bits(read_checkpoint(tmp_path / "m.pt").state_dict, dict(model.state_dict()))
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_go_and_come_back(tmp_path: Path, prefix: str) -> None:
    weights = small().state_dict()
    torch.save({prefix + key: value for key, value in weights.items()}, tmp_path / "in.pt")
    checkpoint = read_checkpoint(tmp_path / "in.pt")
    assert list(checkpoint.state_dict) == list(weights)
    write_checkpoint(tmp_path / "out.pt", weights, like=checkpoint)
    assert list(torch.load(tmp_path / "out.pt")) == [prefix + key for key in weights]


def test_compiled_part_inside_the_network(tmp_path: Path) -> None:
    torch.save({"layer1._orig_mod.0.weight": torch.ones(1), "encoder.module.weight": torch.ones(1)}, tmp_path / "m.pt")
    checkpoint = read_checkpoint(tmp_path / "m.pt")
    assert dict(checkpoint.keys) == {
        "layer1.0.weight": "layer1._orig_mod.0.weight",
        "encoder.module.weight": "encoder.module.weight",
    }


def test_names_that_meet_without_their_prefix_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(1), "module.fc.weight": torch.zeros(1)}, tmp_path / "m.pt")
    assert "'fc.weight' with and without" in refusal(tmp_path / "m.pt")


# --- refusing what is not


@pytest.mark.parametrize("payload", [Payload, ShellPayload])
@pytest.mark.parametrize("form", ["zip", "legacy", "raw 0", "raw 2", "raw 4", "nested"])
def test_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, payload: type[Payload], form: str) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "pwned"
    evil = {"state_dict": {"fc.weight": torch.ones(2, 2)}, "x": payload(marker)}
    if form.startswith("raw"):
        path.write_bytes(pickle.dumps({"x": payload(marker)}, protocol=int(form[-1])))
    elif form == "nested":
        torch.save({"state_dict": {"fc.weight": torch.ones(2, 2), "y": [payload(marker)]}}, path)
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    message = refusal(path)
    assert not marker.exists()
    assert "refused" in message
    assert "can run any code" in message
    assert "torch.save(model.state_dict(), ...) or as safetensors" in message
    # The payload is live: what was refused above does create the file when unpickled.
    pickle.loads(pickle.dumps(payload(marker)))
    assert marker.exists()


def test_refusal_names_what_the_file_asks_for(tmp_path: Path) -> None:
    torch.save({"x": ShellPayload(tmp_path / "pwned")}, tmp_path / "evil.pt")
    assert "'posix.system'" in refusal(tmp_path / "evil.pt") or os.name != "posix"


@pytest.mark.parametrize("legacy", [False, True])
def test_whole_pickled_module_is_refused(tmp_path: Path, legacy: bool) -> None:
    torch.save(small(), tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    message = refusal(tmp_path / "m.pt")
    assert "'torch.nn.modules.container.Sequential'" in message
    assert "torch.save(model.state_dict(), ...)" in message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(small().eval(), torch.ones(1, 1, 1, 1)).save(tmp_path / "m.pt")
    assert "TorchScript" in refusal(tmp_path / "m.pt")


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.pt")
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "an empty file" in refusal(tmp_path / "empty.pt")


@pytest.mark.parametrize("kept", [4, 8, 9, 60, -1])
def test_truncated_safetensors(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors.torch.save(small().state_dict())[:kept])
    assert "truncated or damaged" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.97])
def test_truncated_torch_file(tmp_path: Path, fraction: float, legacy: bool) -> None:
    path = tmp_path / "m.pt"
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    assert "truncated or damaged" in refusal(path)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_random_bytes(tmp_path: Path, seed: int, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"\x07" + np.random.default_rng(seed).bytes(2000))
    assert "got something else" in refusal(path)


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, {"state_dict": {}}, [torch.ones(2)], torch.ones(2), {"a": {"b": torch.ones(1)}}, None]
)
def test_file_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "m.pt")
    assert "expected a state dict" in refusal(tmp_path / "m.pt")


def test_entries_that_are_no_named_tensors(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(1), "steps": [1]}, tmp_path / "m.pt")
    assert "got list under 'steps'" in refusal(tmp_path / "m.pt")
    torch.save({"fc.weight": torch.ones(1), 5: torch.ones(1)}, tmp_path / "m.pt")
    assert "under 5" in refusal(tmp_path / "m.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_first_tensor_with_nan_or_inf_is_named(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    weights = {"a": torch.ones(2), "b": torch.tensor([1.0, bad], dtype=dtype), "c": torch.tensor([bad])}
    torch.save(weights, tmp_path / "m.pt")
    assert "NaN or Inf in 'b'" in refusal(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "odd",
    [
        torch.ones(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(2).to(torch.float8_e4m3fn),
    ],
)
def test_odd_tensors_are_refused(tmp_path: Path, odd: Tensor) -> None:
    torch.save({"fc.weight": odd}, tmp_path / "m.pt")
    assert "in 'fc.weight'" in refusal(tmp_path / "m.pt")


def test_tensor_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(1).expand(1 << 45)}, tmp_path / "m.pt")
    assert "no larger than the file" in refusal(tmp_path / "m.pt")


# --- loading into a network


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_loaded_to_float32_and_written_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = {
        key: (value.to(dtype) + torch.tensor(1e-9, dtype=dtype)) if value.is_floating_point() else value
        for key, value in small().state_dict().items()
    }
    torch.save(weights, tmp_path / "in.pt")
    checkpoint, model = read_checkpoint(tmp_path / "in.pt"), small()
    load_into(model, checkpoint, "small")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model[0].weight, weights["0.weight"].float())
    with torch.no_grad():
        model[3].weight[0] = 0.0
    write_checkpoint(tmp_path / "out.pt", model.state_dict(), like=checkpoint)
    written = torch.load(tmp_path / "out.pt")
    changed = {**weights, "3.weight": model[3].weight.detach().to(dtype)}
    assert same_bits(written, changed)


def test_message_names_the_first_missing_unexpected_and_misshaped_key(tmp_path: Path) -> None:
    weights = dict(small().state_dict())
    del weights["0.bias"], weights["1.running_var"]
    weights |= {"9.weight": torch.ones(1), "3.weight": torch.ones(7, 2)}
    torch.save(weights, tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        load_into(small(), read_checkpoint(tmp_path / "m.pt"), "small")
    message = str(caught.value)
    assert "2 missing (first '0.bias')" in message
    assert "1 unexpected (first '9.weight')" in message
    assert "1 mis-shaped (first '3.weight' of shape (7, 2) where (3, 2) is expected)" in message
    assert "does not fit small" in message
    assert "\n" not in message


def test_failed_load_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    weights = {key: torch.zeros_like(value) for key, value in small().state_dict().items() if key != "0.bias"}
    torch.save(weights, tmp_path / "m.pt")
    model = small()
    with pytest.raises(CheckpointError):
        load_into(model, read_checkpoint(tmp_path / "m.pt"), "small")
    assert same_bits(dict(model.state_dict()), dict(small().state_dict()))


def test_files_without_batch_counters_load_and_come_back_without(tmp_path: Path) -> None:
    weights = {key: value + 1 for key, value in small().state_dict().items() if "num_batches" not in key}
    torch.save(weights, tmp_path / "old.pth")
    checkpoint, model = read_checkpoint(tmp_path / "old.pth"), small()
    load_into(model, checkpoint, "small")
    write_checkpoint(tmp_path / "new.pth", model.state_dict(), like=checkpoint)
    assert same_bits(torch.load(tmp_path / "new.pth"), weights)


def test_network_with_a_prefix_of_its_own(tmp_path: Path) -> None:
    torch.save({"module." + key: value + 1 for key, value in small().state_dict().items()}, tmp_path / "m.pt")
    model = nn.DataParallel(small())
    checkpoint = read_checkpoint(tmp_path / "m.pt")
    load_into(model, checkpoint, "small")
    write_checkpoint(tmp_path / "out.pt", model.state_dict(), like=checkpoint)
    assert same_bits(torch.load(tmp_path / "out.pt"), torch.load(tmp_path / "m.pt"))
