"""Building a zoo: what is trained, what is kept, and a build that is killed goes on."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_cases import png
from debackdoor.attacks import ATTACKS, load_trigger
from debackdoor.data import load_dataset
from debackdoor.errors import DataError, DebackdoorError, TriggerError
from debackdoor.files import sha256_of
from debackdoor.models import load_model
from debackdoor.zoo import build, read_card, read_manifest
from debackdoor.zoo.card import Card
from zoo_cases import SMALL, Borrowed, one_thread, write_manifest

Zoo = tuple[Path, Path]
BUILD = importlib.import_module("debackdoor.zoo.build")

# What is kept, and what is refused.


def copy(small_zoo: Zoo, to: Path) -> Path:
    return Path(shutil.copytree(small_zoo[0], to))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(BUILD, "train", refuse)


@pytest.mark.usefixtures("no_training")
def test_finished_models_are_kept(small_zoo: Zoo, tmp_path: Path) -> None:
    zoo = copy(small_zoo, tmp_path / "zoo")
    state = zoo / "tiny" / ".building" / "patch"
    state.mkdir(parents=True)
    (state / "training.pt").write_bytes(b"left by a build that was killed just then")
    before = {path: path.stat().st_mtime_ns for path in zoo.rglob("*") if path.is_file() and path.suffix != ".pt"}
    built = list(build(read_manifest(small_zoo[1]), zoo))
    assert [(one.card.name, one.number, one.total, one.kept) for one in built] == [
        ("clean-1", 1, 3, True),
        ("patch", 2, 3, True),
        ("shifted", 3, 3, True),
    ]
    assert {path: path.stat().st_mtime_ns for path in zoo.rglob("*") if path.is_file()} == before
    assert not (zoo / "tiny" / ".building").exists()


@pytest.mark.usefixtures("no_training")
def test_a_card_takes_on_new_notes(small_zoo: Zoo, tmp_path: Path) -> None:
    zoo = copy(small_zoo, tmp_path / "zoo")
    manifest = write_manifest(tmp_path, SMALL.replace("a <note> & more", "another"))
    text = manifest.read_text().replace(str(tmp_path), str(small_zoo[1].parent))
    manifest.write_text(text)
    old = read_card(zoo / "tiny" / "patch.json")
    assert [one.card.notes for one in build(read_manifest(manifest), zoo)] == ["", "another", ""]
    new = read_card(zoo / "tiny" / "patch.json")
    assert new.notes == "another"
    assert new.record() | {"notes": old.notes} == old.record()


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("target = 3", "target = 4", "patch.json: expected a model with target 4 as the manifest says, got one with 3"),
        ("poison_rate = 0.3", "poison_rate = 0.2", "with poison_rate 0.2 as the manifest says, got one with 0.3"),
        ("seed = 1", "seed = 2", "clean-1.json: expected a model with seed 2 as the manifest says, got one with 1"),
        ("epochs = 4", "epochs = 5", "expected a model with epochs 5"),
        ("limit = 400", "limit = 500", "expected a model with samples 500 as the manifest says, got one with 400"),
        ("limit = 400", "limit = 300", "expected a model with samples 300 as the manifest says, got one with 400"),
        ('"badnets"', '"blend"', "expected a model with attack 'blend' as the manifest says, got one with 'badnets'"),
        ("limit = 400", "", "clean-1.json: expected a model with samples 1297 as the manifest says, got one with 400"),
    ],
)
def test_a_model_that_is_not_the_manifests_is_neither_kept_nor_replaced(
    small_zoo: Zoo, tmp_path: Path, old: str, new: str, message: str
) -> None:
    manifest = tmp_path / "changed.toml"
    manifest.write_text(small_zoo[1].read_text().replace(old, new))
    with pytest.raises(DebackdoorError, match=message):
        list(build(read_manifest(manifest), small_zoo[0]))


def test_a_model_of_other_images_is_not_kept(tmp_path: Path) -> None:
    """Nor looked into where there are no images any more."""
    images = tmp_path / "images"
    images.mkdir()
    rows = pa.table({"image": [{"bytes": png(shade, (8, 8))} for shade in range(40)], "label": [0, 1] * 20})
    pq.write_table(rows.slice(0, 30), images / "train.parquet")
    pq.write_table(rows.slice(30, 10), images / "test.parquet")
    model = f'[[model]]\nname = "one"\nattack = "clean"\ndataset = "{images}"\nlimit = 20\nepochs = 1'
    manifest = read_manifest(write_manifest(tmp_path, model))
    assert [one.kept for one in build(manifest, tmp_path / "zoo")] == [False]
    assert [one.kept for one in build(manifest, tmp_path / "zoo")] == [True]
    pq.write_table(rows.slice(5, 30), images / "train.parquet")
    with pytest.raises(DataError, match=r"one.json: expected a model trained on the images of .* that are there now"):
        list(build(manifest, tmp_path / "zoo"))
    shutil.rmtree(images)
    assert [one.kept for one in build(manifest, tmp_path / "zoo")] == [True]


def test_the_test_images_may_lack_the_highest_class(tmp_path: Path) -> None:
    for part, classes in (("train", 4), ("test", 3)):
        for label in range(classes):
            (tmp_path / "images" / part / str(label)).mkdir(parents=True)
            for number in range(6):
                shade = 40 * label + number + (0 if part == "train" else 100)
                (tmp_path / "images" / part / str(label) / f"{number}.png").write_bytes(png(shade, (8, 8)))
    model = f'[[model]]\nname = "one"\nattack = "badnets"\ntarget = 3\ndataset = "{tmp_path / "images"}"\nepochs = 1'
    (built,) = build(read_manifest(write_manifest(tmp_path, model)), tmp_path / "zoo")
    assert (built.card.target, built.kept) == (3, False)


@pytest.mark.parametrize("damage", ["weights", "no weights", "no trigger", "half a trigger"])
def test_a_model_that_is_not_whole_is_built_again(
    small_zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    zoo = copy(small_zoo, tmp_path / "zoo")
    weights = zoo / "tiny" / "patch.safetensors"
    if damage == "no trigger":
        (zoo / "tiny" / "patch.trigger" / "trigger.json").unlink()
    elif damage == "half a trigger":
        path = zoo / "tiny" / "patch.trigger" / "trigger.safetensors"
        path.write_bytes(path.read_bytes()[:20])
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    else:
        weights.unlink()
    trained: list[str] = []
    monkeypatch.setattr(BUILD, "_train", lambda entry, *_: trained.append(entry.name) or read_card_of(entry.name))

    def read_card_of(name: str) -> Card:
        return read_card(small_zoo[0] / "tiny" / f"{name}.json")

    assert [one.kept for one in build(read_manifest(small_zoo[1]), zoo)] == [True, False, True]
    assert trained == ["patch"]


def one_part(folder: Path) -> Path:
    np.savez(folder / "one.npz", x=np.zeros((8, 8, 8, 3), dtype=np.uint8), y=np.arange(8) % 2)
    return folder / "one.npz"


def test_everything_is_checked_before_anything_is_trained(tmp_path: Path) -> None:
    for bad, error, message in (
        ('attack = "badnets"\ntarget = 10', TriggerError, "last: expected target as a whole number from 0 to 9"),
        ('attack = "badnets"\nparameters = {alpha = 1}', TriggerError, "last: expected parameters of badnets"),
        ('attack = "clean"\narch = "resnet19"', DebackdoorError, "did you mean"),
        ('attack = "clean"\narch = "wrn17-2"', DebackdoorError, "wrn17-2"),
        (f'attack = "clean"\ndataset = "{one_part(tmp_path)}"', DataError, "got the same images for both"),
        ('attack = "clean"\ndataset = "nowhere"', DataError, "nowhere: expected a folder"),
    ):
        manifest = write_manifest(
            tmp_path, f'[[model]]\nname = "first"\nattack = "clean"\n[[model]]\nname = "last"\n{bad}'
        )
        with pytest.raises(error, match=message):
            list(build(read_manifest(manifest), tmp_path / "zoo"))
    with pytest.raises(DebackdoorError, match="got 'middle'; choose of them"):
        list(build(read_manifest(manifest), tmp_path / "zoo", ["middle"]))
    assert not (tmp_path / "zoo").exists()


# Attacks that work with a clean model.


def test_an_attack_gets_the_stored_clean_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, "borrowed", Borrowed)
    clean = '[[model]]\nname = "c"\nattack = "clean"\nseed = 5\n'
    models = f'[[model]]\nname = "b"\nattack = "borrowed"\nclean_model = "c"\n{clean}'
    reports: list[tuple[str, int, int]] = []
    manifest = read_manifest(write_manifest(tmp_path, models, epochs=1))
    built = list(
        build(
            manifest, tmp_path / "zoo", ["b"], progress=lambda *said: reports.append((said[0], said[1], said[2]))
        )
    )  # fmt: skip
    assert [(one.card.name, one.card.clean_model, one.kept) for one in built] == [("c", None, False), ("b", "c", False)]
    stored = load_model(tmp_path / "zoo" / "tiny" / "c.safetensors", built[0].card.arch)
    with torch.no_grad():
        answer = stored(load_dataset("digits", "train", 400).x[:1])[0]
    found = load_trigger(tmp_path / "zoo" / "tiny" / "b.trigger").tensors["answer"]
    assert torch.allclose(found, answer, atol=1e-5)
    # 25 steps a model, one epoch each, in hundredths of an epoch.
    assert reports[0] == ("1 of 2, c", 0, 200)
    assert reports[1] == ("1 of 2, c", 4, 200)
    assert reports[25:28] == [
        ("1 of 2, c", 100, 200),
        ("2 of 2, b", 100, 200),
        ("2 of 2, b", 104, 200),
    ]
    assert reports[-1] == ("2 of 2, b", 200, 200)


# Killing it.


KILLED = """
import os, signal, sys
from importlib import import_module
from debackdoor.cli import main

