"""Training: poisoned batches, real victims on scikit-learn's digits, the same weights for the same seed, resuming."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from debackdoor.attacks import BackdooredModel, BadNets, load_trigger, make_attack, train, write_victim
from debackdoor.attacks.batches import PoisonedBatches, augment
from debackdoor.errors import DataError, DebackdoorError, ModelError
from debackdoor.evaluation import accuracy, evaluate
from debackdoor.models import build_model, load_model
from debackdoor.models.layout import memory_format
from debackdoor.runtime import generator
from debackdoor.types import CleanSet

NET = """
from torch import nn
def make(num_classes, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(512, num_classes),
    )
"""


def test_batches_hold_the_poison_and_every_sample_once() -> None:
    count = 30
    x = (torch.arange(count) / 100).view(count, 1, 1, 1).expand(count, 1, 4, 4).clone()
    data = CleanSet(x, torch.zeros(count, dtype=torch.int64))
    attack = BadNets(target=1, poison_rate=0.2, num_classes=2, image_shape=(1, 4, 4))
    poison = attack.poison(data)
    batches = PoisonedBatches(data, attack, poison, batch_size=8)
    parts = list(batches.one_pass(generator(0)))
    assert len(parts) == len(batches) == 4
    seen_x, seen_y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    order = seen_x[:, 0, 0, 0].mul(100).round().long()
    assert sorted(order.tolist()) == list(range(count))
    assert sorted(order[seen_y == 1].tolist()) == poison.indices.tolist()
    assert torch.equal(seen_x[seen_y == 1], attack.apply(data.x[order[seen_y == 1]]))
    assert torch.equal(seen_x[seen_y == 0], data.x[order[seen_y == 0]])
    assert torch.equal(data.x, x)


def test_images_are_shifted_by_an_eighth_and_mirrored() -> None:
    x = torch.zeros(400, 1, 16, 16)
    x[:, :, 8, 6] = 1.0
    for flip, columns in ((False, {4, 5, 6, 7, 8}), (True, {4, 5, 6, 7, 8, 9, 10, 11})):
        seen = augment(x, flip, generator(0))
        where = seen[:, 0].nonzero()
        assert len(where) == 400
        assert set(where[:, 1].tolist()) == {6, 7, 8, 9, 10}
        assert set(where[:, 2].tolist()) == columns


@pytest.fixture(scope="module")
def digits() -> tuple[CleanSet, CleanSet]:
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(raw).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()
    return CleanSet(x[:1300], y[:1300], source="digits"), CleanSet(x[1300:], y[1300:], source="digits")


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("arch") / "net.py"
    path.write_text(NET)
    return f"{path}:make"


OPTIONS = {"batch_size": 64, "lr": 0.1, "flip": False, "precision": "fp32", "device": "cpu"}


@pytest.fixture(scope="module")
def victim(digits: tuple[CleanSet, CleanSet], arch: str) -> BackdooredModel:
    data, test = digits
    attack = make_attack("badnets", data, target=3)
    return train(attack, arch, data, test, epochs=6, **OPTIONS)


def test_a_trained_victim_has_the_backdoor_and_its_accuracy(
    victim: BackdooredModel, digits: tuple[CleanSet, CleanSet]
) -> None:
    assert victim.attack is not None
    found = evaluate(victim.model, digits[1], victim.attack)
    assert found.clean_accuracy > 0.88
    assert found.attack_success_rate > 0.95
    assert not victim.model.training
    assert [row["epoch"] for row in victim.history] == [1, 2, 3, 4, 5, 6]
    assert victim.history[-1]["test_accuracy"] == pytest.approx(found.clean_accuracy, abs=0.01)
    assert victim.history[-1]["loss"] < victim.history[0]["loss"]
    assert victim.seconds > sum(row["seconds"] for row in victim.history)  # poisoning takes time, too


def test_blend_and_wanet_build_their_backdoor_in(digits: tuple[CleanSet, CleanSet], arch: str) -> None:
    data, test = digits
    blend = make_attack("blend", data, target=3)
    assert evaluate(train(blend, arch, data, epochs=6, **OPTIONS).model, test, blend).attack_success_rate > 0.95
    warp = make_attack("wanet", data, target=3, strength=3.0, seed=1)  # the default warp hardly shows on 8x8 images
    victim = train(warp, arch, data, epochs=8, **OPTIONS)
    assert "test_accuracy" not in victim.history[0]
    warped = evaluate(victim.model, test, warp)
    clean = evaluate(train(None, arch, data, epochs=6, **OPTIONS).model, test, warp)
    assert warped.clean_accuracy > 0.85
    assert warped.attack_success_rate > 0.35
    assert clean.attack_success_rate < 0.1


def test_the_victim_folder_holds_model_trigger_and_record(
    victim: BackdooredModel, digits: tuple[CleanSet, CleanSet], arch: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "training.pt").write_bytes(b"kept until the results are safe")
    found = evaluate(victim.model, digits[1], victim.attack)  # type: ignore[arg-type]
    record = write_victim(victim, out, found.record())
    assert json.loads((out / "record.json").read_text()) == record
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "record.json", "trigger"]
    assert record["schema"] == "debackdoor/attack/1"
    wanted = {"attack": "badnets", "target": 3, "mode": "all-to-one", "arch": arch, "dataset": "digits", "epochs": 6}
    assert wanted.items() <= record.items()
    assert record["clean_accuracy"] == found.clean_accuracy
    assert set(record["versions"]) == {"python", "torch", "debackdoor"}
    loaded = load_model(out / "model.safetensors", arch=arch)
    assert evaluate(loaded, digits[1], load_trigger(out / "trigger"), precision="fp32") == evaluate(
        victim.model,
        digits[1],
        victim.attack,  # type: ignore[arg-type]
        precision="fp32",
    )


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", ["badnets", "wanet"])
def test_the_same_seed_gives_the_same_weights_resumed_or_not(
    name: str, digits: tuple[CleanSet, CleanSet], arch: str, tmp_path: Path
) -> None:
    data = digits[0].subset(torch.arange(200))
    attack = make_attack(name, data)
    options = OPTIONS | {"epochs": 3}
    state_before = torch.get_rng_state()
    whole = train(attack, arch, data, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state_before)
    torch.manual_seed(99)  # the surroundings must not matter
    reports: list[tuple[str, int, int]] = []

    def killer(stage: str, done: int, total: int, numbers: object) -> None:
        reports.append((stage, done, total))
        if done == 10:  # in the third epoch of four steps each
            raise KilledError

    with pytest.raises(KilledError):
        train(attack, arch, data, seed=1, progress=killer, checkpoint_dir=tmp_path, **options)
    assert reports == [("train", step, 12) for step in range(1, 11)]
    reports.clear()
    resumed = train(
        attack,
        arch,
        data,
        seed=1,
        progress=lambda stage, done, total, _: reports.append((stage, done, total)),
        checkpoint_dir=tmp_path,
        **options,
    )
    assert [done for _, done, _ in reports] == [9, 10, 11, 12]
    assert len(resumed.history) == 3
    assert _same(_weights(whole.model), _weights(resumed.model))
    assert not _same(_weights(whole.model), _weights(train(attack, arch, data, seed=2, **options).model))
    with pytest.raises(DebackdoorError, match="other settings"):
        train(attack, arch, data, seed=2, checkpoint_dir=tmp_path, **options)
    others = CleanSet(1 - data.x, data.y, data.class_names, data.source)
    with pytest.raises(DebackdoorError, match="other settings or images"):
        train(attack, arch, others, seed=1, checkpoint_dir=tmp_path, **options)
    (tmp_path / "training.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(DebackdoorError, match="damaged file; delete it"):
        train(attack, arch, data, seed=1, checkpoint_dir=tmp_path, **options)


def test_a_state_is_of_one_network(digits: tuple[CleanSet, CleanSet], tmp_path: Path) -> None:
    """The file that ``arch`` names is the user's own, and may be changed meanwhile."""
    data, path = digits[0].subset(torch.arange(100)), tmp_path / "net.py"
    options = OPTIONS | {"checkpoint_dir": tmp_path}
    path.write_text(NET)
    train(None, f"{path}:make", data, epochs=2, **options)
    path.write_text(NET.replace("32", "16").replace("512", "256"))
    with pytest.raises(DebackdoorError, match="expected the state of this network, got that of another; delete it"):
        train(None, f"{path}:make", data, epochs=2, **options)


