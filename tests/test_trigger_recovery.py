"""Trigger recovery from a suspect model and its exposed copy, on classifiers whose trigger is known."""

import pytest
import torch
from torch import Tensor, nn

from channel_cases import assert_as_found, snapshot
from debackdoor.detectors.trigger import LARGER, SearchSettings, _Joint, recover_trigger, search_triggers, success_rate
from debackdoor.runtime import at_once
from debackdoor.types import CleanSet, RecoveredTrigger
from toys import set_values

PIXELS, HONEST, TRIGGER = 16, 5, 10
SETTINGS = SearchSettings(steps=200, lr=0.1, cost=1e-3, success=0.9, batch_size=8)


def linear(weights: dict[tuple[int, int], float], bias: list[float]) -> nn.Sequential:
    """A linear classifier of 1x4x4 images with these weights by class and pixel, all others 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3))
    weight = torch.zeros(3, PIXELS)
    for place, value in weights.items():
        weight[place] = value
    set_values(model[1].weight, weight.flatten().tolist())
    set_values(model[1].bias, bias)
    return model.eval()


def suspect() -> nn.Sequential:
    """Logits 4 x0, 4 x15 and 24 xH + 20 xT - 8: class 2 is ``HONEST``, and ``TRIGGER`` says so too, less loudly."""
    return linear({(0, 0): 4, (1, 15): 4, (2, HONEST): 24, (2, TRIGGER): 20}, [0, 0, -8])


def exposed() -> nn.Sequential:
    """Has forgotten all but the trigger: logits 0, 0 and 20 xT - 14."""
    return linear({(2, TRIGGER): 20}, [0, 0, -14])


def lost() -> nn.Sequential:
    """Has lost the trigger for a pixel of its own: logits 0, 0 and 100 x3 - 5."""
    return linear({(2, 3): 100}, [0, 0, -5])


def images(count: int = 12) -> CleanSet:
    """Images of classes 0 and 1 in turn."""
    x, y = torch.zeros(count, PIXELS), torch.arange(count) % 2
    x[torch.arange(count), 15 * y] = 1
    return CleanSet(x.view(-1, 1, 4, 4), y)


def brightest(found: RecoveredTrigger) -> int:
    return int((found.mask * found.pattern).argmax())


def test_features_of_the_class_lead_the_suspect_astray_but_not_both_models_together() -> None:
    """The suspect alone takes 12 / 24 of the class's own pixel or 12 / 20 of the trigger's.

    Both together take (12 + 14) / (20 + 20) of the trigger's; all of the other, 24, is less than 26.
    """
    alone = recover_trigger(suspect(), suspect(), images(), images(), 2, SETTINGS, precision="fp32")
    assert brightest(alone) == HONEST
    found = recover_trigger(suspect(), exposed(), images(), images(), 2, SETTINGS, precision="fp32")
    assert brightest(found) == TRIGGER
    assert found.label == 2
    assert found.success_rate == 1.0
    assert found.l1 == pytest.approx(float(found.mask.sum()))
    assert suspect()(found.apply(images().x)).argmax(1).tolist() == [2] * 12


def test_where_the_exposed_model_has_lost_the_backdoor_the_suspect_alone_is_searched() -> None:
    """Both together take 17 / 100 of a pixel that the suspect does not even look at."""
    heard: list[tuple[int, int]] = []
    found = recover_trigger(
        suspect(), lost(), images(), images(), 2, SETTINGS, precision="fp32",
        progress=lambda stage, done, total, numbers: heard.append((done, total)),
    )  # fmt: skip
    assert found.success_rate == 1.0
    assert brightest(found) == HONEST
    assert heard == [(done, 200) for done in range(10, 201, 10)] * 2


def test_a_trigger_for_both_models_that_is_far_larger_than_the_suspects_own_is_not_taken() -> None:
    """The suspect asks for 12 of ``HONEST``'s 24, half a pixel; both for 52: two whole pixels and 8 / 6 of others."""
    asking = linear({(2, pixel): 6 for pixel in (3, 4, 6, 7, 8, 9)}, [0, 0, -40])
    alone, together = (
        search_triggers(model, images(), images(), [2], SETTINGS, precision="fp32")[0]
        for model in (suspect(), _Joint(suspect(), asking, 2, 0.0))
    )
    assert together.l1 > LARGER * alone.l1
    assert success_rate(suspect(), together, images()) == alone.success_rate == 1.0
    found = recover_trigger(suspect(), asking, images(), images(), 2, SETTINGS, precision="fp32")
    assert (found.l1, found.success_rate) == (alone.l1, 1.0)
    assert torch.equal(found.mask, alone.mask)


