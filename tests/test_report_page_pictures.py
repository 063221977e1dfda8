"""Pictures and charts of the report page: triggers, images and samples, and any number of channels and classes."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import report_cases as cases
from debackdoor.report import figures
from debackdoor.report.pictures import Pictures
from report_page_cases import Page, everything, page

__all__ = ["page"]


def pixels(image: dict[str, str]) -> NDArray[np.uint8]:
    head, _, data = image["src"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_trigger_and_stamped_images_are_right(page: Any) -> None:
    images = page(cases.scan(), pictures=everything()).all("img")
    mask, pattern, both = (pixels(image) for image in images[:3])
    assert (mask.shape, pattern.shape, both.shape) == ((32, 32), (32, 32, 3), (32, 32, 3))
    assert (mask[-4:-1, -4:-1] == 242).all()
    assert (pattern[-4:-1, -4:-1, 0] == [[255, 0, 255], [0, 255, 0], [255, 0, 255]]).all()
    assert both[0, 0, 0] == round(255 * 0.02 * 0.5)
    pairs = images[3:15]
    assert [image["alt"] for image in pairs[::2]] == [
        f"Clean image of label {label} ({cases.NAMES[label]})" for label in (0, 1, 2, 4, 5, 6)
    ]
    clean, trigger = cases.clean_set(), cases.trigger()
    for index, (before, after) in zip((0, 1, 2, 4, 5, 6), zip(pairs[::2], pairs[1::2], strict=True), strict=True):
        wanted = torch.stack([clean.x[index], trigger.apply(clean.x[index : index + 1])[0]])
        shown = np.stack([pixels(before), pixels(after)]).transpose(0, 3, 1, 2)
        assert np.abs(shown - 255 * wanted.numpy()).max() <= 0.51


def test_a_faint_pattern_is_shown_loud_and_on_images_as_it_is(page: Any) -> None:
    """Stripes of 0.02 up and down fill the range from black to white; on an image they are five grey levels."""
    found = page(cases.scan(), pictures=replace(everything(), pattern=cases.pattern()))
    assert "Held-out images it sends to 3 (cat) 81.0 % Strength (root mean square) 0.02" in found.words
    loud, before, after = (pixels(image).astype(int) for image in found.all("img")[15:18])
    assert (loud[:, ::2] == 255).all()
    assert (loud[:, 1::2] == 0).all()
    assert set(np.unique(np.abs(after - before))) <= {4, 5, 6}
    assert found.alts("The same image with the pattern") == ["The same image with the pattern"] * 6


def test_a_faint_pattern_is_shown_where_no_trigger_was_recovered(page: Any) -> None:
    pictures = replace(everything(), trigger=None, pattern=cases.pattern())
    found = page(cases.scan() | {"trigger": None}, pictures=pictures)
    assert "A faint pattern that sends images there" in found.words
    assert found.alts("The same image with the pattern") == ["The same image with the pattern"] * 6
    assert "The recovered trigger" not in found.words


def test_without_a_faint_pattern_none_is_mentioned(page: Any) -> None:
    assert "faint pattern that does so" not in page(cases.scan(pattern=None), pictures=everything()).words


def test_the_samples_with_the_highest_scores(page: Any) -> None:
    found = page(cases.scan(), pictures=everything())
    assert found.alts("Suspect image") == [f"Suspect image {number}" for number in range(23, 11, -1)]
    assert "12 of 24 images are flagged" in found.words
    assert "5.0 % of clean images" in found.words
    none = Pictures(
        scores=replace(cases.sample_scores(0), flagged=torch.zeros(0, dtype=torch.bool)),
        suspects=torch.zeros(0, 3, 8, 8),
    )
    assert page(cases.scan(), pictures=none).alts() == []


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_number_of_channels(page: Any, channels: int) -> None:
    x = torch.linspace(0, 1, 200).expand(12, channels, 300, 200)
    clean = replace(cases.clean_set(count=12), x=x)
    trigger = replace(cases.trigger(), mask=torch.zeros(1, 300, 200), pattern=x[0])
    images = page(cases.scan(), pictures=Pictures(trigger, clean, cases.sample_scores(12), x)).all("img")
    assert len(images) == 3 + 12 + 12
    assert pixels(images[-1]).shape == ((224, 149, 3) if channels == 3 else (224, 149))


@pytest.mark.parametrize("classes", [2, 10, 43, 1000])
def test_any_number_of_classes(page: Any, classes: int) -> None:
    found = page(cases.scan(classes=classes))
    bars = found.words[found.words.index("At the peak") : found.words.index("Over the steps")]
    left_out = f"The {classes - 10} labels with smaller shares are left out."
    assert (left_out in bars) == (classes > 10)
    assert len(re.findall(r"\d \d+\.\d %", bars)) <= min(classes, 10)
    assert f"every label would get {100 / classes:.1f} %" in found.words


def test_a_trigger_without_pictures(page: Any) -> None:
    found = page(cases.scan())
    assert f"98.8 % Size {cases.trigger().l1:.4g} pixels" in found.words
    assert found.alts() == []


def test_channels_by_layer_in_their_own_order(page: Any) -> None:
    found = page(cases.scan())
    chart = found.words[found.words.index("Channels with a score") : found.words.index("The 20 channels")]
    assert "The 4 layers with fewer of them are left out." in chart
    layers = re.findall(r"layer\S+bn2", chart)
    assert layers == sorted(layers)
    assert "25 of 64" in chart
    assert "the JSON record has 50" in found.words
    assert sorted(["b10", "b9", "a", "b"], key=figures.natural) == ["a", "b", "b9", "b10"]


@pytest.mark.parametrize("name", ["名前" * 30, "\U0001f600", "$a$", "#040404", "</text>", "a" * 300])
def test_charts_take_any_name(name: str, recwarn: pytest.WarningsRecorder) -> None:
    chart = figures.share_bars([0.9, 0.1], [name, "b"], [0], name)
    found = Page(chart)
    assert figures.text(name, 20) in found.words
    assert found.all("svg")[0]["aria-label"] == name
    assert "var(--bad)" in chart
    assert list(recwarn) == []


def test_figures_are_the_same_each_time_and_leave_matplotlib_alone() -> None:
    from matplotlib import rcParams

    before = dict(rcParams)
    rows = cases.scan()["unlearning"]
    assert figures.share_lines(rows, [3], "a") == figures.share_lines(rows, [3], "a")
    assert "pyplot" not in figures.share_lines.__globals__
    assert dict(rcParams) == before


def test_a_single_check_without_accuracy(page: Any) -> None:
    rows = [{"step": 2, "accuracy": float("nan"), "label_shares": [0.5, 0.5], "taken_back": False}]
    found = page(cases.scan(classes=2, history={"unlearn": rows}))
    assert "Accuracy ends at not known." in found.all("svg")[-2]["aria-label"].replace("\u00a0", " ")
