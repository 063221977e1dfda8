"""One self-contained page about a scan, a repair, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from debackdoor import __version__
from debackdoor.detectors.words import REASONS
from debackdoor.errors import DebackdoorError
from debackdoor.files import atomic_write_text
from debackdoor.report import figures, wording
from debackdoor.report.pictures import Pictures, pattern_in_pictures, samples_in_pictures, trigger_in_pictures
from debackdoor.report.records import CHANNELS, LOW, REPAIR_SCHEMA, SCAN_SCHEMA, plain
from debackdoor.report.templates import template

LISTED = 20
"""As many channels are listed: those with the lowest scores."""

TOP_SUSPECTS = 3
"""As many suspect labels are marked in the charts."""


def write_page(
    path: str | Path,
    record: Mapping[str, Any],
    *,
    repair: Mapping[str, Any] | None = None,
    pictures: Pictures | None = None,
    unlearning: Sequence[Mapping[str, Any]] = (),
    command: str | None = None,
) -> None:
    """Writes one HTML page: no script, and nothing that a browser would have to fetch.

    Args:
        path: the HTML file; replaced in one step where it exists.
        record: what ``scan_record`` or ``repair_record`` returned, or the same read from JSON.
        repair: the record of a repair that followed the scan of ``record``.
        pictures: the images that the records do not hold.
        unlearning: for a repair alone, its ``history["unlearn"]``; a scan's record holds its own.
        command: the command line that was run; by default one with the record's settings.

    Raises:
        MissingDependencyError: if jinja2 or matplotlib does not import.
        DebackdoorError: if a record is of another kind, or the file cannot be written.
    """
    page = _page(plain(record), plain(repair), pictures or Pictures(), plain(list(unlearning)), command)
    try:
        atomic_write_text(path, page)
    except OSError as error:
        raise DebackdoorError(
            f"{path} was not written: {error.strerror or error}; check the folder and the disk"
        ) from error


def _page(
    record: Mapping[str, Any],
    repair: Mapping[str, Any] | None,
    pictures: Pictures,
    unlearning: Sequence[Mapping[str, Any]],
    command: str | None,
) -> str:
    if record.get("schema") not in (SCAN_SCHEMA, REPAIR_SCHEMA):
        raise DebackdoorError(f"expected the record of a scan or a repair, got schema {record.get('schema')!r}")
    if repair is not None and repair.get("schema") != REPAIR_SCHEMA:
        raise DebackdoorError(f"expected the record of a repair, got schema {repair.get('schema')!r}")
    scan = record if record["schema"] == SCAN_SCHEMA else None
    repair = record if scan is None else repair
    page = _template()
    name = _namer(scan, pictures)
    verdicts = [] if scan is None else [wording.scan_verdict(scan)]
    verdicts += [] if repair is None else [wording.repair_verdict(repair)]
    return page.render(
        head=record,
        scan=scan,
        verdicts=verdicts,
        advice=wording.advice(verdicts[-1], repair or record),
        suspects=[] if scan is None else _suspects(scan, name),
        unlearning=_unlearning(scan, repair, unlearning, name),
        signs=[] if scan is None else _signs(scan, name),
        trigger=trigger_in_pictures((scan or {}).get("trigger"), pictures, name),
        pattern=pattern_in_pictures((scan or {}).get("pattern"), pictures, name),
        samples=samples_in_pictures(pictures, name),
        channels=None if scan is None else _channels(scan),
        repair=None if repair is None else _repair(repair, name),
        command=command or _command(record),
        together=wording.TOGETHER,
        limits=wording.LIMITS,
        version=__version__,
    )


def _namer(scan: Mapping[str, Any] | None, pictures: Pictures) -> wording.Name:
    """What labels are called, by the clean set's class names or those of the suspects in the record."""
    names = dict(enumerate(pictures.clean.class_names)) if pictures.clean is not None else {}
    names |= {item["label"]: item["name"] for item in (scan or {}).get("suspect_labels", ()) if item["name"]}

    def name(label: int) -> str:
        return f"{label} ({names[label]})" if names.get(label, str(label)) != str(label) else str(label)

    return name


