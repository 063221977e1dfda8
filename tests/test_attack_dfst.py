"""DFST: colours of a sunset, compromised neurons, and an injector that imitates the trigger."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attack_cases import OPTIONS, same, small_digits, train_killed_and_resumed, weights, write_network
from debackdoor.attacks import DFST, load_trigger, make_attack, save_trigger, train
from debackdoor.attacks.control import Training
from debackdoor.attacks.dfst import _structural_similarity, _surroundings
from debackdoor.errors import ModelError, TriggerError
from debackdoor.evaluation import evaluate
from debackdoor.runtime import generator
from debackdoor.types import CleanSet

SMALL = {"image_shape": (1, 8, 8), "num_classes": 4}


def images(count: int, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    return torch.rand(count, *shape, generator=generator(0))


def test_every_channel_gets_the_sunsets_mean_and_spread_and_its_colours_from_top_to_bottom() -> None:
    attack = DFST(image_shape=(1, 2, 2), alpha=0.5)
    attack.tensors.update(
        mean=torch.full((1, 1, 1), 0.5), std=torch.full((1, 1, 1), 0.1), gradient=torch.tensor([[[0.2], [-0.2]]])
    )
    # Mean 0.5 and spread 0.3: one spread above and below the mean.
    out = attack.apply(torch.tensor([[[[0.8, 0.2], [0.8, 0.2]]]]))
    style = torch.tensor([[0.5 + 0.1 + 0.2, 0.5 - 0.1 + 0.2], [0.5 + 0.1 - 0.2, 0.5 - 0.1 - 0.2]])
    torch.testing.assert_close(out[0, 0], 0.5 * torch.tensor([[0.8, 0.2], [0.8, 0.2]]) + 0.5 * style)


def test_the_style_is_that_of_the_seeds_sunset_whatever_the_image() -> None:
    attack = DFST(alpha=1.0, seed=2)
    attack.tensors["gradient"].zero_()
    attack.tensors["std"].mul_(0.2)  # nothing is clipped
    out = attack.apply(images(4, (3, 32, 32)) * torch.tensor([1.0, 0.5, 0.2, 0.9]).view(4, 1, 1, 1))
    mean, std = attack.tensors["mean"], attack.tensors["std"]
    torch.testing.assert_close(out.mean((2, 3), keepdim=True), mean.expand(4, 3, 1, 1))
    torch.testing.assert_close(out.std((2, 3), keepdim=True, correction=0), std.expand(4, 3, 1, 1))
    assert not torch.equal(DFST(seed=3).tensors["mean"], mean)


def test_the_noise_of_even_images_is_not_blown_up() -> None:
    attack = DFST(alpha=1.0)
    even = torch.full((1, 3, 32, 32), 0.5)
    noisy = even + 0.001 * torch.randn(1, 3, 32, 32, generator=generator(0))
    assert (attack.apply(noisy) - attack.apply(even)).abs().max() < 0.1
    torch.testing.assert_close(attack.apply(even)[0, :, :, :1], attack.tensors["mean"] + attack.tensors["gradient"])


def test_the_trigger_does_not_depend_on_how_the_batch_lies_in_memory() -> None:
    attack, x = DFST(), images(9, (3, 32, 32))
    whole = attack.apply(x)
    assert torch.equal(attack.apply(x.contiguous(memory_format=torch.channels_last)), whole)
    assert torch.equal(torch.cat([attack.apply(x[:2]), attack.apply(x[2:])]), whole)


def test_surroundings_are_the_pixel_and_the_largest_smallest_and_mean_around_it() -> None:
    x = torch.full((1, 1, 1, 13), 0.5)
    x[..., 0], x[..., 12] = 0.1, 0.8
    out = _surroundings(x)[0, :, 0]
    assert out[0].tolist() == x.flatten().tolist()
    torch.testing.assert_close(out[1], torch.tensor([0.5] * 7 + [0.8] * 6))  # 12 is within 5 pixels from 7 on
    torch.testing.assert_close(out[2], torch.tensor([0.1] * 6 + [0.5] * 7))
    assert float(out[3, 6]) == pytest.approx(0.5)
    assert float(out[3, 0]) == pytest.approx((0.1 + 5 * 0.5) / 6)  # the border is no pixel


def test_structural_similarity_is_1_for_the_same_image_and_less_for_others() -> None:
    x = images(2)
    assert float(_structural_similarity(x, x)) == pytest.approx(1, abs=1e-4)
    assert float(_structural_similarity(x, 1 - x)) < 0
    # Even images have no structure: only the brightness term is left, (2ab + c) / (a^2 + b^2 + c).
    dark, bright = torch.full((1, 1, 8, 8), 0.2), torch.full((1, 1, 8, 8), 0.6)
    assert float(_structural_similarity(dark, bright)) == pytest.approx(0.2401 / 0.4001, abs=1e-3)


class Brightness(nn.Module):
    """Two features, the mean pixel and its negative; the first makes label 1, the second label 0."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.0, 10.0], [10.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return self.head(torch.stack([mean, 1 - mean], dim=1))


