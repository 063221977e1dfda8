"""Networks that do what few do: keep activations, work in place, draw from chance, give no gradient; and odd data."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import debackdoor as db
from debackdoor.case import open_case
from debackdoor.channels import find_channels
from debackdoor.defenses import ANP, FTSAM, MCR, NAD, RNP, Defense
from debackdoor.defenses.lesson import RelearnSettings
from debackdoor.defenses.nad import find_places
from debackdoor.defenses.relearn import relearn
from debackdoor.detectors.features import penultimate_features
from debackdoor.detectors.trigger import MOST_AT_ONCE, SearchSettings, _Joint, search_triggers
from debackdoor.detectors.universal import aims_at
from debackdoor.errors import ModelError
from debackdoor.runtime import at_once, has_fast_bf16
from debackdoor.types import CleanSet, RecoveredTrigger
from rnp_cases import quadrant_set, quadrants, strip_set, strips
from test_copying import Keeping


class InPlace(nn.Module):
    """Normalises its input in place, as many networks' preprocessing does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.sub_(0.1).div_(0.9))


class Apart(InPlace):
    """Normalises it in a place of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x - 0.1) / 0.9)


class Chancy(nn.Module):
    """Drops features in eval mode, too, as ``F.dropout`` does by default."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(F.dropout(x, 0.01))


