"""The page of a bench in a browser: its tables sort, scroll by themselves, and can be read by everyone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium.webdriver", reason="the library selenium is not installed")
pytest.importorskip("axe_core_python", reason="the library axe-core-python is not installed")

from debackdoor.bench.page import to_html
from debackdoor.bench.tables import compare
from test_bench_tables import RECORDS
from test_report_browser import BROWSER, DRIVER, axe, browser, fetched, show

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="Chromium or its chromedriver is not installed")

__all__ = ["browser"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two defences as in the tests of the tables, and ten more that make the matrix wide, half of them fine-tuned."""
    path = tmp_path_factory.mktemp("bench") / "page.html"
    blend, clean = RECORDS[2:4]
    more = []
    for number in range(10):
        rates = blend["attack_success_rate"] | ({"fine_tuned": number / 20} if number % 2 else {})
        more += [found | {"defense": f"another-{number}"} for found in (blend | {"attack_success_rate": rates}, clean)]
    path.write_text(to_html(compare([*RECORDS, *more])))
    return path


def column(browser: Any, table: int, at: int) -> list[str]:
    script = """
        const rows = [...document.querySelectorAll('table')[arguments[0]].tBodies[0].rows];
        return rows.map(row => row.cells[arguments[1]].textContent)"""
    return list(browser.execute_script(script, table, at))


def test_a_heading_sorts(browser: Any, page: Path) -> None:
    """The first click puts the best on top, or names begin with a; the second turns it round."""
    browser.get("about:blank")
    fetched(browser), browser.get_log("browser")
    show(browser, page)
    assert fetched(browser) == [page.as_uri()]
    heads = browser.find_elements("css selector", "table:first-of-type thead th")[:14]
    seen = []
    for at, clicks in ((3, 1), (3, 1), (0, 1)):
        for _ in range(clicks):
            browser.execute_script("arguments[0].querySelector('button').click()", heads[at])
        seen.append((heads[at].get_attribute("aria-sort"), column(browser, 0, at)))
    for (order, cells), (wanted, reverse) in zip(
        seen, [("descending", True), ("ascending", False), ("ascending", False)], strict=True
    ):
        assert order == wanted
        assert cells == sorted(cells, reverse=reverse)
    assert heads[3].get_attribute("aria-sort") is None
    assert browser.get_log("browser") == []


def test_what_was_not_measured_comes_last(browser: Any, page: Path) -> None:
    show(browser, page)
    seen = 0
    for at, head in enumerate(browser.find_elements("css selector", "table:first-of-type thead th")[:14]):
        if len(set(column(browser, 0, at)) - {"-"}) < 2 or "-" not in column(browser, 0, at):
            continue
        for _ in range(2):
            browser.execute_script("arguments[0].querySelector('button').click()", head)
            cells = column(browser, 0, at)
            numbers = [float(cell) for cell in cells if cell != "-"]
            assert cells[len(numbers) :] == ["-"] * (len(cells) - len(numbers))
            assert numbers == sorted(numbers, reverse=head.get_attribute("aria-sort") == "descending")
        seen += 1
    assert seen


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_never_scrolls_sideways_but_its_tables_do(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wide = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(element => element.scrollWidth > element.clientWidth)"
    )
    assert wide[1]
    names = browser.execute_script(
        "return [...document.querySelectorAll('tbody th')].map(element => element.getBoundingClientRect().width)"
    )
    assert min(names) > 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, page: Path, scheme: str) -> None:
    show(browser, page, scheme=scheme)
    browser.execute_script((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = browser.execute_async_script(
        "const done = arguments[0]; axe.run(document).then(done, e => done(String(e)))"
    )
    bad = {
        item["id"]: item["nodes"][0]["html"]
        for item in found["violations"]
        if item["impact"] in ("serious", "critical")
    }
    assert bad == {}
    assert {"color-contrast", "scope-attr-valid", "scrollable-region-focusable"} <= {
        item["id"] for item in found["passes"]
    }
