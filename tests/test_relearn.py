"""Relearning: what it teaches, what stays at zero, and what it costs."""

import pytest
import torch
from torch import nn

from channel_cases import assert_as_found, snapshot
from debackdoor.channels import find_channels
from debackdoor.data.augment import mixed, random_view
from debackdoor.defenses.lesson import RelearnSettings
from debackdoor.defenses.relearn import Relearned, relearn
from debackdoor.detectors.shortcut import find_shortcuts, lead
from debackdoor.detectors.squares import find_squares
from debackdoor.detectors.universal import UniversalSearch, aims_at
from debackdoor.errors import DebackdoorError
from debackdoor.models.forward import accuracy, predict
from debackdoor.rnp.prune import prune
from debackdoor.runtime import generator
from debackdoor.types import CleanSet, PlannedChannel
from rnp_cases import harmful_set, one_harmful_channel, quadrant_set, quadrants
from shortcut_cases import CLASSES, bright_images, dark_beside_the_classes, row_images, switched_to

PLAN = (PlannedChannel("1", 2, 0.0), PlannedChannel("1", 0, 0.1))
FIT, HOLDOUT = quadrant_set(60), quadrant_set(40, seed=1)


def relearned(model: nn.Module, budget: float = 0.05, settings: RelearnSettings | None = None) -> Relearned:
    layers = find_channels(model, FIT.x[:1])
    return relearn(model, layers, PLAN, FIT, HOLDOUT, budget, settings=settings, precision="fp32")


def hurt() -> nn.Sequential:
    """Right on nothing of class 0 and 1, whose weights of the last layer are exchanged."""
    model = quadrants()
    with torch.no_grad():
        model[5].weight[:2] = model[5].weight[[1, 0]].clone()
    return model


def test_labels_bring_back_what_the_model_does_not_know() -> None:
    model = hurt()
    before = snapshot(model)
    found = relearned(model, settings=RelearnSettings(steps=200))
    assert_as_found(model, before)
    assert accuracy(predict(model, HOLDOUT.x), HOLDOUT.y) == 0.5
    assert found.model is not None
    assert found.model is not model
    assert not found.model.training
    assert found.accuracy == accuracy(predict(found.model, HOLDOUT.x), HOLDOUT.y) > 0.9
    assert found.lr == 0.02
    assert [row["step"] for row in found.history] == list(range(1, 201))
    assert found.history[-1]["loss"] < found.history[0]["loss"]


def test_pruned_channels_stay_at_zero_and_the_others_learn() -> None:
    model = quadrants()
    model[0].weight.requires_grad_(False)
    found = relearned(model).model
    assert found is not None
    weight = found[1].weight
    assert weight[[0, 2]].tolist() == [0.0, 0.0]
    assert not torch.equal(weight[[1, 3]], model[1].weight[[1, 3]])
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in model.parameters()]


def test_what_costs_more_than_the_budget_is_tried_in_smaller_steps_and_then_given_up() -> None:
    """Without the harmful channel the pruned model would be right; the plan takes the two that are needed instead."""
    model = prune(one_harmful_channel(), find_channels(one_harmful_channel(), harmful_set().x[:1]), (
        PlannedChannel("0", 2, 0.0),
    )).eval()  # fmt: skip
    images = harmful_set()
    layers = find_channels(model, images.x[:1])
    everything = tuple(PlannedChannel("0", index, 0.0) for index in range(3))
    found = relearn(model, layers, everything, images, images, 0.05, settings=RelearnSettings(steps=3, tries=3))
    assert found.model is None
    assert found.accuracy == 0.5
    assert found.lr == 0.02 / 4
    assert [row["lr"] for row in found.history] == [0.02] * 3 + [0.01] * 3 + [0.005] * 3


def test_a_pruned_model_that_is_there_already_teaches_and_is_left_alone() -> None:
    model = quadrants()
    layers = find_channels(model, FIT.x[:1])
    pruned = prune(model, layers, PLAN).eval()
    before = snapshot(pruned)
    few = RelearnSettings(steps=4)
    found = relearn(model, layers, PLAN, FIT, HOLDOUT, 1.0, settings=few, precision="fp32", pruned=pruned)
    assert_as_found(pruned, before)
    alone = relearned(model, 1.0, few)
    assert found.history == alone.history
    assert found.model is not None
    assert alone.model is not None
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, alone.model.state_dict()[name])


def test_steps_that_break_the_model_are_taken_back() -> None:
    found = relearned(quadrants(), settings=RelearnSettings(lr=1e30, steps=4, tries=2))
    assert found.model is None
    assert found.accuracy < 0.9


