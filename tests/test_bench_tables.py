"""Tables of a bench: what is compared, how it is ranked, and the forms it takes; on records made by hand."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench_cases import record
from debackdoor.bench.page import to_html
from debackdoor.bench.records import read_records
from debackdoor.bench.tables import compare, points, to_csv, to_markdown
from debackdoor.errors import DebackdoorError, MissingDependencyError

RECORDS = [
    record("badnets", "ours", 0.98, lost=0.02, success=0.02, seconds=100, memory=900),
    record("badnets", "ours", 0.96, seed=1, lost=0.04, success=0.04, seconds=200, memory=1100),
    record("blend", "ours", 0.90, lost=0.0, success=0.2, seconds=300, memory=1000),
    record("clean-0", "ours", None, lost=0.0),
    record("badnets", "other", 0.5, lost=0.06, success=1.0, blind=False),
    record("blend", "other", 0.95, lost=-0.02, success=0.1, blind=False),
    record("wanet", "other", None, error="ModelError: <no> norms", blind=False),
    record("clean-0", "other", None, lost=0.03, blind=False),
    record("clean-1", "other", None, lost=0.01, blind=False),
]


def test_defences_are_compared_on_what_all_have() -> None:
    """Left out: the second seed of ours, the second clean model of the other."""
    found = compare(RECORDS)
    ours, other = found.rows
    assert found.shared == {("badnets", 0, 500), ("blend", 0, 500)}
    assert (found.left_out, found.failed) == (2, 1)
    assert (ours.defense, ours.blind, ours.cells, ours.worst_model, ours.failed) == ("ours", True, 2, "blend", 0)
    assert (other.defense, other.blind, other.cells, other.worst_model, other.failed) == (
        "other",
        False,
        2,
        "badnets",
        1,
    )
    assert [ours.der_mean, ours.der_spread, ours.der_worst] == pytest.approx([0.94, 0.04, 0.90])
    assert [other.der_mean, other.der_spread, other.der_worst] == pytest.approx([0.725, 0.225, 0.5])
    assert [ours.accuracy_lost, ours.attack_success_rate, ours.robust_accuracy] == pytest.approx([0.01, 0.11, 0.8])
    assert (ours.seconds, ours.peak_memory_mib) == (200, 1000)
    assert [ours.accuracy_lost_clean, other.accuracy_lost_clean] == pytest.approx([0.0, 0.03])


def test_seconds_of_several_devices_are_said_to_be() -> None:
    here, there, unnamed = (
        [item | more for item in RECORDS] for more in ({"device": "cpu"}, {"device": "NVIDIA H200"}, {"device": None})
    )
    assert compare(here).devices == ("cpu",)
    assert "Seconds" not in compare(here).note
    mixed = compare([*here[:4], *there[4:]])
    assert mixed.devices == ("NVIDIA H200", "cpu")
    assert " Seconds and memory are those of NVIDIA H200 and cpu: compare them on one alone." in mixed.note
    assert compare([*here[:4], *unnamed[4:]]).devices == ("an unnamed device", "cpu")
    # What is not compared does not count.
    assert compare([*here[:6], *(item | {"device": "elsewhere"} for item in here[6:7]), *here[7:]]).devices == ("cpu",)


def test_fewer_defences_share_more() -> None:
    (row,) = compare(RECORDS, ["ours"]).rows
    assert row.cells == 3
    assert row.der_mean == pytest.approx((0.98 + 0.96 + 0.90) / 3)
    assert compare(RECORDS, ["ours"]).left_out == compare(RECORDS, ["ours"]).failed == 0


def test_equal_means_are_ranked_by_the_worst() -> None:
    even = [record(model, "even", 0.8) for model in ("a", "b")]
    uneven = [record("a", "an-uneven", 0.7), record("b", "an-uneven", 0.9)]
    assert [row.defense for row in compare([*uneven, *even]).rows] == ["even", "an-uneven"]


@pytest.mark.parametrize(
    ("records", "defenses", "message"),
    [
        (RECORDS, ["ours", "magic"], "expected defences out of other, ours, got 'magic'"),
        (
            [RECORDS[2], RECORDS[4]],
            [],
            "expected a backdoored model, seed and number of clean images that all of other, ",
        ),
        ([RECORDS[3]], [], "expected a backdoored model"),
        ([], [], "expected a backdoored model"),
    ],
)
def test_what_cannot_be_compared(records: list[dict[str, Any]], defenses: list[str], message: str) -> None:
    with pytest.raises(DebackdoorError, match=message):
        compare(records, defenses)


@pytest.mark.parametrize(("kind", "value"), [("model", "sha256"), ("defense", "defense_parameters")])
def test_records_of_one_name_and_two_things_are_never_mixed(kind: str, value: str) -> None:
    first, second = record("badnets", "ours", 0.98), record("badnets", "ours", 0.9, seed=1)
    assert compare([first | {value: None}, second]).rows[0].cells == 2
    other = {"sha256": "another", "defense_parameters": {"lr": 9}}[value]
    with pytest.raises(DebackdoorError, match=f"expected records of one {kind} .*, got two of different {value}"):
        compare([first, second | {value: other}])


def test_markdown() -> None:
    heading, rule, ours, other, _, note = to_markdown(compare(RECORDS)).splitlines()
    assert heading.startswith(
        "| defence | blind | cells | DER mean | spread | worst | on | CA lost | ASR | ASR, tuned | RA | seconds |"
    )
    assert rule == "|" + 15 * "---|"
    assert ours == "| ours | yes | 2 | 0.940 | 0.040 | 0.900 | blend | 1.0 | 11.0 | - | 80.0 | 200.0 | 1000 | 0.0 | 0 |"
    assert (
        other == "| other | no | 2 | 0.725 | 0.225 | 0.500 | badnets | 2.0 | 55.0 | - | 80.0 | 10.0 | 1000 | 3.0 | 1 |"
    )
    assert note == (
        "2 defences on 2 cells each: 2 backdoored models, 1 seed, 500 clean images. 2 cells left out, since not all of "
        "the defences have them. 1 cell failed and left out. Not blind: how far the method goes was published with it, "
        "not chosen on the clean images."
    )


def test_the_asr_after_fine_tuning_is_shown_where_all_have_it() -> None:
    """A model that was left alone is not fine-tuned either."""

    def tuned(found: dict[str, Any], rate: float) -> dict[str, Any]:
        return found | {"attack_success_rate": found["attack_success_rate"] | {"fine_tuned": rate}}

    first = tuned(record("badnets", "ours", 0.98, success=0.02), 0.1)
    alone = record("blend", "ours", 0.5, success=1.0) | {"changed": False}
    lacking = record("wanet", "ours", 0.9)
    assert compare([first, alone]).rows[0].attack_success_rate_tuned == pytest.approx(0.55)
    assert "| 51.0 | 55.0 |" in to_markdown(compare([first, alone]))
    for records in ([first, lacking], [alone]):
        assert compare(records).rows[0].attack_success_rate_tuned is None


def test_csv_has_all_digits() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(compare(RECORDS)))))
    assert [row["defense"] for row in rows] == ["ours", "other"]
    assert float(rows[1]["der_spread"]) == pytest.approx(0.225)
    assert rows[1]["blind"] == "False"
    (alone,) = csv.DictReader(io.StringIO(to_csv(compare(RECORDS[:3]))))
    assert alone["accuracy_lost_clean"] == ""


def test_points_have_no_minus_before_zero() -> None:
    assert [points(rate) for rate in (0.0, -0.0001, -0.02, 0.1234)] == ["0.0", "0.0", "-2.0", "12.3"]


class Page(HTMLParser):
    """The rows of a page's tables, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, dict[str, str], str]]]] = []
        self.fetched: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        found = {name: value or "" for name, value in attributes}
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append((tag, found, ""))
            self._cell = True
        self.fetched += [value for name, value in found.items() if name in ("src", "href") and value != "data:,"]

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._cell:
            tag, found, text = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (tag, found, text + data)


