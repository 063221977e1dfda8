"""Sampling, splitting and checking sets of images, and what a source may be called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from data_cases import make_folder, one_sentence
from debackdoor.data import check_clean_set, check_labels, load_clean, load_dataset, split_clean
from debackdoor.data.augment import random_shift, random_shift_by
from debackdoor.data.named import named_folder
from debackdoor.data.sampling import balanced_sample
from debackdoor.errors import DataError
from debackdoor.types import CleanSet


def clean_set(labels: list[int]) -> CleanSet:
    """Image i is flat i / 1000, so that it can be told apart."""
    return CleanSet((torch.arange(len(labels)) / 1000).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.tensor(labels))


def test_sample_is_balanced_and_others_fill_up() -> None:
    labels = np.array([0] * 100 + [1] * 3 + [2] * 100)
    chosen = balanced_sample(labels, 23, seed=0)
    assert len(set(chosen.tolist())) == 23
    assert np.bincount(labels[chosen]).tolist() == [10, 3, 10]


def test_sample_differs_by_at_most_one_where_the_limit_does_not_divide() -> None:
    labels = np.repeat(np.arange(4), 50)
    counts = np.bincount(labels[balanced_sample(labels, 10, seed=3)], minlength=4)
    assert sorted(counts.tolist()) == [2, 2, 3, 3]


def test_sample_follows_the_seed_and_smaller_is_the_beginning_of_larger() -> None:
    labels = np.repeat(np.arange(5), 20)
    large = balanced_sample(labels, 50, seed=1).tolist()
    assert large == balanced_sample(labels, 50, seed=1).tolist()
    assert large != balanced_sample(labels, 50, seed=2).tolist()
    assert balanced_sample(labels, 15, seed=1).tolist() == large[:15]
    assert sorted(labels[large[:5]].tolist()) == [0, 1, 2, 3, 4]


def test_sample_without_limit_is_everything_in_order_and_a_large_limit_is_everything() -> None:
    labels = np.array([1, 0, 1])
    assert balanced_sample(labels, None, seed=0).tolist() == [0, 1, 2]
    assert sorted(balanced_sample(labels, 99, seed=0).tolist()) == [0, 1, 2]


def test_split_is_stratified_disjoint_and_complete() -> None:
    clean = clean_set([0] * 10 + [1] * 6 + [2] * 2 + [3])
    fit, hold = split_clean(clean, 0.5, 4)
    assert hold.y.bincount().tolist() == [5, 3, 1]
    assert fit.y.bincount().tolist() == [5, 3, 1, 1]
    together = torch.cat([fit.x, hold.x])[:, 0, 0, 0]
    assert torch.equal(together.sort().values, clean.x[:, 0, 0, 0])
    again = split_clean(clean, 0.5, 4)
    assert torch.equal(again[1].x, hold.x)
    assert not torch.equal(split_clean(clean, 0.5, 5)[1].x, hold.x)


@pytest.mark.parametrize("holdout", [0.01, 0.99])
def test_split_keeps_every_class_in_both_parts_at_any_share(holdout: float) -> None:
    fit, hold = split_clean(clean_set([0, 0, 1, 1, 1]), holdout)
    assert fit.num_classes_seen == hold.num_classes_seen == 2


def test_split_shares_out_classes_of_one_sample() -> None:
    fit, hold = split_clean(clean_set([0, 1, 2, 3]), 0.5)
    assert (len(fit), len(hold)) == (2, 2)


def test_split_refuses_one_image_and_a_share_of_everything() -> None:
    with pytest.raises(DataError, match="at least 2 images") as error:
        split_clean(clean_set([0]), 0.5)
    one_sentence(error)
    with pytest.raises(DataError, match="between 0 and 1"):
        split_clean(clean_set([0, 1]), holdout=1.0)
    with pytest.raises(DataError, match="seed of at least 0, a whole number, got -1"):
        split_clean(clean_set([0, 1]), 0.5, seed=-1)


def test_check_labels_names_the_label() -> None:
    check_labels(clean_set([0, 1, 2]), 3)
    with pytest.raises(DataError, match="got 2 for image 2") as error:
        check_labels(clean_set([0, 1, 2]), 2)
    one_sentence(error)


def test_check_clean_set() -> None:
    check_clean_set(clean_set([0, 1] * 10), 2)
    for labels, message in (
        ([3] * 30, "only class 3"),
        ([0, 1] * 9, "at least 20 clean images, got 18"),
        ([9], "0 to 4"),
    ):
        with pytest.raises(DataError, match=message) as error:
            check_clean_set(clean_set(labels), 5)
        one_sentence(error)


def test_digits() -> None:
    train, test = load_dataset("digits"), load_dataset("digits", "test")
    assert train.x.shape == (1297, 3, 32, 32)
    assert test.x.shape == (500, 3, 32, 32)
    assert test.y.bincount().min() >= 48
    assert train.class_names == tuple("0123456789")
    assert float(train.x.max()) == 1.0
    # Together they are every digit once: where bilinear enlarging puts 7/8 of one pixel and 1/8 of the next.
    raw = load_digits().images / 16
    expected = 0.875 * raw[:, 0, 2] + 0.125 * raw[:, 0, 3]
    got = torch.cat([train.x, test.x])[:, :, 0, 10]
    for channel in range(3):
        assert np.allclose(np.sort(got[:, channel].numpy()), np.sort(expected), atol=1e-6)
    assert torch.equal(load_dataset("digits", "test").x, test.x)


def test_a_named_class_that_is_missing_is_no_other(tmp_path: Path) -> None:
    """The folders are numbered in their order: without one, those after it have the label before theirs."""
    clean = load_clean(str(make_folder(tmp_path / "named", {"cat": 12, "dog": 12})))
    check_clean_set(clean, 2)
    with pytest.raises(DataError, match=r"expected 3 named classes for a model of so many, got 2, .* call the folders"):
        check_clean_set(clean, 3)
    check_clean_set(load_clean(str(make_folder(tmp_path / "numbered", {"0": 12, "2": 12}))), 3)


def test_words_stand_for_folders_of_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEBACKDOOR_DATA", raising=False)
    with pytest.raises(DataError, match="gtsrb: expected the environment variable DEBACKDOOR_DATA, got none; set") as e:
        load_clean("gtsrb")
    one_sentence(e)
    make_folder(tmp_path / "other" / "gtsrb", {"00000": 1, "00001": 2})
    monkeypatch.setenv("DEBACKDOOR_DATA", str(tmp_path / "other"))
    assert len(load_clean("gtsrb")) == 3
    with pytest.raises(DataError, match="DEBACKDOOR_DATA"):
        load_clean("cifar10")


@pytest.mark.parametrize(("word", "classes", "sample_range"), [("cifar10", 10, {50}), ("gtsrb", 43, {11, 12})], ids=str)
def test_real_data(word: str, classes: int, sample_range: set[int]) -> None:
    try:
        named_folder(word)
    except DataError as error:
        pytest.skip(str(error))
    clean = load_clean(word)
    assert clean.x.shape == (500, 3, 32, 32)
    assert len(clean.class_names) == classes
    assert set(clean.y.bincount(minlength=classes).tolist()) <= sample_range
    assert 0.2 < float(clean.x.mean()) < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit of at least 1"),
        ({"limit": -5}, "limit of at least 1"),
        ({"limit": 2.5}, "limit of at least 1 image, got 2.5"),
        ({"seed": -1}, "seed of at least 0, a whole number, got -1"),
        ({"seed": 0.5}, "seed of at least 0, a whole number, got 0.5"),
        ({"seed": -1, "limit": None}, "seed of at least 0, a whole number, got -1"),
        ({"image_size": 8.5}, "image_size to be at least 1 pixel, got 8.5"),
        ({"split": "val"}, "train or test, got 'val'"),
        ({"image_size": 0}, "image_size to be at least 1"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_clean("digits", **options)  # type: ignore[arg-type]
    one_sentence(error)


def test_unknown_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    for source in ("cifar11", tmp_path / "missing.parquet", tmp_path / "a.txt", "x" * 5000):
        with pytest.raises(DataError) as error:
            load_clean(source)
        assert str(source) in one_sentence(error)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)") as error:
        load_clean(tmp_path)
    assert str(tmp_path) in one_sentence(error)


def test_shifts_are_shares_of_height_and_of_width() -> None:
    """Of an image of 4x40 pixels a tenth is no row and four columns."""
    x = torch.arange(40.0).expand(200, 1, 4, 40) / 40
    moved = random_shift_by(x, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, :, 0], moved[:, :, 3])
    firsts = (moved[:, 0, 0, 20] * 40).round().int() - 20
    assert (int(firsts.min()), int(firsts.max())) == (-4, 4)


def test_square_images_are_shifted_alike_in_both_directions() -> None:
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    by_share, by_pixels = (
        shift(x, by, torch.Generator().manual_seed(0)) for shift, by in ((random_shift_by, 0.25), (random_shift, 2))
    )
    assert torch.equal(by_share, by_pixels)
