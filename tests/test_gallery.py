"""The gallery: what it shows of each attack, and that it is a page on its own."""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from debackdoor.attacks import load_trigger
from debackdoor.attacks.registry import ATTACKS
from debackdoor.data import load_dataset
from debackdoor.errors import DebackdoorError, MissingDependencyError
from debackdoor.report.gallery import _paper, write_gallery
from debackdoor.zoo import list_cards

Zoo = tuple[Path, Path]


class Page(HTMLParser):
    """The images of a page by the article they are in, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, list[dict[str, str]]] = {}
        self.fetched: list[str] = []
        self.open: list[str] = []
        self._article = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        if tag == "article":
            self._article = found["id"]
        if tag == "img":
            self.images.setdefault(self._article, []).append(found)
        self.fetched += [value for name, value in found.items() if name in ("src", "srcset")]
        self.fetched += [found["href"]] if tag == "link" else []
        self.fetched += [tag] if tag in ("script", "iframe", "object", "embed") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def pixels(image: dict[str, str]) -> NDArray[np.uint8]:
    head, _, data = image["src"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def text(small_zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "gallery.html"
    folder = small_zoo[0] / "tiny"
    write_gallery(path, list_cards(folder), folder, "tiny")
    return path.read_text(encoding="utf-8")


def test_each_attack_has_three_strips_of_four_images(text: str, small_zoo: Zoo) -> None:
    page = Page(text)
    assert page.open == []
    assert list(page.images) == ["patch", "shifted"]
    assert [len(images) for images in page.images.values()] == [12, 12]
    assert [image["alt"].split(",")[0] for image in page.images["patch"][::4]] == [
        "clean",
        "triggered",
        "difference × 10",
    ]
    assert all("label 3" not in image["alt"] for image in page.images["patch"])  # the target


def test_the_pictures_are_right(text: str, small_zoo: Zoo) -> None:
    images = [pixels(image) for image in Page(text).images["patch"]]
    assert {image.shape for image in images} == {(32, 32, 3)}
    pattern = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]])[:, :, None]
    for clean, *others in zip(images[:4], images[4:8], images[8:], strict=True):
        triggered, difference = (image.copy() for image in others)
        assert (triggered[-3:, -3:] == pattern).all()
        assert (difference[-3:, -3:] != 128).any()
        triggered[-3:, -3:], difference[-3:, -3:] = clean[-3:, -3:], 128
        assert (triggered == clean).all()
        assert (difference == 128).all()
    # Half noise: the difference is five times (noise - digit), around the middle.
    attack = load_trigger(small_zoo[0] / "tiny" / "shifted.trigger")
    test = load_dataset("digits", "test", 16)
    images = [pixels(image) for image in Page(text).images["shifted"]]
    wanted = 0.5 + 5 * (attack.tensors["image"] - test.x[0])
    assert np.abs(images[8] - wanted.clamp(0, 1).mul(255).permute(1, 2, 0).numpy()).max() <= 1
    assert np.abs(images[0] - test.x[0].mul(255).permute(1, 2, 0).numpy()).max() <= 0.5


def test_numbers_target_paper_and_notes_stand_beside_them(text: str, small_zoo: Zoo) -> None:
    cards = {card.name: card for card in list_cards(small_zoo[0] / "tiny")}
    start = text.index('<article id="patch">')
    patch, shifted = text[start:].split("</article>")[:2]
    for card, part in ((cards["patch"], patch), (cards["shifted"], shifted)):
        for rate in (card.clean_accuracy, card.attack_success_rate, card.robust_accuracy):
            assert rate is not None
            assert f"<dd>{100 * rate:.1f} %</dd>" in part.replace(' class="bad"', "")
        assert ATTACKS[card.attack].__name__ in part
    assert "https://arxiv.org/abs/1708.06733" in patch
    assert "Gu et al." in patch
    assert "poison_rate 0.3, seed 0" in patch
    assert "<dt>target</dt><dd>3</dd>" in patch
    assert "a &lt;note&gt; &amp; more" in patch
    assert "the next label (y + 1)" in shifted
    assert "all-to-all" in shifted
    table = text[text.index("<tbody>") :]
    mean = f"{100 * cards['clean-1'].clean_accuracy:.1f} %"
    assert re.findall(r'<td class="number">(.*?)</td>', table) == ["1", mean, mean, mean]


def test_the_page_needs_nothing_else(text: str) -> None:
    assert all(item.startswith("data:") for item in Page(text).fetched)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "image-rendering: pixelated" in text


def test_clean_models_are_summed_up(small_zoo: Zoo, tmp_path: Path) -> None:
    clean = list_cards(small_zoo[0] / "tiny")[0]
    cards = [replace(clean, name=f"c{share}", clean_accuracy=share) for share in (0.9, 0.8, 0.82)]
    write_gallery(tmp_path / "a.html", cards, small_zoo[0] / "tiny", "tiny")
    found = re.findall(r'<td class="number">(.*?)</td>', (tmp_path / "a.html").read_text())
    assert found == ["3", "84.0 %", "80.0 %", "90.0 %"]


def test_given_images_are_for_models_of_their_classes(small_zoo: Zoo, tmp_path: Path) -> None:
    folder = small_zoo[0] / "tiny"
    test = load_dataset("digits", "test", 40)
    for top, dark in ((10, True), (9, False)):
        y = test.y.clamp(max=top - 1).numpy()
        np.savez(tmp_path / "dark.npz", x=np.zeros((40, 3, 32, 32), dtype=np.float32), y=y)
        write_gallery(tmp_path / "a.html", list_cards(folder), folder, "tiny", str(tmp_path / "dark.npz"))
        images = Page((tmp_path / "a.html").read_text()).images["patch"]
        assert (not pixels(images[0]).any()) is dark


def test_every_attack_names_its_paper() -> None:
    for kind in ATTACKS.values():
        citation, link = _paper(kind)
        assert link.startswith("https://"), kind.name
        assert len(citation) > 20, kind.name


def test_errors(small_zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_zoo[0] / "tiny"
    cards = list_cards(folder)
    with pytest.raises(DebackdoorError, match="expected models to show, got none"):
        write_gallery(tmp_path / "a.html", [], folder, "tiny")
    with pytest.raises(DebackdoorError, match=r"a\.html was not written"):
        write_gallery(tmp_path / "none" / "a.html", cards, folder, "tiny")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        MissingDependencyError, match=r"expected the library jinja2 .* pip install 'debackdoor\[report\]'"
    ):
        write_gallery(tmp_path / "a.html", cards, folder, "tiny")
    assert not (tmp_path / "a.html").exists()
