"""What open_case makes of networks and callers with odd habits, before any search begins."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import debackdoor as db
from channel_cases import assert_as_found, snapshot
from debackdoor.case import Case, open_case
from debackdoor.defenses import ANP, RNP, Defense, FineTuning
from debackdoor.errors import ModelError
from debackdoor.runtime import contiguous, learning
from debackdoor.types import CleanSet
from rnp_cases import quadrant_set, quadrants


def opened(model: nn.Module, clean: CleanSet | None = None) -> Case:
    return open_case(model, clean or quadrant_set(), RNP(precision="fp32"), "cpu")


class NoReturn(nn.Sequential):
    """Its ``train`` returns nothing, as of many networks that keep their norms frozen."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class Closure(nn.Module):
    """Calls one of its modules by a function that a copy keeps as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = quadrants()
        self.call = lambda x: self.body(x).mul(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class SharedMemory(nn.Module):
    """Two layers with one memory, but a parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = quadrants(), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.one.weight)
        self.two.weight.data = self.one.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.body(x)))


@contextmanager
def double() -> Iterator[None]:
    """A caller whose own numbers are float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_network_whose_train_returns_nothing() -> None:
    model = NoReturn(*quadrants())
    case = opened(model)
    assert isinstance(case.suspect, NoReturn)
    assert not any(module.training for module in case.suspect.modules())


def test_a_copy_that_would_call_the_callers_modules_is_refused() -> None:
    model = Closure().eval()
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"a function holds on to 'body.*write it as a method"):
        opened(model)
    assert_as_found(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_caller_may_use_the_network_in_another_thread_meanwhile() -> None:
    model, clean = quadrants(), quadrant_set()
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            model(clean.x[:4])

    other = threading.Thread(target=serve)
    other.start()
    try:
        assert opened(model).classes == 4
    finally:
        stop.set()
        other.join()


def test_weights_in_one_memory_are_refused() -> None:
    with pytest.raises(ModelError, match=r"got one\.weight and two\.weight in one memory"):
        opened(SharedMemory().eval())
    tied = SharedMemory().eval()
    tied.two.weight = tied.one.weight
    case = opened(tied)
    assert case.suspect.two.weight is case.suspect.one.weight


def test_a_callers_default_precision_changes_nothing() -> None:
    model, clean = quadrants(), quadrant_set()
    usual = db.scan(model, clean, device="cpu")
    with double():
        assert db.load_clean("digits", limit=20).x.dtype == torch.float32
        report = db.scan(model, clean, device="cpu")
        assert torch.get_default_dtype() == torch.float64
    assert (report.verdict, report.score) == (usual.verdict, usual.score)


def test_gradients_of_the_images_are_not_asked_for() -> None:
    clean = quadrant_set()
    case = opened(quadrants(), CleanSet(clean.x.requires_grad_(), clean.y))
    assert not any(part.x.requires_grad for part in (case.clean, case.fit, case.holdout))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_may_lie_channels_last_where_the_network_calls_view(channels: int) -> None:
    x = torch.rand(4, channels, 6, 6).permute(0, 2, 3, 1)
    pixels = torch.empty(4 * 36 * channels).as_strided(x.shape, (36 * channels, 6 * channels, channels, 1)).copy_(x)
    images = pixels.permute(0, 3, 1, 2)
    found = nn.Conv2d(channels, 2, 3)(contiguous(images))
    assert found.view(4, -1).shape == (4, 32)
    assert torch.equal(contiguous(images), images)


class Viewing(nn.Sequential):
    """Calls ``.view`` on its images."""

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = super().forward(x.view(len(x), -1).view(x.shape))
        return answers


def test_a_pile_may_lie_otherwise_in_memory_than_the_clean_images() -> None:
    model, clean = Viewing(quadrants()).eval(), quadrant_set()
    pile = clean.x[:8].transpose(2, 3).contiguous().transpose(2, 3)
    usual, found = (
        db.detect_samples(model, clean, x, method="strip", on="original", device="cpu") for x in (clean.x[:8], pile)
    )
    assert torch.equal(found.scores, usual.scores)


def test_a_callers_default_device_changes_nothing() -> None:
    """Numbers drawn on the CPU would be asked for elsewhere; "meta" stands for a GPU."""
    model, clean, images = quadrants(), quadrant_set(), quadrant_set(8).x
    usual = db.scan(model, clean, device="cpu", precision="fp32")
    with torch.device("meta"):
        assert db.load_clean("digits", limit=20).x.device.type == "cpu"
        report = db.scan(model, clean, device="cpu", precision="fp32")
        assert FineTuning(epochs=1, batch_size=20, shift=0.0)(model, clean).clean_accuracy["after"] > 0.5
        assert db.detect_samples(model, clean, images, device="cpu").scores.device.type == "cpu"
        assert torch.empty(1).device.type == "meta"
    assert (report.verdict, report.score) == (usual.verdict, usual.score)


def test_a_caller_who_forbids_what_is_not_deterministic_is_warned_instead() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with learning():
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("model", "said"), [(Closure, "a function holds on to 'body"), (SharedMemory, "in one memory")]
)
@pytest.mark.parametrize("defense", [FineTuning(epochs=1), RNP(), ANP(iterations=2)], ids=lambda d: type(d).__name__)
def test_defences_refuse_what_a_copy_would_not_hold(model: type[nn.Module], said: str, defense: Defense) -> None:
    suspect = model().eval()
    before = snapshot(suspect)
    with pytest.raises(ModelError, match=said):
        defense(suspect, quadrant_set())
    assert_as_found(suspect, before)


@pytest.mark.parametrize(
    "take", [opened, lambda model: FineTuning(epochs=1)(model, quadrant_set())], ids=["job", "defence"]
)
def test_a_compiled_part_is_refused(take: Callable[[nn.Module], object]) -> None:
    model = quadrants()
    model[5] = torch.jit.trace(model[5], torch.rand(1, model[5].in_features))
    with pytest.raises(ModelError, match="got a compiled ScriptModule"):
        take(model)
    assert not any(module._forward_pre_hooks for module in model.children())
