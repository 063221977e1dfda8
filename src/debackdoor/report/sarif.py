"""SARIF 2.1.0, the form in which continuous integration collects findings.

OASIS, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0",
https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from debackdoor import __version__
from debackdoor.errors import DebackdoorError
from debackdoor.report.records import SCAN_SCHEMA, plain

SARIF_VERSION = "2.1.0"
SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


@dataclass(frozen=True)
class _Rule:
    """What a verdict is called in SARIF.

    Attributes:
        id: stable over versions; services recognise a finding by it.
        name: the same in one word.
        level: ``error``, ``warning`` or ``note``.
        severity: from 0 to 10, as code scanning services rank security findings.
        short: what was found.
        full: what that means.
        help: what to do.
    """

    id: str
    name: str
    level: str
    severity: str
    short: str
    full: str
    help: str

    def descriptor(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "shortDescription": {"text": self.short},
            "fullDescription": {"text": self.full},
            "help": {"text": self.help},
            "defaultConfiguration": {"level": self.level},
            "properties": {"tags": ["security", "machine-learning"], "security-severity": self.severity},
        }


_RULES = {
    "backdoored": _Rule(
        "DBD001",
        "BackdooredModel",
        "error",
        "9.0",
        "The model hides a backdoor.",
        "At least one sign of a backdoor is beyond its threshold: images with a trigger get a label of somebody's "
        "choice.",
        "Do not deploy the model. Repair it with 'debackdoor repair', or get it anew from a trusted source.",
    ),
    "suspicious": _Rule(
        "DBD002",
        "SuspiciousModel",
        "warning",
        "6.0",
        "The model may hide a backdoor.",
        "A sign of a backdoor comes near to its threshold, nearer than is usual without one.",
        "Hold the model back. Scan again with more clean images and another seed.",
    ),
    "inconclusive": _Rule(
        "DBD003",
        "InconclusiveScan",
        "note",
        "1.0",
        "The scan could not tell whether the model hides a backdoor.",
        "What the scan looks for could not be measured on this model with these images, or its signs disagree.",
        "Do not take the model for clean. Scan again with more clean images.",
    ),
}


def sarif(record: Mapping[str, Any]) -> dict[str, Any]:
    """A SARIF log with one run: the scan of one checkpoint, and one result unless it is clean.

    Args:
        record: what ``scan_record`` returned, or the same read from JSON.

    Raises:
        DebackdoorError: if it is no record of a scan.
    """
    if record.get("schema") != SCAN_SCHEMA:
        raise DebackdoorError(
            f"expected a record of schema '{SCAN_SCHEMA}' for SARIF, got {record.get('schema')!r}; give that of a scan"
        )
    record = plain(record)
    results = [] if record["verdict"] == "clean" else [_result(record)]
    run = {
        "tool": {
            "driver": {
                "name": "debackdoor",
                "version": record["versions"].get("debackdoor", __version__),
                "rules": [rule.descriptor() for rule in _RULES.values()],
            }
        },
        "invocations": [{"executionSuccessful": True}],
        "artifacts": [
            {
                "location": {"uri": _uri(record["checkpoint"])},
                "roles": ["analysisTarget"],
                "hashes": {"sha-256": record["sha256"]},
            }
        ],
        "results": results,
        "properties": {name: record[name] for name in ("verdict", "score", "arch", "seed", "clean_images")},
    }
    return {"$schema": SARIF_SCHEMA, "version": SARIF_VERSION, "runs": [run]}


def _result(record: Mapping[str, Any]) -> dict[str, Any]:
    rule = _RULES[record["verdict"]]
    # Without reasons a label is only the nearest to a finding.
    found = [suspect for suspect in record["suspect_labels"] if suspect["reasons"]]
    first = found[0] if found else {"label": None, "name": None}
    return {
        "ruleId": rule.id,
        "ruleIndex": [each.id for each in _RULES.values()].index(rule.id),
        "level": rule.level,
        "message": {"text": record["message"]},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": _uri(record["checkpoint"]), "index": 0},
                    # A model has no lines, but code scanning services do not show a result without one.
                    "region": {"startLine": 1},
                }
            }
        ],
        # The second is the one that GitHub goes by. Where it is missing, that is made from the file's first line, which
        # all safetensors files of one architecture share.
        "partialFingerprints": {
            "checkpointSha256/v1": record["sha256"],
            "primaryLocationLineHash": f"{record['sha256']}:1",
        },
        "properties": {
            "verdict": record["verdict"],
            "score": record["score"],
            "label": first["label"],
            "labelName": first["name"],
            "suspectLabels": [
                {"label": suspect["label"], "name": suspect["name"], "reasons": suspect["reasons"]} for suspect in found
            ],
            "allToAll": record["all_to_all"],
        },
    }


def _uri(path: str) -> str:
    """A file URI of an absolute path, a relative reference of a relative one."""
    file = Path(path)
    return file.as_uri() if file.is_absolute() else quote(os.fsencode(file.as_posix()))