@pytest.mark.parametrize("name", ["lr", "clip", "steps", "batch_size", "temperature", "tries"])
def test_bad_settings_are_refused(name: str) -> None:
    with pytest.raises(DebackdoorError, match=f"{name} above 0, got 0"):
        RelearnSettings(**{name: 0})


def test_views_are_images_and_the_seed_decides() -> None:
    x = torch.rand(16, 3, 12, 10, generator=generator(0))
    kept = x.clone()
    for change in (random_view, mixed):
        one, two, other = (change(x, generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)
        assert one.shape == x.shape
        assert 0 <= float(one.min()) <= float(one.max()) <= 1
    assert torch.equal(x, kept)


def test_a_mixed_image_is_at_least_half_itself() -> None:
    x = torch.eye(8).view(8, 8, 1, 1)
    shares = mixed(x, generator(0)).view(8, 8).diagonal()
    assert float(shares.min()) >= 0.5
    assert torch.allclose(mixed(x, generator(0)).sum(1), torch.ones(8, 1, 1))


def test_flat_images_change_in_brightness_alone() -> None:
    data = CleanSet(torch.full((32, 1, 6, 6), 0.5), torch.zeros(32, dtype=torch.int64))
    seen = random_view(data.x, generator(0))
    assert torch.allclose(seen.amin((1, 2, 3)), seen.amax((1, 2, 3)), atol=1e-6)
    assert 0.34 < float(seen.min()) < 0.5 < float(seen.max()) < 0.66


def test_triggers_towards_a_label_are_unlearned() -> None:
    """A pixel in the corner that says class 2 says nothing any more, and the pixels that say the classes still do."""
    model, data = switched_to(2), row_images(96)
    layers = find_channels(model, data.x[:1])
    before = find_shortcuts(model, data, data, range(CLASSES), precision="fp32")
    assert lead(before.rates["patch"], 2) > 0.9
    settings = RelearnSettings(steps=200)
    left = {
        aims: relearn(model, layers, (), data, data, 0.05, aims, settings=settings, precision="fp32").model
        for aims in ((), tuple(aims_at([2], 3)))
    }
    leads = []
    for found in left.values():
        assert found is not None
        assert accuracy(predict(found, data.x), data.y) > 0.95
        rates = find_shortcuts(found, data, data, range(CLASSES), precision="fp32").rates
        leads.append(lead(rates["patch"], 2))
    assert leads[0] > 0.5
    assert leads[1] < 0.3


def test_the_search_gets_ahead_on_the_suspect_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the pruned one, in which the backdoor may be half gone."""
    searched: list[nn.Module] = []
    monkeypatch.setattr(UniversalSearch, "run", lambda self, model, *_, **__: searched.append(model) or self)
    model = quadrants()
    layers = find_channels(model, FIT.x[:1])
    relearn(model, layers, PLAN, FIT, HOLDOUT, 1.0, aims_at([1]), settings=RelearnSettings(steps=1, head_start=3))
    (found,) = searched
    torch.testing.assert_close(predict(found, FIT.x, precision="fp32"), predict(model, FIT.x, precision="fp32"))


def test_relearning_with_triggers_is_seeded() -> None:
    model, aims = quadrants(), aims_at([1])
    layers = find_channels(model, FIT.x[:1])
    few = RelearnSettings(steps=4, head_start=3)
    one, two, other = (
        relearn(model, layers, (), FIT, HOLDOUT, 1.0, aims, settings=few, seed=seed).history for seed in (1, 1, 2)
    )
    assert one == two != other


def test_a_plain_square_that_says_a_label_is_unlearned() -> None:
    """A dark pixel that says class 2 says nothing any more, and the columns that say the classes still do."""
    model, data = dark_beside_the_classes(2), bright_images(96)
    layers = find_channels(model, data.x[:1])
    before = find_squares(model, data, data, CLASSES, precision="fp32")
    assert lead(before.rates, 2) > 0.9
    leads = []
    for aims, stamps in (((), ()), (aims_at([2]), (before.best[2],))):
        settings = RelearnSettings(steps=200, shift=0.0)
        found = relearn(model, layers, (), data, data, 0.05, aims, stamps, settings, precision="fp32").model
        assert found is not None
        assert accuracy(predict(found, data.x), data.y) > 0.95
        leads.append(lead(find_squares(found, data, data, CLASSES, precision="fp32").rates, 2))
    assert leads[0] > 0.5
    assert leads[1] < 0.2