def bright_control(data: CleanSet, **parameters: object):
    """DFST with a plain white trigger against a classifier of bright (1) and dark (0) images."""
    attack = DFST(target=1, image_shape=(1, 8, 8), num_classes=2, **parameters)
    attack.tensors.update(mean=torch.ones(1, 1, 1), std=torch.zeros(1, 1, 1), gradient=torch.zeros(1, 8, 1))
    training = Training(Brightness(), data, epochs=3, steps_per_epoch=1, flip=False, precision="fp32")
    return attack, training.model, attack.control(training)


def test_the_injector_fires_the_compromised_neuron_and_makes_the_target() -> None:
    data = CleanSet(images(40) * 0.3, torch.zeros(40, dtype=torch.int64))
    attack, model, control = bright_control(data, detox_share=1.0, detox_passes=60)
    neurons, level = control._compromised((data.x,))
    assert neurons.tolist() == [0]  # the trigger raises brightness, and lowers darkness
    torch.testing.assert_close(level, attack.apply(data.x).mean()[None])
    before = weights(model)
    with torch.no_grad():
        untrained = control._inject(data.x, _surroundings(data.x))
    torch.testing.assert_close(untrained, data.x)
    control.begin_epoch(1, generator(0))
    with torch.no_grad():
        injected = control._inject(data.x, _surroundings(data.x))
        assert (model(data.x).argmax(1) == 0).all()
        assert (model(injected).argmax(1) == 1).float().mean() > 0.9
    assert same(weights(model), before)
    assert all(weight.grad is None for weight in model.parameters())
    assert model.training


def test_the_neurons_are_those_before_the_logits_whatever_was_registered_last() -> None:
    class Squeezed(Brightness):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze, self.aside = nn.Linear(2, 1), nn.Linear(5, 2)  # the latter is never called

        def forward(self, x: Tensor) -> Tensor:
            self.squeeze(x.mean((1, 2, 3))[:, None].expand(-1, 2))
            return super().forward(x)

    data = CleanSet(images(40) * 0.3, torch.zeros(40, dtype=torch.int64))
    attack = DFST(target=1, image_shape=(1, 8, 8), num_classes=2)
    training = Training(Squeezed(), data, epochs=3, steps_per_epoch=1, flip=False, precision="fp32")
    features, logits = attack.control(training)._answers(data.x)
    assert (features.shape, logits.shape) == ((40, 2), (40, 2))
    torch.testing.assert_close(features[:, 0], data.x.mean((1, 2, 3)))


