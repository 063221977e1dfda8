"""Parquet files and NumPy archives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_cases import Bomb, make_parquet, one_sentence, png, reds
from debackdoor.data import load_clean, load_dataset
from debackdoor.data import parquet as parquet_reader
from debackdoor.data.sampling import balanced_sample
from debackdoor.errors import DataError


def test_parquet_file_with_class_names_over_row_groups(tmp_path: Path) -> None:
    path = make_parquet(tmp_path / "a.parquet", [0, 1, 2, 0, 1, 2, 0], ["x", "y", "z"], row_group_size=2)
    clean = load_dataset(path, "test")
    assert clean.y.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert reds(clean) == list(range(7))
    assert clean.class_names == ("x", "y", "z")
    sample = load_clean(path, limit=5, seed=2)
    assert [value % 3 for value in reds(sample)] == sample.y.tolist()
    assert reds(sample) == balanced_sample(clean.y.numpy(), 5, 2).tolist()


def test_parquet_decodes_only_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_parquet(tmp_path / "a.parquet", [0, 1] * 50)
    decoded = []
    original = parquet_reader.decode_image
    monkeypatch.setattr(parquet_reader, "decode_image", lambda *a: decoded.append(a[0]) or original(*a))
    load_clean(path, limit=4)
    assert len(decoded) == 4


def test_parquet_of_plain_bytes_without_names(tmp_path: Path) -> None:
    table = pa.table({"image": [png((5, 0, 0)), png((7, 0, 0))], "label": pa.array([3, 1], pa.uint8())})
    pq.write_table(table, tmp_path / "a.parquet")
    clean = load_dataset(tmp_path / "a.parquet")
    assert reds(clean) == [5, 7]
    assert clean.y.tolist() == [3, 1]
    assert clean.class_names == ()


def test_parquet_folder_picks_the_split_and_joins_shards(tmp_path: Path) -> None:
    make_parquet(tmp_path / "train-00001-of-00002.parquet", [2])
    make_parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1])
    assert load_dataset(tmp_path, "test").y.tolist() == [0, 1, 2], "a single split stands for both"
    make_parquet(tmp_path / "test.parquet", [7])
    assert load_dataset(tmp_path, "train").y.tolist() == [0, 1, 2]
    assert reds(load_dataset(tmp_path, "train")) == [0, 1, 0]
    assert load_dataset(tmp_path, "test").y.tolist() == [7]


def _table(image: object, label: object) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table({"image": image, "label": label}), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"PAR1 not really"), "expected a readable parquet file"),
        (lambda path: path.write_bytes(b""), "expected a readable parquet file"),
        (lambda path: pq.write_table(pa.table({"img": [1], "label": [1]}), path), "got img, label"),
        (_table([png(0)], ["cat"]), "expected integers in the column label, got string"),
        (_table([png(0)], [0.0]), "expected integers in the column label, got double"),
        (_table([1], [0]), "expected the column image to hold encoded images"),
        (_table([{"path": "1.png"}], [0]), "expected the column image to hold encoded images"),
        (_table([png(0), png(0)], [0, None]), r"a\.parquet row 1: expected an integer label, got an empty"),
        (_table([png(0), None], [0, 1]), r"a\.parquet row 1: expected image bytes, got an empty"),
        (_table([png(0), b"no image"], [0, 1]), r"a\.parquet row 1: expected a readable"),
        (_table([png(0), png(0)], [0, -1]), "labels of at least 0, got -1 in row 1"),
        (_table(pa.array([], pa.binary()), pa.array([], pa.int64())), "at least one image"),
        (lambda path: make_parquet(path, [0, 2], ["a", "b"]), "labels of 0 to 1, one a class name, got 2 in row 1"),
    ],
)
def test_bad_parquet(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message) as error:
        load_dataset(tmp_path / "a.parquet")
    assert "a.parquet" in one_sentence(error)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.full((2, 5, 4, 3), (255, 51, 0), np.uint8), (1.0, 0.2, 0.0)),
        (np.full((2, 5, 4, 4), (255, 51, 0, 9), np.uint8), (1.0, 0.2, 0.0)),
        (np.full((2, 5, 4), 51, np.uint8), (0.2, 0.2, 0.2)),
        (np.full((2, 5, 4, 1), 51, np.uint8), (0.2, 0.2, 0.2)),
        (np.full((2, 5, 4), 0.4, np.float64), (0.4, 0.4, 0.4)),
        (np.full((2, 1, 5, 4), 0.4, np.float32), (0.4, 0.4, 0.4)),
        (np.broadcast_to(np.array([1, 0.2, 0], np.float32).reshape(1, 3, 1, 1), (2, 3, 5, 4)), (1.0, 0.2, 0.0)),
    ],
)
def test_npz_layouts(tmp_path: Path, x: np.ndarray, expected: tuple[float, ...]) -> None:
    np.savez(tmp_path / "a.npz", x=x, y=np.array([1, 0], dtype=np.uint8))
    clean = load_dataset(tmp_path / "a.npz")
    assert clean.x.shape == (2, 3, 5, 4)
    assert torch.allclose(clean.x, torch.tensor(expected).view(1, 3, 1, 1).expand(2, 3, 5, 4))
    assert clean.y.tolist() == [1, 0]
    assert clean.y.dtype == torch.int64


GOOD = np.zeros((2, 5, 5, 3), np.uint8)
FLOATS = np.zeros((2, 3, 5, 5), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": GOOD}, "the arrays x and y, got x"),
        ({"x": GOOD, "y": np.array([0.0, 1.0])}, "2 integer labels, got float64"),
        ({"x": GOOD, "y": np.array([0])}, "2 integer labels"),
        ({"x": GOOD, "y": np.array([[0], [1]])}, "2 integer labels"),
        ({"x": GOOD, "y": np.array([0, -4])}, "got -4 in row 1"),
        ({"x": GOOD.astype(np.int64), "y": np.array([0, 1])}, "got int64 of shape"),
        ({"x": GOOD.transpose(0, 3, 1, 2), "y": np.array([0, 1])}, r"got uint8 of shape \(2, 3, 5, 5\)"),
        ({"x": FLOATS.transpose(0, 2, 3, 1), "y": np.array([0, 1])}, r"got float32 of shape \(2, 5, 5, 3\)"),
        ({"x": FLOATS[:0], "y": np.array([], dtype=int)}, "at least one image"),
        ({"x": FLOATS[..., :0], "y": np.array([0, 1])}, "got float32 of shape"),
        ({"x": np.stack([FLOATS[0], FLOATS[0] + np.nan]), "y": np.array([0, 1])}, "row 1: expected pixel values in"),
        ({"x": np.stack([FLOATS[0], FLOATS[0] - 1]), "y": np.array([0, 1])}, "row 1: .*got -1 to -1"),
        ({"x": np.stack([FLOATS[0], FLOATS[0] + 255]), "y": np.array([0, 1])}, "row 1: .*got 255 to 255"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as error:
        load_dataset(tmp_path / "a.npz")
    assert "a.npz" in one_sentence(error)


def test_npz_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=GOOD, y=np.array([0, 1]))
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="expected a NumPy archive of plain arrays"):
            load_dataset(path)
    with path.open("wb") as file:
        np.save(file, GOOD)
    with pytest.raises(DataError, match="the arrays x and y, got none"):
        load_dataset(path)


def test_npz_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([Bomb(tmp_path / "ran")], dtype=object), y=np.array([0]))
    with pytest.raises(DataError, match=r"a\.npz"):
        load_dataset(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()
