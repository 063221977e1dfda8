"""``debackdoor detect``: which images of a pile carry the trigger."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from debackdoor.cli import options
from debackdoor.cli.output import Output, each_of, finding_stands
from debackdoor.cli.places import check_kept, check_new_folder, paths_among
from debackdoor.cli.status import BACKDOORED, INCONCLUSIVE, OK, complain
from debackdoor.text import visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from debackdoor.data import Pile
    from debackdoor.types import SampleScores

BY_CHANCE = 0.001
"""So many flagged images are a finding where a pile of clean ones gives as many no more often than this."""


class Method(StrEnum):
    """What gives a score to an image."""

    REPAIR_SHIFT = "repair-shift"
    EXPOSED_MARGIN = "exposed-margin"
    STRIP = "strip"
    COGNITIVE_DISTILLATION = "cognitive-distillation"
    SPECTRAL = "spectral"
    CLUSTERING = "clustering"


class On(StrEnum):
    """Which model a published method looks at."""

    EXPOSED = "exposed"
    ORIGINAL = "original"


OWN = (Method.REPAIR_SHIFT, Method.EXPOSED_MARGIN)
"""Methods that look at models of their own; debackdoor.detect, which has them too, imports torch."""

SHOWN = 10
"""As many flagged images are named; the record names all."""


def detect(
    checkpoint: options.Checkpoint,
    arch: options.Arch,
    clean: options.CleanData,
    suspects: Annotated[
        str, typer.Option(metavar="DATA", help="The images to judge, as --clean takes them; labels are not needed.")
    ],
    json_to: options.JsonTo = None,
    clean_out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy the images that pass into this empty or new folder.")
    ] = None,
    method: Annotated[Method, typer.Option(help="What gives a score to an image.")] = Method.REPAIR_SHIFT,
    on: Annotated[
        On, typer.Option(help="Let a published method look at the exposed or the original model.")
    ] = On.EXPOSED,
    false_positive_rate: Annotated[
        float, typer.Option("--fpr", min=0, max=1, help="The share of clean images that may be flagged, a fraction.")
    ] = 0.01,
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
    """Find the images that carry a model's trigger.

    Nothing is deleted: --clean-out copies what passes.

    Exits with 0 if no more images are flagged than may be by chance, with 1 if more are, and with 3 if nothing could be
    told. Too few clean images, a model at chance on them, and a network that cannot be examined end it with 3 and no
    file.
    """
    if on is On.ORIGINAL and method in OWN:
        own = " and ".join(OWN)
        raise typer.BadParameter(f"expected exposed for {own}, got {on}; choose another --method", param_hint="--on")
    output = Output(quiet, json_to)
    read = paths_among(clean, suspects, arch)
    output.check_json([checkpoint, *read])
    check_kept(keep, read, json_to, clean_out)
    if clean_out is not None:
        check_new_folder(clean_out, paths_among(clean, suspects), json_to)

    from debackdoor.data import load_clean, load_pile
    from debackdoor.detect import detect_samples
    from debackdoor.models import open_model
    from debackdoor.report import detect_record, header
    from debackdoor.runtime import deterministic_algorithms, resolve_device

    resolve_device(device)
    with deterministic_algorithms(deterministic), output.stages() as stages:
        stages.begin("load")
        loaded = open_model(checkpoint, arch, num_classes, mean, std)
        images, pile = load_clean(clean, limit, seed), load_pile(suspects)
        stages.begin("detect")
        scores = detect_samples(
            loaded.model,
            images,
            pile.x,
            method=method,
            on=on,
            false_positive_rate=false_positive_rate,
            seed=seed,
            device=device,
            precision=precision,
            memory=memory,
            keep=keep,
            progress=stages,
        )

    def write_record() -> None:
        head = header(loaded, data=clean, seed=seed, seconds=stages.seconds)
        output.write_json(detect_record(head, scores, clean_images=len(images), suspects=pile.names))

    status = BACKDOORED if scores.p_value < BY_CHANCE else OK if scores.conclusive else INCONCLUSIVE
    steps: list[Callable[[], object]] = [lambda: _describe(output, scores, pile), write_record]
    if clean_out is not None:
        steps.append(lambda: _copy(output, pile, ~scores.flagged, clean_out))
    with finding_stands(status, debug):
        each_of(steps)
    if not scores.conclusive:
        complain("warning: the clean task was not unlearned, so the exposed model tells little; give more clean images")
    return status


def _copy(output: Output, pile: Pile, chosen: Tensor, folder: Path) -> None:
    from debackdoor.data import write_images

    write_images(pile, chosen, folder)
    output.say(f"copied {int(chosen.sum())} images that pass to {folder}")


def _describe(output: Output, scores: SampleScores, pile: Pile) -> None:
    flagged = scores.flagged.nonzero()[:, 0]
    order = flagged[scores.scores[flagged].argsort(descending=True)].tolist()
    for index in order[:SHOWN]:
        name, label, score = visible(pile.names[index]), int(scores.answers[index]), scores.scores[index]
        output.say(f"flagged: {name}, which the model calls {label} (score {score:.3g})")
    if len(order) > SHOWN:
        output.say(f"... and {len(order) - SHOWN} more, which --json names")
    output.say(
        f"{len(order)} of {len(scores)} images are flagged, by {scores.method}; of clean images it would be at most "
        f"about {scores.false_positive_rate:.1%}"
    )
