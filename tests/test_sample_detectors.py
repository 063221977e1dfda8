"""Sample detectors on networks and piles where it can be worked out which images stand out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import toys
from channel_cases import assert_as_found, snapshot
from debackdoor.detectors.clustering import ActivationClustering
from debackdoor.detectors.cognitive_distillation import CognitiveDistillation
from debackdoor.detectors.features import penultimate_features, principal_axes
from debackdoor.detectors.sample_base import SampleDetector
from debackdoor.detectors.spectral import SpectralSignatures
from debackdoor.detectors.strip import STRIP
from debackdoor.errors import DataError, DebackdoorError, ModelError
from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from toys import set_values

DETECTORS: list[SampleDetector] = [
    STRIP(overlays=20, precision="fp32"),
    CognitiveDistillation(steps=60, smoothness=0.0, precision="fp32"),
    SpectralSignatures(precision="fp32"),
    ActivationClustering(precision="fp32"),
]
each_detector = pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: detector.name)


def rows(count: int) -> CleanSet:
    """8x8 images of noise below 0.1; of class k, row 2 k is at 1."""
    x, y = 0.1 * torch.rand(count, 1, 8, 8, generator=generator(0)), torch.arange(count) % 4
    x[torch.arange(count), 0, 2 * y] = 1.0
    return CleanSet(x, y)


def triggered(x: Tensor) -> Tensor:
    """The images with the pixel in the middle of row 1 at 1."""
    stamped = x.clone()
    stamped[:, 0, 1, 4] = 1.0
    return stamped


def backdoored(label: int) -> nn.Sequential:
    """Logit k is the sum of row 2 k, unless the trigger's pixel is at 1: then ``label`` has 12 and the others 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4))
    weight, head = torch.zeros(5, 8, 8), torch.zeros(4, 5)
    weight[torch.arange(4), 2 * torch.arange(4)] = 1
    weight[:4, 1, 4], weight[4, 1, 4] = -8, 1
    head[torch.arange(4), torch.arange(4)], head[label, 4] = 1, 12
    for parameter, values in zip(model.parameters(), (weight, torch.zeros(5), head, torch.zeros(4)), strict=True):
        set_values(parameter, values.flatten().tolist())
    return model.eval()


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


def equal_parts() -> nn.Sequential:
    """Logits log(p) and log(1 - p), p the mean of two pixels: answers with known entropy."""

    class Odds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            p = x.flatten(1).mean(1, keepdim=True).clamp(1e-6, 1 - 1e-6)
            return torch.cat([p, 1 - p], 1).log()

    return nn.Sequential(Odds()).eval()


def test_strip_is_the_mean_entropy_under_saturating_overlays() -> None:
    """(0, 1) over itself never; under (1, 0) it saturates nowhere and is (1, 1): sure. Under (0, 1): p = 1 / 2."""
    clean = CleanSet(torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]).view(3, 1, 1, 2), torch.tensor([0, 0, 1]))
    images = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    scores, of_clean = STRIP(overlays=100, precision="fp32")(equal_parts(), clean, images, torch.tensor([0, 0]))
    half = -torch.log(torch.tensor(2.0))
    # Each clean image has the two others: the first has one like itself and the third, the third has the two first.
    torch.testing.assert_close(of_clean, torch.stack([half / 2, half / 2, 0 * half]), atol=1e-4, rtol=0)
    assert float(scores[1]) == pytest.approx(0, abs=1e-4)
    # Two of the three overlays, so one or two that are like it.
    assert min(abs(float(scores[0] - half / 2)), abs(float(scores[0] - half))) < 1e-4


def test_strip_needs_something_to_lay_over_a_clean_image() -> None:
    clean = CleanSet(torch.rand(1, 1, 1, 2), torch.tensor([0]))
    with pytest.raises(DataError, match="at least 2 clean images"):
        STRIP()(toys.mlp(), clean, clean.x, clean.y)


def test_a_mask_keeps_what_the_answer_needs() -> None:
    """Of an image with the trigger that is its pixel, without it the rows; nothing hangs on the rows between."""
    x = rows(2).x
    detector = CognitiveDistillation(steps=100, smoothness=0.0, precision="fp32")
    masks = detector.distil(backdoored(1), torch.cat([x, triggered(x)]), generator(0))
    assert masks.shape == (4, 1, 8, 8)
    assert float(masks.min()) >= 0
    assert float(masks.max()) <= 1
    assert float(masks[2:, 0, 1, 4].min()) > 0.9
    assert float(masks[2:].sum((1, 2, 3)).max()) < 1.5
    assert float(masks[:2, 0, ::2].mean()) > 0.5
    assert float(masks[:2, 0, 3::2].max()) < 0.01


def test_the_batch_size_changes_no_score_of_the_features() -> None:
    model, data = backdoored(1), rows(40)
    for kind in (SpectralSignatures, ActivationClustering):
        few, many = (
            kind(batch_size=size, precision="fp32")(model, data.subset(torch.arange(8)), data.x, data.y)
            for size in (7, 500)
        )
        torch.testing.assert_close(few, many)


