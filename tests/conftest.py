"""What several test files share.

A GPU is used where DEBACKDOOR_TEST_GPU is set alone, and by tests/test_gpu.py alone: the others compare numbers bit by
bit, and say what happens without one.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cli_cases import Shell
from debackdoor.attacks import Attack, BackdooredModel, make_attack, train
from debackdoor.data import load_dataset
from debackdoor.types import CleanSet
from debackdoor.zoo import build, read_manifest
from zoo_cases import SMALL, one_thread, write_manifest

if "DEBACKDOOR_TEST_GPU" not in os.environ:
    # Read when CUDA is first used; processes that tests start inherit it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums of several threads round otherwise, and small victims then turn out otherwise, too."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class DigitsVictim:
    """A backdoored classifier of 16x16 digits, the defender's images, and the test set that only the tests see.

    Attributes:
        trained: the model, and how it was trained.
        attack: its trigger.
        clean: 500 images without triggers.
        test: the 500 test images.
    """

    trained: BackdooredModel
    attack: Attack
    clean: CleanSet
    test: CleanSet


def train_digits_victim(arch: str, seed: int) -> DigitsVictim:
    """A BadNets backdoor to label 3, on one digit in ten."""
    data = load_dataset("digits", image_size=16)
    attack = make_attack("badnets", data, target=3, seed=seed)
    trained = train(attack, arch, data, epochs=10, batch_size=64, lr=0.1, seed=seed, flip=False, device="cpu")
    clean = load_dataset("digits", limit=500, image_size=16)
    return DigitsVictim(trained, attack, clean, load_dataset("digits", "test", image_size=16))


@pytest.fixture(scope="session")
def digits_victim() -> DigitsVictim:
    """A narrow ResNet-18, trained once a session, in a few seconds."""
    return train_digits_victim("resnet18-w8", seed=1)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A way to run commands in a folder of their own."""
    return Shell(tmp_path, capsys)


@pytest.fixture(scope="session")
def small_zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a zoo of three small models, and its manifest; not to be changed."""
    folder = tmp_path_factory.mktemp("zoo")
    manifest = write_manifest(folder, SMALL)
    with one_thread():
        assert [built.kept for built in build(read_manifest(manifest), folder / "zoo", device="cpu")] == [False] * 3
    return folder / "zoo", manifest


@pytest.fixture
def zoo(small_zoo: tuple[Path, Path]) -> Path:
    """The folder of the small zoo's only tier."""
    return small_zoo[0] / "tiny"