def test_the_page_has_the_ranking_and_the_whole_matrix() -> None:
    page = Page(to_html(compare(RECORDS)))
    ranking, backdoored, clean = page.tables
    assert page.fetched == []
    for table in page.tables:
        assert {(tag, found["scope"]) for tag, found, _ in table[0]} == {("th", "col")}
        assert all((row[0][0], row[0][1]["scope"]) == ("th", "row") for row in table[1:])
    assert [row[0][2] for row in ranking] == ["defence", "ours", "other"]
    assert [text for *_, text in backdoored[0]] == ["model", "ours", "other"]
    said = {row[0][1]["data-value"]: [text for *_, text in row[1:]] for row in backdoored[1:]}
    assert said == {
        "badnets": ["0.970 *ASR 3.0CA lost 3.0", "0.500ASR 100.0CA lost 6.0"],
        "blend": ["0.900ASR 20.0CA lost 0.0", "0.950ASR 10.0CA lost -2.0"],
        "wanet": ["-not tried", "failed *ModelError: <no> norms"],
    }
    assert [row[1][1]["class"] for row in backdoored[1:]] == ["h9", "h8", "none"]
    assert [found["data-value"] for _, found, _ in backdoored[3][1:]] == ["", ""]  # which are sorted last
    said = {row[0][1]["data-value"]: [text for *_, text in row[1:]] for row in clean[1:]}
    assert said == {
        "clean-0": ["0.0changed 1 of 1", "3.0changed 1 of 1"],
        "clean-1": ["-not tried", "1.0 *changed 1 of 1"],
    }


