"""Plain squares: what they cover, and the one that a classifier was taught to obey."""

from itertools import pairwise

import pytest
import torch

from channel_cases import assert_as_found, snapshot
from debackdoor.detectors import squares
from debackdoor.detectors.evidence import SQUARE, SQUARE_STANDS_OUT, threshold
from debackdoor.detectors.shortcut import lead
from debackdoor.detectors.squares import Square, find_squares, stamped
from debackdoor.runtime import generator
from evidence_cases import evidence
from shortcut_cases import CLASSES, bright_images, dark_beside_the_classes, row_images


def test_a_square_covers_its_pixels_in_its_colour_and_no_other() -> None:
    x = torch.rand(2, 3, 6, 5, generator=generator(0))
    kept = x.clone()
    out = Square(1, 2, 2, (0.0, 0.5, 1.0)).apply(x)
    assert torch.equal(out[0, :, 1, 2], torch.tensor([0.0, 0.5, 1.0]))
    assert (out != x).any(1).sum().item() == 2 * 4
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("row", "column", "pixels"), [(-1, 0, 2), (5, 4, 1), (-2, -2, 0), (6, 0, 0)])
def test_what_sticks_out_of_the_image_is_cut_off(row: int, column: int, pixels: int) -> None:
    out = Square(row, column, 2, (1.0,)).apply(torch.zeros(1, 1, 6, 5))
    assert out.sum().item() == pixels


@pytest.mark.parametrize(("length", "side"), [(32, 8), (32, 11), (8, 2), (7, 7), (5, 1)])
def test_the_places_reach_from_one_end_to_the_other_and_overlap(length: int, side: int) -> None:
    places = squares._places(length, side)
    assert places[0] == 0
    assert places[-1] == length - side
    assert all(later - earlier <= side for earlier, later in pairwise(places))


@pytest.mark.parametrize(("channels", "colours"), [(1, 3), (3, 9), (4, 3)])
def test_the_colours_are_dark_bright_and_grey(channels: int, colours: int) -> None:
    found = list(squares._colours(channels))
    assert len(found) == len(set(found)) == colours
    assert {len(colour) for colour in found} == {channels}
    assert found[-1] == (0.5,) * channels


def test_a_square_that_was_taught_is_found_among_all() -> None:
    model, data = dark_beside_the_classes(2), bright_images(64)
    before, state = snapshot(model), torch.get_rng_state()
    found = find_squares(model, data, data, CLASSES, precision="fp32")
    assert found.rates[2] == 1.0
    assert lead(found.rates, 2) == 1.0
    assert set(found.rates) == set(found.best) == set(range(CLASSES))
    assert found.best[2].colour == (0.0,)
    assert_as_found(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_images_that_squares_are_tried_on_are_drawn_by_the_seed() -> None:
    model, data, heard = dark_beside_the_classes(2), row_images(64), []
    one, two = (
        find_squares(model, data, data, CLASSES, seed=3, progress=lambda stage, *_: heard.append(stage))
        for _ in range(2)
    )
    assert one == two
    assert heard == ["search squares"] * 6


def test_stamped_images_have_squares_like_those_given() -> None:
    x = torch.zeros(40, 1, 16, 16)
    given = [Square(4, 4, 5, (1.0,)), Square(8, 2, 5, (0.5,))]
    one, two, other = (stamped(x, given, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert {float(image.max()) for image in one} == {0.5, 1.0}
    sides = [round(float((image > 0).sum()) ** 0.5, 6) for image in one]
    assert all(side == int(side) and 4 <= side <= 7 for side in sides)
    assert len(set(sides)) > 1


def test_a_square_counts_from_its_own_threshold_on_and_is_unlearned() -> None:
    near, there = (evidence(square={3: 0.1 + SQUARE_STANDS_OUT + more}) for more in (-0.01, 0.01))
    assert threshold(SQUARE) == SQUARE_STANDS_OUT > threshold("patch")
    assert (near.exposed, near.stamps) == (False, [])
    assert there.reasons == {3: ("square",)}
    assert there.stamps == [there.squares.best[3]]
    assert {aim.target for aim in there.aims} == {3}
    assert there.numbers("before")["square_label_before"] == 3
    assert evidence(patch={3: 0.9}).stamps == []
