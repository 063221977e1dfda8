"""Unlearning: why it stops, and which steps are taken back."""

from dataclasses import replace

import pytest
import torch

from debackdoor.rnp.unlearn import unlearn
from rnp_cases import DIAL, HALF, NAN, RIGHT, WRONG, Dial, column, dial_set, turn


def test_it_stops_when_the_task_is_forgotten() -> None:
    found, t = turn([RIGHT, RIGHT, HALF, WRONG, WRONG])
    assert found.reason == "forgotten"
    assert t == pytest.approx(0.3, rel=1e-4)
    assert column(found, "accuracy") == [1.0, 0.5, 0.0]
    assert column(found, "step") == [1, 2, 3]
    assert found.accuracy == 0.0
    assert found.label_shares == [0.25] * 4
    assert not found.model.training


def test_the_target_itself_is_enough() -> None:
    found, _ = turn([RIGHT, HALF, WRONG], stop_accuracy=0.5)
    assert (found.reason, len(found.history)) == ("forgotten", 1)


def test_by_default_the_target_is_a_tenth_above_chance() -> None:
    """Four classes: 0.35. Three of eight right is above it, two of eight are not."""
    three_right, two_right = [0, 0, 1, 2, 3, 3, 0, 0], [0, 0, 2, 2, 3, 3, 0, 0]
    found, _ = turn([RIGHT, HALF, three_right, two_right, WRONG], stop_accuracy=None)
    assert column(found, "accuracy") == [0.5, 0.375, 0.25]
    assert found.reason == "forgotten"


def test_a_small_fit_part_gets_as_many_steps_as_a_large_one() -> None:
    found, _ = turn([RIGHT], max_passes=3, least_steps=7)
    assert (found.reason, column(found, "step")[-1]) == ("steps", 7)


# Shares of label 2, and accuracies: 1/4 and 1, 1/2 and 3/4, 3/4 and 1/2, 5/8 and 5/8, 1/2 and 1/2, 1/4 and 1/2.
GATHERING = [
    RIGHT,
    [0, 0, 1, 1, 2, 2, 2, 2],
    [0, 2, 1, 2, 2, 2, 2, 2],
    [0, 2, 1, 1, 2, 2, 2, 2],
    [0, 3, 1, 0, 2, 2, 2, 2],
    HALF,
]


def test_answers_that_spread_again_bring_back_the_peak() -> None:
    found, t = turn(GATHERING, past_peak=0.2)
    assert found.reason == "piled up"
    assert [shares[2] for shares in column(found, "label_shares")] == [0.5, 0.75, 0.625, 0.5]
    assert t == pytest.approx(0.2, rel=1e-4)  # the peak, not where the last step led
    assert found.accuracy == column(found, "accuracy")[1] == 0.5
    assert found.label_shares == [0.125, 0.125, 0.75, 0.0]


def test_what_the_labels_are_is_no_peak() -> None:
    """Six of eight images have label 0, and as many answers at the start; half of these are on one label then."""
    uneven = dial_set().subset(torch.tensor([0, 1, 0, 1, 0, 1, 2, 4]))
    model = Dial([RIGHT, [1, 3, 1, 1, 2, 2, 3, 3], WRONG])
    found = unlearn(model, uneven, replace(DIAL, past_peak=0.2), precision="fp32")
    assert [max(shares) for shares in column(found, "label_shares")] == [0.5, 0.75]
    assert (found.reason, found.accuracy) == ("forgotten", 0.0)


def test_answers_that_spread_before_half_is_forgotten_do_not_stop_it() -> None:
    early = [RIGHT, [2, 0, 1, 1, 2, 2, 2, 3], RIGHT, RIGHT, WRONG]
    found, _ = turn(early, past_peak=0.2)
    assert column(found, "accuracy") == [0.75, 1.0, 1.0, 0.0]
    assert found.reason == "forgotten"


def test_without_past_peak_it_goes_on() -> None:
    found, t = turn(GATHERING, max_passes=5)
    assert found.reason == "steps"
    assert t == pytest.approx(0.5, rel=1e-4)
    assert found.label_shares == [0.25] * 4


