"""Piles of images without labels: every form they come in, what they are called, and copies of a choice of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_cases import make_folder, make_parquet, one_sentence, png
from debackdoor.data import Pile, load_dataset, load_pile, write_images
from debackdoor.errors import DataError
from debackdoor.files import new_folder


def reds(pile: Pile) -> list[int]:
    return [round(value * 255) for value in pile.x[:, 0, 0, 0].tolist()]


def flat(root: Path) -> Path:
    """Three images in no sub-folder, of reds 7, 8 and 9, and what is no image."""
    root.mkdir(exist_ok=True)
    for name, red in (("c.PNG", 9), ("a.png", 7), ("b.ppm", 8)):
        with Image.new("RGB", (4, 4), (red, 0, 0)) as image:
            image.save(root / name)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(b"no image")
    return root


def test_a_flat_folder(tmp_path: Path) -> None:
    pile = load_pile(flat(tmp_path))
    assert pile.names == ("a.png", "b.ppm", "c.PNG")
    assert reds(pile) == [7, 8, 9]
    assert (pile.x.dtype, pile.x.shape, pile.folder) == (torch.float32, (3, 3, 4, 4), tmp_path)


def test_a_nested_folder(tmp_path: Path) -> None:
    """At any depth, in any mixture; hidden folders are passed over, and folders that are named like images."""
    make_folder(flat(tmp_path) / "deep", {"er": 2})
    (tmp_path / "album.png").mkdir()
    (tmp_path / "album.png" / "d.png").write_bytes(png((5, 0, 0)))
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "e.png").write_bytes(b"no image")
    pile = load_pile(str(tmp_path))
    assert pile.names == ("a.png", "album.png/d.png", "b.ppm", "c.PNG", "deep/er/0.png", "deep/er/1.png")
    assert reds(pile) == [7, 5, 8, 9, 0, 1]


def test_class_folders_and_splits_are_folders_like_others(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 1, "b": 2})
    make_folder(tmp_path / "test", {"a": 1})
    assert load_pile(tmp_path).names == ("test/a/0.png", "train/a/0.png", "train/b/0.png", "train/b/1.png")


def test_a_hidden_folder_that_is_asked_for_is_read(tmp_path: Path) -> None:
    assert len(load_pile(flat(tmp_path / ".cache")).names) == 3


X = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


@pytest.mark.parametrize(
    "labels",
    [{}, {"y": np.array([3, 1])}, {"y": np.array(["cat", "dog"])}, {"y": np.array([-1, -1])}, {"y": np.array([0.5])},
     {"y": np.array([None, None])}],
)  # fmt: skip
def test_an_archive_with_labels_or_without_or_with_any(tmp_path: Path, labels: dict[str, Any]) -> None:
    np.savez(tmp_path / "a.npz", x=X, **labels)
    pile = load_pile(tmp_path / "a.npz")
    assert pile.names == ("row 0", "row 1")
    assert pile.folder is None
    torch.testing.assert_close(pile.x, torch.from_numpy(X).permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize(
    "columns", [{}, {"label": [2, 0]}, {"label": ["cat", "dog"]}, {"label": [None, 1]}, {"label": [-1, -1]}]
)
@pytest.mark.parametrize("struct", [False, True])
def test_a_parquet_file_with_labels_or_without_or_with_any(
    tmp_path: Path, columns: dict[str, Any], struct: bool
) -> None:
    images = [png((5, 0, 0)), png((7, 0, 0))]
    entries = [{"bytes": data, "path": None} for data in images] if struct else images
    pq.write_table(pa.table({"image": entries, **columns}), tmp_path / "a.parquet")
    pile = load_pile(tmp_path / "a.parquet")
    assert (pile.names, reds(pile), pile.folder) == (("row 0", "row 1"), [5, 7], None)


def test_a_folder_of_parquet_files_is_of_one_split(tmp_path: Path) -> None:
    make_parquet(tmp_path / "train.parquet", [0, 1, 2])
    make_parquet(tmp_path / "test.parquet", [0], ["one"])
    assert reds(load_pile(tmp_path)) == [0, 1, 2]
    assert load_pile(tmp_path, "test").names == ("row 0",)


def test_digits() -> None:
    pile, data = load_pile("digits", "test", image_size=16), load_dataset("digits", "test", image_size=16)
    assert torch.equal(pile.x, data.x)
    assert (len(pile.names), pile.names[499]) == (500, "row 499")


def test_a_word_for_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBACKDOOR_DATA", str(tmp_path))
    make_folder(tmp_path / "gtsrb", {"0": 1, "1": 1})
    pile = load_pile("gtsrb")
    assert (pile.names, pile.folder) == (("0/0.png", "1/0.png"), tmp_path / "gtsrb")


def test_sizes_are_those_of_the_files_or_the_one_asked_for(tmp_path: Path) -> None:
    (flat(tmp_path) / "z.png").write_bytes(png((1, 0, 0), size=(6, 4)))
    with pytest.raises(DataError, match=r"z\.png: expected 4x4 pixels as in .*a\.png, got 6x4; ") as error:
        load_pile(tmp_path)
    one_sentence(error)
    assert load_pile(tmp_path, image_size=8).x.shape == (4, 3, 8, 8)


def _npz(**arrays: Any) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        np.savez(root / "a.npz", **arrays)
        return root / "a.npz"

    return write


def _parquet(**columns: Any) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        pq.write_table(pa.table(columns), root / "a.parquet")
        return root / "a.parquet"

    return write


def _file(name: str, content: bytes, inside: bool = True) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        (root / name).write_bytes(content)
        return root if inside else root / name

    return write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root, r"expected images \(.*\.png.*\), got none; check the path"),
        (lambda root: root / "nowhere", "got a path that does not exist; check the path"),
        (_file("a.png", png(0), inside=False), "got a file of another kind; check the path"),
        (_file("a.png", b"no image"), r"a\.png: expected a readable PNG.*; replace or remove it"),
        (_file(".a.png", b""), r"expected images .*, got none"),
        (_npz(y=np.array([1, 2])), "expected an archive of an array x, got y; save it"),
        (_npz(x=np.array(5)), r"a\.npz: expected .*; save it"),
        (_npz(x=X.astype(int)), "expected x to be uint8 .*, got int64 .*; convert it"),
        (_npz(x=X[:0]), "at least one image, got none; check the path"),
        (_npz(x=np.array([None])), r"a\.npz: expected a NumPy archive of plain arrays"),
        (_file("a.npz", b"", inside=False), r"a\.npz: expected a NumPy archive of plain arrays"),
        (_parquet(label=[1, 2]), "expected a column image, got label; rename them"),
        (_parquet(image=[1, 2]), "expected the column image to hold encoded images .*, got int64; store"),
        (_parquet(image=[png(0), None]), r"a\.parquet row 1: expected image bytes, got an empty entry; fill or remove"),
        (
            _file("a.parquet", b"PAR1", inside=False),
            r"a\.parquet: expected a readable parquet file, .*; check the file",
        ),
    ],
)
def test_bad_piles_are_refused_in_one_sentence(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_pile(make(tmp_path))
    assert str(tmp_path) in one_sentence(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size to be at least 1 pixel, got 0; leave it out"),
        ({"split": "both"}, "split to be train or test, got 'both'; choose"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_pile(flat(tmp_path), **arguments)


def test_copies_are_the_files_byte_for_byte_in_their_folders(tmp_path: Path) -> None:
    """Also of what an image file holds beside pixels; and it does not matter to what size the pile was brought."""
    source, out = tmp_path / "in", tmp_path / "out"
    make_folder(flat(source) / "deep", {"er": 2})
    (source / "deep" / "er" / "1.png").write_bytes(png(3) + b"what follows the image")
    pile = load_pile(source, image_size=2)
    write_images(pile, torch.tensor([True, False, True, False, True]), out)
    copies = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert copies == {name: (source / name).read_bytes() for name in ("a.png", "c.PNG", "deep/er/1.png")}


def test_images_of_one_file_become_png_files_with_the_same_pixels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X)
    write_images(load_pile(tmp_path / "a.npz"), torch.tensor([False, True]), tmp_path / "out")
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "row-1.png"
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), X[1])


def test_nothing_chosen_is_an_empty_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    write_images(load_pile(flat(tmp_path / "in")), torch.zeros(3).bool(), out)
    assert list(out.iterdir()) == []


def _full(out: Path) -> None:
    out.mkdir()
    (out / ".mine").write_text("mine")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_full, "expected an empty folder or none, got one with files in it; give another"),
        (lambda out: out.write_text("mine"), "cannot be written .*; check the folder and the disk"),
        (
            lambda out: out.parent.joinpath("in", "c.PNG").unlink(),
            "cannot be written .*; check the folder and the disk",
        ),
    ],
)
def test_where_copies_cannot_be_they_are_refused(
    tmp_path: Path, prepare: Callable[[Path], object], message: str
) -> None:
    pile, out = load_pile(flat(tmp_path / "in")), tmp_path / "out"
    prepare(out)
    with pytest.raises(DataError, match=re.escape(str(out)) + f": {message}") as error:
        write_images(pile, torch.tensor([False, False, True]), out)
    one_sentence(error)
    assert not list(out.glob("*.PNG"))
    if out.is_file() or (out / ".mine").exists():
        assert (out if out.is_file() else out / ".mine").read_text() == "mine"


@pytest.mark.parametrize("existed", [False, True])
def test_a_copy_that_is_interrupted_leaves_no_part_of_it(
    tmp_path: Path, existed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pile, out, written = load_pile(flat(tmp_path / "in")), tmp_path / "out", []

    def write(path: Path, data: bytes) -> int:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        with open(path, "wb") as file:
            return file.write(data)

    if existed:
        out.mkdir()
    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(KeyboardInterrupt):
        write_images(pile, torch.ones(3).bool(), out)
    assert len(written) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == (["in", "out"] if existed else ["in"])
    assert not existed or list(out.iterdir()) == []


def test_an_empty_folder_keeps_its_permissions_and_a_link_to_it_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    real.chmod(0o750)
    link.symlink_to(real, target_is_directory=True)
    write_images(load_pile(flat(tmp_path / "in")), torch.ones(3).bool(), link)
    assert link.is_symlink()
    assert len(list(real.iterdir())) == 3
    assert real.stat().st_mode & 0o777 == 0o750


def test_what_comes_into_the_folder_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def fill() -> None:
        with new_folder(out) as folder:
            (folder / "new").write_text("new")
            (out / "mine").write_text("mine")

    with pytest.raises(OSError, match="not empty"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mine"]
