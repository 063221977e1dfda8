"""LIRA: a bounded disturbance from a network that learns against the victim, and is fixed in the end."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from attack_cases import OPTIONS, same, small_digits, train_killed_and_resumed, weights, write_network
from debackdoor.attacks import LIRA, load_trigger, save_trigger, train
from debackdoor.attacks.control import Training
from debackdoor.errors import TriggerError
from debackdoor.evaluation import evaluate
from debackdoor.models import build_model
from debackdoor.runtime import generator

SMALL = {"image_shape": (3, 8, 8), "num_classes": 10, "generator_width": 4}


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=generator(0))


def test_the_disturbance_is_epsilon_times_tanh_and_clipped() -> None:
    attack = LIRA(epsilon=0.1, **SMALL)
    x = torch.tensor([0.5, 0.5, 0.5, 0.98, 0.02]).view(1, 1, 1, 5)
    made = torch.tensor([0.0, 1.0, -50.0, 50.0, -50.0]).view(1, 1, 1, 5)
    torch.testing.assert_close(attack.disturb(x, made).flatten(), torch.tensor([0.5, 0.5761594, 0.4, 1.0, 0.0]))


def test_no_pixel_moves_by_more_than_epsilon_and_none_is_rounded() -> None:
    x = images(20)
    moved = LIRA(epsilon=0.003, **SMALL).apply(x) - x
    assert 0 < float(moved.abs().max()) <= 0.003 + 1e-6  # under a grey level: rounding would undo it


def lira_control(**parameters: object):
    """An untrained victim of digits, and what controls its training; images are not augmented."""
    attack = LIRA(**SMALL | parameters)
    model = build_model("resnet18-w4", 10, in_channels=3).train()
    training = Training(model, small_digits(), epochs=4, steps_per_epoch=1, flip=False, precision="fp32")
    training.__dict__["augment"] = lambda x, random: x
    return attack, training, attack.control(training)


def test_a_share_of_the_batch_gets_twins_and_alpha_mixes_the_losses() -> None:
    attack, training, control = lira_control(poison_rate=0.3, target=3, alpha=0.25, fixed_share=1.0)
    control.begin_epoch(1, generator(0))  # past the first, G is fixed here
    seen: list[Tensor] = []

    def answers(x: Tensor) -> Tensor:
        seen.append(x)
        logits = torch.zeros(len(x), 10)
        logits[20:, 3] = 1.0  # clean images cost log 10, twins less
        return logits

    training.__dict__["logits"] = answers
    x, y = images(20), torch.arange(20) % 10
    before = x.clone()
    loss, _, labels = control.loss(x, y, generator(0))
    assert torch.equal(x, before)
    assert labels.tolist() == [*y.tolist(), *[3] * 6]
    assert torch.equal(seen[0][:20], x)
    torch.testing.assert_close(seen[0][20:], attack.apply(x[:6]))
    log10 = torch.tensor(10.0).log()
    twins = (torch.tensor(1.0).exp() + 9).log() - 1
    torch.testing.assert_close(loss, 0.25 * log10 + 0.75 * twins)


def test_all_to_all_twins_get_the_next_label() -> None:
    _, _, control = lira_control(mode="all-to-all", poison_rate=0.1)
    control.begin_epoch(0, generator(0))
    _, _, labels = control.loss(images(20), torch.full((20,), 9), generator(0))
    assert labels.tolist() == [9] * 20 + [0] * 2


def test_a_step_of_the_generator_changes_nothing_of_the_victim_and_makes_its_loss_smaller() -> None:
    _, training, control = lira_control(epsilon=0.5, generator_lr=0.01)
    control.begin_epoch(0, generator(0))
    training.model(images(64))  # running statistics of its own
    training.model.linear.weight.data.mul_(20)  # answers that depend on the image
    victim = weights(training.model)
    x, wanted = images(32), torch.full((32,), 3)

    def cost() -> float:
        training.model.eval()
        with torch.no_grad():
            logits = training.logits(control.attack.disturb(x, control.network(x)))
        training.model.train()
        return float(torch.nn.functional.cross_entropy(logits, wanted))

    before = cost()
    for _ in range(20):
        control._teach(x, wanted)
    assert same(weights(training.model), victim)
    assert training.model.training
    assert all(weight.grad is None for weight in training.model.parameters())
    assert cost() < before - 0.1


def test_twins_are_made_by_the_network_as_the_epoch_began_and_then_by_the_last_one() -> None:
    _, _, control = lira_control(fixed_share=0.5)
    x, y = images(40), torch.arange(40) % 10
    control.begin_epoch(0, generator(0))
    initial = weights(control._used)
    control.loss(x, y, generator(0))
    assert same(weights(control._used), initial)
    assert not same(weights(control.network), initial)
    learned = weights(control.network)
    control.begin_epoch(1, generator(0))
    assert same(weights(control._used), learned)
    control.begin_epoch(2, generator(0))
    fixed = control.state()["network"]
    control.loss(x, y, generator(0))
    assert same(control.state()["network"], fixed)
    control.finish()
    assert same(control.attack.tensors, fixed)


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_network(tmp_path_factory.mktemp("arch"))


def test_training_resumes_exactly_and_leaves_the_callers_attack_and_images(arch: str, tmp_path: Path) -> None:
    data = small_digits().subset(torch.arange(200))
    x, attack = data.x.clone(), LIRA(**SMALL)
    initial = {name: value.clone() for name, value in attack.tensors.items()}
    options = OPTIONS | {"epochs": 3}
    whole = train(attack, arch, data, **options)
    resumed = train_killed_and_resumed(tmp_path / "state", 6, attack, arch, data, **options)
    assert same(weights(whole.model), weights(resumed.model))
    assert whole.attack is not None
    assert resumed.attack is not None
    assert same(whole.attack.tensors, resumed.attack.tensors)
    assert same(attack.tensors, initial)
    assert not same(whole.attack.tensors, initial)
    assert torch.equal(data.x, x)
    save_trigger(whole.attack, tmp_path / "trigger")
    assert torch.equal(load_trigger(tmp_path / "trigger").apply(x), whole.attack.apply(x))


def test_the_backdoor_takes_on_digits(arch: str) -> None:
    data, test = small_digits(), small_digits("test")
    victim = train(LIRA(target=3, epsilon=0.1, **SMALL), arch, data, epochs=6, **OPTIONS)
    assert victim.attack is not None
    found = evaluate(victim.model, test, victim.attack)
    assert found.clean_accuracy > 0.85
    assert found.attack_success_rate > 0.9
    assert evaluate(train(None, arch, data, epochs=3, **OPTIONS).model, test, victim.attack).attack_success_rate < 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": 1.5}, "epsilon"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1}, "expected alpha below 1 for lira, got 1, with which no backdoor is learned"),
        ({"generator_width": 0}, "generator_width"),
        ({"generator_lr": -1.0}, "generator_lr"),
        ({"fixed_share": 0.0}, "fixed_share"),
        ({"image_shape": (3, 7, 8)}, "at least 8x8"),
    ],
)
def test_bad_hyper_parameters_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(TriggerError, match=message):
        LIRA(**wrong)
