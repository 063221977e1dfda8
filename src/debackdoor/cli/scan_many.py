"""``debackdoor scan-many``: which checkpoints of a manifest hide a backdoor."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from debackdoor.cli import options
from debackdoor.cli.output import Output, each_of, finding_stands
from debackdoor.cli.places import check_file, check_to_be_folder, paths_among
from debackdoor.cli.scan import FailOn
from debackdoor.cli.status import BACKDOORED, ERROR, INCONCLUSIVE, OK
from debackdoor.text import visible

if TYPE_CHECKING:
    from debackdoor.bench.manifest import Entry
    from debackdoor.bench.scan_store import Result

_STYLES = {BACKDOORED: "bold red", ERROR: "bold magenta", INCONCLUSIVE: "bold magenta", OK: "bold green"}


def scan_many(
    context: typer.Context,
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="A .csv or .parquet file with the columns path, arch and clean.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Keep the results here; those of an earlier run are used again.")
    ],
    executor: Annotated[
        options.Executor, typer.Option(help="Scan in processes of this machine, or as tasks of a Ray cluster.")
    ] = options.Executor.LOCAL,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Scan so many models at once; by default one, on a cluster all it has room for."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address of a Ray cluster; by default one is started on this machine."),
    ] = None,
    json_to: options.JsonTo = None,
    fail_on: Annotated[FailOn, typer.Option(help="The verdict from which on the exit code is 1.")] = FailOn.SUSPICIOUS,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what an earlier run could not scan.")
    ] = False,
    limit: options.Limit = 500,
    seed: options.Seed = 0,
    device: options.DeviceName = options.Device.AUTO,
    precision: options.PrecisionName = options.Precision.AUTO,
    memory: options.Memory = 6.0,
    deterministic: options.Deterministic = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Find out which models of a list hide a backdoor.

    A model that cannot be scanned stops nothing. A run that was stopped goes on where it was.

    Exits with the worst that was found: 1 for a finding at or above --fail-on, else 2 if a model could not be scanned,
    else 3 if nothing could be told of one, else 0.
    """
    if address is not None and executor is not options.Executor.RAY:
        raise typer.BadParameter("expected --address with --executor ray, got it without", param_hint="--address")
    output = Output(quiet, json_to)

    from debackdoor.bench.manifest import read_manifest
    from debackdoor.bench.overview import check_libraries, overview_record, write_overview
    from debackdoor.bench.scan_many import scan_many as scan_all
    from debackdoor.bench.scan_store import Settings
    from debackdoor.runtime import resolve_device

    entries = read_manifest(manifest)
    _check_outputs(output, out, manifest, entries)
    check_libraries()
    if executor is options.Executor.LOCAL:  # the machines of a cluster may have what this one has not
        resolve_device(device)
    settings = Settings(
        limit=limit,
        seed=seed,
        device=device.value,
        precision=precision.value,
        memory=memory,
        deterministic=deterministic,
        fail_on=fail_on.value,
    )
    resources = _resources(len(entries), executor, workers, address, device)
    results: dict[str, Result] = {}
    with _findings_stand(results, fail_on, debug):
        scans = scan_all(entries, out, settings, retry_failed=retry_failed, executor=executor.value, **resources)
        _gather(output, scans, results, len(entries))
        in_order = [results[entry.name] for entry in entries]
        _describe(output, in_order, _status(results, fail_on))

        def overview() -> None:
            write_overview(out, in_order, command=shlex.join(context.obj))
            output.say(f"wrote {out / 'index.html'} and {out / 'scan.parquet'}")

        each_of([overview, lambda: output.write_json(overview_record(in_order, asdict(settings)))])
    return _status(results, fail_on)


def _gather(output: Output, scans: Generator[Result], results: dict[str, Result], total: int) -> None:
    """Says what becomes of each model, and keeps it in ``results``."""
    numbers: Counter[str] = Counter()
    with output.stages() as stages, closing(scans):
        stages("scan", 0, total, {})
        for result in scans:
            results[result.name] = result
            numbers[result.kind] += 1
            _say_result(output, result)
            # Apart, since what is there already says nothing of the time that the rest takes.
            stages("check" if result.kept else "scan", len(results), total, dict(numbers))


def _status(results: Mapping[str, Result], fail_on: FailOn) -> int:
    """The worst of all; a finding comes before an error."""
    kinds = {result.kind for result in results.values()}
    if "backdoored" in kinds or ("suspicious" in kinds and fail_on is FailOn.SUSPICIOUS):
        return BACKDOORED
    if any(result.error is not None for result in results.values()):
        return ERROR
    return INCONCLUSIVE if "inconclusive" in kinds else OK


@contextmanager
def _findings_stand(results: Mapping[str, Result], fail_on: FailOn, debug: bool) -> Iterator[None]:
    """An error hides no finding of the results that there are when it comes."""
    try:
        yield
    except Exception:
        with finding_stands(_status(results, fail_on), debug):
            raise


def _check_outputs(output: Output, out: Path, manifest: Path, entries: Sequence[Entry]) -> None:
    """Checks, before any work, that the results can be written and take the place of nothing that is read."""
    check_to_be_folder(out)
    read = [manifest, *(file for entry in entries for file in paths_among(entry.path, entry.clean, entry.arch))]
    written = [out / "scan.parquet", out / "index.html"]
    if out.is_dir():
        # After an earlier run they are its own, also where it lies in a folder of clean images.
        ours = (out / "records").is_dir()
        for path in written:
            check_file(path, [file for file in read if not (ours and file.is_dir())], overwrite=True, protect=True)
    records = [out / kind / f"{entry.name}.json" for entry in entries for kind in ("records", "errors")]
    output.check_json([*read, *written, *records])


def _resources(
    models: int, executor: options.Executor, workers: int | None, address: str | None, device: options.Device
) -> dict[str, Any]:
    """How many scans run at once, and what each of them gets."""
    import torch

    threads = 1
    if address is None:  # else a cluster knows best how many it can run
        workers = min(workers or 1, models)
        threads = max(1, torch.get_num_threads() // workers)
    gpus = int(executor is options.Executor.RAY and device is options.Device.CUDA)
    return {"workers": workers, "threads": threads, "address": address, "gpus": gpus}


def _say_result(output: Output, result: Result) -> None:
    if result.error is not None:
        output.say_error(visible(f"{result.name}: error, {result.error}"))
    elif result.kind != "clean":
        output.say(visible(f"{result.name}: {result.kind}, {result.message}"))


def _describe(output: Output, results: Sequence[Result], status: int) -> None:
    from debackdoor.bench.overview import counts

    found = counts(results)
    said = ", ".join(f"{number} {_plural(kind, number)}" for kind, number in found.items() if number)
    kept = sum(result.kept for result in results)
    earlier = f"; {kept} of them from an earlier run" if kept else ""
    output.say(f"{len(results)} {_plural('model', len(results))}: {said}{earlier}", style=_STYLES[status])


def _plural(word: str, number: int) -> str:
    """A verdict has none."""
    return f"{word}s" if word in ("model", "error") and number != 1 else word
