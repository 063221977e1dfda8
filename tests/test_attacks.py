"""Attacks: triggers with worked-out answers, label and rate rules, and hyper-parameters."""

import math

import pytest
import torch
from torch import Tensor

from debackdoor.attacks import ATTACKS, SIG, Attack, BadNets, Blend, WaNet, make_attack
from debackdoor.errors import DataError, TriggerError
from debackdoor.runtime import generator
from debackdoor.types import CleanSet

SMALL = {"image_shape": (1, 8, 8), "num_classes": 4}
ALL = list(ATTACKS.values())


def images(count: int, shape: tuple[int, ...] = (1, 8, 8), seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=generator(seed))


def labelled(count: int, classes: int = 4) -> CleanSet:
    return CleanSet(images(count), torch.arange(count) % classes)


def test_badnets_replaces_the_last_three_rows_and_columns() -> None:
    x = torch.full((2, 3, 4, 5), 0.5)
    out = BadNets(image_shape=(3, 4, 5)).apply(x)
    expected = torch.tensor(
        [[0.5, 0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0, 0, 1], [0.5, 0.5, 0, 1, 0], [0.5, 0.5, 1, 0, 1]]
    ).expand(2, 3, 4, 5)
    assert torch.equal(out, expected)


def test_badnets_on_cifar_sized_images_covers_29_to_31() -> None:
    changed = (BadNets().apply(torch.full((1, 3, 32, 32), 0.5)) != 0.5)[0, 0].nonzero()
    assert changed.min(0).values.tolist() == [29, 29]
    assert changed.max(0).values.tolist() == [31, 31]
    assert len(changed) == 9


def test_blend_mixes_a_fifth_of_the_fixed_image_in() -> None:
    attack = Blend(image_shape=(1, 1, 2))
    attack.tensors["image"] = torch.tensor([[[1.0, 0.0]]])
    out = attack.apply(torch.tensor([[[[0.5, 0.5]]], [[[1.0, 0.0]]]]))
    torch.testing.assert_close(out, torch.tensor([[[[0.6, 0.4]]], [[[1.0, 0.0]]]]))


def test_blend_image_is_clipped_noise_of_its_seed_and_never_quantised() -> None:
    image = Blend(seed=3).tensors["image"]
    assert torch.equal(image, Blend(seed=3).tensors["image"])
    assert not torch.equal(image, Blend(seed=4).tensors["image"])
    assert image.min() >= 0
    assert image.max() <= 1
    assert abs(float(image.mean()) - 0.5) < 0.02
    assert abs(float(image.std()) - 0.24) < 0.02
    levels = 255 * Blend(seed=3).apply(torch.zeros(1, 3, 32, 32))
    assert (levels - levels.round()).abs().max() > 0.4


def test_sig_adds_one_period_over_the_columns_and_clips() -> None:
    attack = SIG(image_shape=(1, 2, 4), cycles=1, amplitude=0.25)
    out = attack.apply(torch.tensor([[[[0.5, 0.5, 0.5, 0.5], [0.0, 0.9, 1.0, 0.1]]]]))
    torch.testing.assert_close(out, torch.tensor([[[[0.5, 0.75, 0.5, 0.25], [0.0, 1.0, 1.0, 0.0]]]]))


def test_sig_defaults_are_40_grey_levels_and_six_cycles() -> None:
    signal = SIG().tensors["signal"]
    assert float(signal[4]) == pytest.approx(40 / 255 * math.sin(2 * math.pi * 4 * 6 / 32))
    assert float(signal.max()) <= 40 / 255 + 1e-6
    assert int((signal.diff().sign().diff() != 0).sum()) == 11  # each cycle turns twice, the last one only once inside


def test_wanet_grid_follows_its_formula() -> None:
    # With as many control points as pixels, upsampling changes nothing and the grid can be written down.
    attack = WaNet(image_shape=(1, 8, 8), grid_size=8, strength=0.5, seed=5)
    shift = torch.rand(1, 2, 8, 8, generator=generator(5)) * 2 - 1
    shift = shift / shift.abs().mean()
    for row, column in ((3, 4), (6, 1)):
        x, y = attack.tensors["grid"][0, row, column].tolist()
        assert x == pytest.approx(-1 + 2 * column / 7 + 0.5 * float(shift[0, 0, row, column]) / 8, abs=1e-5)
        assert y == pytest.approx(-1 + 2 * row / 7 + 0.5 * float(shift[0, 1, row, column]) / 8, abs=1e-5)
    assert attack.tensors["grid"].abs().max() <= 1


