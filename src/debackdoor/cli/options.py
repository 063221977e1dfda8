"""The options that commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


# Not taken from debackdoor.runtime, which imports torch: help has to come at once.
class Device(StrEnum):
    """Where numbers are computed."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """How numbers are computed."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class Mode(StrEnum):
    """Which label an attack wants."""

    ALL_TO_ONE = "all-to-one"
    ALL_TO_ALL = "all-to-all"


class Executor(StrEnum):
    """What many models are given to."""

    LOCAL = "local"
    RAY = "ray"


# A class of its own, since typer would read a tuple as so many arguments.
class Numbers(tuple[float, ...]):
    """One number a channel."""


def _numbers(text: str) -> Numbers:
    try:
        return Numbers(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"expected numbers such as 0.49,0.48,0.45, got {text!r}") from error


_DATA = "a folder of class sub-folders, a .parquet or .npz file, a CIFAR folder, or one of digits, cifar10, gtsrb"

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="The model: a safetensors or torch file.")]
Arch = Annotated[
    str,
    typer.Option(
        metavar="ARCH",
        help="A built-in name such as resnet18, file.py:factory, package.module:factory, timm:NAME, torchvision:NAME "
        "or hf:DIR.",
    ),
]
TestData = Annotated[str, typer.Option("--test", metavar="DATA", help=f"Test images: {_DATA}.")]
CleanData = Annotated[str, typer.Option("--clean", metavar="DATA", help=f"Trusted images: {_DATA}.")]
TrainingData = Annotated[str, typer.Option("--data", metavar="DATA", help=f"Training images: {_DATA}.")]
NumClasses = Annotated[int | None, typer.Option(min=2, help="Number of classes; by default the checkpoint's own.")]
Mean = Annotated[
    Numbers | None,
    typer.Option(
        parser=_numbers, metavar="A,B,C", help="What the model was trained to have subtracted from [0, 1] images."
    ),
]
Std = Annotated[
    Numbers | None,
    typer.Option(parser=_numbers, metavar="A,B,C", help="What it was trained to have them divided by after that."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Take at most this many images, equally many of each class.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of everything random.")]
DeviceName = Annotated[Device, typer.Option("--device", help="Where to compute.")]
PrecisionName = Annotated[Precision, typer.Option("--precision", help="How to compute.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="On a GPU, compute the same numbers in every run; takes longer.")
]
Memory = Annotated[float, typer.Option(min=0, metavar="GIB", help="How much memory may be taken, in GiB.")]
Keep = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep finished stages here, and go on from those of an earlier run."),
]
JsonTo = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")
]
HtmlTo = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page that needs no network.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is already there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
# main() looks for it among the arguments, since errors come before a command has them, too.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
