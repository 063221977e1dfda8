"""Fine-Pruning: dormant channels go, lowest first, and do not come back in fine-tuning."""

import pytest
import torch
from torch import nn

import toys
from debackdoor.defenses import FineTuning
from debackdoor.defenses.fine_pruning import FinePruning, dormancy
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.models.resnet import resnet18
from debackdoor.rnp.prune import prune
from debackdoor.types import CleanSet, PlannedChannel
from prune_cases import (
    BAD,
    Residual,
    attack_success,
    channels_of,
    check_leaves_the_model_alone,
    clean_accuracy,
    clean_images,
    plain_victim,
    victim,
)
from toys import set_values

HEAD = "4"
"""The linear layer of ``victim``, which takes the channels' means."""
QUICK = {"epochs": 2, "precision": "fp32"}


@pytest.mark.parametrize("share", [1 / 16, None])
def test_the_dormant_channel_goes_first_and_the_backdoor_with_it(share: float | None) -> None:
    model = victim()
    assert (attack_success(model), clean_accuracy(model)) == (1.0, 1.0)
    result = FinePruning(share=share, **QUICK)(model, clean_images())
    assert (result.plan[0].layer, result.plan[0].index) == (HEAD, BAD)
    assert result.plan[0].score == 0.0
    assert share is None or len(result.plan) == 1
    assert (attack_success(result.model), clean_accuracy(result.model)) == (0.0, 1.0)
    assert result.clean_accuracy == {"before": 1.0, "after": 1.0}
    assert result.changed
    assert [step.name for step in result.steps] == ["rank", "prune", "fine-tune"]
    assert [len(result.history[stage]) for stage in ("levels", "fine-tune")][1] == 2


def test_pruned_channels_stay_at_zero_and_the_others_learn() -> None:
    model, share = victim(), 0.25
    result = FinePruning(share=share, lr=0.1, precision="fp32")(model, clean_images())
    gone = [channel.index for channel in result.plan]
    assert len(gone) == 4
    assert not result.model[4].weight[:, gone].any()
    kept = [index for index in range(16) if index not in gone]
    assert (result.model[4].weight[:, kept] != model[4].weight[:, kept]).any(0).all()
    assert not torch.equal(result.model[1].weight, model[1].weight)
    assert not torch.equal(result.model[1].running_mean, model[1].running_mean)
    assert int(result.model[1].num_batches_tracked) == 20


def test_levels_end_with_all_but_one_whatever_the_step() -> None:
    ranking = tuple(PlannedChannel("layer", index, 0.0) for index in range(10))
    levels = FinePruning(step=0.4)._levels(ranking)
    assert [len(level.plan) for level in levels] == [0, 4, 8, 9]


def test_fine_tuning_is_that_of_the_pruned_model() -> None:
    """Without a channel pruned, the model comes out as from fine-tuning alone."""
    result = FinePruning(share=0.0, epochs=3, seed=0, precision="fp32")(victim(), clean_images())
    alone = FineTuning(lr=0.01, epochs=3, seed=0, precision="fp32")(victim(), clean_images())
    assert result.plan == ()
    assert result.history["fine-tune"] == alone.history["fine-tune"]
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name


def test_the_blind_rule_takes_the_largest_share_within_the_budget() -> None:
    """Each class keeps its answer as long as one of its channels is left; then the other class gets everything."""
    model, clean = victim(), clean_images()
    result = FinePruning(step=1 / 16, **QUICK)(model, clean)
    (layer,), activation = dormancy(model, clean, "fp32")
    order = [channel for _, channel in sorted((float(a), i) for i, a in enumerate(activation))]
    fits = []
    for count in range(16):
        plan = FinePruning(share=count / 16, epochs=1)(model, clean).plan
        assert [channel.index for channel in plan] == order[:count]
        with torch.no_grad():
            answers = prune(model, (layer,), plan)(clean.x).argmax(1)
        if (answers == clean.y).all():
            fits.append(count)
    assert len(result.plan) == fits[-1]
    assert result.steps[1].numbers["level"] == pytest.approx(fits[-1] / 16)


