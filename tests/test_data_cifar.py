"""CIFAR's python batches, which are pickles: read right, and never run."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_cases import Bomb, one_sentence, reds
from debackdoor.data import load_dataset
from debackdoor.errors import DataError


def python2(value: object) -> bytes:
    """Pickle opcodes of ``value`` as Python 2 writes them: text as byte strings."""
    if isinstance(value, str):
        return b"T" + struct.pack("<i", len(value)) + value.encode()
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"(" + b"".join(python2(item) for item in value) + b"l"
    if isinstance(value, dict):
        return b"(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"d"
    assert isinstance(value, np.ndarray)
    raw = value.tobytes()
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
    kind = b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntb"
    shape = b"(" + b"".join(python2(n) for n in value.shape) + b"t"
    return empty + b"(I1\n" + shape + kind + b"I00\n" + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"


def cifar_rows(start: int, count: int) -> np.ndarray:
    """Rows as published: 1,024 red, then green, then blue; red is start + i, green the column, blue 0."""
    rows = np.zeros((count, 3, 32, 32), np.uint8)
    rows[:, 0] = start + np.arange(count).reshape(-1, 1, 1)
    rows[:, 1] = np.arange(32)
    return rows.reshape(count, 3072)


def make_cifar10(root: Path, write: Callable[[object], bytes]) -> Path:
    root.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(names):
        batch = {"batch_label": "", "labels": [number, 9], "data": cifar_rows(10 * number, 2), "filenames": ["a", "b"]}
        (root / name).write_bytes(write(batch))
    (root / "batches.meta").write_bytes(write({"label_names": [f"class {i}" for i in range(10)]}))
    return root


@pytest.mark.parametrize(
    "write",
    [
        lambda batch: b"\x80\x02" + python2(batch) + b".",
        lambda batch: pickle.dumps(batch, protocol=2),
        lambda batch: pickle.dumps(batch, protocol=4),
        lambda batch: pickle.dumps(
            {**batch, "data": np.asfortranarray(batch["data"])} if "data" in batch else batch, 2
        ),
    ],
    ids=["python2", "protocol2", "protocol4", "column-major"],
)
def test_cifar10_batches(tmp_path: Path, write: Callable[[object], bytes]) -> None:
    root = make_cifar10(tmp_path / "cifar-10-batches-py", write)
    train, test = load_dataset(root), load_dataset(root, "test")
    assert train.y.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert reds(train) == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]
    assert test.y.tolist() == [5, 9]
    assert reds(test) == [50, 51]
    assert torch.allclose(test.x[0, 1, 7], torch.arange(32) / 255)
    assert float(test.x[:, 2].max()) == 0
    assert test.class_names[9] == "class 9"


def test_cifar100_batches(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "test")):
        batch = {"data": cifar_rows(number, 1), "fine_labels": [42 + number], "coarse_labels": [0]}
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}, protocol=2))
    assert load_dataset(tmp_path).y.tolist() == [42]
    assert load_dataset(tmp_path, "test").y.tolist() == [43]
    assert len(load_dataset(tmp_path).class_names) == 100


@pytest.mark.parametrize("name", ["test_batch", "batches.meta"])
def test_malicious_batch_runs_nothing(tmp_path: Path, name: str) -> None:
    root = make_cifar10(tmp_path / "c", lambda batch: pickle.dumps(batch, protocol=2))
    for value in (Bomb(tmp_path / "ran"), {"data": Bomb(tmp_path / "ran"), "labels": [0]}):
        (root / name).write_bytes(pickle.dumps(value))
        with pytest.raises(DataError, match=rf"{name}: .*asks for .*open; do not trust it") as error:
            load_dataset(root, "test")
        one_sentence(error)
        assert not (tmp_path / "ran").exists()


def test_pickle_cannot_reach_through_the_admitted_names(tmp_path: Path) -> None:
    root = make_cifar10(tmp_path / "c", lambda batch: pickle.dumps(batch, protocol=2))
    attempts = {
        "numpy runner": b"cnumpy.testing\nrundocs\n(tR.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x11dtype.__reduce__\x93.",
        "builtin": b"cbuiltins\neval\n(S'1'\ntR.",
        "attributes of a class": b"c_codecs\nencode\n(N(V__new__\nI1\ndtb.",
        "endless memo": b"h\xff.",
    }
    for name, content in attempts.items():
        (root / "test_batch").write_bytes(content)
        with pytest.raises(DataError, match="test_batch"):
            load_dataset(root, "test")
        assert len(load_dataset(root)) == 10, name


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "expected a CIFAR batch"),
        ({"data": cifar_rows(0, 1)}, "expected labels to be a list"),
        ({"data": cifar_rows(0, 1), "labels": ["cat"]}, "expected labels to be a list"),
        ({"data": cifar_rows(0, 1), "labels": [0, 1]}, "2 rows of 3072 bytes"),
        ({"data": cifar_rows(0, 1).astype(np.int16), "labels": [0, 1]}, "2 rows of 3072 bytes"),
        ({"data": b"raw", "labels": [0]}, "1 rows of 3072 bytes"),
        ({"data": cifar_rows(0, 1), "labels": [10]}, "labels of 0 to 9"),
    ],
)
def test_bad_cifar_batch(tmp_path: Path, batch: object, message: str) -> None:
    root = make_cifar10(tmp_path / "c", lambda content: pickle.dumps(content, protocol=2))
    (root / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(DataError, match=message) as error:
        load_dataset(root, "test")
    one_sentence(error)


def test_missing_and_truncated_cifar_batches(tmp_path: Path) -> None:
    root = make_cifar10(tmp_path / "c", lambda batch: pickle.dumps(batch, protocol=2))
    whole = (root / "test_batch").read_bytes()
    (root / "test_batch").write_bytes(whole[: len(whole) // 2])
    (root / "data_batch_3").unlink()
    with pytest.raises(DataError, match="test_batch: expected a CIFAR batch"):
        load_dataset(root, "test")
    with pytest.raises(DataError, match="data_batch_3: expected this file, got none"):
        load_dataset(root)
