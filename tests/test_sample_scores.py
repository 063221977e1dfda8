"""The scores of single sample detectors, and the features that they look at, worked out on paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import toys
from debackdoor.detectors.clustering import ActivationClustering
from debackdoor.detectors.cognitive_distillation import CognitiveDistillation
from debackdoor.detectors.features import penultimate_features, principal_axes
from debackdoor.detectors.spectral import SpectralSignatures
from debackdoor.detectors.strip import STRIP
from debackdoor.errors import DataError
from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from sample_cases import backdoored, rows, triggered


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


def test_axes_leave_out_what_does_not_vary() -> None:
    axes = principal_axes(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), 2)
    torch.testing.assert_close(axes.mean, torch.tensor([2.0, 5.0]).double())
    torch.testing.assert_close(axes.directions.abs(), torch.tensor([[1.0, 0.0]]).double())
    torch.testing.assert_close(axes.deviations, torch.tensor([2.0]).double().sqrt())
    for alike in (torch.zeros(4, 2), torch.full((4, 2), 0.1), torch.ones(1, 2)):
        assert principal_axes(alike, 2).directions.shape == (0, 2)
        assert principal_axes(alike, 2).project(alike).shape == (len(alike), 0)
