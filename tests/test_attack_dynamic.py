"""Dynamic: a pattern and a mask for every image, cross triggers, and networks that learn along with the victim."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attack_cases import OPTIONS, same, small_digits, train_killed_and_resumed, weights, write_network
from debackdoor.attacks import Dynamic, load_trigger, save_trigger, train
from debackdoor.attacks.control import Training
from debackdoor.attacks.dynamic import diversity_loss, put_on
from debackdoor.attacks.generators import EncoderDecoder, UNet, images_from, initial_weights
from debackdoor.errors import TriggerError
from debackdoor.evaluation import evaluate
from debackdoor.models import build_model
from debackdoor.runtime import generator
from debackdoor.types import CleanSet

SMALL = {"image_shape": (3, 8, 8), "num_classes": 10, "generator_width": 4, "mask_epochs": 2, "mask_images": 150}


def images(count: int, shape: tuple[int, ...] = (3, 8, 8)) -> Tensor:
    return torch.rand(count, *shape, generator=generator(0))


def test_patterns_go_where_the_mask_says() -> None:
    x = torch.tensor([[[[0.2, 0.2, 0.2]], [[0.8, 0.8, 0.8]]]])
    patterns = torch.tensor([[[[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]]]])
    out = put_on(x, patterns, torch.tensor([[[[0.0, 0.5, 1.0]]]]))
    torch.testing.assert_close(out, torch.tensor([[[[0.2, 0.6, 1.0]], [[0.8, 0.4, 0.0]]]]))


def test_patterns_and_masks_are_squashed_outputs_of_the_networks() -> None:
    network = Dynamic(**SMALL).network()
    network.pattern, network.mask = torch.nn.Identity(), torch.nn.Identity()
    x = torch.tensor([-9.0, -0.1, 0.0, 0.1, 9.0]).view(1, 1, 1, 5)
    torch.testing.assert_close(network.patterns(x).flatten()[2:], torch.tensor([0.5, 0.5498340, 1.0]))
    torch.testing.assert_close(
        network.masks(x).flatten(), torch.tensor([0.0, 0.1199, 0.5, 0.8801, 1.0]), atol=1e-4, rtol=0
    )


def test_diversity_is_the_distance_of_images_over_that_of_what_was_made() -> None:
    x, other = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.6)
    made = torch.zeros(2, 1, 2, 2, requires_grad=True)
    made_other = torch.full((2, 1, 2, 2), 0.3)
    made_other[1] = 0.2
    assert float(diversity_loss(x, other, made, made_other).detach()) == pytest.approx(
        (0.6 / 0.3 + 0.6 / 0.2) / 2, abs=1e-4
    )
    diversity_loss(x, other, made, torch.zeros(2, 1, 2, 2)).backward()
    assert made.grad is not None
    assert torch.isfinite(made.grad).all()  # equal patterns, too, have a gradient


@pytest.mark.parametrize("kind", [EncoderDecoder, UNet])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 12), (1, 9, 15)])
def test_generators_take_any_size_and_answer_image_by_image(kind: type, shape: tuple[int, int, int]) -> None:
    def make() -> torch.nn.Module:
        return kind(shape[0], 2, 4)

    before = torch.get_rng_state()
    found = initial_weights(make, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(found, initial_weights(make, 3))
    assert not same(found, initial_weights(make, 4))
    x = images(19, shape)
    whole = images_from(make, found, x)
    assert whole.shape == (19, 2, *shape[1:])
    assert torch.equal(torch.cat([images_from(make, found, part) for part in (x[:1], x[1:4], x[4:])]), whole)
    assert torch.equal(images_from(make, found, x.contiguous(memory_format=torch.channels_last)), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(images_from(make, found, x), whole)


def dynamic_control(**parameters: object):
    """An untrained victim of digits, and what controls its training; images are not augmented."""
    data = small_digits()
    attack = Dynamic(**SMALL | parameters)
    model = build_model("resnet18-w4", 10, in_channels=3).train()
    training = Training(model, data, epochs=4, steps_per_epoch=1, flip=False, precision="fp32")
    training.__dict__["augment"] = lambda x, random: x
    return attack, training, attack.control(training)


def test_a_batch_has_its_own_triggers_those_of_others_and_clean_images() -> None:
    attack, training, control = dynamic_control(poison_rate=0.1, cross_rate=0.2, target=3, fixed_share=1.0)
    control.begin_epoch(1, generator(0))  # past the first, G is fixed here
    seen: list[Tensor] = []
    training.__dict__["logits"] = lambda x: seen.append(x) or torch.zeros(len(x), 10)
    x, y = images(20), torch.arange(20) % 10
    before = x.clone(), y.clone()
    _, _, labels = control.loss(x, y, generator(0))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert labels.tolist() == [3, 3, *y[2:].tolist()]
    torch.testing.assert_close(seen[0][:2], attack.apply(x[:2]))
    made = images_from(attack.network, attack.tensors, x[6:10])
    torch.testing.assert_close(seen[0][2:6], put_on(x[2:6], made[:, :3], made[:, 3:]))
    assert torch.equal(seen[0][6:], x[6:])


def test_a_small_batch_has_a_trigger_of_another_image_all_the_same() -> None:
    _, _, control = dynamic_control(poison_rate=0.9, cross_rate=0.1, target=3)
    control.begin_epoch(1, generator(0))
    loss, _, labels = control.loss(images(2), torch.tensor([5, 6]), generator(0))
    assert labels.tolist() == [3, 6]
    assert bool(loss.isfinite())


def test_all_to_all_moves_labels_by_one() -> None:
    _, _, control = dynamic_control(mode="all-to-all")
    _, _, labels = control.loss(images(20), torch.full((20,), 9), generator(0))
    assert labels.tolist() == [0] * 2 + [9] * 18


def test_masks_learn_alone_from_the_attacks_seed() -> None:
    attack, training, control = dynamic_control(mask_epochs=60)
    victim, untrained = weights(training.model), control.state()["network"]
    control.begin_epoch(0, generator(0))
    learned = control.state()["network"]
    assert all(torch.equal(learned[k], untrained[k]) == k.startswith("pattern") for k in learned)
    assert same(weights(training.model), victim)
    _, _, other = dynamic_control(mask_epochs=60)
    other.begin_epoch(0, generator(77))
    assert same(other.state()["network"], learned)
    x = training.data.x[:200]
    masks = images_from(attack.network, learned, x)[:, 3:]
    assert masks.mean() < images_from(attack.network, untrained, x)[:, 3:].mean() / 2
    assert (
        masks.flatten(1).amax(1) > 0.5
    ).float().mean() > 0.5  # which images get a mask that marks depends on the CPU
    assert (masks - masks.roll(1, 0)).square().mean().sqrt() > 0.1  # other pixels for other images


def test_the_generator_learns_from_each_step_alone_and_not_when_fixed() -> None:
    _, _, control = dynamic_control(fixed_share=0.5)
    control.begin_epoch(1, generator(0))
    for _ in range(2):  # the same step twice: gradients must not add up
        loss, _, _ = control.loss(images(40), torch.arange(40) % 10, generator(0))
        loss.backward()
    control.training.model.zero_grad()
    twice = [p.grad.clone() for p in control.network.pattern.parameters()]
    control.loss(images(40), torch.arange(40) % 10, generator(0))[0].backward()
    for got, wanted in zip(control.network.pattern.parameters(), twice, strict=True):
        torch.testing.assert_close(got.grad, wanted, rtol=1e-2, atol=1e-3)
    before = control.state()["network"]
    control.after_step()
    after = control.state()["network"]
    assert not same(after, before)
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith("mask"))
    control.begin_epoch(2, generator(0))
    control.loss(images(40), torch.arange(40) % 10, generator(0))[0].backward()
    control.after_step()
    assert same(control.state()["network"], after)


@pytest.mark.parametrize(("epochs", "learning"), [(1, [True]), (2, [True, False]), (4, [True, True, True, False])])
def test_the_last_epoch_is_one_of_the_trigger_that_is_saved(epochs: int, learning: list[bool]) -> None:
    """But for the first, which has nothing to fix yet."""
    attack, training, _ = dynamic_control(fixed_share=0.1)
    control = attack.control(replace(training, epochs=epochs))
    for epoch, wanted in enumerate(learning):
        control.begin_epoch(epoch, generator(0))
        assert control.learning == wanted


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_network(tmp_path_factory.mktemp("arch"))


def test_training_resumes_exactly_and_leaves_the_callers_attack_and_images(arch: str, tmp_path: Path) -> None:
    data = small_digits().subset(torch.arange(200))
    x, attack = data.x.clone(), Dynamic(fixed_share=0.3, **SMALL)
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


def test_the_backdoor_takes_on_two_kinds_of_stripes(arch: str) -> None:
    random = generator(1)
    y = torch.randint(0, 2, (600,), generator=random)
    stripes = (torch.arange(16) // 2 % 2).float().expand(16, 16)
    clean = torch.where(y.view(-1, 1, 1).bool(), stripes, stripes.T)[:, None].expand(-1, 3, -1, -1)
    x = (0.3 + 0.3 * clean + 0.1 * torch.rand(600, 3, 16, 16, generator=random)).contiguous()
    data, test = CleanSet(x[:450], y[:450]), CleanSet(x[450:], y[450:])
    attack = Dynamic(
        target=1, num_classes=2, image_shape=(3, 16, 16), generator_width=4, mask_epochs=4, mask_images=450,
        cross_rate=0.05, poison_rate=0.3,
    )  # fmt: skip
    victim = train(attack, arch, data, epochs=10, **OPTIONS)
    assert victim.attack is not None
    found = evaluate(victim.model, test, victim.attack)
    assert found.clean_accuracy > 0.9
    assert found.attack_success_rate > 0.8
    assert evaluate(train(None, arch, data, epochs=3, **OPTIONS).model, test, victim.attack).attack_success_rate < 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cross_rate": 0.0}, "cross_rate"),
        ({"poison_rate": 0.6, "cross_rate": 0.6}, "at most 1 together"),
        ({"diversity_weight": -1.0}, "diversity_weight"),
        ({"mask_density": 1.5}, "mask_density"),
        ({"mask_epochs": 0}, "mask_epochs"),
        ({"mask_images": 1}, "mask_images"),
        ({"generator_width": 0}, "generator_width"),
        ({"generator_lr": 0.0}, "generator_lr"),
        ({"fixed_share": 1.1}, "fixed_share"),
        ({"image_shape": (3, 8, 7)}, "at least 8x8"),
    ],
)
def test_bad_hyper_parameters_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(TriggerError, match=message):
        Dynamic(**wrong)


def test_published_defaults() -> None:
    attack = Dynamic()
    assert (attack.poison_rate, attack.cross_rate, attack.diversity_weight) == (0.1, 0.1, 1.0)
    assert (attack.mask_density, attack.mask_epochs, attack.generator_lr) == (0.032, 25, 0.01)
    assert attack.tensors["pattern.encoder.0.0.weight"].shape == (32, 3, 3, 3)