class Rounding(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((255 * x).round() / 255)


class FrozenBelow(nn.Module):
    """A backbone that gets no gradient, and a head that learns."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head = inner[:-1], inner[-1]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.body(x)
        return self.head(features)


QUICK: dict[str, Any] = {"batch_size": 20, "shift": 0.0, "precision": "fp32"}


@pytest.mark.parametrize("act", [db.scan, db.repair])
def test_networks_that_keep_activations_are_taken(act: Callable[..., Any]) -> None:
    model = Keeping(quadrants())
    model(quadrant_set(4).x)  # so that it holds some to begin with
    kept = act(model, quadrant_set(), device="cpu", precision="fp32")
    plain = act(quadrants(), quadrant_set(), device="cpu", precision="fp32")
    assert kept.history == plain.history
    found, expected = ((one.ranking if act is db.scan else one.plan) for one in (kept, plain))
    assert [(item.index, item.score) for item in found] == [(item.index, item.score) for item in expected]


@pytest.mark.parametrize("defense", [RNP(), ANP(iterations=2, **QUICK)])
def test_defences_take_networks_that_keep_activations(defense: Defense) -> None:
    result = defense(Keeping(quadrants()), quadrant_set())
    assert set(result.model.state_dict()) == set(Keeping(quadrants()).state_dict())


@pytest.mark.parametrize(
    "defense",
    [NAD(epochs=1, teacher_epochs=1, **QUICK), FTSAM(epochs=1, **QUICK), ANP(iterations=3, **QUICK)],
)
def test_networks_that_work_in_place_learn_what_others_do(defense: Defense) -> None:
    """And the caller's images stay as they are."""
    clean = quadrant_set()
    before = clean.x.clone()
    results = [defense(kind(quadrants()), clean).model.state_dict() for kind in (InPlace, Apart)]
    assert clean.x.equal(before)
    for name, value in results[0].items():
        assert value.allclose(results[1][name], atol=1e-5), name


def test_a_lesson_of_a_network_that_works_in_place() -> None:
    """Images with a trigger go through the student twice, once for the trigger's sake."""
    images, settings = quadrant_set(60), RelearnSettings(steps=4, batch_size=16, head_start=2)
    losses = []
    for kind in (InPlace, Apart):
        model = kind(quadrants()).eval()
        layers = find_channels(model, images.x[:2])
        done = relearn(model, layers, (), images, images, 1.0, aims_at([1]), settings=settings, precision="fp32")
        losses.append([row["loss"] for row in done.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_models_that_work_in_place_see_the_same_image() -> None:
    images = quadrant_set(8).x
    joint, apart = (
        _Joint(kind(quadrants()), kind(quadrants()), 1, 2.0)(images.clone())
        for kind in (InPlace, lambda inner: nn.Sequential(InPlace(inner)))
    )
    alone = InPlace(quadrants())(images.clone())
    held = alone - 2.0 * F.one_hot(torch.tensor(1), 4)
    assert joint.allclose(F.log_softmax(alone, 1) + F.log_softmax(held, 1), atol=1e-6)
    assert apart.equal(joint)


def test_chance_inside_a_network_is_seeded_and_the_callers_own_left_alone() -> None:
    model, clean = Chancy(quadrants()), quadrant_set()
    found = []
    for start in (1, 2):
        torch.manual_seed(start)
        before = torch.random.get_rng_state()
        found.append(db.scan(model, clean, device="cpu", precision="fp32"))
        assert torch.random.get_rng_state().equal(before)
    assert found[0].score == found[1].score
    assert found[0].evidence == found[1].evidence


@pytest.mark.parametrize("change", [Rounding, FrozenBelow])
def test_a_network_that_gives_no_gradient_is_refused(change: Callable[[nn.Sequential], nn.Module]) -> None:
    """Searches would find nothing in it, and a scan would call it clean."""
    with pytest.raises(ModelError, match=r"logits that follow the image by gradient, .*; take rounding, integer conv"):
        db.scan(change(quadrants()), quadrant_set(), device="cpu", precision="fp32")


class Strict(nn.Sequential):
    """Knows one type alone."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        if out.dtype != torch.float32:
            raise TypeError("expected float32")
        return out


@pytest.mark.parametrize(
    "defense",
    [
        RNP(),
        ANP(iterations=2, batch_size=20, shift=0.0),
        ANP(iterations=2, **QUICK),
        NAD(epochs=1, teacher_epochs=1, batch_size=20, shift=0.0),
    ],
    ids=lambda defense: f"{type(defense).__name__}-{defense.precision}",
)
def test_defences_take_networks_that_know_float32_alone(defense: Defense, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the processor, unlike this one perhaps, has the arithmetic for bfloat16."""
    for place in ("runtime", "models.forward", "defenses.base"):
        monkeypatch.setattr(f"debackdoor.{place}.has_fast_bf16", lambda device: True)
    assert defense(Strict(*quadrants()), quadrant_set()).clean_accuracy["before"] > 0.9


def test_a_network_that_knows_float32_alone_is_taken() -> None:
    case = open_case(Strict(*quadrants()), quadrant_set(), RNP(), "cpu")
    assert case.method.precision == ("fp32" if has_fast_bf16(torch.device("cpu")) else "auto")


def test_answers_that_labels_account_for_are_no_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 images 40 have label 0, so that half of all answers is usual for it."""
    monkeypatch.setattr(importlib.import_module("debackdoor.case"), "FEWEST_NORMS", 1)
    even = strip_set(200)
    chosen = torch.cat([(even.y == 0).nonzero()[:40, 0], (even.y != 0).nonzero()[:40, 0]])
    case = open_case(strips(), even.subset(chosen), RNP(precision="fp32"), "cpu")
    share = float((case.fit.y == 0).float().mean())
    assert share == pytest.approx(0.5, abs=0.03)
    shares = iter([[{"label_shares": [0.6, 0.25, 0.05, 0.05, 0.05]}]])
    monkeypatch.setattr(type(case), "unlearn_parts", lambda *_: (type("U", (), {"history": row}) for row in shares))
    assert case.pile_ups(case.suspect) == pytest.approx([0.6 - (share - 0.2), 0.25, 0.05, 0.05, 0.05])


def test_features_are_those_of_every_image_where_memory_is_short() -> None:
    model, images = quadrants(), quadrant_set(50).x
    whole = penultimate_features(model, images, precision="fp32")
    with at_once(16):
        parts = penultimate_features(model, images, precision="fp32")
    assert whole.shape == (50, 16)
    assert parts.allclose(whole, atol=1e-6)


def test_triggers_of_many_labels_are_searched_for_in_parts() -> None:
    seen = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 40)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return self.head(x.mean((2, 3)))

    clean = CleanSet(torch.rand(40, 1, 2, 2), torch.arange(40))
    search_triggers(Watched().eval(), clean, clean, range(40), SearchSettings(steps=2), precision="fp32")
    assert max(seen) == MOST_AT_ONCE
    assert seen[:3] == [512, 512, 256]


def test_attention_is_not_taken_where_channels_come_last() -> None:
    """As in ConvNeXt, whose blocks hold linear layers over the last axis."""

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.down = nn.Conv2d(channels, channels, 2, stride=2)
            self.norm, self.wide, self.narrow = nn.LayerNorm(channels), nn.Linear(channels, 20), nn.Linear(20, channels)

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(x)
            return x + self.narrow(self.wide(self.norm(x.permute(0, 2, 3, 1))).relu()).permute(0, 3, 1, 2)

    model = nn.Sequential(Block(3), Block(3), Block(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    assert [place.module for place in find_places(model, torch.rand(2, 3, 32, 32))] == ["0", "1", "2"]


def test_mode_connectivity_leaves_statistics_of_instance_norms_sound() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(256, 4)
    )
    model(quadrant_set().x)
    fixed = MCR(epochs=1, tuning_epochs=1, **QUICK)(model.eval(), quadrant_set()).model[1]
    assert fixed.running_mean is not None
    assert bool(fixed.running_mean.any())
    assert not bool((fixed.running_var == 1).all())


def test_a_recovered_trigger_goes_where_the_images_are() -> None:
    trigger = RecoveredTrigger(0, torch.zeros(1, 2, 2), torch.zeros(3, 2, 2), 1.0, 0.0)
    assert trigger.apply(torch.empty(1, 3, 2, 2, device="meta")).device.type == "meta"


def test_with_a_published_threshold_all_images_teach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to be chosen by images that are held out."""
    module = importlib.import_module("debackdoor.defenses.rnp")
    taught: list[int] = []
    unlearn = module.unlearn
    monkeypatch.setattr(module, "unlearn", lambda m, fit, *a, **k: taught.append(len(fit)) or unlearn(m, fit, *a, **k))
    clean = quadrant_set()
    RNP.published()(quadrants(), clean)
    RNP()(quadrants(), clean)
    assert taught == [80, 60]