def test_steps_run_out() -> None:
    found, t = turn([RIGHT], max_passes=3, batch_size=4)
    assert found.reason == "steps"
    assert column(found, "step") == [1, 2, 3, 4, 5, 6]
    assert t == pytest.approx(0.6, rel=1e-4)


def test_one_check_a_pass_and_a_step_size_that_decays() -> None:
    found, t = turn([RIGHT], max_passes=3, batch_size=4, check_every=None, decay_at=(1, 2))
    assert column(found, "step") == [2, 4, 6]
    assert t == pytest.approx(2 * (0.1 + 0.01 + 0.001), rel=1e-4)


def test_every_step_too_large_is_stuck() -> None:
    """The third step falls off the edge at t = 0.3; each half of the step size gets closer and falls off again."""
    found, t = turn([RIGHT, RIGHT, RIGHT, WRONG], largest_fall=0.3)
    assert found.reason == "stuck"
    assert column(found, "taken_back") == [False, False, True] + [False, True] * 10
    assert column(found, "lr")[2::2] == [2.0**-power for power in range(11)]
    assert t == pytest.approx(0.3 - 0.1 * 2.0**-10, rel=1e-4)
    assert found.accuracy == 1.0


def test_steps_taken_back_leave_no_trace() -> None:
    stages = [RIGHT, RIGHT, RIGHT, WRONG]
    before, _ = turn(stages, max_passes=2, largest_fall=0.3)
    after, _ = turn(stages, max_passes=3, largest_fall=0.3)
    assert column(after, "taken_back") == [False, False, True]
    assert column(after, "accuracy") == [1.0, 1.0, 0.0]
    assert after.accuracy == 1.0
    kept, found = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    assert int(found["norm.num_batches_tracked"]) == 2


def test_after_a_step_back_momentum_starts_afresh() -> None:
    """t goes 0.1, 0.29, 0.561 (over the edge), back to 0.29, and on by half a first step."""
    found, t = turn([RIGHT] * 5 + [WRONG], momentum=0.9, largest_fall=0.3, max_passes=4)
    assert column(found, "taken_back") == [False, False, True, False]
    assert column(found, "lr") == [1.0, 1.0, 1.0, 0.5]
    assert t == pytest.approx(0.29 + 0.05, rel=1e-4)


def test_a_fall_is_allowed_up_to_its_limit() -> None:
    found, _ = turn([RIGHT, HALF, WRONG], largest_fall=0.5)
    assert column(found, "taken_back") == [False, False]
    assert found.reason == "forgotten"


@pytest.mark.parametrize("largest_fall", [0.3, 1.0])
def test_a_model_that_breaks_down_is_never_returned(largest_fall: float) -> None:
    found, t = turn([RIGHT, RIGHT, [NAN] * 8], largest_fall=largest_fall, max_passes=60)
    assert found.reason == "stuck"
    assert found.accuracy == 1.0
    assert t == pytest.approx(0.2 - 0.1 * 2.0**-10, rel=1e-4)


def test_as_published_it_stops_by_the_accuracy_over_the_pass() -> None:
    """A pass has two steps; the first is right throughout, the second in half, and the check sees what comes after."""
    settings = {"check_every": 2, "stop_accuracy": 0.75}
    stages = [RIGHT, HALF, WRONG, WRONG, WRONG]
    checked, _ = turn(stages, **settings)
    assert (checked.reason, column(checked, "step")) == ("forgotten", [2])
    over_the_pass, _ = turn(stages, **settings, running=True)
    assert (over_the_pass.reason, column(over_the_pass, "step")) == ("forgotten", [2])
    later, _ = turn(stages, check_every=2, stop_accuracy=0.7, running=True)
    assert (later.reason, column(later, "step")) == ("forgotten", [2, 4])
    assert column(later, "accuracy") == [0.0, 0.0]
    assert later.accuracy == 0.0