def _suspects(scan: Mapping[str, Any], name: wording.Name) -> list[dict[str, Any]]:
    """The suspect labels, and what speaks against each in words."""
    return [
        {"name": name(item["label"]), "reasons": [REASONS.get(reason, reason) for reason in item["reasons"]]}
        for item in scan["suspect_labels"]
    ]


def _marked(scan: Mapping[str, Any] | None, repair: Mapping[str, Any] | None) -> list[int]:
    """The labels that the charts mark."""
    if scan is not None:
        return [item["label"] for item in scan["suspect_labels"] if item["reasons"]][:TOP_SUSPECTS]
    check = (repair or {}).get("verification") or {}
    return [] if check.get("label") is None else [check["label"]]


def _unlearning(
    scan: Mapping[str, Any] | None,
    repair: Mapping[str, Any] | None,
    unlearning: Sequence[Mapping[str, Any]],
    name: wording.Name,
) -> dict[str, Any] | None:
    """The two charts of the pile-up, or None where no check of the unlearning is known."""
    rows = unlearning if scan is None else scan["unlearning"]
    if not rows:
        return None
    peak = max(rows, key=lambda row: max(row["label_shares"]))
    shares = peak["label_shares"]
    top, suspects = shares.index(max(shares)), _marked(scan, repair)
    said = f"{wording.percent(shares[top])} of the answers on {name(top)}, after {peak['step']} steps"
    over = f"Accuracy ends at {wording.percent(rows[-1]['accuracy'])}."
    return {
        "peak": said,
        "even": wording.percent(1 / len(shares)),
        "left_out": max(0, len(shares) - figures.TOP_LABELS),
        "bars": figures.share_bars(
            shares, [name(label) for label in range(len(shares))], suspects, f"Bar chart of answers by label: {said}."
        ),
        "lines": figures.share_lines(rows, suspects, f"Line chart of answers over the steps: most are {said}. {over}"),
    }


def _signs(scan: Mapping[str, Any], name: wording.Name) -> list[wording.Sign]:
    reasons = [reason for item in scan["suspect_labels"] for reason in item["reasons"]]
    reasons += ["away"] if scan["all_to_all"] else []
    return wording.signs(scan["evidence"], scan["num_classes"], reasons, name)


def _channels(scan: Mapping[str, Any]) -> dict[str, Any] | None:
    layers = scan["layers"]
    if not layers:
        return None
    low, count = sum(row["low"] for row in layers), sum(row["channels"] for row in layers)
    alt = f"Bar chart of channels with a score below {LOW} by layer: most in {layers[0]['layer']}, {layers[0]['low']}."
    return {
        "low": low,
        "count": count,
        "below": LOW,
        "recorded": min(count, CHANNELS),
        "listed": scan["channels"][:LISTED],
        "left_out": max(0, len(layers) - figures.TOP_LAYERS),
        "chart": figures.layer_bars(layers, alt),
    }


def _repair(record: Mapping[str, Any], name: wording.Name) -> dict[str, Any]:
    """What a repair did, and the same evidence before it and after it."""
    check = record["verification"]
    evidence = {} if check is None else check["evidence"]
    before, after = (
        {sign.reason: sign for sign in wording.signs(evidence, record["num_classes"], (), name, when)}
        for when in ("before", "after")
    )
    if "pile_up_share_before" not in evidence:  # where it cannot tell, a model that was left alone has it all the same
        before.pop("pile-up", None)
    rows = [(sign.name, sign, after.get(reason)) for reason, sign in before.items()]
    return {"record": record, "signs": rows, "compared": bool(after)}


def _command(record: Mapping[str, Any]) -> str:
    words = [*wording.what(record), "--limit", record["clean_images"], "--seed", record["seed"]]
    if record["schema"] == SCAN_SCHEMA:
        return wording.command("scan", *words, *(["--all-triggers"] if record["triggers"] else []))
    return wording.command("repair", *words, "--budget", record["budget"], "--out", "FILE")


def check_libraries() -> None:
    """Checks, before any work, that what a page is made with is there.

    Raises:
        MissingDependencyError: if jinja2 or matplotlib does not import.
    """
    _template()
    figures.figure_class()


def _template() -> Any:
    filters = {
        "percent": wording.percent,
        "number": lambda value: "not known" if value is None else f"{value:.4g}",
        "words": lambda value: str(value).replace("_", " "),
    }
    return template("debackdoor.report", "page.html.jinja", filters)