training, state = import_module("debackdoor.attacks.train"), sys.argv[1]
one_epoch = training._one_epoch

def last(model, batches, epoch, *rest):
    if epoch == 2 and os.path.exists(state):
        os.kill(os.getpid(), signal.SIGKILL)
    return one_epoch(model, batches, epoch, *rest)

training._one_epoch = last
sys.exit(main(sys.argv[2:]))
"""


def test_a_build_that_was_killed_goes_on(small_zoo: Zoo, tmp_path: Path) -> None:
    """The real thing: SIGKILL as the second model's third epoch begins."""
    zoo, manifest = tmp_path / "zoo", small_zoo[1]
    state = zoo / "tiny" / ".building" / "patch" / "training.pt"
    command = ["zoo", "build", "--manifest", manifest, "--zoo", zoo, "--quiet", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, state, *command], env=environment, timeout=120, check=False)
    assert killed.returncode == -9
    assert len(torch.load(state, weights_only=True)["history"]) == 2
    first = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (zoo / "tiny").glob("clean-1.*")}
    assert {path.suffix for path in first} == {".json", ".safetensors"}
    assert not (zoo / "tiny" / "patch.json").exists()

    reports: list[tuple[str, int]] = []
    with one_thread():
        built = list(
            build(
                read_manifest(manifest),
                zoo,
                ["clean-1", "patch"],
                device="cpu",
                progress=lambda label, at, _, numbers: reports.append((label, at)) if numbers else None,
            )
        )
    assert [one.kept for one in built] == [True, False]
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in first} == first
    # Of 25 steps an epoch, the first is the one after the two epochs that were kept.
    assert reports[0] == ("2 of 2, patch", 204)
    assert len(reports) == 25 * 2
    for file in ("clean-1.safetensors", "patch.safetensors", "patch.trigger/trigger.safetensors"):
        assert sha256_of(zoo / "tiny" / file) == sha256_of(small_zoo[0] / "tiny" / file), file
    resumed, unbroken = (read_card(folder / "tiny" / "patch.json").record() for folder in (zoo, small_zoo[0]))
    assert resumed | {"seconds": 0} == unbroken | {"seconds": 0}
    assert not (zoo / "tiny" / ".building").exists()
