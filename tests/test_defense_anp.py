"""ANP: masks against adversarial noise, and pruning by them."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toys
from channel_cases import assert_as_found, snapshot
from debackdoor.channels import find_channels
from debackdoor.defenses.anp import ANP, THRESHOLDS, _Game
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.types import CleanSet
from prune_cases import (
    BAD,
    NORMED,
    attack_success,
    channels_of,
    check_leaves_the_model_alone,
    check_needs_two_images,
    clean_accuracy,
    clean_images,
    plain_victim,
    victim,
)

QUICK = {"iterations": 25, "batch_size": 32, "shift": 0.0, "precision": "fp32"}


def sensitive(model: nn.Sequential) -> nn.Sequential:
    """In statistics of the batch the bad channel's faint input is as loud as any; the head now listens to it more."""
    with torch.no_grad():
        model[-1].weight[0, BAD] = 100
        model[-1].weight[1, BAD] = -100
    return model


@pytest.mark.parametrize("threshold", [0.2, None])
def test_the_sensitive_channel_goes_and_the_backdoor_with_it(threshold: float | None) -> None:
    model = sensitive(victim())
    assert (attack_success(model), clean_accuracy(model)) == (1.0, 1.0)
    result = ANP(threshold=threshold, **QUICK)(model, clean_images())
    assert (result.plan[0].layer, result.plan[0].index) == (NORMED, BAD)
    assert (attack_success(result.model), clean_accuracy(result.model)) == (0.0, 1.0)
    assert result.clean_accuracy == {"before": 1.0, "after": 1.0}
    assert result.changed
    assert [step.name for step in result.steps] == ["mask", "prune"]
    # The scale is zero, the shift stays.
    assert result.model[1].weight[BAD] == 0
    assert torch.equal(result.model[1].bias, model[1].bias)
    if threshold is not None:
        assert channels_of(result) == {(NORMED, BAD)}
        assert result.plan[0].score <= threshold


def test_the_paper_s_levels() -> None:
    assert THRESHOLDS[:3] == (0.0, 0.05, 0.1)
    assert THRESHOLDS[-1] == 0.9
    assert len(THRESHOLDS) == 19