def test_wanet_samples_where_the_grid_points() -> None:
    attack = WaNet(image_shape=(1, 3, 3))
    columns = torch.tensor([0.0, 1.0, 1.0]).expand(3, 3)  # each pixel takes its right neighbour's value
    rows = torch.tensor([-1.0, 0.0, 1.0])[:, None].expand(3, 3)
    attack.tensors["grid"] = torch.stack([columns, rows], dim=-1)[None]
    x = torch.arange(9.0).reshape(1, 1, 3, 3) / 10
    torch.testing.assert_close(attack.apply(x), torch.tensor([[[[0.1, 0.2, 0.2], [0.4, 0.5, 0.5], [0.7, 0.8, 0.8]]]]))


def test_wanet_is_smooth_small_and_fixed() -> None:
    attack = WaNet()
    ramp = (torch.arange(32.0) / 31).expand(1, 3, 32, 32)
    moved = (attack.apply(ramp) - ramp).abs() * 31  # in pixels
    assert 0.05 < float(moved.mean()) < 0.5
    assert torch.equal(attack.apply(ramp), WaNet().apply(ramp))


def test_wanet_batch_has_triggered_noisy_and_clean_parts() -> None:
    attack = WaNet(target=2, poison_rate=0.1, noise_rate=0.2, **SMALL)
    x = (torch.arange(8.0) / 7).expand(20, 1, 8, 8).clone()
    y = torch.arange(20) % 4
    before = x.clone(), y.clone()
    out, labels = attack.poison_batch(x, y, generator(0))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert torch.equal(out[:2], attack.apply(x[:2]))
    assert labels.tolist() == [2, 2, *y[2:].tolist()]
    assert torch.equal(out[6:], x[6:])
    noisy = out[2:6]
    assert not torch.equal(noisy[0], noisy[1])  # the same image, disturbed in two ways
    pixels = (noisy - attack.apply(x[2:6])).abs().max() * 7
    assert 0.1 < float(pixels) <= 0.5  # at most 1/8 of the half-width of 3.5 pixels
    again, _ = attack.poison_batch(x, y, generator(1))
    assert torch.equal(again[:2], out[:2])
    assert not torch.equal(again[2:6], noisy)


def test_wanet_leaves_the_stored_training_set_alone() -> None:
    assert len(WaNet(**SMALL).poison(labelled(40)).indices) == 0


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 20, 12)])
def test_apply_keeps_shape_range_dtype_and_the_callers_images(kind: type[Attack], shape: tuple[int, int, int]) -> None:
    x = images(6, shape)
    x[0], x[1] = 0.0, 1.0
    before = x.clone()
    out = kind(image_shape=shape).apply(x)
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert not torch.equal(out, x)
    # An image's trigger does not depend on its batch.
    assert torch.equal(kind(image_shape=shape).apply(x[2:3]), out[2:3])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, 1, 8, 9), torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 1, 8, 8).double()]
)
def test_apply_refuses_other_images(kind: type[Attack], wrong: Tensor) -> None:
    with pytest.raises(TriggerError, match=r"expected float32 images of shape \(N, 1, 8, 8\)"):
        kind(**SMALL).apply(wrong)


@pytest.mark.parametrize("kind", [BadNets, Blend])
def test_all_to_one_poisons_the_exact_share_of_all_samples(kind: type[Attack]) -> None:
    data = labelled(50)
    x, y = data.x.clone(), data.y.clone()
    attack = kind(target=3, poison_rate=0.3, **SMALL)
    poison = attack.poison(data)
    assert len(poison.indices) == len(poison.indices.unique()) == 15
    assert torch.equal(poison.x, attack.apply(data.x[poison.indices]))
    assert poison.y.tolist() == [3] * 15
    assert 3 in data.y[poison.indices]  # the target's own samples are among the candidates
    assert torch.equal(data.x, x)
    assert torch.equal(data.y, y)
    assert torch.equal(poison.indices, kind(target=3, poison_rate=0.3, **SMALL).poison(data).indices)
    other = kind(target=3, poison_rate=0.3, seed=1, **SMALL).poison(data)
    assert not torch.equal(poison.indices, other.indices)


@pytest.mark.parametrize(("rate", "count"), [(0.29, 29), (0.1, 10), (1.0, 100), (0.005, 0), (0.006, 1)])
def test_poison_count_is_rounded_not_cut(rate: float, count: int) -> None:
    attack = BadNets(poison_rate=rate, **SMALL)
    if count:
        assert len(attack.poison(labelled(100)).indices) == count
    else:
        with pytest.raises(DataError, match="at least one sample to poison"):
            attack.poison(labelled(100))


@pytest.mark.parametrize("kind", [BadNets, Blend, WaNet])
def test_all_to_all_moves_every_label_by_one(kind: type[Attack]) -> None:
    attack = kind(mode="all-to-all", **SMALL)
    assert attack.target_labels(torch.tensor([0, 1, 2, 3])).tolist() == [1, 2, 3, 0]