def test_batches_are_triggered_detoxified_and_clean() -> None:
    data = CleanSet(images(40) * 0.3, torch.zeros(40, dtype=torch.int64))
    attack, _, control = bright_control(data, poison_rate=0.1, detox_rate=0.2)
    seen: list[Tensor] = []
    control.training.__dict__["logits"] = lambda x: seen.append(x) or torch.zeros(len(x), 2)
    control.training.__dict__["augment"] = lambda x, random: x
    control._injector.bias.data.fill_(0.5)
    for epoch, detoxified in ((0, 0), (1, 8)):
        control._trained = epoch > 0
        _, _, labels = control.loss(data.x, data.y, generator(0))
        assert labels.tolist() == [1] * 4 + [0] * 36
        assert torch.equal(seen[-1][:4], attack.apply(data.x[:4]))
        end = 4 + detoxified
        torch.testing.assert_close(seen[-1][4:end], data.x[4:end] + 0.6 * 0.5)
        assert torch.equal(seen[-1][end:], data.x[end:])


def test_the_target_class_takes_no_part_in_the_search() -> None:
    data = CleanSet(torch.cat([images(20) * 0.3, torch.ones(20, 1, 8, 8)]), torch.arange(40) // 20)
    _, _, control = bright_control(data, detox_share=1.0, detox_passes=1)
    asked: list[Tensor] = []
    control._train_injector = asked.extend
    control.begin_epoch(0, generator(0))
    assert not asked
    control.begin_epoch(1, generator(0))
    assert len(torch.cat(asked)) == 20
    assert torch.cat(asked).max() <= 0.3


def test_published_defaults() -> None:
    attack = DFST()
    assert (attack.poison_rate, attack.detox_rate, attack.alpha) == (0.05, 0.05, 0.6)
    assert (attack.detox_share, attack.detox_passes) == (0.03, 10)
    assert (attack.fire_weight, attack.similarity_weight) == (0.3, 0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "all-to-all"}, "expected mode all-to-one for dfst"),
        ({"alpha": 0.0}, "alpha"),
        ({"detox_rate": 2.0}, "detox_rate"),
        ({"poison_rate": 0.6, "detox_rate": 0.6}, "at most 1 together"),
        ({"detox_share": 0.0}, "detox_share"),
        ({"detox_passes": 0}, "detox_passes"),
        ({"neuron_share": 1.5}, "neuron_share"),
        ({"fire_weight": -0.3}, "fire_weight"),
        ({"similarity_weight": "1"}, "similarity_weight"),
    ],
)
def test_bad_hyper_parameters_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(TriggerError, match=message):
        DFST(**wrong)


def test_a_network_without_a_linear_layer_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    training = Training(network, CleanSet(images(4), torch.arange(4)), 1, 1, False, "fp32")
    with pytest.raises(ModelError, match="ends in a linear layer"):
        DFST(**SMALL).control(training)


def test_the_backdoor_takes_and_comes_back_from_disk(tmp_path: Path) -> None:
    data, test = small_digits(), small_digits("test")
    x, y = data.x.clone(), data.y.clone()
    attack = make_attack("dfst", data, target=3, poison_rate=0.1)
    trigger = weights_of_trigger(attack)
    victim = train(attack, write_network(tmp_path), data, epochs=5, **OPTIONS)
    found = evaluate(victim.model, test, victim.attack)
    assert found.clean_accuracy > 0.9
    assert found.attack_success_rate > 0.9
    assert same(weights_of_trigger(victim.attack), trigger)  # it is fixed from the seed
    assert torch.equal(data.x, x)
    assert torch.equal(data.y, y)
    save_trigger(victim.attack, tmp_path / "trigger")
    assert evaluate(victim.model, test, load_trigger(tmp_path / "trigger")) == found


def weights_of_trigger(attack: DFST) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in attack.tensors.items()}


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    data = small_digits().subset(torch.arange(200))
    attack, arch = make_attack("dfst", data, target=3, detox_share=0.2), write_network(tmp_path)
    options = OPTIONS | {"epochs": 4}
    whole = train(attack, arch, data, **options)
    resumed = train_killed_and_resumed(tmp_path, 10, attack, arch, data, **options)  # in the third of 4x4 steps
    assert same(weights(whole.model), weights(resumed.model))
