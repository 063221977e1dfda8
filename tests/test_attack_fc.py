"""FC: target-class images whose features collide with those of patched images of other classes."""

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attack_cases import OPTIONS, same, small_digits, train_killed_and_resumed, weights, write_network
from debackdoor.attacks import FeatureCollision, load_trigger, make_attack, save_trigger, train
from debackdoor.attacks.surrogate import Surrogate
from debackdoor.errors import DataError, ModelError, TriggerError
from debackdoor.evaluation import evaluate
from debackdoor.types import CleanSet
from toys import pool, set_values

SMALL = {"image_shape": (1, 8, 8), "num_classes": 4}


def grey(*levels: float) -> CleanSet:
    """Ten even images of each level; the first level is of class 0, the next of class 1, and so on."""
    x = torch.tensor(levels).repeat_interleave(10).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()
    return CleanSet(x, torch.arange(len(levels)).repeat_interleave(10))


def mean_pixel() -> nn.Module:
    """Its features are the image and the mean pixel."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), pool(), nn.Linear(1, 4))
    set_values(model[0].weight, [1])
    return model.eval()


def test_the_trigger_is_a_black_and_white_patch() -> None:
    attack = FeatureCollision()
    pattern = attack.tensors["pattern"]
    assert pattern.shape == (3, 8, 8)
    assert pattern.unique().tolist() == [0, 1]
    assert 70 < int(pattern.sum()) < 122  # 96 of 192 by chance, give or take
    out = attack.apply(torch.full((2, 3, 32, 32), 0.5))
    assert torch.equal(out[1, :, 20:28, 20:28], pattern)
    assert int((out == 0.5).sum()) == 2 * 3 * (1024 - 64)
    assert not torch.equal(pattern, FeatureCollision(seed=1).tensors["pattern"])


def test_images_move_towards_the_other_class_around_a_watermark_of_the_patch() -> None:
    data, model = grey(0.5, 0.9), mean_pixel()
    x, y = data.x.clone(), data.y.clone()
    state = deepcopy(model.state_dict())
    attack = FeatureCollision(poison_rate=0.6, opacity=0.2, eps=0.1, step=0.04, iterations=8, **SMALL)
    poison = attack.poison(data, model)
    assert len(poison.indices) == 6
    assert int(poison.indices.max()) < 10
    assert poison.y.tolist() == [0] * 6
    expected = torch.full((1, 8, 8), 0.6)  # outside the patch towards the lighter class, up to eps
    expected[:, 5:7, 5:7] = 0.8 * 0.5 + 0.2 * attack.tensors["pattern"]
    torch.testing.assert_close(poison.x, expected.expand(6, 1, 8, 8))
    assert torch.equal(data.x, x)
    assert torch.equal(data.y, y)
    assert same(weights(model), state)
    assert torch.equal(attack.poison(data, model).x, poison.x)


def test_the_other_classes_take_turns() -> None:
    data = grey(0.9, 0.1, 0.5, 1.0)
    attack = FeatureCollision(target=2, poison_rate=0.7, eps=0.05, step=0.05, iterations=1, **SMALL)
    poison = attack.poison(data, mean_pixel())
    levels = poison.x[:, 0, 0, 0]
    assert levels.tolist() == pytest.approx([0.55, 0.45, 0.55, 0.55, 0.45, 0.55, 0.55])  # towards 0.9, 0.1, 1.0, ...


def test_goals_are_mean_features_of_patched_images() -> None:
    data = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 4)
    model = mean_pixel()
    attack = FeatureCollision(target=1, sources=10, **SMALL)
    surrogate = Surrogate(model, data.x[:1], 4)
    image, mean = attack._goals(data, surrogate)
    patched = attack.apply(data.x)
    for row, label in enumerate((0, 2, 3)):
        torch.testing.assert_close(image[row], patched[data.y == label].mean(0).flatten(), atol=2e-3, rtol=0)
        torch.testing.assert_close(mean[row, 0], patched[data.y == label].mean(), atol=2e-3, rtol=0)


def test_defaults() -> None:
    attack = FeatureCollision()
    assert (attack.eps, attack.size, attack.opacity) == (16 / 255, 0.25, 0.3)
    assert 0.5 <= attack.poison_rate <= 0.8
    assert attack.iterations * attack.step >= attack.eps  # any place in the ball can be reached


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "all-to-all"}, "expected mode all-to-one for fc"),
        ({"size": 0.0}, "size"),
        ({"eps": 1.5}, "eps"),
        ({"opacity": 0.0}, "opacity"),
        ({"step": math.nan}, "step"),
        ({"iterations": 0}, "iterations"),
        ({"sources": 0}, "sources"),
    ],
)
def test_bad_hyper_parameters_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(TriggerError, match=message):
        FeatureCollision(**wrong)


def test_poisoning_needs_a_clean_model_the_target_class_and_another_one() -> None:
    with pytest.raises(ModelError, match="got none"):
        FeatureCollision(**SMALL).poison(grey(0.5, 0.9))
    with pytest.raises(DataError, match="at least one sample"):
        FeatureCollision(target=3, **SMALL).poison(grey(0.5, 0.9), mean_pixel())
    with pytest.raises(DataError, match="classes other than 0"):
        FeatureCollision(**SMALL).poison(grey(0.5), mean_pixel())


def _distances(attack: FeatureCollision, data: CleanSet, clean: nn.Module, x: Tensor) -> list[float]:
    """Mean squared distance of each layer to the goals that the images of the poison have in turn."""
    surrogate = Surrogate(clean, data.x[:1], 10)
    goals = [layer[torch.arange(len(x)) % 9] for layer in attack._goals(data, surrogate)]
    with torch.no_grad():
        return [float((a - b).square().mean()) for a, b in zip(surrogate.features(x), goals, strict=True)]


def test_the_backdoor_takes_resumes_and_comes_back_from_disk(tmp_path: Path) -> None:
    data, test = small_digits(), small_digits("test")
    arch = write_network(tmp_path)
    clean = train(None, arch, data, epochs=4, seed=1, **OPTIONS).model
    attack = make_attack("fc", data, target=3, size=0.375, eps=0.2, step=0.04, sources=20)
    poison = attack.poison(data, clean)
    after, before = (_distances(attack, data, clean, x) for x in (poison.x, data.x[poison.indices]))
    assert after[-1] < 0.4 * before[-1]
    assert all(late < early for late, early in zip(after, before, strict=True))
    options = OPTIONS | {"epochs": 6, "clean_model": clean}
    victim = train(attack, arch, data, **options)
    found = evaluate(victim.model, test, victim.attack)
    without = evaluate(clean, test, attack)
    assert found.clean_accuracy > 0.88
    assert found.attack_success_rate > 0.6
    assert without.attack_success_rate < 0.2
    save_trigger(victim.attack, tmp_path / "trigger")
    assert evaluate(victim.model, test, load_trigger(tmp_path / "trigger")) == found
    resumed = train_killed_and_resumed(tmp_path / "state", 50, attack, arch, data, **options)
    assert same(weights(resumed.model), weights(victim.model))