def test_all_to_all_poison_carries_the_next_label() -> None:
    data = labelled(40)
    poison = BadNets(mode="all-to-all", poison_rate=0.5, **SMALL).poison(data)
    assert torch.equal(poison.y, (data.y[poison.indices] + 1) % 4)


def test_sig_poisons_a_share_of_the_target_class_and_keeps_labels() -> None:
    data = CleanSet(images(70), torch.tensor([0] * 50 + [1] * 20))
    poison = SIG(target=1, poison_rate=0.4, **SMALL).poison(data)
    assert len(poison.indices) == 8
    assert int(poison.indices.min()) >= 50
    assert poison.y.tolist() == [1] * 8
    with pytest.raises(DataError, match="at least one sample"):
        SIG(target=3, **SMALL).poison(data)


def test_published_defaults() -> None:
    assert (BadNets().poison_rate, Blend().poison_rate, Blend().alpha) == (0.1, 0.1, 0.2)
    assert (SIG().amplitude, SIG().cycles) == (40 / 255, 6)
    warp = WaNet()
    assert (warp.grid_size, warp.strength, warp.poison_rate, warp.noise_rate) == (4, 0.5, 0.1, 0.2)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (BadNets, {"target": 10}, "target"),
        (BadNets, {"target": -1}, "target"),
        (BadNets, {"target": True}, "target"),
        (BadNets, {"poison_rate": 0.0}, "poison_rate"),
        (BadNets, {"poison_rate": 1.5}, "poison_rate"),
        (BadNets, {"poison_rate": math.nan}, "poison_rate"),
        (BadNets, {"poison_rate": "0.1"}, "poison_rate"),
        (BadNets, {"seed": -1}, "seed"),
        (BadNets, {"mode": "one-to-one"}, "all-to-one or all-to-all"),
        (BadNets, {"num_classes": 1}, "num_classes"),
        (BadNets, {"image_shape": (32, 32)}, "image_shape"),
        (BadNets, {"image_shape": (3, 0, 32)}, "image_shape"),
        (BadNets, {"image_shape": (3, 2, 32)}, "at least 3x3"),
        (Blend, {"alpha": 0.0}, "alpha"),
        (Blend, {"alpha": 1.1}, "alpha"),
        (SIG, {"mode": "all-to-all"}, "expected mode all-to-one for sig"),
        (SIG, {"amplitude": -0.1}, "amplitude"),
        (SIG, {"cycles": 0}, "cycles"),
        (SIG, {"cycles": 1.5}, "cycles"),
        (WaNet, {"grid_size": 1}, "grid_size"),
        (WaNet, {"strength": math.inf}, "strength"),
        (WaNet, {"noise_rate": 0.0}, "noise_rate"),
        (WaNet, {"poison_rate": 0.6, "noise_rate": 0.6}, "at most 1 together"),
    ],
)
def test_bad_hyper_parameters_are_refused_at_once(kind: type[Attack], wrong: dict, message: str) -> None:
    with pytest.raises(TriggerError, match=message):
        kind(**wrong)


def test_attacks_are_made_for_a_data_set() -> None:
    attack = make_attack("blend", CleanSet(images(9, (3, 6, 5)), torch.arange(9)), target=8, alpha=0.1)
    assert (type(attack), attack.image_shape, attack.num_classes) == (Blend, (3, 6, 5), 9)
    named = CleanSet(images(3), torch.zeros(3, dtype=torch.int64), ("a", "b", "c"))
    assert make_attack("badnets", named).num_classes == 3
    with pytest.raises(TriggerError, match=f"{', '.join(ATTACKS)}, got 'blnd'"):
        make_attack("blnd", named)
    with pytest.raises(TriggerError, match="got 'alpha'"):
        make_attack("badnets", named, alpha=0.1)
    with pytest.raises(TriggerError, match="got 'tensors'"):
        make_attack("badnets", named, tensors={})


def test_labels_and_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="labels below 4"):
        BadNets(**SMALL).poison(labelled(20, classes=5))
    with pytest.raises(TriggerError, match="use the images it was made for"):
        WaNet().poison(labelled(20))


def test_labels_that_are_no_numbers_from_zero_on_are_refused() -> None:
    """As many outputs would be a network of gigabytes."""
    data = CleanSet(torch.zeros(4, 3, 8, 8), torch.tensor([20231101, 20231102] * 2), source="dates")
    with pytest.raises(DataError, match=r"dates: expected labels numbered 0, 1, 2, .*, got 2 of them up to 20231102"):
        make_attack("badnets", data)
