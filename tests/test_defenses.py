"""Defences: hyper-parameters, the plan they choose, and that they see and change nothing else."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from channel_cases import assert_as_found, snapshot
from debackdoor.channels import count_channels, find_channels
from debackdoor.data import split_clean
from debackdoor.defenses import RNP, Defense, FineTuning
from debackdoor.errors import DataError, DebackdoorError
from debackdoor.rnp.prune import Cost, below, plan_mask, rank, spared
from debackdoor.rnp.recover import RecoverSettings
from debackdoor.rnp.unlearn import UnlearnSettings
from debackdoor.types import CleanSet, Plan, RepairResult
from rnp_cases import quadrant_set, quadrants

QUICK = {
    "unlearning": UnlearnSettings(lr=0.02, least_steps=1, max_passes=4, batch_size=20),
    "recovery": RecoverSettings(passes=4, batch_size=20),
    "precision": "fp32",
}


@pytest.mark.parametrize("name", ["budget", "suspicious", "threshold"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_shares_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(DebackdoorError, match=f"expected {name} from 0 to 1, got {value}"):
        RNP(**{name: value})


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_range_are_allowed(value: float) -> None:
    assert RNP(budget=value, threshold=value).threshold == value


def test_hyper_parameters_are_keywords_and_stay_as_they_are() -> None:
    with pytest.raises(TypeError):
        RNP(0.02)  # type: ignore[misc]
    with pytest.raises(TypeError):
        RNP(bugdet=0.02)  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        RNP().budget = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Defense()  # type: ignore[abstract]
    assert isinstance(RNP(), Defense)
    assert RNP.name == "rnp"
    assert RNP(seed=3) == RNP(seed=3) != RNP(seed=4)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(DebackdoorError, match="fp8"):
        RNP(precision="fp8")(quadrants(), quadrant_set())


def test_the_published_settings() -> None:
    """Unlearn with SGD 0.01, 0.9, 5e-4, divided by ten after passes 10 and 20, to 0.2; recover with 0.2, 0.9, 20."""
    published = RNP.published(threshold=0.3, seed=5)
    assert (published.threshold, published.seed, published.precision) == (0.3, 5, "fp32")
    assert published.unlearning == UnlearnSettings(
        lr=0.01, momentum=0.9, weight_decay=5e-4, clip=None, stop_accuracy=0.2, past_peak=None, check_every=None,
        largest_fall=1.0, max_passes=21, least_steps=1, batch_size=128, shift=0.125, decay_at=(10, 20), running=True,
    )  # fmt: skip
    recovery = RecoverSettings(lr=0.2, momentum=0.9, weight=0.2, passes=20, batch_size=128, shift=0.125)
    assert published.recovery == recovery


def cost(model: nn.Module, defense: RNP, plan: Plan) -> Cost:
    """Of ``model`` with the plan's norm weights at zero, on the hold-out part; computed here."""
    _, holdout = split_clean(quadrant_set(), seed=defense.seed)
    pruned = quadrants()
    pruned.load_state_dict(model.state_dict())
    with torch.no_grad():
        for channel in plan:
            assert channel.layer == "1"
            pruned[1].weight[channel.index] = 0
        logits = pruned(holdout.x)
    right = int((logits.argmax(1) == holdout.y).sum())
    return Cost(right / len(holdout), float(nn.functional.cross_entropy(logits, holdout.y)))


def check_result(model: nn.Module, defense: RNP, result: RepairResult) -> None:
    assert result.model is not model
    assert not any(module.training for module in result.model.modules())
    for name, value in result.model.state_dict().items():
        if name == "1.weight":
            kept = torch.ones(4)
            kept[[channel.index for channel in result.plan]] = 0
            assert torch.equal(value, model.state_dict()[name] * kept)
        else:
            assert torch.equal(value, model.state_dict()[name])
    assert result.changed is bool(result.plan)
    assert result.clean_accuracy == pytest.approx(
        {"before": cost(model, defense, ()).accuracy, "after": cost(model, defense, result.plan).accuracy}
    )
    assert result.verification is None
    assert [step.name for step in result.steps] == ["unlearn", "recover", "prune"]
    assert len(result.history["recover"]) == defense.recovery.passes
    assert result.history["unlearn"]
    assert result.steps[2].numbers["channels"] == len(result.plan)
    assert result.steps[0].reason in ("forgotten", "piled up", "steps", "stuck")


@pytest.mark.parametrize("suspicious", [0.5, 1.0])
@pytest.mark.parametrize("budget", [0.0, 0.1, 1.0])
def test_the_plan_is_what_the_hold_out_part_can_spare(budget: float, suspicious: float) -> None:
    model, clean, defense = quadrants(), quadrant_set(), RNP(budget=budget, suspicious=suspicious, **QUICK)
    result = defense(model, clean)
    check_result(model, defense, result)
    assert result.clean_accuracy["after"] >= result.clean_accuracy["before"] - budget - 1e-6
    fit, _ = split_clean(clean, seed=0)
    candidates = [channel for channel in defense.expose(model, fit).ranking if channel.score <= suspicious]
    assert result.plan == spared(tuple(candidates), lambda plan: cost(model, defense, plan), budget)


