"""SARIF: one result a finding, none for a clean model, in the structure that the standard asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import report_cases as cases
from debackdoor.errors import DebackdoorError
from debackdoor.report.records import to_json
from debackdoor.report.sarif import sarif


def closed(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """An object that has no other entries: the standard's schema allows none."""
    return {
        "type": "object",
        "properties": properties,
        "required": required or [],
        "additionalProperties": False,
    }


BAG = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True, "items": {"type": "string"}}}}
TEXT = {"type": "string"}
MESSAGE = closed(["text"], text=TEXT, markdown=TEXT)
LEVEL = {"enum": ["none", "note", "warning", "error"]}
ARTIFACT_LOCATION = closed(
    uri={"type": "string", "format": "uri-reference", "pattern": r"^[A-Za-z0-9\-._~:/?#@!$&'()*+,;=%]+$"},
    uriBaseId=TEXT,
    index={"type": "integer", "minimum": -1},
)
RULE = closed(
    ["id"],
    id=TEXT,
    name=TEXT,
    shortDescription=MESSAGE,
    fullDescription=MESSAGE,
    help=MESSAGE,
    defaultConfiguration=closed(level=LEVEL),
    properties=BAG,
)
DRIVER = closed(["name"], name={"const": "debackdoor"}, version=TEXT, rules={"type": "array", "items": RULE})
ARTIFACT = closed(
    location=ARTIFACT_LOCATION,
    roles={"type": "array", "uniqueItems": True, "items": {"enum": ["analysisTarget", "attachment", "resultFile"]}},
    hashes={"type": "object", "additionalProperties": TEXT},
)
RESULT = closed(
    ["message"],
    ruleId=TEXT,
    ruleIndex={"type": "integer", "minimum": -1},
    level=LEVEL,
    message=MESSAGE,
    locations={
        "type": "array",
        "items": closed(
            physicalLocation=closed(
                ["artifactLocation"],
                artifactLocation=ARTIFACT_LOCATION,
                region=closed(startLine={"type": "integer", "minimum": 1}),
            )
        ),
    },
    partialFingerprints={"type": "object", "additionalProperties": TEXT},
    properties=BAG,
)
RUN = closed(
    ["tool"],
    tool=closed(["driver"], driver=DRIVER),
    invocations={
        "type": "array",
        "items": closed(["executionSuccessful"], executionSuccessful={"type": "boolean"}),
    },
    artifacts={"type": "array", "uniqueItems": True, "items": ARTIFACT},
    results={"type": "array", "items": RESULT},
    properties=BAG,
)
SARIF = closed(
    ["version", "runs"],
    version={"const": "2.1.0"},
    runs={"type": "array", "items": RUN},
    **{"$schema": {"type": "string", "format": "uri"}},
)
"""What is used of sarif-schema-2.1.0.json: its required entries, its lists of values, and that there are no others."""


def log(record: Any) -> Any:
    """The SARIF log of a record after a way through JSON, once it is found to have the standard's structure."""
    Draft202012Validator.check_schema(SARIF)
    found = json.loads(json.dumps(sarif(record), allow_nan=False))
    Draft202012Validator(SARIF).validate(found)
    return found


def run(record: Any) -> Any:
    (only,) = log(record)["runs"]
    return only


@pytest.mark.parametrize(
    ("verdict", "rule", "level"),
    [("backdoored", "DBD001", "error"), ("suspicious", "DBD002", "warning"), ("inconclusive", "DBD003", "note")],
)
def test_a_finding_is_one_result(verdict: str, rule: str, level: str) -> None:
    record = cases.scan(verdict)
    found = run(record)
    (result,) = found["results"]
    assert (result["ruleId"], result["level"]) == (rule, level)
    listed = found["tool"]["driver"]["rules"][result["ruleIndex"]]
    assert (listed["id"], listed["defaultConfiguration"]["level"]) == (rule, level)
    assert result["message"]["text"] == record["message"]
    assert result["partialFingerprints"] == {
        "checkpointSha256/v1": record["sha256"],
        "primaryLocationLineHash": f"{record['sha256']}:1",
    }
    (place,) = result["locations"]
    assert place["physicalLocation"]["artifactLocation"]["index"] == 0


def test_no_result_for_a_clean_model() -> None:
    found = run(cases.scan("clean"))
    assert found["results"] == []
    assert [rule["id"] for rule in found["tool"]["driver"]["rules"]] == ["DBD001", "DBD002", "DBD003"]
    assert found["properties"]["verdict"] == "clean"


def test_score_and_label_are_properties() -> None:
    (result,) = run(cases.scan())["results"]
    properties = result["properties"]
    assert (properties["score"], properties["label"], properties["labelName"]) == (2.56, 3, "cat")
    assert properties["suspectLabels"][0]["reasons"] == ["pile-up", "margin", "patch", "additive"]
    (result,) = run(cases.scan("inconclusive", score=float("nan")))["results"]
    assert (result["properties"]["label"], result["properties"]["score"]) == (None, None)


def test_a_label_without_reasons_is_not_told_as_suspect() -> None:
    record = cases.scan("inconclusive")
    record["suspect_labels"] = [{"label": 5, "name": None, "reasons": [], "evidence": {}}]
    (result,) = run(record)["results"]
    assert (result["properties"]["label"], result["properties"]["suspectLabels"]) == (None, [])


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("models/a b#1.pt", "models/a%20b%231.pt"),
        ("a:b.pt", "a%3Ab.pt"),
        ("/srv/models/ä.pt", "file:///srv/models/%C3%A4.pt"),
        ("not-\udcff-utf8.pt", "not-%FF-utf8.pt"),
        ("../x/<script>.pt", "../x/%3Cscript%3E.pt"),
    ],
)
def test_the_checkpoint_is_a_uri_with_its_hash(path: str, uri: str) -> None:
    found = run(cases.scan(top={"checkpoint": str(Path(path))}))
    (artifact,) = found["artifacts"]
    assert artifact == {"location": {"uri": uri}, "roles": ["analysisTarget"], "hashes": {"sha-256": "a3" * 32}}
    assert found["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri


def test_a_record_read_from_json_gives_the_same() -> None:
    record = cases.scan()
    assert sarif(json.loads(to_json(record))) == sarif(record)


@pytest.mark.parametrize("record", [{}, {"schema": "debackdoor/repair/1"}])
def test_other_records_are_refused(record: dict[str, str]) -> None:
    with pytest.raises(DebackdoorError, match="expected a record of schema 'debackdoor/scan/1' for SARIF, got"):
        sarif(record)