def test_names_are_no_markup() -> None:
    text = to_html(compare([record("<b>a</b>", "<i>x</i>", 0.9)]))
    assert "<b>a" not in text
    assert "<i>x" not in text
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", text)


def test_without_jinja2_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"expected the library jinja2.*pip install 'debackdoor\[bench\]'"):
        to_html(compare(RECORDS))


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    for number, found in enumerate(records):
        (folder / f"{number}.json").write_text(json.dumps(found))
    return folder


def test_records_are_read_from_folders_in_folders(tmp_path: Path) -> None:
    write(tmp_path / "a" / "ours", RECORDS[:4]), write(tmp_path / "b", RECORDS[4:])
    assert read_records([tmp_path / "a", tmp_path / "b"]) == RECORDS


def test_records_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DebackdoorError, match="expected a folder with records, got none; make some with bench run"):
        read_records([tmp_path])
    write(tmp_path / "a", [RECORDS[0]]), write(tmp_path / "b", [RECORDS[0]])
    with pytest.raises(DebackdoorError, match=r"expected one record a cell, got another in .*/a/0.json"):
        read_records([tmp_path / "a", tmp_path / "b"])
    for damage, message in [
        ([], "expected schema 'debackdoor/bench/1', got 'list'"),
        ({**RECORDS[0], "schema": "x"}, "got 'x'"),
        ({name: value for name, value in RECORDS[0].items() if name != "der"}, "expected the entry der, got none"),
        ({**RECORDS[0], "robust_accuracy": 0.3}, "expected robust_accuracy before and after, got 0.3"),
        ({**RECORDS[0], "seed": []}, "expected a whole number for seed, got []; delete it"),
        ({**RECORDS[0], "model": None}, "expected text for model, got None"),
        ({**RECORDS[0], "error": False}, "expected text or null for error, got False"),
        ({**RECORDS[0], "der": "0.9"}, "expected a number for der, got '0.9'"),
        ({**RECORDS[3], "clean_accuracy": RECORDS[6]["clean_accuracy"]}, "a number for clean_accuracy before, got N"),
    ]:
        (tmp_path / "b" / "0.json").write_text(json.dumps(damage))
        with pytest.raises(DebackdoorError, match=re.escape(message)):
            read_records([tmp_path / "b"])
