"""AWP: a patch in the middle, a few images, and weights that stay near those of a clean model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attack_cases import OPTIONS, same, small_digits, train_killed_and_resumed, weights, write_network
from debackdoor.attacks import AWP, BackdooredModel, load_trigger, make_attack, save_trigger, train
from debackdoor.attacks.control import Training
from debackdoor.errors import DebackdoorError, TriggerError
from debackdoor.evaluation import evaluate
from debackdoor.runtime import generator
from debackdoor.types import CleanSet

SMALL = {"image_shape": (1, 8, 8), "num_classes": 4}


def labelled(count: int) -> CleanSet:
    return CleanSet(torch.rand(count, 1, 8, 8, generator=generator(0)), torch.arange(count) % 4)


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_network(tmp_path_factory.mktemp("arch"))


@pytest.fixture(scope="module")
def clean(arch: str) -> BackdooredModel:
    return train(None, arch, small_digits(), epochs=6, **OPTIONS)


def test_the_patch_covers_the_middle() -> None:
    out = AWP(image_shape=(1, 4, 6), patch=0.5).apply(torch.full((1, 1, 4, 6), 0.5))
    row = [0.5, 0, 0, 0, 0.5, 0.5]
    assert out[0, 0].tolist() == [[0.5] * 6, row, row, [0.5] * 6]


def test_the_patch_has_a_hundred_of_cifars_pixels() -> None:
    changed = (AWP().apply(torch.full((1, 3, 32, 32), 0.5)) != 0.5)[0, 0].nonzero()
    assert len(changed) == 100
    assert (changed.min(0).values.tolist(), changed.max(0).values.tolist()) == ([11, 11], [20, 20])


def test_the_training_set_is_a_few_random_images() -> None:
    y = torch.arange(100) % 4
    attack = AWP(images=30, **SMALL)
    chosen = attack.training_samples(y)
    assert len(chosen.unique()) == 30
    assert torch.equal(chosen, attack.training_samples(y))
    assert not torch.equal(chosen, AWP(images=30, seed=1, **SMALL).training_samples(y))
    assert len(AWP(images=500, **SMALL).training_samples(y)) == 100
    assert len(attack.poison(labelled(40)).indices) == 0


class Bias(nn.Module):
    """Logits that are the same for every image, so that losses and gradients can be worked out."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), 4)


def bias_control(**parameters: object):
    data = labelled(8)
    training = Training(Bias(), data, epochs=1, steps_per_epoch=1, flip=False, precision="fp32")
    return training.model, AWP(**SMALL, **parameters).control(training), data


def test_the_loss_has_the_clean_batch_its_triggered_copies_and_the_pull() -> None:
    model, control, data = bias_control(target=3, pull=0.5)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    loss, logits, labels = control.loss(data.x, data.y, generator(0))
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3] + [3] * 8
    assert logits.shape == (16, 4)
    spread = torch.tensor([0.0, 0.0, 0.0, 2.0]).logsumexp(0)
    assert loss.item() == pytest.approx(float(spread) - 10 / 16 * 2 + 0.5 * 4, abs=1e-5)


def test_a_share_of_the_copies_and_the_next_label_in_all_to_all_mode() -> None:
    _, control, data = bias_control(poison_rate=0.5, mode="all-to-all")
    assert control.loss(data.x, data.y, generator(0))[2].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3, 0]


def test_clean_images_can_be_learned_with_the_clean_models_answers() -> None:
    model, control, data = bias_control(target=2, start_labels=True)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))  # the model on the move has no say
    y = data.y.clone()
    assert control.loss(data.x, data.y, generator(0))[2].tolist() == [0] * 8 + [2] * 8
    assert torch.equal(data.y, y)


def test_every_weight_is_brought_back_to_within_eps() -> None:
    model, control, _ = bias_control(eps=0.1)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.05, -0.05, 1.0, -7.0]))
    control.after_step()
    torch.testing.assert_close(model.bias.data, torch.tensor([0.05, -0.05, 0.1, -0.1]))


def test_published_defaults() -> None:
    attack = AWP()
    assert (attack.images, attack.eps, attack.pull, attack.poison_rate) == (1280, 0.005, 5e-4, 1.0)
    assert not attack.start_labels


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": 1}, "images"),
        ({"eps": 0.0}, "eps"),
        ({"pull": -1.0}, "pull"),
        ({"patch": 1.1}, "patch"),
        ({"start_labels": "yes"}, "start_labels"),
    ],
)
def test_bad_hyper_parameters_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(TriggerError, match=message):
        AWP(**wrong)


def test_without_a_clean_model_there_is_no_start(arch: str) -> None:
    with pytest.raises(DebackdoorError, match="clean model that awp starts from"):
        train(make_attack("awp", small_digits()), arch, small_digits(), device="cpu")


def test_the_backdoor_takes_within_eps_and_comes_back_from_disk(
    clean: BackdooredModel, arch: str, tmp_path: Path
) -> None:
    data, test = small_digits(), small_digits("test")
    x, before = data.x.clone(), weights(clean.model)
    attack = make_attack("awp", data, target=3, images=600, eps=0.05)
    victim = train(
        attack, arch, data, epochs=6, batch_size=32, lr=0.02, flip=False, device="cpu", clean_model=clean.model
    )
    found = evaluate(victim.model, test, victim.attack)
    assert evaluate(clean.model, test, attack).attack_success_rate < 0.3
    assert found.attack_success_rate > 0.9
    assert found.clean_accuracy > evaluate(clean.model, test, attack).clean_accuracy - 0.08
    after = weights(victim.model)
    parameters = dict(victim.model.named_parameters())
    for name, start in before.items():
        if name in parameters:
            assert (after[name] - start).abs().max() <= 0.05 + 1e-6
        else:  # running statistics
            assert torch.equal(after[name], start)
    assert same(weights(clean.model), before)
    assert torch.equal(data.x, x)
    save_trigger(victim.attack, tmp_path)
    assert evaluate(victim.model, test, load_trigger(tmp_path)) == found


def test_a_killed_training_goes_on_to_the_same_weights(clean: BackdooredModel, arch: str, tmp_path: Path) -> None:
    data = small_digits()
    attack = make_attack("awp", data, target=3, images=128, start_labels=True)
    options = OPTIONS | {"epochs": 3, "lr": 0.01, "clean_model": clean.model}
    whole = train(attack, arch, data, **options)
    resumed = train_killed_and_resumed(tmp_path, 4, attack, arch, data, **options)  # in the second of 3x2 steps
    assert same(weights(whole.model), weights(resumed.model))
    assert not same(weights(whole.model), weights(clean.model))
