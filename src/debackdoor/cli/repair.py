"""``debackdoor repair``: from an untrusted checkpoint to a repaired one."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from debackdoor.cli import options
from debackdoor.cli.output import Output, each_of, finding_stands, write_text
from debackdoor.cli.places import check_file, check_kept, check_more, paths_among
from debackdoor.cli.status import BACKDOORED, INCONCLUSIVE, OK, complain
from debackdoor.cli.words import numbers_in_words
from debackdoor.errors import DebackdoorError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from debackdoor.types import CleanSet, RepairResult, ScanReport


def repair(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    arch: options.Arch,
    clean: options.CleanData,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the repaired model goes: .safetensors, .pt, ...")],
    budget: Annotated[
        float, typer.Option(min=0, max=1, help="How far accuracy on clean images may fall, a fraction.")
    ] = 0.02,
    json_to: options.JsonTo = None,
    html: options.HtmlTo = None,
    scan_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Scan, too, from the same look, and write the scan's record.")
    ] = None,
    overwrite: options.Overwrite = False,
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
    """Remove the backdoor of a model.

    A few clean images are all it takes.

    Exits with 0 if the model was repaired and verified or nothing had to be repaired, with 1 if the backdoor was still
    there in the end, and with 3 if nothing could be told; the file is written then, too. Too few clean images, a model
    at chance on them, and a network that cannot be examined end it with 3 and no file.
    """
    output = Output(quiet, json_to)
    read = paths_among(clean, arch)
    check_file(out, [checkpoint], overwrite)
    check_file(out, read, overwrite, protect=True)
    taken = [checkpoint, out, *read]
    check_more(taken, html, scan_json)
    output.check_json(taken)
    check_kept(keep, read, out, json_to, html, scan_json)

    from debackdoor.both import scan_and_repair
    from debackdoor.checkpoint import write_checkpoint
    from debackdoor.data import load_clean
    from debackdoor.models import open_model, state_dict_of
    from debackdoor.repair import repair as repair_model
    from debackdoor.report import header, repair_record
    from debackdoor.runtime import deterministic_algorithms, resolve_device

    resolve_device(device)
    if html is not None:
        from debackdoor.report.page import check_libraries

        check_libraries()
    with deterministic_algorithms(deterministic), output.stages() as stages:
        stages.begin("load")
        loaded = open_model(checkpoint, arch, num_classes, mean, std)
        images = load_clean(clean, limit, seed)
        stages.begin("repair")
        settings: dict[str, Any] = {"seed": seed, "device": device, "precision": precision, "memory": memory}
        settings |= {"keep": keep, "progress": stages}

        def head() -> dict[str, Any]:
            return header(loaded, data=clean, seed=seed, seconds=stages.seconds)

        if scan_json is None:
            scan, result = None, repair_model(loaded.model, images, budget, **settings)
        else:
            scan = _Scan(scan_json, head, len(images))
            try:
                _, result = scan_and_repair(loaded.model, images, budget, **settings, scanned=scan.write)
            except Exception as error:
                return scan.survive(error, debug)

    def write_model() -> None:
        write_checkpoint(out, state_dict_of(result.model), like=loaded.checkpoint, overwrite=overwrite)
        output.say(f"wrote {out}" + ("" if result.changed else f", a copy with the same tensors as {checkpoint}"))

    def write_records() -> None:
        record = repair_record(head(), result, clean_images=len(images), budget=budget)
        records: list[Callable[[], object]] = [lambda: output.write_json(record)]
        if html is not None:
            records.append(lambda: _write_page(html, record, result, images, shlex.join(context.obj)))
        each_of(records)

    # Also when the model cannot be written: what was found is worth knowing.
    steps: list[Callable[[], object]] = [lambda: _describe(output, result, len(images)), write_model, write_records]
    if scan is not None:
        steps.append(scan.check_written)
    status = _status(result)
    with finding_stands(status, debug):
        each_of(steps)
    return status


@dataclass
class _Scan:
    """The record of a scan, which is written before the repair begins.

    Attributes:
        path: the file.
        head: gives what the record begins with.
        images: how many clean ones.
        finding: whether the scan found anything.
        error: why the record could not be written.
    """

    path: Path
    head: Callable[[], Mapping[str, Any]]
    images: int
    finding: bool = False
    error: DebackdoorError | None = None

    def write(self, report: ScanReport) -> None:
        """Writes the record; an error is kept for the end, since the repair goes on."""
        from debackdoor.report import scan_record, to_json

        self.finding = report.verdict in ("backdoored", "suspicious")
        record = scan_record(self.head(), report, clean_images=self.images, fail_on="suspicious")
        try:
            write_text(self.path, to_json(record))
        except DebackdoorError as error:
            self.error = error

    def check_written(self) -> None:
        """Raises the error that was kept."""
        if self.error is not None:
            raise self.error

    def survive(self, error: Exception, debug: bool) -> int:
        """The exit code after a repair that failed: a finding of the scan stands; without one the error is raised."""
        if self.error is not None:
            complain(str(self.error))
        with finding_stands(BACKDOORED if self.finding else OK, debug):
            raise error
        return BACKDOORED


def _write_page(html: Path, record: Mapping[str, Any], result: RepairResult, images: CleanSet, command: str) -> None:
    from debackdoor.report.page import write_page
    from debackdoor.report.pictures import Pictures

    pictures, rows = Pictures(clean=images), result.history.get("unlearn", ())
    write_page(html, record, pictures=pictures, unlearning=rows, command=command)


def _status(result: RepairResult) -> int:
    if result.verification is not None and not result.verification.conclusive:
        return INCONCLUSIVE
    fine = result.verification.passed if result.verification is not None else not result.changed
    return OK if fine else BACKDOORED


def _describe(output: Output, result: RepairResult, images: int) -> None:
    """Says what was found and done; a backdoor that is left is said on stderr, even when quiet."""
    for step in result.steps:
        numbers = numbers_in_words(step.numbers)
        output.say(f"{step.name}: {step.reason}" + (f" ({numbers})" if numbers else ""))
    before, after = result.clean_accuracy["before"], result.clean_accuracy["after"]
    output.say(f"clean accuracy {before:.1%} before, {after:.1%} after, on the part held out of {images} images")
    if not result.changed:
        output.say("no weight was changed")
    if _status(result) != OK:
        message = result.verification.message if result.verification is not None else "the repair was not verified"
        complain(f"warning: {message}; do not use the model")