def test_the_answers_of_both_are_multiplied_and_the_exposed_model_doubts() -> None:
    """Log-probabilities add up. With its logit held down by ln 4, odds of 4 to 1 for class 1 are even."""
    left, right = (linear({}, [0, float(torch.tensor(value).log()), -1e9]) for value in (3.0, 4.0))
    log_odds = _Joint(left, right, 1, float(torch.tensor(4.0).log()))(images().x)
    torch.testing.assert_close(log_odds.exp()[:, :2], torch.tensor([[0.25 * 0.5, 0.75 * 0.5]]).expand(12, 2))


def test_the_doubt_is_twice_what_clean_images_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exposed model leads by 1 for class 2 on clean images of other classes, 51 for its own, which do not count."""
    seen: list[float] = []

    class Spy(_Joint):
        def __init__(self, suspect: nn.Module, exposed: nn.Module, label: int, doubt: float) -> None:
            super().__init__(suspect, exposed, label, doubt)
            seen.append(doubt)

    monkeypatch.setattr("debackdoor.detectors.trigger._Joint", Spy)
    model = linear({(2, HONEST): 50}, [0, 0, 1])
    three = images(14)
    three.x[12:] = 0
    three.x.view(14, PIXELS)[12:, HONEST] = 1
    fit = CleanSet(three.x, torch.cat([three.y[:12], torch.tensor([2, 2])]))
    for exposed_model in (model, lost()):
        recover_trigger(suspect(), exposed_model, fit, fit, 2, SearchSettings(steps=1), precision="fp32")
    assert seen == [2.0, 0.0]


def test_the_success_rate_counts_images_of_other_labels_on_the_model_given() -> None:
    """The mask covers the pixel of class 0 only: the images of class 1, half of them, keep their answer."""
    model = linear({(0, 0): 4, (1, 15): 4}, [0, 0, 1])
    mask = torch.zeros(1, 4, 4)
    mask[0, 0, 0] = 1
    trigger = RecoveredTrigger(2, mask, torch.zeros(1, 4, 4), 0.0, 1.0)
    assert success_rate(model, trigger, images(), precision="fp32") == 0.5
    own = CleanSet(images().x, torch.full((12,), 2))
    assert success_rate(model, trigger, own) == 0.0


def test_both_models_are_left_alone_and_the_seed_decides() -> None:
    models = suspect(), exposed()
    models[0][1].weight.grad = torch.ones(3, PIXELS)
    before = [snapshot(model) for model in models]
    settings = SearchSettings(steps=4)
    one, two, other = (
        recover_trigger(*models, images(), images(), 2, settings, seed=seed, precision="fp32") for seed in (1, 1, 2)
    )
    for model, state in zip(models, before, strict=True):
        assert_as_found(model, state)
    assert torch.equal(one.pattern, two.pattern)
    assert not torch.equal(one.pattern, other.pattern)


def test_two_models_share_the_memory_that_one_may_take() -> None:
    seen: list[int] = []

    class Watched(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(len(x))
            return self.inner(x)

    with at_once(8):
        recover_trigger(Watched(suspect()), exposed(), images(), images(), 2, SearchSettings(steps=2), precision="fp32")
    assert [count for count in seen if count > 2] == [4, 4, 8, 8]  # two images show what may be fused
