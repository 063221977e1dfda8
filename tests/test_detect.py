"""Which images of a pile are flagged: the threshold, how much of that is chance, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import debackdoor as db
from channel_cases import assert_as_found, snapshot
from debackdoor.detect import DETECTORS
from debackdoor.detectors.sample_base import SampleDetector
from debackdoor.errors import ChanceError, DataError, DebackdoorError, ModelError, TooFewError
from debackdoor.types import CleanSet
from rnp_cases import PILE, lived_in, quadrant_set, quadrants, strip_set, strips


@dataclass(frozen=True, kw_only=True)
class Fixed(SampleDetector):
    """Scores the 20 clean images from 0 to 19, and the pile as the test says; keeps what it was given."""

    name: ClassVar[str] = "fixed"
    scores: ClassVar[list[float]] = []
    given: ClassVar[list[Any]] = []

    def __call__(
        self, model: nn.Module, clean: CleanSet, images: Tensor, answers: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        self.given[:] = [model, clean, images, answers, self.seed, self.precision]
        order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(1))
        return torch.tensor(self.scores), torch.arange(float(len(clean)))[order]


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> type[Fixed]:
    monkeypatch.setitem(DETECTORS, "fixed", Fixed)
    return Fixed


def detect(pile: Tensor | CleanSet = PILE, **more: Any) -> db.SampleScores:
    return db.detect_samples(quadrants(), quadrant_set(), pile, **{"on": "original", "device": "cpu", **more})


def test_the_threshold_is_a_clean_score_and_flagged_is_what_is_above(fixed: type[Fixed]) -> None:
    """A tenth of a further score's 21 places among 20 may be above, 2.1: those beside 19, so that the threshold is 18.

    Were the four clean, all places among the 24 would be as likely for them. Three of them come before the second
    clean one if at least three are among the first four: 4 * 20 ways for three, and one for four, of 24 choose 4.
    """
    fixed.scores = [18.5, 18.0, 25.0, 19.5]
    found = detect(method="fixed", false_positive_rate=0.1)
    assert (found.threshold, found.false_positive_rate) == (18.0, 0.1)
    assert found.flagged.tolist() == [True, False, True, True]
    assert found.p_value == pytest.approx((4 * 20 + 1) / comb(24, 4))


@pytest.mark.parametrize(
    ("rate", "scores", "threshold", "flagged", "p_value"),
    [
        (0.0, [19.0, 20.0, 21.0], 19.0, 2, 3 / comb(23, 2)),  # two of three before 20: the first two places, 3 pairs
        (0.0, [1.0, 2.0, 19.0], 19.0, 0, 1.0),
        (0.01, [99.0, 98.0, 97.0], 19.0, 3, 1 / comb(23, 3)),  # of 20, a hundredth is none
        (0.05, [99.0, 98.0, 97.0], 19.0, 3, 1 / comb(23, 3)),  # above 18 there would be 2 places of 21
        (1.0, [0.0, 0.0, 0.5], 0.0, 1, None),
    ],
)
def test_thresholds_and_what_is_chance(
    rate: float, scores: list[float], threshold: float, flagged: int, p_value: float | None, fixed: type[Fixed]
) -> None:
    fixed.scores = scores
    found = detect(PILE[:3], method="fixed", false_positive_rate=rate)
    assert (found.threshold, int(found.flagged.sum())) == (threshold, flagged)
    if p_value is not None:
        assert found.p_value == pytest.approx(p_value)
    assert 0 <= found.p_value <= 1


def test_the_scores_are_a_sequence(fixed: type[Fixed]) -> None:
    fixed.scores = [18.5, 18.0, 25.0, 19.5]
    found = detect(method="fixed")
    assert (len(found), list(found), found[2]) == (4, fixed.scores, 25.0)
    assert found.answers.tolist() == [0, 1, 2, 3]
    assert found.method == "fixed on the original model"
    assert found.false_positive_rate == pytest.approx(1 / 21)  # a hundredth cannot be told with 20


def test_the_detector_gets_the_held_out_images_with_the_models_answers(fixed: type[Fixed]) -> None:
    """One clean image in ten has a wrong label: what counts is what the model says, as it is for the pile."""
    fixed.scores, clean = [1.0] * 4, quadrant_set()
    wrong = CleanSet(clean.x, torch.where(torch.arange(80) % 10 == 0, (clean.y + 1) % 4, clean.y))
    db.detect_samples(
        quadrants(), wrong, CleanSet(PILE, torch.tensor([3, 3, 3, 3])), method="fixed", on="original", seed=5,
        device="cpu", precision="fp32",
    )  # fmt: skip
    model, held, images, answers, seed, precision = fixed.given
    assert len(held) == 20
    assert torch.equal(model(held.x).argmax(1), held.y)
    assert (held.x.flatten(1)[:, None] == clean.x.flatten(1)).all(2).any(1).all()
    assert torch.equal(images, PILE)
    assert answers.tolist() == [0, 1, 2, 3]  # the labels of the pile are not used
    assert (seed, precision) == (5, "fp32")


def test_the_detector_gets_the_exposed_model_or_the_original(fixed: type[Fixed]) -> None:
    fixed.scores = [1.0] * 4
    for on, low, high in (("exposed", 0.0, 0.4), ("original", 1.0, 1.0)):
        assert detect(method="fixed", on=on).method == f"fixed on the {on} model"
        model, held, *_ = fixed.given
        assert low <= float((model(held.x).argmax(1) == held.y).float().mean()) <= high


def test_the_callers_model_is_left_alone_and_the_seed_decides() -> None:
    model, clean, images = strips().train(), strip_set(), strip_set(4, seed=1).x
    model[4].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(5)
    x, pile, before = clean.x.clone(), images.clone(), snapshot(model)
    heard: list[str] = []
    settings: dict[str, Any] = {"method": "exposed-margin", "device": "cpu"}
    one = db.detect_samples(
        model, clean, images, seed=2, progress=lambda stage, *_: heard.append(stage), **settings
    )  # fmt: skip
    assert_as_found(model, before)  # torch's random state included
    assert torch.equal(clean.x, x)
    assert torch.equal(images, pile)
    torch.manual_seed(99)
    two, other = (
        db.detect_samples(strips(), clean, CleanSet(images, torch.zeros(4).long()), seed=seed, **settings)
        for seed in (2, 3)
    )
    assert torch.equal(one.scores, two.scores)
    assert (one.threshold, one.p_value) == (two.threshold, two.p_value)
    assert not torch.equal(one.scores, other.scores)
    assert one.method == "exposed-margin on the exposed model"
    assert list(dict.fromkeys(heard)) == ["unlearn", "score samples"]


@pytest.mark.parametrize("stage", ["unlearn", "score samples"])
def test_the_callers_model_is_left_alone_when_interrupted(stage: str) -> None:
    model = lived_in()
    before = snapshot(model)

    def interrupt(now: str, *_: object) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        db.detect_samples(model, quadrant_set(), PILE, method="exposed-margin", device="cpu", progress=interrupt)
    assert_as_found(model, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "guess"}, DebackdoorError, "a method out of repair-shift, exposed-margin, strip, .*, got 'guess'"),
        ({"on": "both"}, DebackdoorError, "out of exposed, original, .*, got 'both'; choose another"),
        ({"on": "original"}, DebackdoorError, "for repair-shift and exposed-margin the exposed one, got 'original'"),
        ({"false_positive_rate": 1.5}, DebackdoorError, "false_positive_rate from 0 to 1, got 1.5; give a fraction"),
        ({"false_positive_rate": float("nan")}, DebackdoorError, "false_positive_rate from 0 to 1, got nan"),
        ({"seed": -1}, DebackdoorError, "a seed from 0 to 2147483647, got -1; correct it"),
        ({"images": PILE[:, :, :4]}, DataError, r"images of shape \(1, 8, 8\) .*, got \(1, 4, 8\); bring them"),
        ({"images": PILE[0]}, DataError, r"float32 images of shape \(N, C, H, W\), got torch.float32 \(1, 8, 8\)"),
        ({"images": PILE[:0]}, DataError, "at least one image, got none"),
        ({"images": PILE.double()}, DataError, "float32 images of .*, got torch.float64"),
        ({"images": PILE * 255}, DataError, r"pixel values in \[0, 1\], got .*; scale the images"),
        ({"images": PILE - torch.nan}, DataError, r"pixel values in \[0, 1\], got nan"),
        ({"clean": quadrant_set(19)}, TooFewError, "at least 20 clean images, got 19; add images"),
        ({"clean": CleanSet(quadrant_set().x, torch.arange(80) // 4 % 4)}, ChanceError, "no better than chance; check"),
        ({"clean": CleanSet(quadrant_set().x, torch.arange(80) % 5)}, DataError, "labels of 0 to 3 .* got 4"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(9, 4))}, ModelError, r"take images of shape \(1, 8, 8\)"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_the_work(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"model": quadrants(), "clean": quadrant_set(), "images": PILE, "device": "cpu"} | arguments
    heard: list[object] = []
    with pytest.raises(error, match=message) as caught:
        db.detect_samples(**given, progress=lambda *now: heard.append(now))
    assert isinstance(caught.value, DebackdoorError)
    assert "\n" not in str(caught.value)
    assert heard == []
