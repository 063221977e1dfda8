"""``debackdoor bench``: measures defences side by side, and makes tables of what was measured."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from debackdoor.cli import options
from debackdoor.cli.output import Output, each_of, write_text
from debackdoor.cli.places import check_folder, check_more
from debackdoor.cli.status import OK

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from debackdoor.bench.run import Finished

FAILED = 1

bench = typer.Typer(help="Measure defences side by side, and make tables of it.", rich_markup_mode=None)


@bench.command()
def run(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder for the records, one JSON file a cell.")],
    matrix: Annotated[
        Path | None,
        typer.Argument(
            metavar="MATRIX",
            help="A TOML file with any of the keys zoo, models, defenses, seeds and clean_images; options go before "
            "it.",
        ),
    ] = None,
    zoo: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of a zoo's tier; by default zoo/slim.")
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="A model, or a pattern such as 'gtsrb-*'; by default all."),
    ] = None,
    defenses: Annotated[
        list[str] | None, typer.Option("--defense", metavar="NAME", help="A defence; by default every one there is.")
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", metavar="N", help="Seed of the clean images and of the defence; by default 0."),
    ] = None,
    clean_images: Annotated[
        list[int] | None,
        typer.Option("--clean-images", metavar="N", help="As many clean images a defence gets; by default 500."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure the cells again whose record is an error.")
    ] = False,
    fine_tune: Annotated[
        bool,
        typer.Option("--fine-tune", help="Fine-tune every repaired model for 20 epochs and measure it once more."),
    ] = False,
    executor: Annotated[
        options.Executor, typer.Option(help="Processes of this machine, or Ray tasks.")
    ] = options.Executor.LOCAL,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="As many cells are measured at once; by default one, on a cluster all it has room for."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each; for Ray its processors.")] = 1,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs that Ray sets aside for each; by default one with --device cuda, else none."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address of a Ray cluster; by default one is started on this machine."),
    ] = None,
    device: options.DeviceName = options.Device.AUTO,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Measure every model with every defence, seed and number of clean images.

    A cell that has its record is skipped, so that a bench that was stopped goes on where it was. One that fails is
    recorded with its error. Cells that differ in the model or the defence's settings are never mixed.

    Exits with 0 if every cell was measured, and with 1 if some failed.
    """
    on_ray = executor is options.Executor.RAY
    if not on_ray and (address is not None or gpus):
        option = "--gpus" if address is None else "--address"
        raise typer.BadParameter(f"expected {option} with --executor ray, got it without", param_hint=option)
    output = Output(quiet)
    check_folder(next(path for path in (out.absolute(), *out.absolute().parents) if path.exists()))

    from debackdoor.bench.cells import Matrix, read_matrix
    from debackdoor.bench.run import failures
    from debackdoor.bench.run import run as run_bench

    chosen = (Matrix() if matrix is None else read_matrix(matrix)).replaced(
        zoo=zoo,
        models=models or None,
        defenses=defenses or None,
        seeds=seeds or None,
        clean_images=clean_images or None,
    )
    cells = run_bench(
        chosen,
        out,
        retry_failed=retry_failed,
        device=device.value,
        fine_tune=fine_tune,
        executor=executor.value,
        workers=workers if address is not None else workers or 1,
        threads=threads,
        address=address,
        gpus=1 if gpus is None and on_ray and device is options.Device.CUDA else gpus or 0,
    )
    finished = _gathered(output, cells, len(chosen.cells()))
    failed = failures(finished)
    output.say(_summary(finished, failed))
    for item in failed:
        output.say_error(f"failed: {item.cell}: {item.record['error']}", style="red")
    return FAILED if failed else OK


@bench.command()
def table(
    folders: Annotated[list[Path], typer.Argument(metavar="DIRS", help="Folders with records of bench run.")],
    defenses: Annotated[
        list[str] | None,
        typer.Option("--defense", metavar="NAME", help="A defence to compare; by default all that have records."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table in Markdown, too; it is printed anyway.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as CSV with all digits.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one page that needs no network, with the whole matrix.")
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compare defences by their records.

    They are ranked by their mean DER, with the worst beside it, on the models, seeds and numbers of clean images that
    all of them have.
    """
    output = Output(quiet)
    check_more([record for folder in folders for record in folder.rglob("*.json")], markdown, csv, html)

    from debackdoor.bench.records import read_records
    from debackdoor.bench.tables import compare, to_csv, to_markdown

    if html is not None:
        from debackdoor.bench.page import check_libraries

        check_libraries()
    comparison = compare(read_records(folders), defenses or ())
    said = to_markdown(comparison)
    output.say(said)
    steps: list[Callable[[], object]] = []
    if markdown is not None:
        steps.append(lambda: write_text(markdown, said + "\n"))
    if csv is not None:
        steps.append(lambda: write_text(csv, to_csv(comparison)))
    if html is not None:
        from debackdoor.bench.page import to_html

        steps.append(lambda: write_text(html, to_html(comparison)))
    each_of(steps)


def _gathered(output: Output, cells: Generator[Finished, None, None], total: int) -> list[Finished]:
    """All cells, each said as it comes."""
    finished: list[Finished] = []
    failed = 0
    with output.stages() as stages, contextlib.closing(cells), _said_when_interrupted(output, finished, total):
        stages.begin("bench")
        for item in cells:
            finished.append(item)
            failed += item.record["error"] is not None
            if not item.kept:
                output.say(_line(item))
            stages("bench", item.number, item.total, {"failed": failed})
    return finished


@contextlib.contextmanager
def _said_when_interrupted(output: Output, finished: list[Finished], total: int) -> Iterator[None]:
    """Says how far a bench is that is stopped."""
    try:
        yield
    except KeyboardInterrupt:
        output.say(f"{len(finished)} of {total} cells have their record; the same command goes on from there")
        raise


def _line(item: Finished) -> str:
    said = f"{item.number} of {item.total}: {item.cell}"
    record = item.record
    if record["error"] is not None:
        return f"{said}: failed: {record['error']}"
    accuracy = record["clean_accuracy"]
    said += f": CA {accuracy['before']:.1%} to {accuracy['after']:.1%}"
    if record["der"] is not None:
        success = record["attack_success_rate"]
        said += f", ASR {success['before']:.1%} to {success['after']:.1%}, DER {record['der']:.3f}"
    return f"{said}, {record['seconds']:.0f} s"


def _summary(finished: list[Finished], failed: list[Finished]) -> str:
    kept = sum(item.kept for item in finished)
    said = f"{len(finished)} cells: {len(finished) - kept} measured now, {kept} were there, {len(failed)} failed"
    return said + ("; --retry-failed measures those again" if failed else "")