def seen(values: list[float]) -> tuple[nn.Module, Tensor]:
    """A model whose features are the two pixels, and images (v, 0) for the values v."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).eval()
    return model, torch.tensor([[value, 0.0] for value in values]).view(-1, 1, 1, 2)


def test_spectral_scores_are_squared_distances_along_the_widest_direction() -> None:
    """Of class 0: mean 0.25, so 0.25 ** 2 twice, 0 and 0.5 ** 2 would be; class 1 holds one image; class 2 none."""
    model, images = seen([0.0, 0.0, 0.25, 0.75, 0.5])
    clean = CleanSet(seen([0.5, 0.5, 0.5])[1], torch.tensor([0, 1, 2]))
    scores, of_clean = SpectralSignatures(precision="fp32")(model, clean, images, torch.tensor([0, 0, 0, 0, 1]))
    torch.testing.assert_close(scores, torch.tensor([0.0625, 0.0625, 0.0, 0.25, 0.0]))
    torch.testing.assert_close(of_clean, torch.tensor([0.0625, 0.0, 0.0]))


def test_clusters_are_scored_from_the_larger_to_the_smaller_centre() -> None:
    """0, 0, 0 and 1: the silhouette is 3 / 4, for the lone image has none. Halfway is 0."""
    model, images = seen([0.0, 0.0, 0.0, 1.0, 0.5])
    clean = CleanSet(seen([0.0, 0.5, 1.0, 0.25])[1], torch.tensor([0, 0, 0, 1]))
    detector = ActivationClustering(precision="fp32")
    scores, of_clean = detector(model, clean, images, torch.tensor([0, 0, 0, 0, 1]))
    torch.testing.assert_close(scores, torch.tensor([-0.75, -0.75, -0.75, 0.75, 0.0]))
    torch.testing.assert_close(of_clean, torch.tensor([-0.75, 0.0, 0.75, 0.0]))


def test_features_are_what_the_head_is_given() -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 3, 8, 8)
    model = toys.PreAct().eval()
    logits = model(x)
    features = penultimate_features(model, x, batch_size=2, precision="fp32")
    assert features.shape == (5, 8)
    torch.testing.assert_close(model.head[1](features), logits)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1), toys.pool()).eval()
    found = penultimate_features(convolution, x, precision="fp32")
    torch.testing.assert_close(found, convolution[1](convolution[0](x)).flatten(1).detach())
    vit = toys.TinyViT().eval()
    torch.testing.assert_close(vit.head(penultimate_features(vit, x, precision="fp32")), vit(x))


def test_features_of_other_heads() -> None:
    """Two of three outputs are used; a head that is no layer; a keyword; a linear layer on rows that are no images."""
    torch.manual_seed(0)
    x = torch.rand(5, 3, 8, 8)
    assert penultimate_features(toys.ViewNet().eval(), x).shape == (5, 6)
    cosine = nn.Sequential(toys.pool(), toys.CosineHead(3, 4)).eval()
    torch.testing.assert_close(penultimate_features(cosine, x, precision="fp32"), cosine(x).detach())

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(input=x.mean((2, 3)))

    torch.testing.assert_close(penultimate_features(Keyword().eval(), x, precision="fp32"), x.mean((2, 3)))

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.reshape(-1, 64)).view(len(x), -1)

    rows = Rows().eval()
    torch.testing.assert_close(penultimate_features(rows, x, precision="fp32"), rows(x).detach())


def test_the_table_has_means_over_seeds_and_the_worst_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both numbers where a detector was tried on both models, one where on one, none where on none."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    render = importlib.import_module("sample_tables").render
    records = [
        {"model": "a", "aurocs": {"strip": {"original": 0.5, "exposed": 0.75}, "exposed-margin": {"exposed": 1.0}}},
        {"model": "a", "aurocs": {"strip": {"original": 0.75, "exposed": 0.25}, "exposed-margin": {"exposed": 0.5}}},
        {"model": "b", "aurocs": {"strip": {"original": 0.125, "exposed": 1.0}}},
    ]
    assert render(records).splitlines() == [
        "| model | strip | exposed-margin |",
        "|---|---|---|",
        "| a | 0.625 / 0.500 | 0.750 |",
        "| b | 0.125 / 1.000 | - |",
        "| **mean** | 0.375 / 0.750 | 0.750 |",
        "| **worst** | 0.125 / 0.500 | 0.750 |",
    ]


def test_axes_leave_out_what_does_not_vary() -> None:
    axes = principal_axes(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), 2)
    torch.testing.assert_close(axes.mean, torch.tensor([2.0, 5.0]).double())
    torch.testing.assert_close(axes.directions.abs(), torch.tensor([[1.0, 0.0]]).double())
    torch.testing.assert_close(axes.deviations, torch.tensor([2.0]).double().sqrt())
    for alike in (torch.zeros(4, 2), torch.full((4, 2), 0.1), torch.ones(1, 2)):
        assert principal_axes(alike, 2).directions.shape == (0, 2)
        assert principal_axes(alike, 2).project(alike).shape == (len(alike), 0)
