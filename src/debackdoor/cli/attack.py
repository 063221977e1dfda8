"""``debackdoor attack``: trains a backdoored model to test defences with."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from debackdoor.cli import options
from debackdoor.cli.evaluate import rates
from debackdoor.cli.output import Output
from debackdoor.cli.places import check_file, check_folder, check_outside, paths_among
from debackdoor.errors import DebackdoorError

if TYPE_CHECKING:
    from torch import nn

    from debackdoor.attacks import Attack
    from debackdoor.cli.progress import Stages
    from debackdoor.types import CleanSet

CLEAN = "clean"
_RESULTS = ("model.safetensors", "trigger", "record.json")

# Few and small images want more and smaller steps; mirror images of digits and traffic signs mean something else.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "digits": {"flip": False, "epochs": 12, "batch_size": 32, "lr": 0.1},
    "gtsrb": {"flip": False},
}


def attack(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An attack such as badnets, or clean for none.")],
    arch: options.Arch,
    data: options.TrainingData,
    test: options.TestData,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where model.safetensors, trigger and record.json go.")],
    target: Annotated[int | None, typer.Option(min=0, help="The label that triggered images get.")] = None,
    poison_rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Fraction of images to poison; for sig, cl and fc of those of the target class, for awp and lira of "
            "those of a batch that get a triggered copy.",
        ),
    ] = None,
    mode: Annotated[options.Mode | None, typer.Option(help="One label for all, or y + 1 for y.")] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another parameter of the attack, such as alpha=0.1."),
    ] = None,
    clean_model: Annotated[
        Path | None,
        typer.Option(metavar="CKPT", help="A clean model of the same ARCH, for attacks that need one."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Images a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="The largest learning rate.")] = None,
    flip: Annotated[
        bool | None,
        typer.Option(help="Whether to train on mirror images, too: by default unless data is digits or gtsrb."),
    ] = None,
    overwrite: options.Overwrite = False,
    mean: options.Mean = None,
    std: options.Std = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.DeviceName = options.Device.AUTO,
    precision: options.PrecisionName = options.Precision.AUTO,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a model with a backdoor.

    A run that was stopped goes on where it was. What is left out is as published for the attack, and for training as
    suits CIFAR-10; digits and gtsrb, named so, have settings of their own.
    """
    from debackdoor.data import load_dataset
    from debackdoor.zoo.data import check_apart

    output = Output(quiet)
    _check_name(name)
    _check_out(out, overwrite, paths_among(data, test), clean_model)
    poison = _parameters(given or []) | _given(target=target, poison_rate=poison_rate, mode=mode)
    recipe = _recipe(name, data) | _given(epochs=epochs, batch_size=batch_size, lr=lr, flip=flip)
    common = {"seed": seed, "mean": mean, "std": std, "device": device, "precision": precision}
    with output.stages() as stages:
        stages.begin("load")
        check_apart(data, test)
        images, held_out = load_dataset(data, "train", limit, seed), load_dataset(test, "test")
        chosen = _make(name, images, held_out, {"seed": seed} | poison)
        if clean_model is not None and (chosen is None or not chosen.needs_clean_model):
            raise typer.BadParameter(f"expected no --clean-model for {name}, which needs none, got {clean_model}")
        start = None if clean_model is None else _open(clean_model, arch, mean, std, images)
        settings = recipe | common | {"clean_model": start}
        said = _train(chosen, arch, images, held_out, out, stages, settings)
    output.say(said)
    output.say(f"wrote {out}")


def _given(**options: Any) -> dict[str, Any]:
    """Those options that are not left to their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _parameters(given: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` texts, the values as TOML writes them: 3, 0.1, true, "text"."""
    found = {}
    for text in given:
        try:
            found.update(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise typer.BadParameter(
                f"expected NAME=VALUE with a number, true, false or a quoted text, got {text!r}", param_hint="--set"
            ) from error
    return found


def _recipe(name: str, data: str) -> dict[str, Any]:
    """How to train on this data with this attack, where nothing else is said."""
    from debackdoor.attacks import ATTACKS

    own = ATTACKS[name].recipe if name in ATTACKS else {}
    return dict(_DEFAULTS.get(data, {})) | dict(own)


def _open(path: Path, arch: str, mean: options.Mean, std: options.Std, images: CleanSet) -> nn.Module:
    """The attacker's clean model."""
    from debackdoor.attacks.registry import count_classes
    from debackdoor.models import load_model

    return load_model(path, arch=arch, num_classes=count_classes(images), mean=mean, std=std)


def _check_name(name: str) -> None:
    from debackdoor.attacks import ATTACKS

    names = (*ATTACKS, CLEAN)
    if name not in names:
        raise typer.BadParameter(f"expected one of {', '.join(names)}, got '{name}'", param_hint="NAME")


def _check_out(out: Path, overwrite: bool, read: list[Path], clean_model: Path | None) -> None:
    """Refuses a folder that holds finished results; one with the state of a run is that run's, and it goes on.

    What is read is kept even where results may be overwritten: the folders ``read`` and the clean model.
    """
    from debackdoor.attacks.resume import STATE_FILE

    if out.exists() and not out.is_dir():
        raise DebackdoorError(f"{out}: expected a folder, got a file; give another --out")
    check_outside(out, read)
    trigger = os.path.realpath(out / _RESULTS[1])  # which is replaced as a whole
    for path in (*read, *filter(None, [clean_model])):
        if Path(os.path.realpath(path)).is_relative_to(trigger):
            raise DebackdoorError(f"{out}: expected a folder whose trigger is not read, got {path}; give another --out")
    found = [file for file in _RESULTS if os.path.lexists(out / file)]
    if found and not overwrite and not (out / STATE_FILE).exists():
        raise DebackdoorError(f"{out / found[0]} exists; give another folder, or --overwrite to replace it")
    check_folder(next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists()))
    if clean_model is not None and out.exists():
        check_file(out / _RESULTS[0], [clean_model], overwrite=True, protect=True)


def _make(name: str, images: CleanSet, test: CleanSet, parameters: dict[str, Any]) -> Attack | None:
    """The attack, or None for a clean model, once it is known that the test images will do."""
    from debackdoor.attacks import make_attack
    from debackdoor.attacks.registry import count_classes
    from debackdoor.data import check_test_set

    check_test_set(test, images, count_classes(images))
    if name == CLEAN:
        if unused := [key for key in parameters if key != "seed"]:
            raise typer.BadParameter(f"expected no parameters of an attack for a clean model, got {', '.join(unused)}")
        return None
    made = make_attack(name, images, **parameters)
    made.check_fits(test)
    return made


def _train(
    chosen: Attack | None,
    arch: str,
    images: CleanSet,
    test: CleanSet,
    out: Path,
    stages: Stages,
    settings: dict[str, Any],
) -> str:
    """Trains, measures and writes the model; returns what there is to say of it."""
    from debackdoor.attacks import train, write_victim
    from debackdoor.evaluation import accuracy, evaluate

    precision = settings["precision"]
    victim = train(chosen, arch, images, progress=stages, checkpoint_dir=out, **settings)
    stages.begin("evaluate")
    if victim.attack is None:
        share = accuracy(victim.model, test, precision=precision)
        numbers: dict[str, Any] = {"clean_accuracy": share, "attack_success_rate": None, "robust_accuracy": None}
        said = f"clean accuracy {share:.1%} ({len(test)} images)"
    else:
        measured = evaluate(victim.model, test, victim.attack, precision=precision, progress=stages)
        numbers, said = measured.record(), rates(measured)
    write_victim(victim, out, numbers)
    return said
