"""CLP: channels that can be driven far above the others of their layer go, found without data."""

import pytest
import torch
from torch import nn

import toys
from debackdoor.channels import find_channels
from debackdoor.defenses.clp import CLP, lipschitz
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.types import CleanSet
from prune_cases import (
    BAD,
    NORMED,
    attack_success,
    channels_of,
    check_leaves_the_model_alone,
    clean_accuracy,
    clean_images,
    plain_victim,
    victim,
)
from toys import set_values


@pytest.mark.parametrize("u", [3.0, None])
def test_the_backdoor_goes_and_nothing_else(u: float | None) -> None:
    """Fifteen channels of constant 1 and one of 10: the latter is 15 / sqrt(16) deviations above the mean."""
    model = victim()
    assert (attack_success(model), clean_accuracy(model)) == (1.0, 1.0)
    result = CLP(u=u, precision="fp32")(model, clean_images())
    assert channels_of(result) == {(NORMED, BAD)}
    assert result.plan[0].score == pytest.approx(-3.75)
    assert (attack_success(result.model), clean_accuracy(result.model)) == (0.0, 1.0)
    assert result.clean_accuracy == {"before": 1.0, "after": 1.0}
    assert result.changed
    assert [step.name for step in result.steps] == ["rank", "prune"]
    # Scale and shift both, as in the paper.
    assert result.model[1].weight.tolist() == [1.0] * BAD + [0.0]
    assert result.model[1].bias.tolist() == [0.0] * 16
    # The blind rule's strongest level prunes nothing more here: the other channels are equal.
    assert result.steps[1].numbers["level"] == (3.0 if u else 0.5)


def test_a_channel_below_the_threshold_stays() -> None:
    result = CLP(u=3.76)(victim(), clean_images())
    assert (result.plan, result.changed) == ((), False)
    assert all(torch.equal(value, result.model.state_dict()[name]) for name, value in victim().state_dict().items())


def test_without_a_norm_the_weights_count_alone() -> None:
    result = CLP()(plain_victim(), clean_images())
    assert channels_of(result) == {("0", BAD)}
    assert (attack_success(result.model), clean_accuracy(result.model)) == (0.0, 1.0)
    assert not result.model[0].bias[BAD].any()
    assert not result.model[0].weight[BAD].any()


def test_the_blind_rule_minds_the_budget() -> None:
    """Where the clean task hangs on the loudest channel, it is spared, and the published rule is not so kind."""
    model = victim()
    set_values(model[0].weight, [weight for _ in range(15) for weight in (0, 0, 1)] + [10, -10, 0])
    set_values(model[1].bias, [0] * 16)
    set_values(model[4].weight, [0] * 15 + [1] + [0] * 16)
    set_values(model[4].bias, [0, 1])
    clean = clean_images()
    kind, published = CLP(u=None)(model, clean), CLP(u=3.0)(model, clean)
    assert kind.clean_accuracy == {"before": 1.0, "after": 1.0}
    assert kind.plan == ()
    assert published.clean_accuracy == {"before": 1.0, "after": 0.5}
    assert CLP(u=None, budget=0.5)(model, clean).plan == published.plan


def test_the_constant_is_the_singular_value_times_what_the_norm_multiplies_by() -> None:
    """Channel 0 has the matrix ((3, 0), (0, 4)), channel 1 ((1, 1), (1, 1)): their largest singular values are 4, 2."""
    model = nn.Sequential(nn.Conv2d(2, 2, (1, 2)), nn.BatchNorm2d(2, eps=1.0), toys.pool(), nn.Linear(2, 2))
    set_values(model[0].weight, [3, 0, 0, 4, 1, 1, 1, 1])
    set_values(model[1].weight, [-3, 2])
    set_values(model[1].running_var, [8, 3])
    layers, (constants,) = lipschitz(model.eval(), torch.zeros(1, 2, 2, 2))
    assert [layer.name for layer in layers] == ["1"]
    assert layers[0].parameters == ("1.weight", "1.bias")
    assert constants.tolist() == pytest.approx([4 * 3 / 3, 2 * 2 / 2])


