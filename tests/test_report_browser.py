"""The report page in a browser: nothing is fetched, nothing overflows, and it can be read by everyone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import report_cases as cases
from debackdoor.report.page import write_page
from debackdoor.report.pictures import Pictures

webdriver = pytest.importorskip("selenium.webdriver", reason="the library selenium is not installed")
axe = pytest.importorskip("axe_core_python", reason="the library axe-core-python is not installed")
BROWSER, DRIVER = (
    shutil.which("chromium") or shutil.which("google-chrome"),
    shutil.which("chromedriver"),
)
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="Chromium or its chromedriver is not installed")

PAGES = ("backdoored", "repaired", "clean", "inconclusive")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of every kind; class names and the path hold markup."""
    folder = tmp_path_factory.mktemp("pages")
    names = ("<script>document.title = 'run'</script>", *cases.NAMES[1:])
    pictures = Pictures(cases.trigger(), cases.clean_set(names=names), cases.sample_scores(), cases.suspect_images())
    top = {"checkpoint": "m/" + 30 * "long" + "<img src=x onerror=alert(1)>.pt"}
    write_page(folder / "backdoored.html", cases.scan(top=top), pictures=pictures)
    write_page(folder / "repaired.html", cases.scan(), repair=cases.repaired())
    write_page(folder / "clean.html", cases.scan("clean", 1000))
    write_page(folder / "inconclusive.html", cases.scan("inconclusive", 2, evidence={}, ranking=()))
    return folder


def show(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def fetched(browser: Any) -> list[str]:
    """What the network log has since it was last read, apart from what pages hold themselves."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched_and_nothing_is_complained_of(browser: Any, folder: Path, name: str) -> None:
    page = folder / f"{name}.html"
    browser.get("about:blank")
    fetched(browser), browser.get_log("browser")
    show(browser, page)
    assert fetched(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []
    entries = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [entry for entry in entries if not entry.startswith("data:")] == []
    assert browser.title.split(":")[0] in ("Backdoored", "Repaired and verified", "No backdoor found", "Inconclusive")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_everything_is_seen_and_nothing_overflows(browser: Any, folder: Path, name: str, width: int) -> None:
    show(browser, folder / f"{name}.html", width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = """
        return [...document.querySelectorAll(arguments[0])].map(element => {
            const box = element.getBoundingClientRect();
            const natural = element.tagName == "IMG" ? element.naturalWidth : 1;
            return [box.left, box.right, box.top, box.width, box.height, natural];
        })"""
    first, *_ = browser.execute_script(boxes, ".verdict")
    assert first[2] < 100
    assert first[4] > 100
    shown = browser.execute_script(boxes, "h1, h2, svg.chart, .icon, img, table, pre, .meter")
    assert len(shown) > (15 if name != "inconclusive" else 5)
    for left, right, _, wide, high, natural in shown:
        assert left >= 0
        assert right <= width
        assert min(wide, high, natural) > 0
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"
    )
    assert smallest >= 9


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["backdoored", "repaired", "clean"])
def test_axe_finds_nothing_serious(browser: Any, folder: Path, name: str, scheme: str) -> None:
    show(browser, folder / f"{name}.html", scheme=scheme)
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
    checked = {item["id"] for item in found["passes"]}
    assert {"color-contrast", "heading-order", "html-has-lang", "scope-attr-valid", "svg-img-alt"} <= checked


def test_dark_is_dark(browser: Any, folder: Path) -> None:
    look = """
        return [document.body, document.querySelector("h1")].map(element => {
            const style = getComputedStyle(element);
            return [style.backgroundColor, style.color];
        })"""
    seen = []
    for scheme in ("light", "dark"):
        show(browser, folder / "clean.html", scheme=scheme)
        seen.append(browser.execute_script(look))
    (paper, ink), (_, word) = seen[1]
    assert (paper, ink, word) == ("rgb(18, 21, 25)", "rgb(232, 234, 237)", "rgb(127, 217, 154)")
    assert not {paper, ink, word} & {colour for pair in seen[0] for colour in pair}
