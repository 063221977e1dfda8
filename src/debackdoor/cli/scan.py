"""``debackdoor scan``: whether a checkpoint hides a backdoor."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from debackdoor.cli import options
from debackdoor.cli.output import Output, each_of, finding_stands, write_text
from debackdoor.cli.places import check_kept, check_more, paths_among
from debackdoor.cli.status import BACKDOORED, INCONCLUSIVE, OK
from debackdoor.cli.words import numbers_in_words
from debackdoor.text import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.table import Table

    from debackdoor.types import CleanSet, ScanReport


_STYLES = {"clean": "bold green", "suspicious": "bold yellow", "backdoored": "bold red", "inconclusive": "bold magenta"}


class FailOn(StrEnum):
    """The verdict from which on a scan ends with exit code 1."""

    SUSPICIOUS = "suspicious"
    BACKDOORED = "backdoored"


def scan(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    arch: options.Arch,
    clean: options.CleanData,
    json_to: options.JsonTo = None,
    html: options.HtmlTo = None,
    sarif: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the finding as SARIF 2.1.0, for code scanning.")
    ] = None,
    fail_on: Annotated[FailOn, typer.Option(help="The verdict from which on the exit code is 1.")] = FailOn.SUSPICIOUS,
    all_triggers: Annotated[
        bool, typer.Option("--all-triggers", help="Search for a trigger towards every label, too; takes longer.")
    ] = False,
    num_classes: options.NumClasses = None,
    mean: options.Mean = None,
    std: options.Std = None,
    limit: options.Limit = 500,
    seed: options.Seed = 0,
    device: options.DeviceName = options.Device.AUTO,
    precision: options.PrecisionName = options.Precision.AUTO,
    memory: options.Memory = 6.0,
    keep: options.Keep = None,
    deterministic: options.Deterministic = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Find out whether a model hides a backdoor.

    A few clean images are all it takes.

    Exits with 0 if nothing was found, with 1 for a finding at or above --fail-on, and with 3 if nothing could be told.
    """
    output = Output(quiet, json_to)
    read = paths_among(clean, arch)
    taken = [checkpoint, *read]
    check_more(taken, html, sarif)
    output.check_json(taken)
    check_kept(keep, read, json_to, html, sarif)

    from debackdoor.data import load_clean
    from debackdoor.models import open_model
    from debackdoor.report import header, scan_record
    from debackdoor.runtime import deterministic_algorithms, resolve_device
    from debackdoor.scan import scan as scan_model

    resolve_device(device)
    if html is not None:
        from debackdoor.report.page import check_libraries

        check_libraries()
    with deterministic_algorithms(deterministic), output.stages() as stages:
        stages.begin("load")
        loaded = open_model(checkpoint, arch, num_classes, mean, std)
        images = load_clean(clean, limit, seed)
        stages.begin("scan")
        report = scan_model(
            loaded.model,
            images,
            all_triggers=all_triggers,
            seed=seed,
            device=device,
            precision=precision,
            memory=memory,
            keep=keep,
            progress=stages,
        )
    status = _status(report, fail_on)
    with finding_stands(status, debug):
        head = header(loaded, data=clean, seed=seed, seconds=stages.seconds)
        record = scan_record(head, report, clean_images=len(images), fail_on=fail_on)
        steps: list[Callable[[], object]] = [
            lambda: _describe(output, report, len(images)),
            lambda: output.write_json(record),
        ]
        if sarif is not None:
            steps.append(lambda: _write_sarif(sarif, record))
        if html is not None:
            steps.append(lambda: _write_page(html, record, report, images, shlex.join(context.obj)))
        each_of(steps)
    return status


def _status(report: ScanReport, fail_on: FailOn) -> int:
    if report.verdict == "inconclusive":
        return INCONCLUSIVE
    finding = report.verdict == "backdoored" or (report.verdict == "suspicious" and fail_on is FailOn.SUSPICIOUS)
    return BACKDOORED if finding else OK


def _write_sarif(path: Path, record: Mapping[str, Any]) -> None:
    from debackdoor.report import to_json
    from debackdoor.report.sarif import sarif

    write_text(path, to_json(sarif(record)))


def _write_page(path: Path, record: Mapping[str, Any], report: ScanReport, images: CleanSet, command: str) -> None:
    from debackdoor.report.page import write_page
    from debackdoor.report.pictures import Pictures

    pictures = Pictures(trigger=report.trigger, clean=images, pattern=report.pattern)
    write_page(path, record, pictures=pictures, command=command)


def _describe(output: Output, report: ScanReport, images: int) -> None:
    """The verdict and what led to it, in a few lines."""
    output.say(f"verdict: {report.verdict}", style=_STYLES[report.verdict])
    output.say(report.message)
    if report.suspects:
        output.show(_suspects(report))
    if report.trigger is not None:
        trigger = report.trigger
        output.say(
            f"a trigger of {trigger.l1:.1f} pixels leads {trigger.success_rate:.0%} of held-out images to label "
            f"{trigger.label}"
        )
    if report.pattern is not None:
        pattern = report.pattern
        output.say(
            f"a faint pattern (RMS {pattern.rms:.3f}) leads {pattern.success_rate:.0%} of held-out images to label "
            f"{pattern.label}"
        )
    for row in report.history.get("triggers", ()):
        output.say(
            f"towards label {row['label']} the smallest trigger found takes {row['l1']:.1f} pixels and works on "
            f"{row['success_rate']:.0%}"
        )
    sign = "" if report.score is None else f"the strongest sign is {report.score:.2f} times its threshold; "
    output.say(f"{sign}{images} clean images were used")


def _suspects(report: ScanReport) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("suspect label", "speaks against it", "numbers"):
        table.add_column(column, overflow="fold")
    for suspect in report.suspects:
        name = escape(visible(f"{suspect.label}" + (f" ({suspect.name})" if suspect.name else "")))
        table.add_row(name, ", ".join(suspect.reasons) or "nearest", numbers_in_words(suspect.evidence))
    return table