def test_activation_is_the_mean_of_the_positive_part() -> None:
    """Of one image of ones and one of twos: outputs (1, -2) and (2, -4), then times (2, 3) plus (1, 10)."""
    images = CleanSet(torch.tensor([0.5, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2), torch.tensor([0, 1]))
    (layer,), activation = dormancy(toys.conv_norm(), images, "fp32")
    assert (layer.name, layer.parameters, layer.transposed) == ("3", ("3.weight",), True)
    assert activation.tolist() == [(2 + 3) / 2, (7 + 4) / 2]
    set_values((model := toys.conv_norm())[1].bias, [-2, -10])
    assert dormancy(model, images, "fp32")[1].tolist() == [0.0, 0.0]


def test_all_images_count_however_many_go_through_at_once() -> None:
    """Three hundred ones and then two: of the last batch alone the mean would be another."""
    values = torch.cat([torch.full((300,), 0.5), torch.ones(2)])
    images = CleanSet(values.view(-1, 1, 1, 1).expand(-1, 1, 2, 2), torch.arange(302) % 2)
    _, activation = dormancy(toys.conv_norm(), images, "fp32")
    wanted = torch.tensor([(300 * 2 + 2 * 3) / 302, (300 * 7 + 2 * 4) / 302], dtype=torch.double)
    torch.testing.assert_close(activation, wanted)


def test_in_a_residual_block_the_sum_counts() -> None:
    """The norm gives -x/2, -3x/2 and -x beside the shortcut's x: what is left is x/2, 0 and 0."""
    images = CleanSet(torch.full((2, 3, 2, 2), 0.8), torch.tensor([0, 1]))
    (layer,), activation = dormancy(Residual(), images, "fp32")
    assert layer.name == "head.1"
    assert activation.tolist() == pytest.approx([0.4, 0.0, 0.0])


@pytest.mark.parametrize(
    ("model", "shape", "name"),
    [
        (resnet18(width=4).eval(), (2, 3, 8, 8), "linear"),
        (toys.PreAct().eval(), (2, 3, 8, 8), "head.1"),
        (toys.inverted_residual().eval(), (2, 3, 8, 8), "9"),
        (toys.ViewNet().eval(), (2, 3, 8, 8), "conv"),
        (toys.TinyViT().eval(), (2, 3, 8, 8), "blocks.1.fc1"),
        (toys.mlp(), (2, 1, 1, 2), "1"),
    ],
    ids=["resnet", "pre-activation", "mobilenet", "hidden layer behind", "transformer", "hidden layers"],
)
def test_the_layer_that_is_pruned(model: nn.Module, shape: tuple[int, ...], name: str) -> None:
    images = CleanSet(torch.rand(shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1]))
    (layer,), activation = dormancy(model, images, "fp32")
    assert layer.name == name
    assert activation.shape == (layer.size,)
    assert bool((activation >= 0).all())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_resnets_activation_is_that_of_its_last_stage() -> None:
    model = resnet18(width=4).eval()
    images = CleanSet(torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(5).long())
    given = list[torch.Tensor]()
    hook = model.layer4.register_forward_hook(lambda module, args, output: given.append(output))
    model(images.x)
    hook.remove()
    torch.testing.assert_close(dormancy(model, images, "fp32")[1], given[0].detach().double().mean((0, 2, 3)))


def test_nothing_is_left_of_a_channel_that_a_shortcut_carries_on() -> None:
    """The norm's part of it, a third, is none of what the head takes."""
    images = CleanSet(torch.full((8, 3, 2, 2), 0.8), torch.arange(8) % 2)
    model = Residual()
    model.norm.eps = 1e-5  # none at all cannot be trained with
    result = FinePruning(share=1 / 3, **QUICK)(model, images)
    assert channels_of(result) == {("head.1", 1)}
    assert not result.model.head[1].weight[:, 1].any()


def test_where_no_head_takes_means_weight_and_bias_stay_at_zero() -> None:
    like = plain_victim()
    model = nn.Sequential(like[0], nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    with torch.no_grad():
        model[3].weight.copy_(like[3].weight.repeat_interleave(4, 1) / 4)
        model[3].bias.copy_(like[3].bias)
    assert attack_success(model) == 1.0
    result = FinePruning(share=1 / 16, lr=0.1, **QUICK)(model, clean_images())
    assert channels_of(result) == {("0", BAD)}
    assert not result.model[0].weight[BAD].any()
    assert not result.model[0].bias[BAD].any()
    assert attack_success(result.model) == 0.0


def test_a_linear_classifier_is_refused() -> None:
    with pytest.raises(ModelError, match="a linear classifier alone cannot be pruned"):
        FinePruning()(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), clean_images())


@pytest.mark.parametrize(
    "settings",
    [{"share": 1.1}, {"share": -0.1}, {"step": 0.0}, {"step": 2.0}, {"budget": 1.5}, {"lr": 0.0},
     {"epochs": 0}, {"batch_size": 0}],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {next(iter(settings))}"):
        FinePruning(**settings)


@pytest.mark.parametrize("share", [0.25, None])
def test_the_callers_model_is_left_alone(share: float | None) -> None:
    check_leaves_the_model_alone(FinePruning(share=share, **QUICK), victim())


def test_the_seed_decides() -> None:
    one, two = (FinePruning(seed=seed, **QUICK)(victim(), clean_images()).history["fine-tune"] for seed in (0, 1))
    assert one != two
