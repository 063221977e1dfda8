"""Keeping within memory: how many images go through a model at once, and that parts of a batch add up to it."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import debackdoor as db
from cli_cases import Shell
from debackdoor.case import open_case
from debackdoor.channels import find_channels
from debackdoor.defenses.lesson import Batch, Lesson, RelearnSettings
from debackdoor.defenses.relearn import relearn
from debackdoor.defenses.rnp import RNP
from debackdoor.detectors.trigger import SearchSettings, search_triggers
from debackdoor.detectors.universal import aims_at
from debackdoor.errors import DebackdoorError
from debackdoor.memory import BESIDE, CLEAN_SETS, GIB, MODELS, MOST, RUNTIME, images_within
from debackdoor.models.forward import predict, trusted_precision
from debackdoor.rnp.recover import RecoverSettings, recover
from debackdoor.rnp.unlearn import UnlearnSettings, unlearn
from debackdoor.runtime import at_most, at_once, generator, has_fast_bf16, parts
from shortcut_cases import CLASSES, row_images, switched_to


class Largest(nn.Module):
    """A network that remembers the largest batch it was given; copies share the memory."""

    def __init__(self, inner: nn.Module, seen: list[int]) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def __deepcopy__(self, memo: dict[int, object]) -> Largest:
        return Largest(copy.deepcopy(self.inner, memo), self.seen)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.inner(x)


class Noting(nn.Linear):
    """A layer that saves more than tensors."""

    def get_extra_state(self) -> dict[str, str]:
        return {"made": "by hand"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        assert state


def test_what_modules_save_beside_tensors_takes_no_memory() -> None:
    x = torch.rand(6, 3, 4, 4)
    noting, plain = (nn.Sequential(nn.Flatten(), kind(48, 2)) for kind in (Noting, nn.Linear))
    assert images_within(1.0, noting, x) == images_within(1.0, plain, x)


@pytest.mark.parametrize(("count", "most"), [(10, 3), (10, 10), (10, 99), (7, 1), (1, 4)])
def test_parts_are_the_whole_batch_and_small_enough(count: int, most: int) -> None:
    with at_once(most):
        found = [list(range(count))[part] for part in parts(count)]
        assert at_most(count) == min(count, most)
    assert sorted(number for part in found for number in part) == list(range(count))
    assert max(map(len, found)) <= most
    assert len(parts(count)) == 1
    assert at_most(count) == count


def test_the_old_limit_is_back_after_an_error() -> None:
    with at_once(5):
        with pytest.raises(ZeroDivisionError), at_once(2):
            raise ZeroDivisionError
        assert at_most(9) == 5


def test_learning_in_parts_is_learning_from_the_whole() -> None:
    """Without batch statistics the gradients of the parts add up to that of the batch."""
    images, model = row_images(48), switched_to(2)
    layers = find_channels(model, images.x[:2])

    def learned() -> tuple[dict[str, Tensor], Tensor]:
        settings = UnlearnSettings(lr=0.01, batch_size=32, max_passes=2, least_steps=4)
        exposed = unlearn(model, images, settings, precision="fp32").model
        masks = recover(model, layers, images, RecoverSettings(passes=3, batch_size=32), precision="fp32")
        return exposed.state_dict(), masks.mask

    whole, masks = learned()
    with at_once(6):
        in_parts, masks_in_parts = learned()
    for name, value in whole.items():
        torch.testing.assert_close(in_parts[name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(masks_in_parts, masks, rtol=1e-4, atol=1e-6)
    assert not torch.equal(whole["1.weight"], model.state_dict()["1.weight"])
    assert masks.min() < 1


@pytest.mark.parametrize(("batch_size", "most"), [(12, 10), (12, 4), (2, 4)])
def test_a_lesson_in_parts_is_the_lesson_from_the_whole(batch_size: int, most: int) -> None:
    """The triggers that move along with the student included, and parts without a clean image."""
    images, model = row_images(48), switched_to(2)
    layers = find_channels(model, images.x[:2])
    settings = RelearnSettings(steps=6, batch_size=batch_size, head_start=2, triggered=6)

    def learned() -> list[float]:
        history = relearn(
            model, layers, (), images, images, 1.0, aims_at([2]), settings=settings, precision="fp32"
        ).history
        return [row["loss"] for row in history]

    whole = learned()
    with at_once(most):
        assert learned() == pytest.approx(whole, rel=1e-3)


def test_triggers_searched_in_parts_are_the_same() -> None:
    images, settings = row_images(48), SearchSettings(steps=10, batch_size=8)

    def found() -> list[float]:
        return [trigger.l1 for trigger in search_triggers(switched_to(2), images, images, range(CLASSES), settings)]

    whole = found()
    with at_once(16):
        assert found() == pytest.approx(whole)


@pytest.mark.parametrize("most", [9, 6, 5, 4])
def test_parts_of_a_lesson_are_all_of_it_and_small_enough(most: int) -> None:
    """Six clean images and as many mixed ones, four with a trigger and two with a square."""
    kind = torch.tensor([0] * 6 + [1] * 6 + [2] * 4 + [3] * 2).float()
    batch = Batch(kind, torch.arange(18.0), torch.arange(6), torch.arange(6) + 20, torch.arange(4))
    assert batch.split() == [batch]
    with at_once(most):
        split = batch.split()
    assert len(split) == math.ceil(18 / most)
    for part in split:
        assert len(part.seen) <= most
        assert part.seen.tolist() == kind[part.taught.long()].tolist()
        assert len(part.seen) == 2 * len(part.y) + len(part.triggered_y)
        clean, mixed = part.taught[: 2 * len(part.y)].chunk(2)
        assert (mixed - clean).tolist() == [6] * len(part.y)
        assert int((part.seen == 2).sum()) == len(part.trigger)
    assert sorted(torch.cat([part.taught for part in split]).tolist()) == list(range(18))
    for name in ("y", "triggered_y", "trigger"):
        together = torch.cat([getattr(part, name) for part in split])
        assert sorted(together.tolist()) == sorted(getattr(batch, name).tolist())


def test_a_part_of_a_lesson_may_lack_clean_images() -> None:
    """Two clean images and two mixed ones, nine with a trigger: of four parts one pair each is in two."""
    batch = Batch(torch.zeros(13), torch.arange(13.0), torch.arange(2), torch.arange(9), torch.arange(9))
    with at_once(4):
        sizes = [(len(part.y), len(part.trigger)) for part in batch.split()]
    assert sizes == [(1, 2), (1, 1), (0, 3), (0, 3)]


def test_a_repair_lets_no_more_images_through_than_it_may() -> None:
    seen: list[int] = []
    model, images = Largest(switched_to(2), seen).eval(), row_images(64)
    kept = 49 + 5 + 5  # at least the image and what comes out of the first layer and of ReLU, float32
    base = RUNTIME * GIB + MODELS * 1100 + CLEAN_SETS * images.x.numel() * 4
    result = db.repair(model, images, device="cpu", precision="fp32", memory=(base + 20 * BESIDE * 4 * kept) / GIB)
    assert result.changed
    assert max(seen) <= 32
    seen.clear()
    assert db.repair(model, images, device="cpu", precision="fp32").changed
    assert max(seen) > 32


class Counted(nn.Module):
    """A network that notes at every call how many of it there are, copies included."""

    def __init__(self, inner: nn.Module, alive: weakref.WeakSet[Counted], most: list[int]) -> None:
        super().__init__()
        self.inner, self.alive, self.most = inner, alive, most
        alive.add(self)

    def __deepcopy__(self, memo: dict[int, object]) -> Counted:
        return Counted(copy.deepcopy(self.inner, memo), self.alive, self.most)

    def forward(self, x: Tensor) -> Tensor:
        self.most.append(len(self.alive))
        return self.inner(x)


def test_a_repair_holds_as_many_networks_as_are_counted_on() -> None:
    """Those of ``MODELS`` but a checkpoint, gradients, momentum and fused layers; and at the end the pruned student."""
    most: list[int] = []
    model = Counted(switched_to(2), weakref.WeakSet(), most).eval()
    result = db.repair(model, row_images(64), device="cpu", precision="fp32")
    assert [step.name for step in result.steps][-2:] == ["relearn", "verify"]
    assert result.plan
    assert max(most) == MODELS - 4 + 1


def test_gradients_and_momentum_make_room_for_the_pruned_student(monkeypatch: pytest.MonkeyPatch) -> None:
    images, model, held = row_images(48), switched_to(2), list[int]()
    layers = find_channels(model, images.x[:2])
    lesson = Lesson(model, model, layers, (), images, (), (), RelearnSettings(steps=2), 0, "fp32")

    def prune(student: nn.Module, *_: object) -> nn.Module:
        held.append(sum(parameter.grad is not None for parameter in student.parameters()) + len(lesson.optimizer.state))
        return student

    monkeypatch.setattr("debackdoor.defenses.lesson.prune", prune)
    history: list[dict[str, Any]] = []
    lesson.teach(history, None)
    assert held == [0]
    assert len(history) == 2


def test_a_model_that_forgot_is_gone_when_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgot:
        def __init__(self) -> None:
            self.history = [{"label_shares": [0.5] * CLASSES}]

    made: list[weakref.ref[Forgot]] = []
    still: list[bool] = []

    def unlearn_parts(*_: object, **__: object) -> Iterator[Forgot]:
        for _run in range(3):
            still.extend(one() is not None for one in made)
            kept = [Forgot()]
            made.append(weakref.ref(kept[0]))
            yield kept.pop()

    monkeypatch.setattr("debackdoor.case.unlearn_parts", unlearn_parts)
    case = open_case(switched_to(2), row_images(64), RNP(precision="fp32"), "cpu")
    case.pile_ups(case.suspect)
    assert still
    assert not any(still)


def test_the_images_are_a_power_of_two_and_follow_the_memory() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    x = torch.rand(20, 3, 8, 8, generator=generator(0))
    found = [images_within(limit, model, x, "fp32") for limit in (0.7, 1.2, 2.4)]
    assert all(count & (count - 1) == 0 for count in found)
    # The input, what the convolution gives ReLU and ReLU the linear layer, 4 bytes a number.
    each = BESIDE * 4 * (3 * 64 + 16 * 36)
    for limit, count in zip((0.7, 1.2, 2.4), found, strict=True):
        assert count <= (limit - RUNTIME) * GIB / each < 2.1 * count


def test_too_little_memory_is_refused_with_what_would_do() -> None:
    with pytest.raises(DebackdoorError, match=r"at least 0\.7 GiB for this model and 20 clean images, got 0\.6"):
        images_within(0.6, nn.Linear(3, 10), torch.rand(20, 3))


def test_infinite_memory_is_as_much_as_any_batch_needs() -> None:
    assert images_within(math.inf, nn.Linear(3, 10), torch.rand(20, 3), "fp32") == MOST


@pytest.mark.parametrize("command", ["scan", "repair", "detect"])
@pytest.mark.parametrize("memory", ["0", "-1", "nan", "much"])
def test_the_commands_refuse_such_memory(shell: Shell, command: str, memory: str) -> None:
    more = {"scan": [], "repair": ["--out", shell.folder / "out.pt"], "detect": ["--suspects", "digits"]}[command]
    arguments = (shell.checkpoint(), "--arch", shell.arch, "--clean", "digits", *more)
    ran = shell(command, *arguments, "--memory", memory)
    assert ran.code in (2, 4)
    assert "memory" in ran.err
    assert "Traceback" not in ran.err
    assert not (shell.folder / "out.pt").exists()


def test_half_precision_is_not_used_where_it_changes_the_answers() -> None:
    """Logits that differ by less than bf16 can tell apart."""
    if not has_fast_bf16(torch.device("cpu")):
        pytest.skip("this machine computes in fp32 anyway")
    x = torch.rand(32, 2, generator=generator(0))
    fine = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        fine.weight.copy_(torch.tensor([[1.0, 1.0], [1.001, 0.999]]))
    assert trusted_precision(fine, x, "auto") == "fp32"
    assert trusted_precision(fine, x, "bf16") == "bf16"
    with torch.no_grad():
        fine.weight.copy_(torch.eye(2))
    assert trusted_precision(fine, x, "auto") == "auto"

    class Strict(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if out.dtype != torch.float32:
                raise TypeError("expected float32")
            return out

    assert trusted_precision(Strict(2, 2), x, "auto") == "fp32"
    assert predict(fine, x).shape == (32, 2)
