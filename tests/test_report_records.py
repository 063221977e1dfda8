"""Records of scans and detections: what stands in them, and that they are as their JSON Schemas say."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import report_cases as cases
from debackdoor.errors import DebackdoorError
from debackdoor.evaluation import Evaluation
from debackdoor.report import detect_record, evaluate_record, load_schema, scan_record, to_json
from debackdoor.report.records import SCHEMAS
from debackdoor.types import Suspect

Record = dict[str, Any]


def detection(count: int = 4) -> Record:
    names = [f"{index}.png" for index in range(count)]
    return detect_record(cases.head(), cases.sample_scores(count), clean_images=500, suspects=names)


def evaluation() -> Record:
    return evaluate_record(cases.head(), Evaluation(0.94, 0.99, 0.01, 1000, 900), attack="badnets")


RECORDS: dict[str, Callable[[], Record]] = {
    "scan": cases.scan,
    "repair": cases.repaired,
    "evaluate": evaluation,
    "detect": detection,
}


def faults(kind: str, record: Record) -> list[str]:
    """What the schema has against the record, after its way through JSON."""
    validator = Draft202012Validator(load_schema(kind))
    return [error.json_path for error in validator.iter_errors(json.loads(to_json(record)))]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_schemas_are_schemas_with_descriptions(kind: str) -> None:
    schema = load_schema(kind)
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema"] == {
        "const": f"debackdoor/{kind}/1",
        "description": "The kind of record and its number.",
    }
    assert all(entry.get("description") for entry in schema["properties"].values())
    assert set(schema["required"]) == set(schema["properties"]) == set(RECORDS[kind]())


def test_an_unknown_schema_is_refused() -> None:
    with pytest.raises(DebackdoorError, match="expected a record out of scan, repair, evaluate, detect, got 'zoo'"):
        load_schema("zoo")


@pytest.mark.parametrize("kind", SCHEMAS)
def test_records_are_as_their_schemas_say(kind: str) -> None:
    assert faults(kind, RECORDS[kind]()) == []


@pytest.mark.parametrize(
    ("verdict", "classes"), [("clean", 2), ("suspicious", 10), ("backdoored", 43), ("inconclusive", 1000)]
)
def test_scans_of_every_verdict_and_size_are(verdict: str, classes: int) -> None:
    assert faults("scan", cases.scan(verdict, classes)) == []


@pytest.mark.parametrize("kind", SCHEMAS)
def test_normalisation_is_a_number_a_channel(kind: str) -> None:
    assert faults(kind, {**RECORDS[kind](), "mean": [0.5, -1.0, 0], "std": [0.2, 1, 3.0]}) == []


def test_steps_that_were_taken_back_say_so() -> None:
    assert [row["step"] for row in cases.scan()["unlearning"] if row["taken_back"]] == [8]


def test_scans_without_anything_are() -> None:
    record = cases.scan("inconclusive", suspects=(), evidence={}, ranking=(), history={})
    assert faults("scan", record) == []
    assert (record["channels"], record["layers"], record["unlearning"]) == ([], [], [])


def test_numbers_that_are_not_finite_are_null() -> None:
    found = cases.trigger()
    record = cases.scan(
        score=math.inf, evidence={"margin_ratio": math.nan}, trigger=replace(found, success_rate=math.nan)
    )
    assert faults("scan", record) == []
    read = json.loads(to_json(record))
    assert (read["score"], read["evidence"], read["trigger"]["success_rate"]) == (None, {"margin_ratio": None}, None)


@pytest.mark.parametrize("state", [{"checked": False}, {"passed": False}, {"conclusive": False}, {"changed": False}])
def test_repairs_of_every_end_are(state: dict[str, bool]) -> None:
    assert faults("repair", cases.repaired(**state)) == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("scan", ("schema",), "debackdoor/scan/2"),
        ("scan", ("sha256",), "A" * 64),
        ("scan", ("verdict",), "bad"),
        ("scan", ("fail_on",), "clean"),
        ("scan", ("score",), "high"),
        ("scan", ("all_to_all",), 0),
        ("scan", ("suspect_labels", 0, "label"), -1),
        ("scan", ("suspect_labels", 0, "reasons"), ["a feeling"]),
        ("scan", ("suspect_labels", 0, "evidence", "margin_ratio"), "4.3"),
        ("scan", ("trigger", "success_rate"), 98.8),
        ("scan", ("pattern", "rms"), -0.02),
        ("scan", ("channels", 0, "layer"), 7),
        ("scan", ("layers", 0, "low"), -1),
        ("scan", ("unlearning", 0, "label_shares"), [2.0]),
        ("scan", ("unlearning", 0, "taken_back"), 0),
        ("scan", ("clean_images",), 0),
        ("scan", ("mean",), "0.5,0.5,0.5"),
        ("repair", ("std",), [0.0]),
        ("repair", ("changed",), None),
        ("repair", ("clean_accuracy", "after"), 93.5),
        ("repair", ("verification", "passed"), "yes"),
        ("repair", ("steps", 0, "reason"), None),
        ("evaluate", ("attack_success_rate",), 1.01),
        ("evaluate", ("triggered_images",), 900.5),
        ("detect", ("samples", 0, "image"), None),
        ("detect", ("samples", 0, "answer"), "cat"),
        ("detect", ("flagged",), -1),
    ],
)
def test_a_wrong_entry_fails(kind: str, path: tuple[Any, ...], value: Any) -> None:
    record = copy.deepcopy(RECORDS[kind]())
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert faults(kind, record) != []


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_missing_entry_fails(kind: str) -> None:
    for name in RECORDS[kind]():
        record = RECORDS[kind]()
        del record[name]
        assert faults(kind, record) == ["$"], name


def test_what_a_scan_record_holds() -> None:
    record = cases.scan(suspects=(Suspect(3, "cat", ("pile-up", "patch"), {"pile_up_share": 0.97}),))
    assert record["schema"] == "debackdoor/scan/1"
    assert {name: record[name] for name in cases.head()} == cases.head()
    assert (record["verdict"], record["score"], record["fail_on"]) == ("backdoored", 2.56, "suspicious")
    assert record["suspect_labels"] == [
        {"label": 3, "name": "cat", "reasons": ["pile-up", "patch"], "evidence": {"pile_up_share": 0.97}}
    ]
    assert record["trigger"] == {"label": 3, "success_rate": 0.988, "l1": cases.trigger().l1}
    assert cases.scan("clean")["trigger"] is None
    assert record["pattern"] == {"label": 3, "success_rate": 0.81, "rms": pytest.approx(0.02)}
    assert cases.scan("clean")["pattern"] is None
    ranking = cases.ranking()
    assert len(ranking) == 1280
    assert [(row["layer"], row["index"], row["score"]) for row in record["channels"]] == [
        (channel.layer, channel.index, channel.score) for channel in ranking[:50]
    ]
    assert sum(row["channels"] for row in record["layers"]) == 1280
    assert sum(row["low"] for row in record["layers"]) == sum(channel.score < 0.5 for channel in ranking)
    assert [row["low"] for row in record["layers"]] == sorted((row["low"] for row in record["layers"]), reverse=True)
    row = record["unlearning"][-2]
    assert set(row) == {"step", "accuracy", "label_shares", "taken_back"}
    assert row["label_shares"][3] == 0.97


def test_the_report_is_not_changed() -> None:
    report = cases.report()
    before = copy.deepcopy((dict(report.evidence), report.history, report.suspects))
    record = scan_record(cases.head(), report, clean_images=500, fail_on="backdoored")
    record["evidence"].clear()
    record["unlearning"][0]["label_shares"].clear()
    record["suspect_labels"][0]["evidence"].clear()
    assert (dict(report.evidence), report.history, report.suspects) == before


def test_fail_on_is_checked() -> None:
    with pytest.raises(DebackdoorError, match="expected fail_on out of suspicious, backdoored, got 'clean'"):
        scan_record(cases.head(), cases.report(), clean_images=500, fail_on="clean")


def test_what_a_detect_record_holds() -> None:
    record = detection(3)
    assert record["samples"] == [
        {"image": "0.png", "score": 0.0, "flagged": False, "answer": 3},
        {"image": "1.png", "score": 0.5, "flagged": False, "answer": 3},
        {"image": "2.png", "score": 1.0, "flagged": True, "answer": 3},
    ]
    assert (record["suspect_images"], record["flagged"], record["threshold"]) == (3, 1, 0.5)
    by_number = detect_record(cases.head(), cases.sample_scores(3), clean_images=9, suspects=range(3))
    assert [row["image"] for row in by_number["samples"]] == [0, 1, 2]
    assert faults("detect", by_number) == []
    with pytest.raises(DebackdoorError, match="expected 3 names, one a score, got 2"):
        detect_record(cases.head(), cases.sample_scores(3), clean_images=9, suspects=[0, 1])
