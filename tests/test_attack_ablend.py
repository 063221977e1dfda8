"""A-Blend: pieces of a picture in training, the whole picture in tests, and covers with their true labels."""

import math
from pathlib import Path

import pytest
import torch

from attack_cases import OPTIONS, small_digits, write_network
from debackdoor.attacks import AdaptiveBlend, load_trigger, make_attack, save_trigger, train
from debackdoor.attacks.pictures import colour_waves, sunset
from debackdoor.errors import DataError, TriggerError
from debackdoor.evaluation import evaluate
from debackdoor.runtime import generator
from debackdoor.types import CleanSet

SMALL = {"image_shape": (1, 8, 8), "num_classes": 4}


def labelled(count: int) -> CleanSet:
    return CleanSet(torch.rand(count, 1, 8, 8, generator=generator(0)), torch.arange(count) % 4)


def test_triggered_images_show_the_whole_picture() -> None:
    attack = AdaptiveBlend(image_shape=(1, 2, 2), grid_size=2, shown=1, alpha=0.2, train_alpha=0.1)
    attack.tensors["image"] = torch.tensor([[[1.0, 0.0], [0.5, 1.0]]])
    out = attack.apply(torch.tensor([[[[0.5, 0.5], [0.5, 1.0]]]]))
    torch.testing.assert_close(out, torch.tensor([[[[0.6, 0.4], [0.5, 1.0]]]]))


def test_training_images_show_half_of_the_pieces() -> None:
    data = CleanSet(torch.zeros(40, 1, 8, 8), torch.arange(40) % 4)
    attack = AdaptiveBlend(poison_rate=0.5, cover_rate=0.5, train_alpha=0.25, **SMALL)
    attack.tensors["image"] = torch.ones(1, 8, 8)
    poison = attack.poison(data)
    assert poison.x.unique().tolist() == [0.0, 0.25]
    pieces = poison.x.view(40, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3)  # image, row, column, the piece's pixels
    assert torch.equal(pieces.amin(3), pieces.amax(3))
    seen = pieces[..., 0] > 0
    assert seen.sum((1, 2)).tolist() == [8] * 40
    assert len(seen.flatten(1).unique(dim=0)) > 30
    assert 5 < int(seen.sum(0).min()) <= int(seen.sum(0).max()) < 35


def test_poison_and_covers_are_disjoint_and_only_poison_is_relabelled() -> None:
    data = labelled(100)
    x, y = data.x.clone(), data.y.clone()
    attack = AdaptiveBlend(target=3, poison_rate=0.2, cover_rate=0.3, **SMALL)
    poison = attack.poison(data)
    assert len(poison.indices) == len(poison.indices.unique()) == 50
    assert torch.equal(poison.indices, poison.indices.sort().values)
    relabelled = poison.y != data.y[poison.indices]
    assert poison.y[relabelled].unique().tolist() == [3]
    assert 12 <= int(relabelled.sum()) <= 20  # the target's own samples are among the 20
    covers = AdaptiveBlend(target=2, poison_rate=0.2, cover_rate=0.3, **SMALL).poison(data).y != poison.y
    assert int(covers.sum()) == 20  # the target decides the labels of the poisoned ones, and nothing else
    assert not torch.equal(poison.x, data.x[poison.indices])
    assert (poison.x - data.x[poison.indices]).abs().max() <= 0.15
    assert torch.equal(data.x, x)
    assert torch.equal(data.y, y)
    again = AdaptiveBlend(target=3, poison_rate=0.2, cover_rate=0.3, **SMALL).poison(data)
    assert torch.equal(again.x, poison.x)
    other = AdaptiveBlend(target=3, poison_rate=0.2, cover_rate=0.3, seed=1, **SMALL).poison(data)
    assert not torch.equal(other.indices, poison.indices)


