"""Neural Cleanse: which of several sizes are outlying, and a network with one small trigger."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scipy.stats import norm

from debackdoor.detectors.neural_cleanse import OUTLYING, Anomalies, anomaly_indices, neural_cleanse, published
from debackdoor.detectors.trigger import SearchSettings
from shortcut_cases import CLASSES, row_images, switched_to


def test_anomaly_indices_count_deviations_below_the_median() -> None:
    """The median is 11, the deviations are 10, 1, 0, 1 and 2: their median is 1, of a normal distribution 0.6745."""
    unit = norm.ppf(0.75)
    found = anomaly_indices([1.0, 10.0, 11.0, 12.0, 13.0])
    assert found == pytest.approx([10 * unit, unit, 0.0, -unit, -2 * unit])
    assert found[0] == pytest.approx(6.745, abs=1e-3)


@pytest.mark.parametrize("sizes", [[3.0] * 5, [1.0, 5.0, 5.0, 5.0]])
def test_without_deviation_nothing_is_outlying(sizes: list[float]) -> None:
    """More than half of the sizes are the same, so that their median deviation is 0, whatever the others are."""
    assert anomaly_indices(sizes) == [0.0] * len(sizes)


def test_the_index_is_that_of_the_label() -> None:
    assert Anomalies((), (0.5, -1.0, 2.5), 2).index == 2.5


def test_the_published_search() -> None:
    assert published().lower_by == pytest.approx(8**0.5)
    assert replace(published(), lower_by=2.0) == SearchSettings(
        steps=200, cost=0.001, patience=5, raise_by=2.0, lower_by=2.0, success=0.99
    )
    assert published(7).steps == 7


def test_the_label_of_a_switch_has_the_smallest_trigger() -> None:
    """The switch's pixel alone leads to label 2; towards another label its own pixel has to beat the class's."""
    heard: list[int] = []
    found = neural_cleanse(
        switched_to(2), row_images(), row_images(), CLASSES, precision="fp32",
        progress=lambda _, done, *__: heard.append(done),
    )  # fmt: skip
    sizes = [trigger.l1 for trigger in found.triggers]
    assert [trigger.label for trigger in found.triggers] == list(range(CLASSES))
    assert list(found.indices) == anomaly_indices(sizes)
    assert found.label == sizes.index(min(sizes)) == 2
    assert found.index == max(found.indices) > OUTLYING
    assert heard == list(range(10, 201, 10))
    brief = neural_cleanse(switched_to(2), row_images(), row_images(), CLASSES, published(3), precision="fp32")
    assert brief.triggers[2].l1 != found.triggers[2].l1