def test_a_transposed_convolution_has_its_outputs_along_the_second_dimension() -> None:
    """The weights that make output 0 are (1, 3), those of output 1 are (2, 4)."""
    _, (constants,) = lipschitz(toys.conv_transposed(), torch.zeros(1, 2, 1, 1))
    assert constants.tolist() == pytest.approx([10**0.5, 20**0.5])


@pytest.mark.parametrize("dead", ["weight", "gamma", "variance"])
def test_dead_channels_do_not_block_their_layer(dead: str) -> None:
    model = victim()
    with torch.no_grad():
        if dead == "weight":
            model[0].weight[0] = 0
        elif dead == "gamma":
            model[1].weight[0] = 0
        else:
            model[1].running_var[0] = 0
    _, (constants,) = lipschitz(model, clean_images().x[:2])
    assert constants.isfinite().all()
    assert constants[0] == 0
    result = CLP()(model, clean_images())
    assert channels_of(result) == {(NORMED, BAD)}
    assert result.plan[0].score == pytest.approx(-14 / 15**0.5)


def test_pre_activation_networks_pair_each_norm_with_the_convolution_before_it() -> None:
    model = toys.PreAct().eval()
    for norm in (model.bn1, model.bn2, model.bn3, model.bn4):
        torch.nn.init.uniform_(norm.weight, 1, 2)
        torch.nn.init.uniform_(norm.running_var, 1, 2)
    layers, constants = lipschitz(model, torch.zeros(1, 3, 8, 8))
    found = dict(zip((layer.name for layer in layers), constants, strict=True))
    # bn3 normalises a sum and belongs to no convolution; conv1 and conv3 count with the norms behind them.
    assert list(found) == ["stem", "bn1", "bn2", "conv2", "shortcut", "bn4", "conv4"]

    def singular(conv: nn.Conv2d) -> torch.Tensor:
        return torch.stack([torch.linalg.svdvals(filter_.flatten(1))[0] for filter_ in conv.weight.detach().double()])

    for name in ("stem", "conv2", "shortcut", "conv4"):
        torch.testing.assert_close(found[name], singular(model.get_submodule(name)))
    for name, conv in (("bn1", model.stem), ("bn2", model.conv1), ("bn4", model.conv3)):
        norm = model.get_submodule(name)
        gain = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        torch.testing.assert_close(found[name], singular(conv) * gain)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
def test_norms_without_statistics_count_with_their_scale(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), norm, toys.pool(), nn.Linear(4, 2))
    set_values(model[0].weight, [1, -2, 3, 4])
    set_values(norm.weight, [1, 1, -1, 2])
    assert lipschitz(model.eval(), torch.rand(1, 1, 2, 2))[1][0].tolist() == [1, 2, 3, 8]


def test_hidden_layers_stand_in_where_nothing_convolves() -> None:
    layers, (constants,) = lipschitz(toys.mlp(), torch.zeros(1, 1, 1, 2))
    assert [layer.name for layer in layers] == ["1"]
    assert constants.tolist() == pytest.approx([2**0.5, 2**0.5])


def test_a_model_without_convolutions_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), toys.pool(), nn.Linear(3, 2)).eval()
    assert find_channels(model, clean_images().x[:2])
    with pytest.raises(ModelError, match="expected a model with convolutions or hidden linear layers, got Sequential"):
        CLP()(model, clean_images())


def test_one_image_is_enough() -> None:
    clean = clean_images()
    assert CLP()(victim(), CleanSet(clean.x[:1], clean.y[:1])).plan


@pytest.mark.parametrize("settings", [{"u": 0.0}, {"u": -1.0}, {"u": float("nan")}, {"budget": 1.5}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {next(iter(settings))}"):
        CLP(**settings)


@pytest.mark.parametrize("u", [3.0, None])
def test_the_callers_model_is_left_alone(u: float | None) -> None:
    check_leaves_the_model_alone(CLP(u=u), victim())