@pytest.mark.parametrize("threshold", [0.0, 0.9, 1.0])
def test_a_threshold_takes_every_mask_at_or_below_it(threshold: float) -> None:
    model, defense = quadrants(), RNP(threshold=threshold, **QUICK)
    result = defense(model, quadrant_set())
    check_result(model, defense, result)
    fit, _ = split_clean(quadrant_set(), seed=0)
    exposure = defense.expose(model, fit)
    assert len(exposure.ranking) == 4
    assert result.plan == tuple(channel for channel in exposure.ranking if channel.score <= threshold)
    assert threshold < 1.0 or len(result.plan) == 4


def test_an_exposure_fits_together() -> None:
    model, clean, defense = quadrants(), quadrant_set(), RNP(**QUICK)
    exposure = defense.expose(model, clean)
    assert exposure.layers == find_channels(model, clean.x[:2])
    assert exposure.recovered.mask.shape == (count_channels(exposure.layers),)
    assert exposure.ranking == rank(exposure.layers, exposure.recovered.mask, exposure.recovered.mean_mask)
    lowest = exposure.ranking[0]
    assert lowest.score == float(exposure.recovered.mask.min())
    assert plan_mask(exposure.layers, exposure.ranking[:1]).tolist().index(0.0) == lowest.index
    assert below(exposure.ranking, 1.0) == exposure.ranking


def test_the_callers_model_is_left_alone_and_the_seed_decides() -> None:
    model, clean = quadrants().train(), quadrant_set()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(4)
    before = snapshot(model)
    heard = []
    one, two = (RNP(seed=1, **QUICK)(model, clean, progress=lambda stage, *_: heard.append(stage)) for _ in range(2))
    assert_as_found(model, before)
    assert one.plan == two.plan
    assert one.history == two.history
    assert set(heard) == {"unlearn", "recover"}
    with pytest.raises(DataError, match="at least 2 images"):
        RNP(**QUICK)(model, clean.subset(torch.tensor([0])))
    assert_as_found(model, before)


def unsure() -> nn.Sequential:
    """Right on no image of classes 0 and 1, and with dropout before the head."""
    model = quadrants()
    with torch.no_grad():
        model[5].weight[:2] = model[5].weight[[1, 0]].clone()
    model.insert(5, nn.Dropout(0.2))
    return model


def test_fine_tuning_learns_the_labels_and_changes_nothing_else() -> None:
    model, clean = unsure().train(), quadrant_set()
    model[0].weight.requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    heard: list[str] = []
    one = FineTuning(lr=0.1, precision="fp32")(model, clean, progress=lambda stage, *_: heard.append(stage))
    assert_as_found(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.clean_accuracy["before"] == 0.5
    assert one.clean_accuracy["after"] > 0.9
    assert one.changed
    assert one.plan == ()
    assert not one.model.training
    assert [p.requires_grad for p in one.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert len(one.history["fine-tune"]) == len(heard) == 20
    torch.manual_seed(99)  # the surroundings must not matter
    assert FineTuning(lr=0.1, precision="fp32")(unsure(), clean).history == one.history
    assert FineTuning(lr=0.1, precision="fp32", seed=1)(unsure(), clean).history != one.history


def test_fine_tuning_can_hold_images_out() -> None:
    clean = quadrant_set()
    result = FineTuning(lr=0.1, epochs=2, holdout=0.5, precision="fp32")(unsure(), clean)
    _, judges = split_clean(clean, 0.5, 0)
    assert result.clean_accuracy["before"] == float((unsure()(judges.x).argmax(1) == judges.y).float().mean())


@pytest.mark.parametrize("name", ["lr", "epochs", "batch_size"])
def test_bad_settings_of_fine_tuning_are_refused(name: str) -> None:
    with pytest.raises(DebackdoorError, match=f"{name} above 0, got 0"):
        FineTuning(**{name: 0})


def test_the_published_masks_lie_on_norms_alone_where_there_are_any() -> None:
    """The last convolution, which no norm follows, is maskable, too."""
    mixed = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip
    plain = nn.Sequential(*(layer for layer in mixed if not isinstance(layer, nn.BatchNorm2d)))
    quick = {"unlearning": UnlearnSettings(max_passes=1), "recovery": RecoverSettings(passes=1)}
    images = CleanSet(torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4)
    for model, threshold, names in (
        (mixed, 0.2, ["1"]), (mixed, None, ["1", "3"]), (plain, 0.2, ["0", "2"]), (plain, None, ["0", "2"]),
    ):  # fmt: skip
        exposure = RNP(threshold=threshold, **quick).expose(model, images)
        assert [layer.name for layer in exposure.layers] == names
