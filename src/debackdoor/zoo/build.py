"""Trains the models of a manifest, one at a time; a build that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from debackdoor.attacks import load_trigger, train
from debackdoor.attacks.registry import count_classes
from debackdoor.data import load_dataset
from debackdoor.data.load import open_source
from debackdoor.errors import DataError, DebackdoorError, TriggerError
from debackdoor.files import sha256_of
from debackdoor.models import build_model, load_model
from debackdoor.runtime import resolve_device, seeded
from debackdoor.types import Progress
from debackdoor.zoo.card import Card, card_of, read_card, trigger_of, weights_of, write_card
from debackdoor.zoo.data import Splits, check_apart, files_sha256, load_splits
from debackdoor.zoo.manifest import CLEAN, Entry, Manifest
from debackdoor.zoo.store import check_same, settings_of, store

_PARTS = 100
"""Progress counts hundredths of an epoch."""


@dataclass(frozen=True)
class Built:
    """One model of a build.

    Attributes:
        card: what it is.
        number: its place among the models of the build, from 1.
        total: how many models the build has.
        kept: whether it was there already.
    """

    card: Card
    number: int
    total: int
    kept: bool


def build(
    manifest: Manifest,
    out: str | Path,
    names: Collection[str] = (),
    *,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
) -> Iterator[Built]:
    """Makes the models of a manifest that are not in ``out/TIER`` yet, and yields all of them as they are ready.

    What is missing is checked before any of it is trained. A training keeps its state in ``out/TIER/.building/NAME``
    after every epoch, and goes on from there when the last build was killed.

    Args:
        manifest: the models to be.
        out: the zoo's folder, made where it is missing.
        names: the models wanted, with the clean models they need; without any, all.
        device: where to train and measure.
        precision: how to.
        progress: called as ``progress("K of N, NAME", done, total, numbers)``, where ``total`` is the work of
            the whole build, in hundredths of an epoch.

    Raises:
        DebackdoorError: if a name, an architecture or an attack's parameters are not usable, data cannot be read, or a
            model that is there is not the one that the manifest describes.
    """
    folder = Path(out) / manifest.tier
    entries = manifest.wanted(names)
    ready = {entry.name: card for entry in entries if (card := find_finished(entry, folder)) is not None}
    missing = [entry for entry in entries if entry.name not in ready]
    resolve_device(device)
    _check(missing)
    tally = _Tally(progress, sum(entry.epochs for entry in missing))
    images = _Images()
    for number, entry in enumerate(entries, 1):
        kept = entry.name in ready
        if not kept:
            tally.begin(f"{number} of {len(entries)}, {entry.name}", entry.epochs)
            ready[entry.name] = _train(entry, images.of(entry), folder, tally, device, precision)
        _clean_up(folder, entry.name)
        yield Built(ready[entry.name], number, len(entries), kept)


def find_finished(entry: Entry, folder: str | Path) -> Card | None:
    """The card of a model that is in the tier's folder already; None where it is missing or not whole.

    A card takes on the manifest's notes where they have changed.

    Raises:
        DebackdoorError: if the card is damaged, or that of another model than the entry describes.
    """
    path, weights = card_of(folder, entry.name), weights_of(folder, entry.name)
    if not path.exists():
        return None
    card = read_card(path)
    names = ("attack", "dataset", "arch", "epochs", "batch_size", "lr", "flip", "seed", "clean_model")
    check_same(str(path), {name: getattr(entry, name) for name in names}, {name: getattr(card, name) for name in names})
    _check_same_images(entry, card, path)
    if not weights.is_file() or sha256_of(weights) != card.sha256:
        return None
    if entry.attack != CLEAN:
        try:
            found = load_trigger(trigger_of(folder, entry.name))
        except TriggerError:
            return None
        check_same(str(path), settings_of(entry.make_attack(found.image_shape, found.num_classes)), settings_of(found))
    if card.notes != entry.notes:
        card = replace(card, notes=entry.notes)
        write_card(card, folder)
    return card


def _check_same_images(entry: Entry, card: Card, path: Path) -> None:
    """Whether a model was trained on as many images as the entry says, and on those that are there now, if any are."""
    try:
        available = len(open_source(entry.dataset, "train").labels)
        sha256 = files_sha256(entry.dataset, "train")
    except DataError:  # what is built needs no images
        return
    trained_on = card.data_sha256.get("train")
    if sha256 is not None and sha256 != trained_on:
        raise DataError(
            f"{path}: expected a model trained on the images of {entry.dataset} that are there now, SHA-256 {sha256}, "
            f"got one of {trained_on}; give those, or delete the model to train it again"
        )
    check_same(str(path), {"samples": min(entry.limit or available, available)}, {"samples": card.samples})


def _check(entries: Sequence[Entry]) -> None:
    """Refuses what would only fail after hours, when its turn comes."""
    for dataset, group in groupby(sorted(entries, key=_dataset), _dataset):
        check_apart(dataset, dataset)
        test = load_dataset(dataset, "test")
        source = open_source(dataset, "train")  # the test images may lack the highest class
        classes = max(len(source.class_names), int(source.labels.max()) + 1)
        for entry in group:
            with seeded(0, torch.device("cpu")):  # random weights, which nobody keeps
                build_model(entry.arch, classes, in_channels=test.x.shape[1])
            try:
                attack = entry.make_attack(test.x.shape[1:], classes)
            except TriggerError as error:
                raise TriggerError(f"{entry.name}: {error}") from error
            if attack is not None:
                attack.check_fits(test)


def _dataset(entry: Entry) -> str:
    return entry.dataset


def _train(entry: Entry, splits: Splits, folder: Path, tally: _Tally, device: str, precision: str) -> Card:
    classes = count_classes(splits.train)
    clean_model = None
    if entry.clean_model is not None:
        clean_model = load_model(weights_of(folder, entry.clean_model), entry.arch, classes)
    attack = entry.make_attack(splits.train.x.shape[1:], classes)
    try:
        victim = train(
            attack,
            data=splits.train,
            device=device,
            progress=tally,
            checkpoint_dir=_state_of(folder, entry.name),
            clean_model=clean_model,
            **asdict(entry.recipe(precision)),
        )
    except DebackdoorError as error:
        raise DebackdoorError(f"{entry.name}: {error}") from error
    return store(entry, victim, splits, folder, device=device, precision=precision)


def _state_of(folder: Path, name: str) -> Path:
    return folder / ".building" / name


def _clean_up(folder: Path, name: str) -> None:
    """Deletes the state of a training whose model is safe, also what a build left that was killed just then."""
    state = _state_of(folder, name)
    shutil.rmtree(state, ignore_errors=True)
    with contextlib.suppress(OSError):  # another build may be at work there
        state.parent.rmdir()


class _Images:
    """The images of the data set in use; one at a time, since each may fill the memory."""

    def __init__(self) -> None:
        self._key: tuple[str, int | None] | None = None
        self._splits: Splits | None = None

    def of(self, entry: Entry) -> Splits:
        key = (entry.dataset, entry.limit)
        if self._splits is None or self._key != key:
            self._splits = None
            self._key, self._splits = key, load_splits(*key)
        return self._splits


class _Tally:
    """A progress callback for one training at a time that tells how far the whole build is."""

    def __init__(self, progress: Progress | None, epochs: int) -> None:
        self._progress = progress
        self._total = _PARTS * epochs
        self._label, self._before, self._share = "", 0, 0

    def begin(self, label: str, epochs: int) -> None:
        """The next model's turn."""
        self._label, self._before, self._share = label, self._before + self._share, _PARTS * epochs
        self("train", 0, 1, {})

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if self._progress is not None:
            self._progress(self._label, self._before + self._share * done // total, self._total, numbers)
