"""``debackdoor demo``: the whole story on scikit-learn's digits, told with the commands that a user would type."""

from __future__ import annotations

import json
import shlex
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from debackdoor.cli import options
from debackdoor.cli.output import Output
from debackdoor.cli.status import OK

_ARCH = ("--arch", "resnet18-w16")
# A tenth of so few images teaches a network the trigger with some seeds only.
_POISON = ("--poison-rate", "0.2")


def demo(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the models and records here; by default nothing is kept.")
    ] = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    device: options.DeviceName = options.Device.AUTO,
    precision: options.PrecisionName = options.Precision.AUTO,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Show it all on scikit-learn's digits.

    Trains a backdoored classifier, measures it, repairs it and measures it again. Needs no download. The exit code is
    that of the repair.
    """
    import torch

    # Sums come out the same in one thread, however many cores there are: the story is the same on every such machine.
    torch.set_num_threads(1)
    output = Output(quiet)
    common = ["--seed", str(seed), "--device", device, "--precision", precision, *(["--quiet"] if quiet else [])]
    codes = []
    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="debackdoor-demo-")))
        for command in _commands(folder, ["--overwrite"] if overwrite else []):
            output.say(f"\n$ debackdoor {shlex.join(command)}")
            codes.append(_run(context, [*command, *common]))
        output.say("\n               clean accuracy   attack success rate")
        for name in ("before", "after"):
            record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            shares = f"{record['clean_accuracy']:>14.1%}   {record['attack_success_rate']:>19.1%}"
            output.say(f"{name + ' repair':<15}{shares}")
    return max(codes)


def _commands(folder: Path, overwrite: list[str]) -> list[list[str]]:
    victim, repaired = str(folder / "model.safetensors"), str(folder / "repaired.safetensors")
    digits = ["--test", "digits"]
    trigger = ["--trigger", str(folder / "trigger")]
    train = ["attack", "badnets", *_ARCH, "--data", "digits", *digits, *_POISON, "--out", str(folder)]
    repair = ["repair", victim, *_ARCH, "--clean", "digits", "--out", repaired, "--json", str(folder / "repair.json")]
    return [
        [*train, *overwrite],
        ["evaluate", victim, *_ARCH, *digits, *trigger, "--json", str(folder / "before.json")],
        [*repair, *overwrite],
        ["evaluate", repaired, *_ARCH, *digits, *trigger, "--json", str(folder / "after.json")],
    ]


def _run(context: typer.Context, arguments: list[str]) -> int:
    root = context.find_root().command
    with root.make_context("debackdoor", arguments) as inner:
        return root.invoke(inner) or OK