@pytest.mark.parametrize("steps", range(1, 8))
def test_any_number_of_steps_has_a_schedule(digits: tuple[CleanSet, CleanSet], arch: str, steps: int) -> None:
    assert len(train(None, arch, digits[0].subset(torch.arange(64)), epochs=steps, **OPTIONS).history) == steps


VIEW = """
from torch import nn
class View(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).view(len(x), -1))
    def train(self, mode=True):
        super().train(mode)
def make(num_classes, in_channels=1):
    return View(nn.Conv2d(in_channels, 16, 3, padding=1), nn.Linear(1024, num_classes))
def make_four(in_channels=1):
    return View(nn.Conv2d(in_channels, 16, 3, padding=1), nn.Linear(1024, 4))
"""


def test_networks_that_call_view_are_trained_and_serve_attackers(
    digits: tuple[CleanSet, CleanSet], tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(VIEW)
    data, arch = digits[0].subset(torch.arange(100)), f"{tmp_path / 'net.py'}:make"
    clean = train(None, arch, data, epochs=1, **OPTIONS).model
    attack = make_attack("trojan", data, iterations=2)
    assert len(train(attack, arch, data, epochs=1, clean_model=clean, **OPTIONS).history) == 1
    with pytest.raises(ModelError, match=r"net\.py:make_four to tell 10 classes apart, got 4; let its factory take"):
        train(None, arch + "_four", data, epochs=1, **OPTIONS)


def test_a_clean_model_of_fewer_classes_is_not_trained(digits: tuple[CleanSet, CleanSet], arch: str) -> None:
    attack = make_attack("trojan", digits[0], num_classes=12)
    with pytest.raises(DataError, match="expected images of 12 classes to train a clean model for trojan on, got 10"):
        train(attack, arch, digits[0], epochs=1, **OPTIONS)


def test_a_clean_model_and_normalisation(digits: tuple[CleanSet, CleanSet], arch: str, tmp_path: Path) -> None:
    clean = train(None, arch, digits[0], mean=[0.3], std=[0.4], epochs=3, **OPTIONS)
    assert accuracy(clean.model, digits[1]) > 0.8
    record = write_victim(clean, tmp_path, {})
    assert (record["attack"], record["target"], record["mean"], record["std"]) == ("clean", None, [0.3], [0.4])
    assert not (tmp_path / "trigger").exists()
    assert set(load_file(tmp_path / "model.safetensors")) == set(clean.model.network.state_dict())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 1}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"lr": 0.0}, "learning rate"),
        ({"lr": math.nan}, "learning rate"),
        ({"precision": "fp8"}, "precision"),
        ({"device": "tpu"}, "device"),
        ({"lr": 1e30}, "diverged"),
        ({"attack": BadNets()}, "images it was made for"),
    ],
)
def test_train_refuses_what_cannot_work(
    wrong: dict, message: str, digits: tuple[CleanSet, CleanSet], arch: str
) -> None:
    data = digits[0].subset(torch.arange(100))
    arguments = {"attack": None, "arch": arch, "data": data, "epochs": 2} | OPTIONS | wrong
    with pytest.raises(DebackdoorError, match=message):
        train(**arguments)


def test_a_victim_that_cannot_be_written_says_so(victim: BackdooredModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DebackdoorError, match="file"):
        write_victim(victim, tmp_path / "file" / "out", {})


def test_narrow_strided_shortcuts_stay_out_of_channels_last() -> None:
    """On CPUs such a layer's weight gradient corrupts memory in that format."""
    place = torch.device("cpu")
    narrow, wide = (build_model(name, 10) for name in ("resnet18-w8", "resnet18-w16"))
    assert memory_format(narrow, place) is torch.contiguous_format
    assert memory_format(wide, place) is torch.channels_last
    assert memory_format(narrow, torch.device("cuda")) is torch.channels_last
