"""``debackdoor evaluate``: a model's clean accuracy, attack success rate and robust accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from debackdoor.cli import options
from debackdoor.cli.output import Output
from debackdoor.cli.places import paths_among
from debackdoor.errors import TriggerError

if TYPE_CHECKING:
    from debackdoor.evaluation import Evaluation


def evaluate(
    checkpoint: options.Checkpoint,
    arch: options.Arch,
    test: options.TestData,
    trigger: Annotated[Path, typer.Option(metavar="DIR", help="The trigger folder that an attack wrote.")],
    json_to: options.JsonTo = None,
    num_classes: options.NumClasses = None,
    mean: options.Mean = None,
    std: options.Std = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.DeviceName = options.Device.AUTO,
    precision: options.PrecisionName = options.Precision.AUTO,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure a model with and without a trigger."""
    output = Output(quiet, json_to)
    output.check_json([checkpoint, *paths_among(test, arch), trigger, *trigger.glob("*")])

    from debackdoor.attacks import load_trigger
    from debackdoor.data import check_labels, load_dataset
    from debackdoor.evaluation import evaluate as measure
    from debackdoor.models import open_model
    from debackdoor.report import evaluate_record, header
    from debackdoor.runtime import resolve_device

    place = resolve_device(device)
    with output.stages() as stages:
        stages.begin("load")
        loaded = open_model(checkpoint, arch, num_classes, mean, std)
        attack = load_trigger(trigger)
        if attack.num_classes != loaded.num_classes:
            raise TriggerError(
                f"{trigger}: expected a trigger for the {loaded.num_classes} classes of {checkpoint}, "
                f"got one for {attack.num_classes}; give the trigger of this model"
            )
        images = load_dataset(test, "test", limit, seed)
        check_labels(images, loaded.num_classes)
        stages.begin("evaluate")
        measured = measure(loaded.model.to(place), images, attack, precision=precision, progress=stages)
    output.say(rates(measured))
    head = header(loaded, data=test, seed=seed, seconds=stages.seconds)
    output.write_json(evaluate_record(head, measured, attack=attack.name))


def rates(measured: Evaluation) -> str:
    """The three rates in one line."""
    return (
        f"clean accuracy {measured.clean_accuracy:.1%}, attack success rate {measured.attack_success_rate:.1%}, "
        f"robust accuracy {measured.robust_accuracy:.1%} "
        f"({measured.clean_images} clean and {measured.triggered_images} triggered images)"
    )
