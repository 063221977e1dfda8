"""What the tests of the report page share: a page as a browser reads it, and what is shown on one."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import report_cases as cases
from debackdoor.report.page import write_page
from debackdoor.report.pictures import Pictures

EVIL = "<script>alert('x')</script>\"'&$\\frac{"
VOID = ("meta", "link", "img", "br")


class Page(HTMLParser):
    """The elements of a page, its words, and everything that a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.active: list[str] = []
        self.words = ""
        self.feed(text)
        self.words = " ".join(self.words.replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "iframe", "object", "embed", "form", "base"):
            self.active.append(tag)
        self.active += [name for name in found if name.startswith("on")]
        for name in ("src", "srcset", "href", "xlink:href", "action"):
            if name in found and not found[name].startswith(("data:", "#")):
                self.active.append(found[name])

    def handle_startendtag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += "" if self.open[-1:] == ["style"] else f"{data} "

    def all(self, tag: str) -> list[dict[str, str]]:
        return [found for name, found in self.elements if name == tag]

    def alts(self, start: str = "") -> list[str]:
        return [image["alt"] for image in self.all("img") if image["alt"].startswith(start)]


@pytest.fixture
def page(tmp_path: Path) -> Any:
    """Writes a page and reads it, once it is found to be well formed and passive."""

    def write(record: Any, **given: Any) -> Page:
        path = tmp_path / "page.html"
        write_page(path, record, **given)
        text = path.read_text(encoding="utf-8")
        assert text.startswith("<!doctype html>")
        found = Page(text)
        assert found.open == []
        assert found.active == []
        assert "url(http" not in text
        assert "@import" not in text
        ids = [element["id"] for _, element in found.elements if "id" in element]
        assert len(ids) == len(set(ids))
        assert all(image["alt"] for image in found.all("img"))
        assert all("scope" in cell for cell in found.all("th"))
        return found

    return write


def everything() -> Pictures:
    return Pictures(cases.trigger(), cases.clean_set(), cases.sample_scores(), cases.suspect_images())
