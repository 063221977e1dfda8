"""Universal perturbations: their bounds, and the shortcuts that they find in classifiers whose shortcuts are known."""

import pytest
import torch
import torch.nn.functional as F

from channel_cases import assert_as_found, snapshot
from debackdoor.detectors.perturbations import KINDS, Additive, Patch, Perturbations, Sizes, Warp
from debackdoor.detectors.shortcut import Shortcuts, find_shortcuts, lead
from debackdoor.detectors.universal import AWAY, Aim, UniversalSearch, aims_at, patches_away
from debackdoor.runtime import generator
from shortcut_cases import CLASSES, row_images, switched_to, switched_to_the_next


@pytest.mark.parametrize("kind", KINDS)
def test_perturbed_images_are_images_and_the_seed_decides(kind: type[Perturbations]) -> None:
    x, index = torch.rand(5, 3, 8, 6, generator=generator(1)), torch.tensor([0, 1, 1, 0, 1])
    kept = x.clone()
    one, two, other = (kind(2, x.shape[1:], Sizes(), generator(seed)).apply(x, index) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.shape == x.shape
    assert 0 <= one.detach().min().item() <= one.detach().max().item() <= 1
    assert torch.equal(x, kept)


def test_additive_patterns_stay_in_their_ball() -> None:
    group = Additive(3, (3, 8, 8), Sizes(additive=0.02), generator(0))
    with torch.no_grad():
        group.parameters[0][0] *= 100
        group.parameters[0][1] *= 1e-3
    small = group.parameters[0][1].clone()
    group.project()
    assert group.parameters[0][0].detach().square().mean().sqrt().item() == pytest.approx(0.02)
    assert torch.equal(group.parameters[0][1], small)


def test_a_patch_covers_its_share_at_most() -> None:
    group = Patch(2, (1, 8, 8), Sizes(patch=1 / 16), generator(0))
    with torch.no_grad():
        group.parameters[0][0] = 20.0
        group.parameters[1][:] = 50.0  # white
    x = torch.zeros(2, 1, 8, 8)
    assert group.apply(x, torch.tensor([0, 1]))[0].sum().item() == pytest.approx(4.0, rel=1e-4)


def test_a_warp_moves_no_further_than_its_reach() -> None:
    group = Warp(1, (1, 16, 16), Sizes(warp=1 / 16), generator(0))
    with torch.no_grad():
        group.parameters[0][:] = 50.0  # all the way to the right and down
    columns = (torch.arange(16.0) / 15).expand(1, 1, 16, 16)
    moved = (group.apply(columns, torch.tensor([0])) - columns)[0, 0, :, :-1] * 15
    assert torch.allclose(moved, torch.ones(16, 15), atol=1e-3)


@pytest.mark.parametrize("size", [(16, 16), (9, 21)])
def test_a_warp_is_interpolated_as_torch_does_also_in_half_precision(size: tuple[int, int]) -> None:
    group = Warp(2, (1, *size), Sizes(warp=1 / 16), generator(0))
    like = torch.zeros(3, 1, *size)
    values = torch.randn(2, 1, Warp.GRID, Warp.GRID, generator=generator(1))
    with torch.autocast("cpu", torch.bfloat16):
        matrix = group._interpolation(like)
    expected = F.interpolate(values, size=size, mode="bicubic", align_corners=True)
    assert torch.allclose((values.flatten(2) @ matrix).view(2, 1, *size), expected, atol=1e-5)
    x, index = torch.rand(3, 1, *size, generator=generator(2)), torch.tensor([1, 0, 1])
    full = group.apply(x, index)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(group.apply(x, index), full)


def test_aims_are_of_every_kind() -> None:
    aims = aims_at([2, 5], 3)
    assert len(aims) == 18
    assert {(aim.kind, aim.target) for aim in aims} == {(kind, label) for kind in KINDS for label in (2, 5)}
    assert patches_away(2) == [Aim(Patch, AWAY)] * 2


def test_the_pattern_of_an_aim_is_the_one_that_is_added() -> None:
    data = row_images(4)
    search = UniversalSearch([Aim(Additive, 1), Aim(Patch, 1), Aim(Additive, 2)], data.x, Sizes(), 0)
    x = torch.full_like(data.x, 0.5)
    for number, aim in enumerate(search.aims):
        if aim.kind is Additive:
            added = search.apply(x, torch.full((4,), number)) - x
            assert torch.allclose(added[0], search.pattern(number), atol=1e-6)


def test_a_search_keeps_the_patterns_it_found() -> None:
    found = find_shortcuts(switched_to(2), row_images(), row_images(), [1, 3], steps=2)
    assert set(found.patterns) == {1, 3}
    size = Sizes().additive
    assert all(pattern.square().mean().sqrt() <= size * 1.001 for pattern in found.patterns.values())


def test_each_image_gets_the_perturbation_that_its_index_names() -> None:
    data = row_images(6)
    search = UniversalSearch([Aim(Patch, 1), Aim(Additive, 2), Aim(Patch, 3)], data.x, Sizes(), 0)
    assert [aim.kind for aim in search.aims] == [Additive, Patch, Patch]
    index = torch.tensor([2, 0, 1, 2, 0, 1])
    together = search.apply(data.x, index)
    for position in range(6):
        alone = search.apply(data.x[position : position + 1], index[position : position + 1])
        assert torch.allclose(together[position : position + 1], alone)


def test_a_switch_is_a_shortcut_to_its_label() -> None:
    model = switched_to(2)
    before, state = snapshot(model), torch.get_rng_state()
    found = find_shortcuts(model, row_images(), row_images(), range(CLASSES), precision="fp32")
    assert found.rates["patch"][2] == 1.0
    assert lead(found.rates["patch"], 2) >= 0.9
    assert all(lead(found.rates["patch"], label) < 0.2 for label in (0, 1, 3))
    assert all(rate < 0.2 for rate in found.rates["additive"].values())
    assert found.spread < 0.2
    assert_as_found(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_of_several_patches_away_the_one_counts_whose_answers_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sends everything to class 0, the second three images in four to the next class."""
    data = row_images()
    spread = torch.where(torch.arange(len(data)) % 4 > 0, (data.y + 1) % CLASSES, data.y)

    class StandIn:
        def __init__(self, aims: list[Aim], *_: object) -> None:
            self.aims = aims

        def run(self, *_: object, **__: object) -> None: ...

        def answers(self, model: object, x: object, number: int, **_: object) -> torch.Tensor:
            return (torch.zeros_like(data.y), spread)[number]

    monkeypatch.setattr("debackdoor.detectors.shortcut.UniversalSearch", StandIn)
    found = find_shortcuts(switched_to_the_next(), data, data, [], away=2, precision="fp32")
    assert found.away == pytest.approx(0.75)
    assert found.spread > 0


def test_a_switch_to_the_next_class_leads_away_and_nowhere() -> None:
    found = find_shortcuts(switched_to_the_next(), row_images(), row_images(), range(CLASSES), precision="fp32")
    assert found.away == 1.0
    assert found.gathered == pytest.approx(1 / CLASSES)
    assert found.spread >= 0.5


def test_without_a_switch_there_is_no_shortcut() -> None:
    model = switched_to(2)
    with torch.no_grad():
        model[1].weight[CLASSES] = 0
    found = find_shortcuts(model, row_images(), row_images(), range(CLASSES), precision="fp32")
    assert max(lead(rates, label) for rates in found.rates.values() for label in range(CLASSES)) < 0.3
    assert found.spread < 0.3


def test_only_the_labels_that_were_asked_for_are_searched() -> None:
    heard: list[tuple[object, ...]] = []
    found = find_shortcuts(
        switched_to(2), row_images(), row_images(), [1, 3], steps=20, progress=lambda *report: heard.append(report[:3])
    )
    assert all(list(rates) == [1, 3] for rates in found.rates.values())
    assert heard == [("search perturbations", done, 20) for done in (10, 20)]


def test_a_lead_is_measured_from_the_other_labels_median() -> None:
    rates = {0: 0.9, 1: 0.1, 2: 0.2, 3: 0.7}
    assert lead(rates, 0) == pytest.approx(0.7)
    assert lead(rates, 3) == pytest.approx(0.5)


def test_a_spread_is_what_leads_away_beyond_what_gathers() -> None:
    assert Shortcuts({}, 0.8, 0.3).spread == pytest.approx(0.5)


def test_where_no_patch_away_was_searched_for_nothing_is_said_of_one() -> None:
    found = find_shortcuts(switched_to_the_next(), row_images(), row_images(), [1], away=0, steps=2, precision="fp32")
    assert (found.away, found.gathered, found.spread) == (None, None, 0.0)
