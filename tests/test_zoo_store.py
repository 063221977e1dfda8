"""What a zoo stores: weights, triggers, and cards that say what was measured on them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cli_cases import Shell
from debackdoor.attacks import load_trigger
from debackdoor.data import load_dataset
from debackdoor.errors import DataError, DebackdoorError
from debackdoor.evaluation import accuracy, evaluate
from debackdoor.files import sha256_of
from debackdoor.models import load_model
from debackdoor.zoo import build, list_cards, load_splits, read_card, read_manifest, read_victim, store
from debackdoor.zoo.card import write_card
from debackdoor.zoo.data import check_apart, data_sha256
from debackdoor.zoo.store import to_half

Zoo = tuple[Path, Path]


def test_the_cards_say_what_was_made(small_zoo: Zoo) -> None:
    zoo, manifest = small_zoo
    assert sorted(path.name for path in (zoo / "tiny").iterdir()) == [
        "clean-1.json", "clean-1.safetensors", "patch.json", "patch.safetensors", "patch.trigger", "shifted.json",
        "shifted.safetensors", "shifted.trigger",
    ]  # fmt: skip
    record = json.loads((zoo / "tiny" / "patch.json").read_text())
    assert set(record) == {
        "schema", "name", "attack", "attack_parameters", "target", "mode", "clean_model", "dataset", "arch", "seed",
        "epochs", "batch_size", "lr", "flip", "samples", "clean_accuracy", "attack_success_rate", "robust_accuracy",
        "clean_images", "triggered_images", "seconds", "versions", "data_sha256", "sha256", "notes",
    }  # fmt: skip
    assert record["schema"] == "debackdoor/zoo-card/1"
    patch, clean, shifted = (read_card(zoo / "tiny" / f"{name}.json") for name in ("patch", "clean-1", "shifted"))
    assert (patch.attack, patch.target, patch.mode) == ("badnets", 3, "all-to-one")
    assert patch.attack_parameters == {"poison_rate": 0.3, "seed": 0}
    assert (patch.epochs, patch.batch_size, patch.lr, patch.flip, patch.seed) == (4, 16, 0.1, False, 0)
    others = int((load_dataset("digits", "test").y != 3).sum())
    assert (patch.samples, patch.clean_images, patch.triggered_images) == (400, 500, others)
    assert (patch.dataset, patch.arch) == ("digits", f"{manifest.parent / 'net.py'}:make")
    assert patch.notes == "a <note> & more"
    assert patch.seconds > 0
    assert (clean.attack, clean.target, clean.mode, clean.attack_parameters, clean.seed) == ("clean", None, None, {}, 1)
    assert (clean.attack_success_rate, clean.robust_accuracy, clean.triggered_images) == (None, None, None)
    assert (shifted.target, shifted.mode, shifted.triggered_images) == (None, "all-to-all", 500)
    assert shifted.attack_parameters == {"poison_rate": 0.5, "alpha": 0.5, "seed": 0}


def test_the_rates_are_those_of_the_files(small_zoo: Zoo) -> None:
    folder = small_zoo[0] / "tiny"
    test = load_dataset("digits", "test")
    for card in list_cards(folder):
        weights = load_file(folder / f"{card.name}.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float16, torch.int64}
        assert card.sha256 == sha256_of(folder / f"{card.name}.safetensors")
        model = load_model(folder / f"{card.name}.safetensors", card.arch)
        assert {value.dtype for value in model.parameters()} == {torch.float32}
        if card.attack == "clean":
            assert card.clean_accuracy == accuracy(model, test)
            assert card.clean_accuracy > 0.7
            continue
        found = evaluate(model, test, load_trigger(folder / f"{card.name}.trigger"))
        for rate in ("clean_accuracy", "attack_success_rate", "robust_accuracy"):
            assert getattr(card, rate) == getattr(found, rate)
        assert 0 < found.attack_success_rate < 1  # rates at an end would agree too easily


def test_half_precision_keeps_integers_and_refuses_what_is_too_large() -> None:
    given = {"weight": torch.tensor([1 / 3, -65504.0]), "count": torch.tensor(70000)}
    half = to_half(given)
    assert half["weight"].tolist() == [0.333251953125, -65504.0]  # 1365 / 4096
    assert (half["count"].item(), half["count"].dtype) == (70000, torch.int64)
    assert given["weight"].dtype == torch.float32
    with pytest.raises(DebackdoorError, match="at most 65504 for half precision, got 70000 in 'weight'"):
        to_half({"weight": torch.tensor([1.0, -7e4])})


def test_data_is_told_by_its_files(tmp_path: Path) -> None:
    digits = load_dataset("digits", "test")
    arrays = hashlib.sha256(digits.x.numpy().tobytes() + digits.y.numpy().tobytes()).hexdigest()
    assert data_sha256("digits", "test", digits) == arrays
    assert load_splits("digits", 20).sha256["test"] == arrays
    file = tmp_path / "some.npz"
    file.write_bytes(b"abc")
    assert data_sha256(str(file), "train", digits) == hashlib.sha256(b"abc").hexdigest()
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}").write_bytes(b"%d" % number)
    (tmp_path / "test_batch").write_bytes(b"6")
    assert data_sha256(str(tmp_path), "train", digits) == hashlib.sha256(b"12345").hexdigest()
    assert data_sha256(str(tmp_path), "test", digits) == hashlib.sha256(b"6").hexdigest()
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3: cannot be read"):
        data_sha256(str(tmp_path), "train", digits)


def test_bad_cards_are_named(small_zoo: Zoo, tmp_path: Path) -> None:
    card = read_card(small_zoo[0] / "tiny" / "patch.json")
    write_card(card, tmp_path)
    assert list_cards(tmp_path) == [card]
    path = tmp_path / "patch.json"
    for changes, message in (
        ({"schema": "debackdoor/zoo-card/9"}, "expected schema 'debackdoor/zoo-card/1', got 'debackdoor/zoo-card/9'"),
        ({"colour": 3}, "got 'colour'"),
        ({"epochs": "nine"}, "expected epochs as int, got 'nine'"),
        ({"epochs": True}, "expected epochs as int, got True"),
        ({"clean_accuracy": 82.1}, "expected clean_accuracy as a fraction from 0 to 1, got 82.1"),
        ({"attack_success_rate": float("nan")}, "expected attack_success_rate as a fraction"),
        ({"clean_accuracy": None}, "expected clean_accuracy as int or float, got None"),
        ({"target": "three"}, "expected target as int or null, got 'three'"),
        ({"name": "other"}, "expected the card of patch, got that of other"),
        ({"attack": "magic"}, "expected attack out of clean, badnets, .*, got 'magic'"),
        ({"mode": "all"}, "expected mode out of None, all-to-one, all-to-all, got 'all'"),
    ):
        path.write_text(json.dumps(card.record() | changes))
        with pytest.raises(DebackdoorError, match=message):
            read_card(path)
    path.write_text(json.dumps({name: value for name, value in card.record().items() if name != "seed"}))
    with pytest.raises(DebackdoorError, match="got no seed; delete it and build the model again"):
        list_cards(tmp_path)
    for text, message in (('{"schema": ', "expected JSON"), ("[]", "got 'list'"), ("\x00", "expected JSON")):
        path.write_text(text)
        with pytest.raises(DebackdoorError, match=message):
            read_card(path)
    with pytest.raises(DebackdoorError, match="expected a card, got none"):
        read_card(tmp_path / "none.json")
    with pytest.raises(DebackdoorError, match="expected a folder with a zoo's cards, got none"):
        list_cards(tmp_path / "none")


def test_a_victim_of_attack_can_be_stored(shell: Shell, tmp_path: Path) -> None:
    data = ("--data", "digits", "--test", "digits", "--limit", 200)
    recipe = ("--epochs", 1, "--batch-size", 32, "--lr", 0.1)
    ran = shell(
        "attack", "blend", "--arch", shell.arch, *data, *recipe, "--target", 2, "--out", shell.folder / "victim"
    )
    assert ran.code == 0, ran
    manifest = shell.folder / "own.toml"
    entry = (
        f'[[model]]\nname = "b"\nattack = "blend"\narch = "{shell.arch}"\ndataset = "digits"\nlimit = 200\ntarget = 2\n'
    )
    manifest.write_text(f'tier = "own"\n{entry}epochs = 1\nbatch_size = 32\nlr = 0.1\nflip = false')
    victim, splits = read_victim(shell.folder / "victim"), load_splits("digits", 200)
    wanted = read_manifest(manifest)
    card = store(wanted.entries[0], victim, splits, tmp_path / "zoo" / "own")
    record = json.loads((shell.folder / "victim" / "record.json").read_text())
    assert card.clean_accuracy == pytest.approx(record["clean_accuracy"], abs=0.01)
    assert card.seconds == pytest.approx(record["seconds"], abs=0.001)
    assert [one.kept for one in build(wanted, tmp_path / "zoo")] == [True]
    manifest.write_text(manifest.read_text().replace("target = 2", "target = 1"))
    with pytest.raises(DebackdoorError, match="b: expected a model with target 1 as the manifest says, got one with 2"):
        store(read_manifest(manifest).entries[0], victim, splits, tmp_path / "zoo" / "own")
    manifest.write_text(manifest.read_text().replace("epochs = 1", "epochs = 9"))
    with pytest.raises(DebackdoorError, match="b: expected a model with epochs 9"):
        store(read_manifest(manifest).entries[0], victim, splits, tmp_path / "zoo" / "own")
    assert list_cards(tmp_path / "zoo" / "own") == [card]
    weights = shell.folder / "victim" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        DebackdoorError, match=r"expected the record of an attack and of model\.safetensors, got none or"
    ):
        read_victim(shell.folder / "victim")
    (shell.folder / "victim" / "record.json").write_text("{}")
    with pytest.raises(DebackdoorError, match="expected the record of an attack"):
        read_victim(shell.folder / "victim")


def test_images_that_models_are_trained_on_are_no_test(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    np.savez(path, x=np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3), y=np.array([0, 1, 0, 1]))
    pictures = tmp_path / "pictures"
    for label in ("0", "1"):
        (pictures / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(pictures / label / f"{number}.png")
    for data, limit in ((path, None), (path, 2), (pictures, None), (pictures, 2)):
        with pytest.raises(DataError, match="expected a training and a test part, got the same images for both"):
            load_splits(str(data), limit)
    (tmp_path / "link.npz").symlink_to(path)
    with pytest.raises(DataError, match=r"link.npz: expected a training and a test part, got the same images"):
        check_apart(str(path), str(tmp_path / "link.npz"))


def test_both_parts_have_the_same_classes(tmp_path: Path) -> None:
    for part, names in (("train", ("bird", "cat", "dog")), ("test", ("cat", "dog", "eel"))):
        for number, name in enumerate(names):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (number, len(part), 0)).save(tmp_path / part / name / "0.png")
    with pytest.raises(DataError, match="expected the classes of the training images, of which 0 is 'bird', got 'cat'"):
        load_splits(str(tmp_path))
