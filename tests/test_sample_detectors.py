"""What holds for every sample detector: triggered images stand out, the model is left alone, bad input is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import toys
from channel_cases import assert_as_found, snapshot
from debackdoor.detectors.clustering import ActivationClustering
from debackdoor.detectors.cognitive_distillation import CognitiveDistillation
from debackdoor.detectors.sample_base import SampleDetector
from debackdoor.detectors.spectral import SpectralSignatures
from debackdoor.detectors.strip import STRIP
from debackdoor.errors import DataError, DebackdoorError, ModelError
from debackdoor.types import CleanSet
from sample_cases import backdoored, rows, triggered
from toys import set_values

DETECTORS: list[SampleDetector] = [
    STRIP(overlays=20, precision="fp32"),
    CognitiveDistillation(steps=60, smoothness=0.0, precision="fp32"),
    SpectralSignatures(precision="fp32"),
    ActivationClustering(precision="fp32"),
]
each_detector = pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: detector.name)


def auroc(scores: Tensor, bad: int) -> float:
    """How well the scores tell the last ``bad`` images from those before."""
    return float(roc_auc_score(torch.arange(len(scores)) >= len(scores) - bad, scores))


@each_detector
def test_triggered_images_stand_out(detector: SampleDetector) -> None:
    """One pixel decides for the trigger; of the images that get its label, fewer than half have it."""
    model, data = backdoored(1), rows(160)
    clean, pile = data.subset(torch.arange(40)), data.x[40:]
    victims = data.x[40:][data.y[40:] != 1][:8]
    images = torch.cat([pile, triggered(victims)])
    answers = model(images).argmax(1)
    assert (answers[-8:] == 1).all()
    heard: list[tuple[int, int]] = []
    scores, of_clean = detector(
        model, clean, images, answers, progress=lambda stage, done, total, numbers: heard.append((done, total))
    )
    assert scores.shape == (128,)
    assert of_clean.shape == (40,)
    assert scores.dtype == of_clean.dtype == torch.float32
    assert auroc(scores, 8) > 0.95
    # What a threshold is set by are images of the same kind as the pile's clean ones.
    assert float((scores[-8:] > of_clean.quantile(0.95)).float().mean()) > 0.8
    assert heard[-1][0] == heard[-1][1]


@each_detector
def test_the_seed_decides_and_the_model_is_left_as_it_was(detector: SampleDetector) -> None:
    model = nn.Sequential(toys.PreAct(), nn.Dropout(0.5)).train()
    data = CleanSet(torch.rand(12, 3, 8, 8), torch.arange(12) % 3)
    model[0].bn2.eval()
    model[0].conv1.weight.requires_grad_(False)
    model[0].stem.weight.grad = torch.ones_like(model[0].stem.weight)
    images, answers = torch.rand(9, 3, 8, 8), torch.arange(9) % 3
    before = snapshot(model)
    given = images, answers, data.x, data.y
    kept = [value.clone() for value in given]
    with torch.no_grad():
        one, two = (detector(model, data, images, answers) for _ in range(2))
    assert_as_found(model, before)
    assert all(map(torch.equal, given, kept))
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first, second)
        assert torch.isfinite(first).all()
        assert not first.requires_grad


class Fails(nn.Module):
    """Works for some calls, then raises."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.norm, self.head, self.left = nn.BatchNorm2d(1), nn.Linear(4, 3), calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of order")
        return self.head(self.norm(x).flatten(1))


@each_detector
@pytest.mark.parametrize("calls", [0, 1])
def test_the_model_is_left_as_it_was_after_an_error(detector: SampleDetector, calls: int) -> None:
    model = Fails(calls).train()
    clean, images = CleanSet(torch.rand(30, 1, 2, 2), torch.arange(30) % 3), torch.rand(40, 1, 2, 2)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of order"):
        detector(model, clean, images, torch.arange(40) % 3)
    assert_as_found(model, before)


