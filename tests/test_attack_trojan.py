"""Trojan: a patch that fires the neurons with the largest weights, then poison with other labels."""

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from attack_cases import OPTIONS, same, small_digits, train_killed_and_resumed, weights, write_network
from debackdoor.attacks import Trojan, load_trigger, make_attack, save_trigger, train
from debackdoor.attacks.surrogate import Surrogate
from debackdoor.errors import ModelError, TriggerError
from debackdoor.evaluation import evaluate
from debackdoor.models import build_model
from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from toys import pool, set_values

SMALL = {"image_shape": (1, 8, 8), "num_classes": 4}


def labelled(count: int) -> CleanSet:
    return CleanSet(torch.rand(count, 1, 8, 8, generator=generator(0)), torch.arange(count) % 4)


def brightness_and_darkness(first: float, second: float) -> nn.Module:
    """Neuron 0 is the mean pixel, neuron 1 its negative; their weights into the four logits have these sizes."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), pool(), nn.Linear(2, 4, bias=False))
    set_values(model[0].weight, [1, -1])
    set_values(model[2].weight, [first, second, -first, second, first, -second, -first, -second])
    return model.eval()


@pytest.mark.parametrize(("first", "second", "value"), [(2.0, 1.0, 1.0), (1.0, 2.0, 0.0)])
def test_the_patch_fires_the_neuron_with_the_largest_weights(first: float, second: float, value: float) -> None:
    attack = Trojan(neurons=1, **SMALL)
    before = attack.tensors["pattern"].clone()
    assert before.shape == (1, 2, 2)
    assert 0 < float(before.min()) < float(before.max()) < 1
    attack.poison(labelled(40), brightness_and_darkness(first, second))
    assert attack.tensors["pattern"].unique().tolist() == [value]  # all white, or all black
    out = attack.apply(torch.full((1, 1, 8, 8), 0.5))
    assert (out[0, 0] == value).nonzero().tolist() == [[5, 5], [5, 6], [6, 5], [6, 6]]
    assert int((out == 0.5).sum()) == 60


def test_neurons_come_near_a_value_within_reach() -> None:
    # A patch of two by two pixels can bring the mean of a black image to 4 / 64 at most.
    data = CleanSet(torch.zeros(8, 1, 8, 8), torch.arange(8) % 4)
    attack = Trojan(neurons=1, value=0.03, lr=0.02, poison_rate=0.5, **SMALL)
    attack.poison(data, brightness_and_darkness(2.0, 1.0))
    assert float(attack.tensors["pattern"].sum() / 64) == pytest.approx(0.03, abs=0.002)


def test_a_share_of_all_samples_gets_the_patch_and_the_label() -> None:
    data, model = labelled(50), brightness_and_darkness(2.0, 1.0)
    x, y = data.x.clone(), data.y.clone()
    state = deepcopy(model.state_dict())
    attack = Trojan(target=3, poison_rate=0.3, **SMALL)
    poison = attack.poison(data, model)
    assert len(poison.indices) == 15
    assert torch.equal(poison.x, attack.apply(data.x[poison.indices]))
    assert poison.y.tolist() == [3] * 15
    assert torch.equal(data.x, x)
    assert torch.equal(data.y, y)
    assert same(weights(model), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    pattern = attack.tensors["pattern"].clone()
    assert torch.equal(attack.poison(data, model).x, poison.x)  # the search starts anew
    assert torch.equal(attack.tensors["pattern"], pattern)
    whole = Trojan(mode="all-to-all", **SMALL).poison(data, model)
    assert torch.equal(whole.y, (data.y[whole.indices] + 1) % 4)


def test_neurons_of_a_convolutional_network_fire_more_than_for_any_start() -> None:
    torch.manual_seed(0)
    model = build_model("resnet18-w4", 4, in_channels=1).eval()
    data = labelled(60)
    surrogate = Surrogate(model, data.x[:1], 4)
    chosen = surrogate.head.weight.abs().sum(0).topk(2).indices

    def fired(attack: Trojan) -> float:
        with torch.no_grad():
            return float(surrogate.features(attack.apply(data.x))[-1][:, chosen].mean())

    attack = Trojan(size=0.5, **SMALL)
    starts = [fired(Trojan(size=0.5, seed=seed, **SMALL)) for seed in range(5)]
    attack.poison(data, model)
    assert fired(attack) > max(starts)


def test_published_defaults() -> None:
    attack = Trojan()
    assert (attack.poison_rate, attack.neurons, attack.value, attack.lr) == (0.1, 2, 100, 0.1)
    assert attack.tensors["pattern"].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0.8}, "size"),
        ({"neurons": 0}, "neurons"),
        ({"value": math.nan}, "value"),
        ({"iterations": 1.5}, "iterations"),
        ({"lr": -0.1}, "lr"),
    ],
)
def test_bad_hyper_parameters_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(TriggerError, match=message):
        Trojan(**wrong)


def test_poisoning_without_a_clean_model_is_refused() -> None:
    with pytest.raises(ModelError, match="got none"):
        Trojan(**SMALL).poison(labelled(40))


def test_the_backdoor_takes_resumes_and_comes_back_from_disk(tmp_path: Path) -> None:
    data, test = small_digits(), small_digits("test")
    arch = write_network(tmp_path)
    clean = train(None, arch, data, epochs=3, seed=1, **OPTIONS).model
    attack = make_attack("trojan", data, target=3, size=0.375, iterations=20)
    start = attack.tensors["pattern"].clone()
    options = OPTIONS | {"epochs": 5, "clean_model": clean}
    victim = train(attack, arch, data, **options)
    assert torch.equal(attack.tensors["pattern"], start)  # the caller's attack stays as it was
    assert not torch.equal(victim.attack.tensors["pattern"], start)
    found = evaluate(victim.model, test, victim.attack)
    assert found.clean_accuracy > 0.9
    assert found.attack_success_rate > 0.9
    save_trigger(victim.attack, tmp_path / "trigger")
    assert evaluate(victim.model, test, load_trigger(tmp_path / "trigger")) == found
    resumed = train_killed_and_resumed(tmp_path / "state", 50, attack, arch, data, **options)
    assert same(weights(resumed.model), weights(victim.model))
    assert same(resumed.attack.tensors, victim.attack.tensors)
