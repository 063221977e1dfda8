"""Bad input to every command: one sentence on stderr, exit code 2 or rarely 3, and nothing written."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli_cases import Shell
from debackdoor.attacks import BadNets, save_trigger


def refused(shell: Shell, *arguments: object, code: int = 2) -> str:
    """Runs a command that has to fail as bad input does; returns its sentence."""
    before = shell.files()
    ran = shell(*arguments)
    assert ran.code == code, ran
    assert ran.out == ""
    assert ran.err.startswith("debackdoor: ")
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err
    assert shell.files() == before
    return ran.err


def repair(
    shell: Shell, checkpoint: Path, clean: object = "digits", *more: object, arch: str | None = None, code: int = 2
) -> str:
    out = ("--out", shell.folder / "repaired.safetensors", "--json", shell.folder / "repair.json")
    return refused(shell, "repair", checkpoint, "--arch", arch or shell.arch, "--clean", clean, *out, *more, code=code)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path(self.path).touch, ()


def _missing(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _text(path: Path) -> None:
    path.write_text("this is no checkpoint\n")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _no_tensors(path: Path) -> None:
    torch.save({"epoch": 3}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "got no such file"),
        (_empty, "got an empty file"),
        (_truncated, "truncated or damaged"),
        (_text, "got something else"),
        (_folder, "got a folder"),
        (_no_tensors, "expected a state dict with tensors"),
    ],
)
def test_damaged_checkpoint(shell: Shell, damage: Callable[[Path], None], message: str) -> None:
    path = shell.checkpoint()
    damage(path)
    said = repair(shell, path)
    assert str(path) in said
    assert message in said


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("command", ["repair", "evaluate"])
def test_a_pickle_that_would_run_code_is_not_run(shell: Shell, command: str, protocol: int) -> None:
    path, made = shell.folder / "model.pth", shell.folder / "made-by-payload"
    path.write_bytes(pickle.dumps({"state_dict": Payload(made)}, protocol))
    pickle.loads(path.read_bytes())
    assert made.exists(), "the payload does what it should be kept from"
    made.unlink()
    if command == "repair":
        said = repair(shell, path)
    else:
        save_trigger(BadNets(), shell.folder / "trigger")
        trigger = ("--test", "digits", "--trigger", shell.folder / "trigger")
        said = refused(shell, "evaluate", path, "--arch", shell.arch, *trigger)
    assert "was refused" in said
    assert not made.exists()


def test_a_state_dict_of_another_architecture(shell: Shell) -> None:
    said = repair(shell, shell.checkpoint(), arch=shell.arch.replace(":make", ":make_other"))
    assert "2 missing (first '5.weight')" in said
    assert "14 unexpected (first '11.bias')" in said
    assert "5 mis-shaped (first '0.weight' of shape (16, 3, 3, 3) where (8, 3, 3, 3) is expected)" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(shell: Shell, value: float) -> None:
    assert "got NaN or Inf in '1.bias'" in repair(shell, shell.checkpoint(**{"1.bias": torch.full((16,), value)}))


def test_wrong_class_count(shell: Shell) -> None:
    said = repair(shell, shell.checkpoint(), "digits", "--num-classes", 7)
    assert "expected 7 classes as asked for, got a last layer of 10" in said


def test_unknown_architecture(shell: Shell) -> None:
    assert "did you mean 'resnet18'" in repair(shell, shell.checkpoint(), arch="resnet81")


def test_an_architecture_of_no_name(shell: Shell) -> None:
    scan = ("scan", shell.checkpoint(), "--arch", ".:make", "--clean", "digits", "--json", shell.folder / "a.json")
    assert "module '.' failed to import" in refused(shell, *scan)


def test_a_network_file_that_fails(shell: Shell) -> None:
    (shell.folder / "broken.py").write_text("raise SystemExit('no')\n")
    assert "failed when run: SystemExit: no" in repair(shell, shell.checkpoint(), arch=f"{shell.folder}/broken.py:make")


def test_mean_without_std(shell: Shell) -> None:
    assert "got only mean" in repair(shell, shell.checkpoint(), "digits", "--mean", "0.5,0.5,0.5")


def test_no_clean_images(shell: Shell) -> None:
    (shell.folder / "clean" / "cat").mkdir(parents=True)
    assert "clean" in repair(shell, shell.checkpoint(), shell.folder / "clean")
    assert "a path that does not exist" in repair(shell, shell.checkpoint(), shell.folder / "nowhere")


def test_clean_images_of_one_class(shell: Shell) -> None:
    said = repair(shell, shell.checkpoint(), shell.images([4] * 40), code=3)
    assert "expected clean images of at least 2 classes, got only class 4" in said


def test_too_few_clean_images(shell: Shell) -> None:
    said = repair(shell, shell.checkpoint(), "digits", "--limit", 12, code=3)
    assert "expected at least 20 clean images, got 12" in said


def test_labels_out_of_range(shell: Shell) -> None:
    assert "expected labels of 0 to 9" in repair(shell, shell.checkpoint(), shell.images([0, 1, 10] * 20))
    assert "expected labels of at least 0, got -1" in repair(shell, shell.checkpoint(), shell.images([0, 1, -1] * 20))


def test_an_unreadable_image_is_named(shell: Shell) -> None:
    for label in ("0", "1"):
        (shell.folder / "clean" / label).mkdir(parents=True)
        for index in range(15):
            pixels = np.full((16, 16, 3), index, dtype=np.uint8)
            Image.fromarray(pixels).save(shell.folder / "clean" / label / f"{index}.png")
    broken = shell.folder / "clean" / "1" / "7.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert str(broken) in repair(shell, shell.checkpoint(), shell.folder / "clean")


def test_a_model_that_always_answers_the_same(shell: Shell) -> None:
    weights = {"11.weight": torch.zeros(10, 128), "11.bias": torch.arange(10.0)}
    assert "depend on the image" in repair(shell, shell.checkpoint(**weights))


def test_a_clean_set_on_which_the_model_is_at_chance(shell: Shell) -> None:
    said = repair(shell, shell.checkpoint(), code=3)
    assert "no better than chance" in said
    assert "--mean and --std" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(shell: Shell) -> None:
    assert "use --device cpu" in repair(shell, shell.checkpoint(), "digits", "--device", "cuda")


def evaluate(shell: Shell, trigger: object, *more: object) -> str:
    options = ("--arch", shell.arch, "--test", "digits", "--trigger", trigger, "--json", shell.folder / "record.json")
    return refused(shell, "evaluate", shell.checkpoint(), *options, *more)


def test_evaluate_without_a_trigger(shell: Shell) -> None:
    assert "expected a saved trigger" in evaluate(shell, shell.folder / "nowhere")


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (BadNets(num_classes=7), "expected a trigger for the 10 classes of"),
        (BadNets(image_shape=(3, 16, 16)), "use the images it was made for"),
    ],
)
def test_evaluate_with_the_trigger_of_another_model(shell: Shell, attack: BadNets, message: str) -> None:
    save_trigger(attack, shell.folder / "trigger")
    assert message in evaluate(shell, shell.folder / "trigger")


def attack(shell: Shell, *more: object, data: object = "digits", test: object = "digits") -> str:
    out = ("--out", shell.folder / "victim")
    return refused(shell, "attack", "badnets", "--arch", shell.arch, "--data", data, "--test", test, *out, *more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--target", 10), "expected target as a whole number from 0 to 9"),
        (("--poison-rate", 0), "expected poison_rate as a number above 0"),
        (("--poison-rate", 0.0001), "expected at least one sample to poison"),
        (("--lr", -1), "expected a learning rate above 0"),
        (("--std", "1,1,1"), "got only std"),
        *(
            (("--set", f"{name}=1"), f"expected parameters of badnets out of .*, got '{name}'")
            for name in ("name", "modes", "recipe", "needs_clean_model")
        ),
    ],
)
def test_attack_settings(shell: Shell, more: tuple[object, ...], message: str) -> None:
    assert re.search(message, attack(shell, *more))


def test_attack_on_images_of_two_sizes(shell: Shell) -> None:
    assert "use the images it was made for" in attack(shell, test=shell.images([0, 1] * 20))


def test_attack_with_test_labels_that_training_lacks(shell: Shell) -> None:
    training = shell.images([0, 1] * 20, "train.npz")
    assert "expected labels of 0 to 1" in attack(shell, data=training, test=shell.images([0, 2] * 20))