@each_detector
def test_bad_piles_are_refused(detector: SampleDetector) -> None:
    model, clean = toys.mlp(), CleanSet(torch.rand(4, 1, 1, 2), torch.tensor([0, 1, 0, 1]))
    images, answers = torch.rand(3, 1, 1, 2), torch.tensor([0, 1, 1])
    for x, y, message in (
        (images[0], answers, r"the pile to judge: expected float32 images of shape \(N, C, H, W\)"),
        (images.double(), answers, "expected float32 images"),
        (images + 2, answers, r"pixel values in \[0, 1\]"),
        (images[:0], answers[:0], "at least one image"),
        (images, answers[:2], "expected 3 int64 labels"),
        (images, answers.float(), "expected 3 int64 labels"),
        (torch.rand(3, 1, 2, 1), answers, r"expected images of shape \(1, 1, 2\) as the clean ones"),
    ):
        with pytest.raises(DataError, match=message):
            detector(model, clean, x, y)


@each_detector
def test_a_model_that_answers_with_nan_is_refused(detector: SampleDetector) -> None:
    model, clean = toys.mlp(), CleanSet(torch.rand(4, 1, 1, 2), torch.tensor([0, 1, 0, 1]))
    set_values(model[1].bias, [float("nan"), 0.0])
    with pytest.raises(ModelError, match="expected finite outputs"):
        detector(model, clean, clean.x, clean.y)


@each_detector
@pytest.mark.parametrize("name", ["batch_size"])
def test_bad_settings_are_refused(detector: SampleDetector, name: str) -> None:
    with pytest.raises(DebackdoorError, match=f"{name} above 0, got 0"):
        type(detector)(**{name: 0})
    with pytest.raises(DebackdoorError, match="fp8"):
        type(detector)(precision="fp8")(toys.mlp(), *_two_images())


def _two_images() -> tuple[CleanSet, Tensor, Tensor]:
    clean = CleanSet(torch.rand(2, 1, 1, 2), torch.tensor([0, 1]))
    return clean, clean.x, clean.y


@pytest.mark.parametrize(
    "make",
    [
        lambda: STRIP(overlays=0),
        lambda: CognitiveDistillation(steps=0),
        lambda: CognitiveDistillation(sparsity=-1.0),
        lambda: CognitiveDistillation(smoothness=-1.0),
        lambda: CognitiveDistillation(smoothness=float("nan")),
        lambda: ActivationClustering(components=0),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], SampleDetector]) -> None:
    with pytest.raises(DebackdoorError, match="expected"):
        make()


@each_detector
@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_piles_of_many_classes_get_finite_scores(detector: SampleDetector, size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 43)).eval()
    clean = CleanSet(torch.rand(43, 1, 2, 2), torch.arange(43))
    images = torch.rand(size, 1, 2, 2)
    for answers in (torch.full((size,), 42), torch.arange(size)):
        scores, of_clean = detector(model, clean, images, answers)
        assert torch.isfinite(scores).all()
        assert torch.isfinite(of_clean).all()
        assert (len(scores), len(of_clean)) == (size, 43)


@each_detector
def test_images_that_are_all_alike_get_one_score(detector: SampleDetector) -> None:
    model, alike = backdoored(1), rows(4).x[:1].expand(12, 1, 8, 8).contiguous()
    clean = CleanSet(alike, torch.zeros(12, dtype=torch.int64))
    scores, of_clean = detector(model, clean, alike, torch.zeros(12, dtype=torch.int64))
    # The masks are learned under colours of their own.
    close = 2.0 if isinstance(detector, CognitiveDistillation) else 1e-5
    assert float(torch.cat([scores, of_clean]).max() - torch.cat([scores, of_clean]).min()) < close


@each_detector
def test_scores_are_the_same_in_inference_mode(detector: SampleDetector) -> None:
    model, data = backdoored(1), rows(40)
    usual = detector(model, data, data.x[:8], model(data.x[:8]).argmax(1))
    with torch.inference_mode():
        data = rows(40)
        found = detector(model, data, data.x[:8], model(data.x[:8]).argmax(1))
    assert all(torch.equal(a, b) for a, b in zip(found, usual, strict=True))
