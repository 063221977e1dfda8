"""Markdown tables of scan records."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sklearn.metrics import roc_auc_score

Record = Mapping[str, Any]

COLUMNS = (
    "model",
    "verdict",
    "score",
    "suspect labels",
    "target",
    "trigger: success, pixels, IoU, shifted",
    "Neural Cleanse, original",
    "exposed",
)


def render(records: Sequence[Record]) -> str:
    """One row a model, and the figures over all of them."""
    by_model: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_model[record["model"]].append(record)
    head = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"
    return "\n".join([head, *map(_row, by_model.values()), "", summary(records)])


def _row(records: Sequence[Record]) -> str:
    first = records[0]
    target = "all" if first["mode"] == "all-to-all" else first["target"]
    cells = [
        first["model"],
        _distinct(records, lambda record: record["verdict"]),
        " to ".join(dict.fromkeys(f"{edge(record['score'] for record in records):.2f}" for edge in (min, max))),
        _distinct(records, _labels),
        "-" if backdoor_free(first) else str(target),
        _trigger(records, "scan"),
        *(_cleansed(records, which) for which in ("original", "exposed")),
    ]
    return "| " + " | ".join(cells) + " |"


def _distinct(records: Sequence[Record], what: Callable[[Record], str]) -> str:
    return "; ".join(dict.fromkeys(what(record) for record in records))


def _labels(record: Record) -> str:
    found = ", ".join(str(suspect["label"]) for suspect in record["suspects"])
    return "many" if record["all_to_all"] else found or "none"


def _trigger(records: Sequence[Record], which: str) -> str:
    found = [record["triggers"][which] for record in records if which in record["triggers"]]
    if not found:
        return "-"
    text = f"{_mean(found, 'success_rate'):.0%}, {_mean(found, 'l1'):.1f}"
    overlaps = [row for row in found if "iou" in row]
    return text + (f", {_mean(overlaps, 'iou'):.2f}, {_mean(overlaps, 'shifted_iou'):.2f}" if overlaps else "")


def _cleansed(records: Sequence[Record], which: str) -> str:
    found = [record["neural_cleanse"][which] for record in records if which in record["neural_cleanse"]]
    if not found:
        return "-"
    labels = "; ".join(dict.fromkeys(str(row["label"]) for row in found))
    return f"{_mean(found, 'index'):.1f}, label {labels}"


def _mean(rows: Sequence[Record], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def backdoor_free(record: Record) -> bool:
    """Whether the zoo's card says so."""
    return bool(record["attack"] == "clean")


def auroc(records: Sequence[Record], scores: Sequence[float]) -> float:
    """How well scores, one a record, tell backdoored models from clean ones."""
    return float(roc_auc_score([not backdoor_free(record) for record in records], scores))


def summary(records: Sequence[Record]) -> str:
    """Model level, label and trigger, over all records."""
    bad = [record for record in records if not backdoor_free(record)]
    clean = [record for record in records if backdoor_free(record)]
    told = [record for record in bad if record["verdict"] in ("backdoored", "suspicious")]
    named = [record for record in bad if record["mode"] == "all-to-one"]
    right = [record for record in named if record["suspects"] and record["suspects"][0]["label"] == record["target"]]
    called = sum(record["verdict"] == "backdoored" for record in clean)
    suspected = sum(record["verdict"] == "suspicious" for record in clean)
    lines = [
        f"{len(told)} of {len(bad)} scans of backdoored models call them backdoored or suspicious; {called} of "
        f"{len(clean)} scans of clean models call them backdoored, and {suspected} suspicious. The score's AUROC is "
        f"{auroc(records, [record['score'] for record in records]):.3f}. The first suspect label is the attacker's in "
        f"{len(right)} of {len(named)} scans of models with one such label."
    ]
    for which in ("original", "exposed"):
        rows = [record for record in records if which in record["neural_cleanse"]]
        if rows:
            index = auroc(rows, [row["neural_cleanse"][which]["index"] for row in rows])
            hit = [row for row in named if which in row["neural_cleanse"]]
            labels = sum(row["neural_cleanse"][which]["label"] == row["target"] for row in hit)
            lines.append(
                f"The anomaly index of Neural Cleanse on the {which} model has an AUROC of {index:.3f}, and its most "
                f"anomalous label is the attacker's in {labels} of {len(hit)}."
            )
    return " ".join([*lines, *_recovered(records)])


def _recovered(records: Sequence[Record]) -> list[str]:
    """Success and overlap of the triggers for the patch attacks that all ways recovered one for."""
    ways = {
        "scan": "the scan",
        "neural-cleanse-original": "Neural Cleanse on the original model",
        "neural-cleanse-exposed": "Neural Cleanse on the exposed model",
    }
    shared = [row for row in records if all("iou" in row["triggers"].get(which, {}) for which in ways)]
    if not shared:
        return []
    found = []
    for which, name in ways.items():
        rows = [record["triggers"][which] for record in shared]
        found.append(
            f"those of {name} work on {_mean(rows, 'success_rate'):.1%} of held-out images and have an IoU of "
            f"{_mean(rows, 'iou'):.2f} with the true patch, {_mean(rows, 'shifted_iou'):.2f} after the best shift"
        )
    return [f"Triggers recovered for {len(shared)} patch attacks: {'; '.join(found)}."]


def calibration(records: Sequence[Record]) -> str:
    """For every network the threshold that all others would set, and what it does there.

    It is halfway between the highest score of a clean model and the next higher one of a backdoored model.
    """
    archs = sorted({record["arch"] for record in records})
    lines = [
        "| network left out | threshold from the others | its clean scans above | its backdoored scans above |",
        "|---|---|---|---|",
    ]
    above_clean = above_bad = 0
    for arch in archs:
        level = threshold([record for record in records if record["arch"] != arch])
        mine = [record for record in records if record["arch"] == arch]
        clean, bad = ([row["score"] >= level for row in mine if backdoor_free(row) is free] for free in (True, False))
        above_clean, above_bad = above_clean + sum(clean), above_bad + sum(bad)
        lines.append(f"| {arch} | {level:.2f} | {sum(clean)} of {len(clean)} | {sum(bad)} of {len(bad)} |")
    free = sum(map(backdoor_free, records))
    lines.append(f"| **sum** | - | {above_clean} of {free} | {above_bad} of {len(records) - free} |")
    return "\n".join(lines)


def threshold(records: Sequence[Record]) -> float:
    """Halfway between the highest clean score and the lowest backdoored one above it."""
    highest = max((record["score"] for record in records if backdoor_free(record)), default=0.0)
    beyond = [record["score"] for record in records if not backdoor_free(record) and record["score"] > highest]
    return float((highest + min(beyond, default=highest)) / 2)
