"""``debackdoor zoo``: builds, lists and shows the models to test defences with."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from debackdoor.cli import options
from debackdoor.cli.output import Output
from debackdoor.cli.places import check_folder, check_more, check_outside, paths_among
from debackdoor.errors import DebackdoorError

if TYPE_CHECKING:
    from debackdoor.zoo import Card

LIST_SCHEMA = "debackdoor/zoo-list/1"

zoo = typer.Typer(help="Build, list and show models to test defences with.", rich_markup_mode=None)


class Tier(StrEnum):
    """The manifests that come with the package."""

    SLIM = "slim"
    FULL = "full"


_Folder = Annotated[Path, typer.Option("--zoo", metavar="DIR", help="The zoo's folder, with one folder a tier in it.")]


@zoo.command()
def build(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAMES", help="Models of the manifest; by default all of them."),
    ] = None,
    tier: Annotated[Tier | None, typer.Option(help="The built-in manifest; by default slim.")] = None,
    manifest: Annotated[Path | None, typer.Option(metavar="FILE", help="A manifest of your own, in TOML.")] = None,
    folder: _Folder = Path("zoo"),
    device: options.DeviceName = options.Device.AUTO,
    precision: options.PrecisionName = options.Precision.AUTO,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train the models of a manifest that are not there yet.

    A build that was stopped goes on where it was, and loses at most one epoch. The time left is that of the whole
    build, at the speed of the model in training.
    """
    if tier is not None and manifest is not None:
        raise typer.BadParameter("expected --tier or --manifest, got both", param_hint="--manifest")
    output = Output(quiet)
    check_folder(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()))

    from debackdoor.zoo import build as build_zoo
    from debackdoor.zoo import built_in_manifest, read_manifest

    chosen = built_in_manifest(tier or Tier.SLIM) if manifest is None else read_manifest(manifest)
    with output.stages() as stages:
        stages.begin("load")
        for built in build_zoo(chosen, folder, names or (), device=device, precision=precision, progress=stages):
            done = "was there" if built.kept else f"trained in {built.card.seconds:.0f} s"
            output.say(f"{built.number} of {built.total}: {built.card.name}, {done}, {_rates(built.card)}")
    output.say(f"wrote {folder / chosen.tier}")


@zoo.command("list")
def list_models(
    folder: _Folder = Path("zoo"),
    tier: Annotated[str | None, typer.Option(help="One tier; by default every one that is there.")] = None,
    json_to: options.JsonTo = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """List the models that are there, with their rates."""
    output = Output(quiet, json_to)
    _check_json(output, json_to, folder)

    from debackdoor.zoo import list_cards, list_tiers

    tiers = [folder / tier] if tier else list_tiers(folder)
    found = {path.name: list_cards(path) for path in tiers}
    output.say(_table(found))
    output.write_json(
        {"schema": LIST_SCHEMA, "tiers": {name: [card.record() for card in cards] for name, cards in found.items()}}
    )


@zoo.command()
def show(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A model.")] = None,
    folder: _Folder = Path("zoo"),
    tier: Annotated[str, typer.Option(help="The tier it is in.")] = Tier.SLIM.value,
    json_to: options.JsonTo = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with pictures of every attack of the tier instead."),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Images for the page, where a model has their classes; else its own data's."),
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show one model's card, or a page with pictures of every attack."""
    if (name is None) == (html is None):
        raise typer.BadParameter("expected a NAME or --html FILE, one of the two", param_hint="NAME")
    if html is not None and json_to is not None:
        raise typer.BadParameter("expected --json with a NAME, got it with --html", param_hint="--json")
    if html is None and test is not None:
        raise typer.BadParameter("expected --test with --html, got it with a NAME", param_hint="--test")
    output = Output(quiet, json_to)
    check_more([*_files(folder), *paths_among(test or "")], html)
    _check_json(output, json_to, folder)

    from debackdoor.zoo import list_cards

    cards = list_cards(folder / tier)
    if html is not None:
        from debackdoor.report.gallery import write_gallery

        write_gallery(html, cards, folder / tier, tier, test)
        output.say(f"wrote {html}")
        return
    card = next((card for card in cards if card.name == name), None)
    if card is None:
        known = ", ".join(card.name for card in cards) or "none"
        raise DebackdoorError(f"{folder / tier}: expected a model out of {known}, got '{name}'; see zoo list")
    for key, value in card.record().items():
        output.say(f"{key.replace('_', ' ')}: {_words(value)}")
    output.write_json(card.record())


def _check_json(output: Output, json_to: str | None, folder: Path) -> None:
    """Checks, before any work, that the record takes the place of no card, and will not be taken for one.

    Raises:
        DebackdoorError: if it cannot be written, or would lie in the zoo.
    """
    output.check_json(_files(folder))
    if json_to not in (None, "-"):
        check_outside(Path(str(json_to)), [folder])


def _files(folder: Path) -> list[Path]:
    """All that a zoo consists of. Not the folder, whose records might be written again: here those are the cards."""
    return [path for path in folder.glob("*/**/*") if path.is_file() and path.suffix != ".html"]


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "-"
    return "-" if value in (None, "") else str(value)


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"


def _rates(card: Card) -> str:
    said = f"clean accuracy {_percent(card.clean_accuracy)}"
    if card.attack_success_rate is None:
        return said
    return f"{said}, attack success rate {_percent(card.attack_success_rate)}"


def _table(found: dict[str, list[Card]]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for heading in ("tier", "name", "attack", "data", "network", "target"):
        table.add_column(heading, overflow="fold")
    for heading in ("CA", "ASR", "RA"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tier, cards in found.items():
        for row in map(_row, cards):
            table.add_row(*map(escape, (tier, *row)))
    text = io.StringIO()
    Console(file=text, width=shutil.get_terminal_size((120, 24)).columns).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def _row(card: Card) -> Iterable[str]:
    target = "y + 1" if card.mode == "all-to-all" else "-" if card.target is None else str(card.target)
    rates = (card.clean_accuracy, card.attack_success_rate, card.robust_accuracy)
    return (card.name, card.attack, card.dataset, card.arch, target, *map(_percent, rates))
