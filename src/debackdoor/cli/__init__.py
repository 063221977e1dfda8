"""The command line: parses, calls, prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from debackdoor import __version__
from debackdoor.allocator import keep_freed_memory
from debackdoor.cli.attack import attack
from debackdoor.cli.bench import bench
from debackdoor.cli.demo import demo
from debackdoor.cli.detect import detect
from debackdoor.cli.evaluate import evaluate
from debackdoor.cli.repair import repair
from debackdoor.cli.scan import scan
from debackdoor.cli.scan_many import scan_many
from debackdoor.cli.status import USAGE, status_of
from debackdoor.cli.zoo import zoo

__all__ = ["app", "main"]

app = typer.Typer(name="debackdoor", add_completion=False, rich_markup_mode=None)
for _command in (scan, scan_many, repair, detect, evaluate, attack, demo):
    app.command()(_command)
app.add_typer(zoo, name="zoo")
app.add_typer(bench, name="bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2 for an error, 4 for a usage error, 130 when interrupted.

    Args:
        arguments: what follows the program's name; by default what the process was started with.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = typer.main.get_command(app)
    keep_freed_memory()
    try:
        # Not app(): that would turn some errors into exit codes of its own, among them 1.
        with command.make_context("debackdoor", list(given), obj=("debackdoor", *given)) as context:
            return command.invoke(context) or 0
    # A user's own code may try to end the program: its exit code would be taken for a verdict.
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return status_of(error, debug="--debug" in given)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"debackdoor {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find out whether an image classifier hides a backdoor, and remove it, from a few clean images alone."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(USAGE)