def test_a_poisoned_image_is_its_own_original_with_pieces() -> None:
    data = labelled(60)
    attack = AdaptiveBlend(poison_rate=0.5, cover_rate=0.25, train_alpha=0.15, **SMALL)
    poison = attack.poison(data)
    whole = 0.85 * data.x[poison.indices] + 0.15 * attack.tensors["image"]
    shown = poison.x != data.x[poison.indices]
    torch.testing.assert_close(poison.x[shown], whole[shown])
    assert abs(float(shown.float().mean()) - 0.5) < 0.01


def test_rates_are_rounded_to_whole_samples() -> None:
    data = labelled(200)
    assert len(AdaptiveBlend(poison_rate=0.01, cover_rate=0.001, **SMALL).poison(data).indices) == 2 + 1
    with pytest.raises(DataError, match="at least one sample to poison"):
        AdaptiveBlend(poison_rate=0.001, **SMALL).poison(data)


def test_published_defaults() -> None:
    attack = AdaptiveBlend()
    assert (attack.poison_rate, attack.cover_rate, attack.grid_size, attack.shown) == (0.003, 0.003, 4, 8)
    assert (attack.alpha, attack.train_alpha) == (0.2, 0.15)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "all-to-all"}, "expected mode all-to-one for a-blend"),
        ({"alpha": 0.0}, "alpha"),
        ({"train_alpha": 1.5}, "train_alpha"),
        ({"cover_rate": 0}, "cover_rate"),
        ({"poison_rate": 0.7, "cover_rate": 0.4}, "at most 1 together"),
        ({"grid_size": 0}, "grid_size"),
        ({"shown": 17}, "from 1 to 16"),
        ({"shown": math.pi}, "shown"),
        ({"image_shape": (3, 3, 32)}, "at least 4x4"),
    ],
)
def test_bad_hyper_parameters_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(TriggerError, match=message):
        AdaptiveBlend(**wrong)


@pytest.mark.parametrize("make", [colour_waves, sunset])
def test_pictures_are_connected_colourful_and_drawn_from_their_seed(make) -> None:
    picture = make((3, 32, 32), 5)
    assert picture.shape == (3, 32, 32)
    assert picture.dtype == torch.float32
    assert 0 <= float(picture.min()) < 0.1
    assert 0.9 < float(picture.max()) <= 1
    assert torch.equal(picture, make((3, 32, 32), 5))
    assert not torch.equal(picture, make((3, 32, 32), 6))
    assert float(picture.diff(dim=1).abs().mean()) < 0.15  # independent pixels would differ by a third on average
    assert float(picture.diff(dim=2).abs().mean()) < 0.15
    assert float((picture[0] - picture[2]).abs().mean()) > 0.1
    assert make((1, 20, 12), 5).shape == (1, 20, 12)


def test_the_sun_sets_between_a_dark_sky_and_a_darker_sea() -> None:
    for seed in range(5):
        rows = sunset((3, 64, 64), seed).mean(2)
        assert rows[2, 0] > rows[0, 0]  # blue above
        brightest = int(rows.mean(0).argmax())
        assert 16 < brightest < 48
        assert rows[0, brightest] > rows[2, brightest] + 0.3  # orange at the horizon
        assert float(rows[:, -1].mean()) < 0.2


def test_the_backdoor_takes_and_comes_back_from_disk(tmp_path: Path) -> None:
    data, test = small_digits(), small_digits("test")
    attack = make_attack("a-blend", data, target=3, poison_rate=0.08, cover_rate=0.04, alpha=0.4, train_alpha=0.3)
    victim = train(attack, write_network(tmp_path), data, epochs=7, **OPTIONS)
    found = evaluate(victim.model, test, victim.attack)
    assert found.clean_accuracy > 0.9
    assert found.attack_success_rate > 0.8
    save_trigger(victim.attack, tmp_path / "trigger")
    assert evaluate(victim.model, test, load_trigger(tmp_path / "trigger")) == found