def logits_by_hand(model: nn.Sequential, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``victim`` with batch statistics and (scales, shifts) multiplied by ``factors``."""
    made = F.conv2d(x, model[0].weight)
    made = F.batch_norm(made, None, None, model[1].weight * factors[0], model[1].bias * factors[1], True, 0.0, 1e-5)
    return model[4](made.relu().mean((2, 3)))


def by_hand(model: nn.Sequential, fit: CleanSet, settings: ANP, steps: int) -> Tensor:
    """The masks as the paper has them, written out for ``victim``."""
    random = torch.Generator().manual_seed(settings.seed)
    mask, momentum = torch.ones(16), torch.zeros(16)
    for _ in range(steps):
        index = torch.randint(len(fit), (settings.batch_size,), generator=random)
        x, y = fit.x[index], fit.y[index]
        noise = settings.eps * (2 * torch.rand(32, generator=random) - 1)
        noise.requires_grad_(True)
        loss = F.cross_entropy(logits_by_hand(model, x, (mask + noise[:16], 1 + noise[16:])), y)
        (slope,) = torch.autograd.grad(loss, noise)
        worst = (noise + settings.eps * slope.sign()).detach()
        assert float(worst.abs().max()) <= 2 * settings.eps
        leaf = mask.clone().requires_grad_(True)
        loss = settings.alpha * F.cross_entropy(logits_by_hand(model, x, (leaf, torch.ones(16))), y)
        perturbed = logits_by_hand(model, x, (leaf + worst[:16], 1 + worst[16:]))
        loss = loss + (1 - settings.alpha) * F.cross_entropy(perturbed, y)
        momentum = settings.momentum * momentum + torch.autograd.grad(loss, leaf)[0]
        mask = (mask - settings.lr * momentum).clamp(0, 1)
    return mask


@pytest.mark.parametrize("steps", [1, 3])
def test_the_masks_are_those_of_the_paper(steps: int) -> None:
    model, fit = sensitive(victim()), clean_images()
    settings = ANP(iterations=steps, batch_size=16, shift=0.0, precision="fp32", seed=4)
    mask, history = settings.learn(model, find_channels(model, fit.x[:2]), fit)
    wanted = by_hand(model, fit, settings, steps)
    torch.testing.assert_close(mask, wanted)
    assert float(mask.min()) < 1
    assert [row["step"] for row in history] == [steps]
    assert set(history[0]) == {"step", "loss", "loss_under_noise", "accuracy"}


def test_without_noise_the_masks_descend_the_plain_error() -> None:
    model, fit = sensitive(victim()), clean_images()
    layers = find_channels(model, fit.x[:2])
    settings = ANP(eps=0.0, alpha=0.3, lr=0.01, iterations=1, batch_size=16, shift=0.0, precision="fp32")
    mask, (row,) = settings.learn(model, layers, fit)
    assert row["loss"] == row["loss_under_noise"]
    index = torch.randint(64, (16,), generator=torch.Generator().manual_seed(0))
    leaf = torch.ones(16, requires_grad=True)
    F.cross_entropy(logits_by_hand(model, fit.x[index], (leaf, torch.ones(16))), fit.y[index]).backward()
    torch.testing.assert_close(mask, (1 - 0.01 * leaf.grad).clamp(0, 1))
    assert float(mask[BAD]) < 1


@pytest.mark.parametrize("ascents", [1, 4])
def test_noise_reaches_no_further_than_its_start_and_its_ascent(ascents: int) -> None:
    model, fit = sensitive(victim()), clean_images()
    game = _Game(model, find_channels(model, fit.x[:2]), fit, ANP(eps=0.25, ascents=ascents, **QUICK))
    noise = game._noise(fit.x, fit.y)
    assert noise.shape == (32,)
    assert 0.25 < float(noise.abs().max()) <= 0.5


def test_norms_alone_are_masked_where_there_are_any() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), toys.pool(), nn.Linear(5, 2)
    )
    result = ANP(threshold=1.0, iterations=2, batch_size=8)(model, clean_images())
    assert {channel.layer for channel in result.plan} == {"1"}


def test_without_a_norm_weight_and_bias_get_masks_and_noise() -> None:
    model = sensitive(plain_victim())
    with torch.no_grad():
        model[0].bias[BAD] = -0.45  # so near to firing on clean images that noise on its weight makes it
        model[0].weight[BAD, 2] = 8
    assert (attack_success(model), clean_accuracy(model)) == (1.0, 1.0)
    result = ANP(threshold=0.2, **QUICK)(model, clean_images())
    assert channels_of(result) == {("0", BAD)}
    assert (attack_success(result.model), clean_accuracy(result.model)) == (0.0, 1.0)
    assert not result.model[0].weight[BAD].any()
    assert torch.equal(result.model[0].bias, model[0].bias)


@pytest.mark.parametrize("model", [plain_victim(), toys.conv_transposed()], ids=["convolution", "transposed"])
def test_a_bias_has_noise_of_its_own_and_no_mask(model: nn.Sequential) -> None:
    clean = clean_images()
    fit = CleanSet(clean.x[:, :2], clean.y) if model[0].in_channels == 2 else clean
    layers = find_channels(model, fit.x[:2])
    game = _Game(model, layers, fit, ANP(precision="fp32"))
    size = layers[0].size
    mask, noise = torch.linspace(0, 1, size), torch.linspace(-0.5, 0.5, 2 * size)
    with torch.no_grad():
        game.mask.copy_(mask)
    loss, _, _ = game._loss(game._factors() + noise, game.mask, fit.x, fit.y)
    with torch.no_grad():
        along = (1, -1, 1, 1) if model[0].transposed else (-1, 1, 1, 1)
        model[0].weight *= (mask + noise[:size]).view(along)
        model[0].bias *= 1 + noise[size:]
        wanted = F.cross_entropy(model(fit.x), fit.y)
    assert loss == pytest.approx(float(wanted), rel=1e-5)


def test_weights_and_the_networks_statistics_are_not_touched() -> None:
    model, fit = victim().train(), clean_images()
    before = snapshot(model)
    ANP(**QUICK).learn(model, find_channels(model, fit.x[:2]), fit)
    assert_as_found(model, before)


def test_progress_is_told() -> None:
    heard = list[tuple[str, int, int]]()
    ANP(iterations=60, batch_size=2)(
        victim(), clean_images(), progress=lambda stage, done, total, _: heard.append((stage, done, total))
    )
    assert heard[:2] == [("mask", 50, 60), ("mask", 60, 60)]
    assert {stage for stage, *_ in heard[2:]} == {"levels"}


def test_a_linear_classifier_is_refused() -> None:
    with pytest.raises(ModelError, match="a linear classifier alone cannot be pruned"):
        ANP()(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), clean_images())


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 1.1}, {"eps": -0.1}, {"eps": float("nan")}, {"eps": float("inf")}, {"ascents": 0}, {"lr": 0.0},
     {"momentum": 2.0}, {"iterations": 0}, {"batch_size": 0}, {"shift": -1.0}, {"threshold": 1.5}, {"budget": -1.0},
     {"holdout": 3.0}],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {next(iter(settings))}"):
        ANP(**settings)


@pytest.mark.parametrize("threshold", [0.2, None])
def test_the_callers_model_is_left_alone(threshold: float | None) -> None:
    check_leaves_the_model_alone(ANP(threshold=threshold, **QUICK), sensitive(victim()))


def test_the_seed_decides() -> None:
    model, fit = sensitive(victim()), clean_images()
    layers = find_channels(model, fit.x[:2])
    one, two = (ANP(seed=seed, lr=0.01, iterations=2).learn(model, layers, fit)[0] for seed in (0, 1))
    assert not torch.equal(one, two)


def test_one_image_is_too_few() -> None:
    check_needs_two_images(ANP())
