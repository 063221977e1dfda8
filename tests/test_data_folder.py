"""Folders with one sub-folder a class, and single images."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_cases import make_folder, one_sentence, png, reds
from debackdoor.data import load_clean, load_dataset
from debackdoor.data.load import open_source
from debackdoor.errors import DataError


def test_folder_orders_classes_by_name_and_ignores_what_is_no_image(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"bee": 2, "ant": 3})
    (root / ".hidden").mkdir()
    (root / "readme.txt").write_text("hello")
    (root / "ant" / ".hidden.png").write_text("no image")
    (root / "ant" / "notes.csv").write_text("no image")
    clean = load_dataset(root)
    assert clean.class_names == ("ant", "bee")
    assert clean.y.tolist() == [0, 0, 0, 1, 1]
    assert reds(clean) == [10, 11, 12, 0, 1]
    assert clean.x.dtype == torch.float32
    assert clean.x.shape == (5, 3, 4, 4)


def test_a_pile_is_all_images_below_also_behind_links(tmp_path: Path) -> None:
    root, elsewhere = make_folder(tmp_path / "pile", {"ant": 2}), make_folder(tmp_path / "elsewhere", {"bee": 3})
    (root / "linked").symlink_to(elsewhere)
    (root / "ant" / "back").symlink_to(root)
    (root / "aaa").symlink_to(root / "ant")
    (root / ".hidden").symlink_to(elsewhere)
    (root / "single.png").write_bytes(png(4))
    pile = open_source(root, "test", labelled=False)
    assert [str(file.relative_to(root)) for file in pile.files] == [
        *(f"ant/{number}.png" for number in range(2)),
        *(f"linked/bee/{number}.png" for number in range(3)),
        "single.png",
    ]


def test_a_folder_of_a_pile_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path, {"ant": 2, "bee": 2})
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"bee: cannot be read \(Permission denied\); check the folder"):
        open_source(root, "test", labelled=False)


def test_folder_of_numbers_is_labelled_by_them(tmp_path: Path) -> None:
    clean = load_dataset(make_folder(tmp_path / "plain", {"10": 1, "9": 1, "2": 1}))
    assert clean.y.tolist() == [2, 9, 10]
    assert reds(clean) == [20, 10, 0]
    padded = load_dataset(make_folder(tmp_path / "padded", {"00000": 1, "00012": 1}))
    assert padded.y.tolist() == [0, 12]


def test_folder_does_not_depend_on_file_system_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path, {"a": 9, "b": 9})
    expected = load_clean(root, limit=6, seed=1)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path), reverse=True)))
    again = load_clean(root, limit=6, seed=1)
    assert torch.equal(again.x, expected.x)
    assert torch.equal(again.y, expected.y)


def test_folder_of_splits(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 1, "b": 1})
    make_folder(tmp_path / "test", {"a": 2, "b": 3})
    assert load_dataset(tmp_path).class_names == ("a", "b")
    assert len(load_dataset(tmp_path)) == 2
    assert len(load_dataset(tmp_path, "test")) == 5


def test_only_sampled_images_are_decoded(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"a": 3, "b": 3})
    kept = set(reds(load_clean(root, limit=2)))
    for c, name in enumerate("ab"):
        for i in range(3):
            if 10 * c + i not in kept:
                (root / name / f"{i}.png").write_bytes(b"broken")
    assert set(reds(load_clean(root, limit=2))) == kept
    with pytest.raises(DataError, match=r"\.png: expected a readable"):
        load_dataset(root)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [("L", 51, (0.2, 0.2, 0.2)), ("RGBA", (255, 51, 0, 7), (1.0, 0.2, 0.0)), ("LA", (102, 0), (0.4, 0.4, 0.4))],
)
def test_grey_is_repeated_and_alpha_dropped(
    tmp_path: Path, mode: str, value: int | tuple[int, ...], expected: tuple[float, ...]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png(value, mode=mode))
    assert torch.allclose(load_dataset(tmp_path).x[0, :, 2, 1], torch.tensor(expected))


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "bmp", "webp", "ppm"])
def test_every_image_format(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "a" / f"1.{suffix}")
    x = load_dataset(tmp_path).x
    assert x.shape == (1, 3, 4, 8)
    assert x[0, 0].min() > 0.95
    assert x[0, 1:].max() < 0.05


def test_mixed_sizes_are_refused_or_resized(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"a": 2})
    (root / "a" / "z.png").write_bytes(png((51, 0, 0), size=(6, 4)))
    with pytest.raises(DataError, match=r"z\.png: expected 4x4 pixels as in .*0\.png, got 6x4") as error:
        load_dataset(root)
    one_sentence(error)
    clean = load_dataset(root, image_size=8)
    assert clean.x.shape == (3, 3, 8, 8)
    assert reds(clean) == [0, 1, 51]


def test_resizing_is_bilinear(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([[[0.0, 1.0]] * 2], dtype=np.float32), y=np.array([0]))
    x = load_dataset(tmp_path / "a.npz", image_size=4).x
    assert torch.allclose(x[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "gif", "sixteen"])
def test_bad_image_is_named(tmp_path: Path, damage: str) -> None:
    root = make_folder(tmp_path, {"a": 1, "b": 1})
    bad = root / "b" / "bad.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "PNG")
    sixteen = io.BytesIO()
    Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16)).save(sixteen, "PNG")
    other_format = io.BytesIO()
    Image.new("RGB", (4, 4)).save(other_format, "GIF")
    content = {
        "text": b"no image",
        "empty": b"",
        "truncated": whole.getvalue()[:3000],
        "gif": other_format.getvalue(),
        "sixteen": sixteen.getvalue(),
    }
    bad.write_bytes(content[damage])
    with pytest.raises(DataError, match=re.escape(str(bad))) as error:
        load_dataset(root)
    assert "0x" not in one_sentence(error)


def _no_class_folders(root: Path) -> Path:
    (root / "1.png").write_bytes(png(0))
    return root


def _empty_class(root: Path) -> Path:
    make_folder(root, {"a": 1})
    (root / "b").mkdir()
    return root


def _dangling(root: Path) -> Path:
    make_folder(root, {"a": 1})
    (root / "a" / "z.png").symlink_to("nowhere.png")
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root, "expected one sub-folder a class, got none"),
        (_no_class_folders, "expected one sub-folder a class, got none"),
        (_empty_class, r"b: expected images \(.*\) in a class folder, got none"),
        (lambda root: make_folder(root, {"1": 1, "01": 1}), "got two for class 1"),
        (lambda root: make_folder(root, {"9" * 30: 1}), "class numbers of 64 bits"),
        (_dangling, r"z\.png: cannot be read"),
    ],
)
def test_bad_folders(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_dataset(make(tmp_path))
    one_sentence(error)
