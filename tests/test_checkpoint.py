"""Untrusted checkpoints in, repaired ones out."""

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

from debackdoor.checkpoint import Checkpoint, load_into, read_checkpoint, write_checkpoint
from debackdoor.errors import CheckpointError
from debackdoor.files import atomic_write, atomic_write_text, sha256_of


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        left[key].dtype == right[key].dtype
        and left[key].shape == right[key].shape
        and left[key].flatten().view(torch.uint8).tolist() == right[key].flatten().view(torch.uint8).tolist()
        for key in left
    )


def refusal(path: Path) -> str:
    """The message, checked to be one plain sentence that names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 330
    assert message.startswith(str(path))
    return message


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


class ShellPayload(Payload):
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


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


# --- writing


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    torch.save(small().state_dict(), tmp_path / "in.pt")
    return read_checkpoint(tmp_path / "in.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".SAFETENSORS", ".model", ""])
def test_safetensors_for_its_own_and_unknown_suffixes(tmp_path: Path, checkpoint: Checkpoint, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_checkpoint(path, checkpoint.state_dict, like=checkpoint)
    small().load_state_dict(safetensors.torch.load(path.read_bytes()), strict=True)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_plain_torch_for_its_suffixes(tmp_path: Path, checkpoint: Checkpoint, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_checkpoint(path, checkpoint.state_dict)
    small().load_state_dict(torch.load(path, weights_only=True), strict=True)


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_tensors_that_share_memory_or_have_gaps(tmp_path: Path, name: str) -> None:
    base = torch.arange(1000.0)
    weights = {"tied": base, "again": base, "part": base[:3], "turned": base.view(10, 100).T, "scalar": base[7]}
    write_checkpoint(tmp_path / name, weights)
    back = read_checkpoint(tmp_path / name).state_dict
    assert all(torch.equal(back[key], value) for key, value in weights.items())
    assert (tmp_path / name).stat().st_size < 4 * 3004 + 5000


def test_tied_weights_round_trip(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "in.pt")
    checkpoint = read_checkpoint(tmp_path / "in.pt")
    load_into(model, checkpoint, "tied")
    write_checkpoint(tmp_path / "out.safetensors", model.state_dict(), like=checkpoint)
    assert same_bits(read_checkpoint(tmp_path / "out.safetensors").state_dict, dict(sorted(model.state_dict().items())))


def test_never_over_the_input_under_any_name(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint.path.read_bytes()
    (tmp_path / "link.pt").symlink_to(checkpoint.path)
    os.link(checkpoint.path, tmp_path / "hard.pt")
    monkeypatch.chdir(tmp_path)
    for name in (checkpoint.path, "in.pt", "./in.pt", f"../{tmp_path.name}/in.pt", "link.pt", "hard.pt"):
        with pytest.raises(CheckpointError, match="is the input file"):
            write_checkpoint(name, checkpoint.state_dict, like=checkpoint)
    assert checkpoint.path.read_bytes() == before


def test_existing_files_only_with_overwrite(tmp_path: Path, checkpoint: Checkpoint) -> None:
    other, dangling = tmp_path / "other.pt", tmp_path / "dangling.pt"
    other.write_bytes(b"precious")
    dangling.symlink_to(tmp_path / "nowhere.pt")
    for path in (other, dangling):
        with pytest.raises(CheckpointError, match="exists; give another output"):
            write_checkpoint(path, checkpoint.state_dict, like=checkpoint)
    assert other.read_bytes() == b"precious"
    assert not (tmp_path / "nowhere.pt").exists()
    for path in (other, checkpoint.path):
        write_checkpoint(path, checkpoint.state_dict, like=checkpoint, overwrite=True)
        assert same_bits(torch.load(path), checkpoint.state_dict)


def test_overwriting_a_link_replaces_the_file_it_points_to(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "target.pt", tmp_path / "link.pt"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_checkpoint(link, checkpoint.state_dict, overwrite=True)
    assert link.is_symlink()
    assert same_bits(torch.load(target), checkpoint.state_dict)


@pytest.mark.parametrize("step", ["os.replace", "os.fsync"])
def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = tmp_path / "out.pt"
    out.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(CheckpointError, match="was not written: No space left on device"):
        write_checkpoint(out, checkpoint.state_dict, like=checkpoint, overwrite=True)
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out.pt"]


def test_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "out.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_text_and_its_permissions(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.json", "grün")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "grün"
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    atomic_write_text(tmp_path / "a.json", "b")
    assert (tmp_path / "a.json").read_bytes() == b"b"


def test_output_folder_problems(tmp_path: Path, checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="got a folder"):
        write_checkpoint(tmp_path, checkpoint.state_dict)
    with pytest.raises(CheckpointError, match="No such file or directory"):
        write_checkpoint(tmp_path / "no" / "such" / "out.pt", checkpoint.state_dict)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_not_written(tmp_path: Path, checkpoint: Checkpoint, bad: float) -> None:
    weights = {**checkpoint.state_dict, "3.bias": torch.tensor([0.0, bad, 0.0])}
    with pytest.raises(CheckpointError, match=r"NaN or Inf in '3\.bias'"):
        write_checkpoint(tmp_path / "out.pt", weights, like=checkpoint)
    assert not (tmp_path / "out.pt").exists()


def test_value_too_large_for_the_files_dtype_is_not_written(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(2, dtype=torch.float16)}, tmp_path / "in.pt")
    like = read_checkpoint(tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match=r"NaN or Inf in 'fc\.weight'"):
        write_checkpoint(tmp_path / "out.pt", {"fc.weight": torch.full((2,), 1e6)}, like=like)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("0.bias"), "got '0.bias' in one but not the other"),
        (lambda weights: weights.update(extra=torch.ones(1)), "got 'extra' in one but not the other"),
        (lambda weights: weights.update({"0.bias": torch.ones(5)}), r"expected '0.bias' of shape \(2,\), got \(5,\)"),
    ],
)
def test_other_keys_or_shapes_than_the_input_are_not_written(
    tmp_path: Path, checkpoint: Checkpoint, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    weights = dict(checkpoint.state_dict)
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "out.pt", weights, like=checkpoint)
    assert not (tmp_path / "out.pt").exists()
