"""CL: target-class images that a clean model misreads, with a pattern in their corners and their own labels."""

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from attack_cases import OPTIONS, same, small_digits, train_killed_and_resumed, weights, write_network
from debackdoor.attacks import LabelConsistent, load_trigger, make_attack, save_trigger, train
from debackdoor.errors import DataError, ModelError, TriggerError
from debackdoor.evaluation import accuracy, evaluate
from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from toys import pool, set_values

SMALL = {"image_shape": (1, 8, 8), "num_classes": 4}


def labelled(count: int) -> CleanSet:
    return CleanSet(torch.rand(count, 1, 8, 8, generator=generator(0)), torch.arange(count) % 4)


def brightness() -> nn.Module:
    """The lighter an image, the more it is of class 0; the darker, the more of class 1."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), pool(), nn.Linear(1, 4, bias=False))
    set_values(model[0].weight, [1])
    set_values(model[2].weight, [1, -1, 0, 0])
    return model.eval()


def test_the_pattern_is_mirrored_into_all_corners() -> None:
    out = LabelConsistent(image_shape=(1, 7, 8), amplitude=0.25).apply(torch.full((2, 1, 7, 8), 0.5))
    corners = [
        [1, -1, 1, 0, 0, 1, -1, 1],
        [-1, 1, -1, 0, 0, -1, 1, -1],
        [1, -1, -1, 0, 0, -1, -1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, -1, -1, 0, 0, -1, -1, 1],
        [-1, 1, -1, 0, 0, -1, 1, -1],
        [1, -1, 1, 0, 0, 1, -1, 1],
    ]
    assert torch.equal(out, 0.5 + 0.25 * torch.tensor(corners).float().expand(2, 1, 7, 8))
    whole = LabelConsistent(image_shape=(1, 7, 8)).apply(torch.full((1, 1, 7, 8), 0.3))
    assert whole.unique().tolist() == pytest.approx([0, 0.3, 1])  # clipped: black and white
    assert torch.equal(whole, LabelConsistent(image_shape=(1, 7, 8)).apply(whole.flip(3)).flip(3))


@pytest.mark.parametrize(("target", "towards"), [(0, -1), (1, 1)])
def test_images_of_the_target_class_are_moved_against_their_label_and_then_triggered(target: int, towards: int) -> None:
    data, model = labelled(80), brightness()
    x, y = data.x.clone(), data.y.clone()
    state = deepcopy(model.state_dict())
    attack = LabelConsistent(target=target, poison_rate=0.5, eps=0.1, step=0.05, iterations=5, **SMALL)
    poison = attack.poison(data, model)
    assert len(poison.indices) == 10
    assert torch.equal(poison.indices, poison.indices.sort().values)
    assert poison.y.tolist() == data.y[poison.indices].tolist() == [target] * 10
    moved = (data.x[poison.indices] + towards * 0.1).clamp(0, 1)
    torch.testing.assert_close(poison.x, attack.apply(moved))
    assert torch.equal(data.x, x)
    assert torch.equal(data.y, y)
    assert same(weights(model), state)
    assert torch.equal(attack.poison(data, model).x, poison.x)


def test_the_search_starts_at_random_within_eps() -> None:
    data = labelled(80)
    attack = LabelConsistent(eps=0.1, step=1e-9, iterations=1, amplitude=1e-9, **SMALL)
    moved = attack.poison(data, brightness())
    distance = moved.x - data.x[moved.indices]
    assert 0.09 < float(distance.abs().max()) <= 0.1 + 1e-6
    assert abs(float(distance.mean())) < 0.01
    other = LabelConsistent(seed=1, poison_rate=1.0, eps=0.1, step=1e-9, iterations=1, amplitude=1e-9, **SMALL)
    every = other.poison(data, brightness())
    assert len(every.indices) == 20
    assert not torch.equal(every.x[torch.isin(every.indices, moved.indices)], moved.x)


def test_published_defaults() -> None:
    attack = LabelConsistent()
    assert (attack.poison_rate, attack.eps, attack.amplitude) == (0.8, 16 / 255, 1)
    assert attack.iterations * attack.step >= 1.5 * attack.eps  # any corner of the ball can be reached


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "all-to-all"}, "expected mode all-to-one for cl"),
        ({"eps": 0.0}, "eps"),
        ({"eps": 8}, "eps"),
        ({"step": math.nan}, "step"),
        ({"iterations": 0}, "iterations"),
        ({"amplitude": 255}, "amplitude"),
        ({"image_shape": (3, 5, 32)}, "at least 6x6"),
    ],
)
def test_bad_hyper_parameters_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(TriggerError, match=message):
        LabelConsistent(**wrong)


def test_poisoning_needs_a_clean_model_and_the_target_class() -> None:
    with pytest.raises(ModelError, match="got none"):
        LabelConsistent(**SMALL).poison(labelled(40))
    with pytest.raises(DataError, match="at least one sample"):
        LabelConsistent(target=3, **SMALL).poison(labelled(3), brightness())


def test_the_backdoor_takes_resumes_and_comes_back_from_disk(tmp_path: Path) -> None:
    data, test = small_digits(), small_digits("test")
    arch = write_network(tmp_path)
    clean = train(None, arch, data, epochs=4, seed=1, **OPTIONS).model
    hidden = make_attack("cl", data, target=6, eps=0.2, step=0.05, amplitude=1e-9).poison(data, clean)
    assert accuracy(clean, data.subset(hidden.indices)) > 0.8
    assert accuracy(clean, CleanSet(hidden.x, hidden.y)) < 0.1
    attack = make_attack("cl", data, target=6, eps=0.2, step=0.05)
    options = OPTIONS | {"epochs": 6, "clean_model": clean}
    victim = train(attack, arch, data, **options)
    found = evaluate(victim.model, test, victim.attack)
    assert found.clean_accuracy > 0.88
    assert found.attack_success_rate > 0.9
    assert evaluate(clean, test, attack).attack_success_rate < 0.1
    save_trigger(victim.attack, tmp_path / "trigger")
    assert evaluate(victim.model, test, load_trigger(tmp_path / "trigger")) == found
    resumed = train_killed_and_resumed(tmp_path / "state", 50, attack, arch, data, **options)
    assert same(weights(resumed.model), weights(victim.model))
