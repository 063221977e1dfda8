"""Repaired checkpoints out: same keys, shapes and dtypes, in one step, over nothing that is to be kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from checkpoint_cases import same_bits, small
from debackdoor.checkpoint import Checkpoint, load_into, read_checkpoint, write_checkpoint
from debackdoor.errors import CheckpointError
from debackdoor.files import atomic_write, atomic_write_text

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
    (tmp_path / "a.json").chmod(0o600)
    atomic_write_text(tmp_path / "a.json", "c")
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_synced_has_its_file_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    atomic_write(tmp_path / "out.json", b"{}")
    monkeypatch.undo()
    assert (tmp_path / "out.json").read_bytes() == b"{}"


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
