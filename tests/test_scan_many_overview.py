"""The overview of many scans: the Parquet table, what the page says, and the page in a browser."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from debackdoor.bench import overview
from debackdoor.bench.overview import write_overview
from debackdoor.bench.scan_store import Result
from debackdoor.errors import DebackdoorError
from report_page_cases import EVIL, Page
from scan_many_cases import result
from test_report_browser import BROWSER, axe, browser, fetched, show  # noqa: F401

needs_browser = pytest.mark.skipif(
    not (BROWSER and shutil.which("chromedriver")), reason="Chromium or its chromedriver is not installed"
)


def many() -> list[Result]:
    """One of every kind, with values that are hard to sort or to show."""
    return [
        result("resnet18-a", "clean", score=0.9),
        result("wide-10", "clean", score=0.038, seconds=1234.5),
        result("wide-9", "clean", seconds=3.0),
        result("cut", None, seconds=0.012, sha256=None),
        result("badnets", "backdoored", score=1.2),
        result("many-labels", "backdoored", score=3.5, suspect_labels=tuple(range(14))),
        result("few-images", "inconclusive"),
        result("sig", "suspicious", path="supplier/" + 30 * "long" + "<img src=x onerror=alert(1)>.pt"),
        result("lost", None, seconds=None, error=EVIL),
    ]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    write_overview(tmp_path, many(), command="debackdoor scan-many models.csv --out out")
    return tmp_path / "index.html"


def test_text_that_is_not_utf_8_is_shown_with_escapes(tmp_path: Path) -> None:
    """As in the path of a folder with an old name."""
    write_overview(tmp_path, [result("a", None, error="/mod\udce8les/a.pt: no such file")], command="")
    (row,) = pq.read_table(tmp_path / "scan.parquet").to_pylist()
    assert row["error"] == "/mod\\udce8les/a.pt: no such file"
    assert "les/a.pt: no such file" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_the_table(tmp_path: Path) -> None:
    write_overview(tmp_path, many(), command="")
    table = pq.read_table(tmp_path / "scan.parquet")
    assert dict(zip(table.schema.names, map(str, table.schema.types), strict=True)) == {
        "name": "string", "path": "string", "arch": "string", "verdict": "string", "score": "double",
        "suspect_labels": "list<element: int64>", "message": "string", "seconds": "double", "error": "string",
        "sha256": "string",
    }  # fmt: skip
    rows = table.to_pylist()
    assert [row["name"] for row in rows] == [item.name for item in many()]
    assert rows[3] == {
        "name": "cut", "path": "models/cut.safetensors", "arch": "resnet18", "verdict": None, "score": None,
        "suspect_labels": [], "message": None, "seconds": 0.012,
        "error": "models/cut.safetensors: expected a checkpoint, got none", "sha256": None,
    }  # fmt: skip
    assert (rows[4]["verdict"], rows[4]["score"], rows[4]["suspect_labels"]) == ("backdoored", 1.2, [3])


def test_types_do_not_depend_on_what_was_found(tmp_path: Path) -> None:
    schemas = []
    for item in (result("a"), result("a", None, seconds=None)):
        write_overview(tmp_path, [item], command="")
        schemas.append(pq.read_schema(tmp_path / "scan.parquet"))
    assert schemas[0] == schemas[1]
    assert not any(pa.types.is_null(kind) for kind in schemas[0].types)


@pytest.mark.parametrize(
    ("verdicts", "title"),
    [
        (["clean"], "No backdoor found in 1 model"),
        (["clean", "clean"], "No backdoor found in 2 models"),
        (["backdoored"], "1 of 1 model hides a backdoor"),
        (["clean", "inconclusive"], "1 of 2 models could not be judged"),
        (["inconclusive", None, None], "2 of 3 models could not be scanned"),
        (["suspicious", None], "1 of 2 models is suspicious"),
        (["suspicious", "suspicious", "clean"], "2 of 3 models are suspicious"),
        (["clean", "suspicious", "backdoored"], "1 of 3 models hides a backdoor"),
        (["backdoored", "backdoored", None], "2 of 3 models hide a backdoor"),
    ],
)
def test_the_worst_stands_on_top(tmp_path: Path, verdicts: list[str | None], title: str) -> None:
    write_overview(tmp_path, [result(f"m{at}", verdict) for at, verdict in enumerate(verdicts)], command="")
    text = (tmp_path / "index.html").read_text()
    assert f"<title>{title}</title>" in text
    assert f"<h1>{title}</h1>" in text


def test_counts_come_first_then_the_worst(page: Path) -> None:
    seen = Page(page.read_text())
    order = ["9 models", *(f"{n} {word}" for n, word in ((2, "Backdoored"), (1, "Suspicious"), (2, "Error"))), "Models"]
    places = [seen.words.replace("2Backdoored", "2 Backdoored").replace("1Suspicious", "1 Suspicious")
              .replace("2Error", "2 Error").find(what) for what in order[1:]]  # fmt: skip
    assert places == sorted(places)
    assert places[0] > 0
    links = [attributes["href"] for tag, attributes in seen.elements if tag == "a"]
    assert links == [
        *(f"records/{name}.json" for name in ("many-labels", "badnets", "sig")),
        *(f"errors/{name}.json" for name in ("cut", "lost")),
        *(f"records/{name}.json" for name in ("few-images", "resnet18-a", "wide-9", "wide-10")),
        "scan.parquet",
    ]


def test_nothing_of_a_models_maker_gets_to_run(page: Path) -> None:
    seen = Page(page.read_text())
    assert seen.active.count("script") == 1
    assert [what for what in seen.active if what != "script" and not what.endswith((".json", ".parquet"))] == []
    assert not [attributes for tag, attributes in seen.elements if tag == "img"]
    assert "default-src 'none'" in page.read_text()
    assert EVIL in seen.words


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(overview, "atomic_write", full)
    with pytest.raises(DebackdoorError, match=r"scan.parquet was not written: No space left on device; check"):
        write_overview(tmp_path, many(), command="")


def names(driver: Any) -> list[str]:
    """The models as they are shown, from above."""
    return driver.execute_script(
        "return [...document.querySelectorAll('tbody tr')].filter(e => e.getBoundingClientRect().height > 0)"
        ".map(e => e.querySelector('a').textContent)"
    )


def click(driver: Any, text: str) -> None:
    driver.execute_script(
        "[...document.querySelectorAll('button')].find(e => e.textContent.trim().endsWith(arguments[0])).click()", text
    )


@needs_browser
def test_nothing_is_fetched_or_complained_of(browser: Any, page: Path) -> None:  # noqa: F811
    browser.get("about:blank")
    fetched(browser), browser.get_log("browser")
    show(browser, page)
    assert fetched(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []
    assert browser.title == "2 of 9 models hide a backdoor"


@needs_browser
def test_sorting(browser: Any, page: Path) -> None:  # noqa: F811
    show(browser, page)
    as_written = names(browser)
    click(browser, "Model")
    assert names(browser) == [
        "badnets", "cut", "few-images", "lost", "many-labels", "resnet18-a", "sig", "wide-9", "wide-10",
    ]  # fmt: skip
    state = "return [...document.querySelectorAll('thead th')].map(e => e.getAttribute('aria-sort'))"
    assert browser.execute_script(state) == ["ascending", "none", "none", "none", "none", "none"]
    click(browser, "Model")
    assert names(browser)[:2] == ["wide-10", "wide-9"]
    click(browser, "Seconds")
    assert names(browser)[0] == "wide-10"
    assert names(browser)[-1] == "lost"
    click(browser, "Seconds")
    assert names(browser)[:2] == ["cut", "wide-9"]
    assert names(browser)[-1] == "lost"
    click(browser, "Score")
    assert names(browser)[:2] == ["many-labels", "badnets"]
    assert set(names(browser)[-2:]) == {"cut", "lost"}
    click(browser, "Verdict")
    assert names(browser) == as_written


@needs_browser
def test_one_kind_alone(browser: Any, page: Path) -> None:  # noqa: F811
    show(browser, page)
    said = "return document.querySelector('[role=status]').textContent"
    click(browser, "Error")
    assert (sorted(names(browser)), browser.execute_script(said)) == (["cut", "lost"], "2 of 9 models")
    click(browser, "Backdoored")
    assert names(browser) == ["many-labels", "badnets"]
    pressed = "return [...document.querySelectorAll('[aria-pressed=true]')].map(e => e.dataset.kind)"
    assert browser.execute_script(pressed) == ["backdoored"]
    click(browser, "Backdoored")
    assert (len(names(browser)), browser.execute_script(said)) == (9, "All 9 models")


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_everything_is_seen_and_nothing_overflows(browser: Any, page: Path, width: int) -> None:  # noqa: F811
    show(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = browser.execute_script(
        "return [...document.querySelectorAll("
        "'h1, h2, .counts button, thead button, table, tbody a, .verdict, .found')]"
        ".map(element => element.getBoundingClientRect()).map(box => [box.left, box.right, box.width, box.height])"
    )
    assert len(boxes) == 3 + 5 + 6 + 1 + 3 * 9
    for left, right, wide, high in boxes:
        assert left >= 0
        assert right <= width
        assert min(wide, high) > 0
    first = browser.execute_script("return document.querySelector('.counts button').getBoundingClientRect().bottom")
    assert first < 300


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, page: Path, scheme: str, width: int) -> None:  # noqa: F811
    show(browser, page, width, scheme)
    browser.execute_script((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = browser.execute_async_script(
        "const done = arguments[0]; axe.run(document).then(done, e => done(String(e)))"
    )
    bad = {item["id"]: item["nodes"][0]["html"] for item in found["violations"]}
    assert bad == {}
    assert {"color-contrast", "aria-required-children"} <= {item["id"] for item in found["passes"]}
