"""How long the slim zoo's networks train, and how much longer for each attack, measured side by side.

    python benchmarks/training_cost.py --out benchmarks/results/training-cost.json

Every attack trains for a few epochs on a few images, each time right after a clean model, so that what else the machine
does falls on both. What is done once, whatever the epochs, is timed apart: teaching masks, and poisoning with a clean
model, which grows with the images that are poisoned. What a whole training of each network takes is reckoned from a few
of its epochs.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from publish import commit

from debackdoor.attacks import BackdooredModel, make_attack, train
from debackdoor.data import load_dataset
from debackdoor.files import atomic_write_text
from debackdoor.runtime import versions
from debackdoor.types import CleanSet
from debackdoor.zoo import Entry, built_in_manifest

SCHEMA = "debackdoor/training-cost/1"
ATTACKS = ("badnets", "wanet", "dynamic", "lira", "dfst", "cl", "fc", "trojan")
NETWORKS = ("clean-0", "vgg11-clean", "vgg11_bn-clean", "mobilenetv2-clean", "wrn16-clean", "gtsrb-clean")


def main(
    out: Annotated[Path, typer.Option(help="the record")],
    data: Annotated[str, typer.Option(help="training images")] = "cifar10",
    images: Annotated[int, typer.Option(help="how many of them")] = 2560,
    repeats: Annotated[int, typer.Option(help="pairs an attack")] = 3,
) -> None:
    """Times the attacks of the slim zoo and writes one record."""
    samples = load_dataset(data, "train", images)
    entries = {entry.name: entry for entry in built_in_manifest("slim").entries}
    networks = [whole_training(entries[name], images) for name in NETWORKS]
    clean_model = timed(None, entries["clean-0"], samples)
    rows = [measure(entries[name], entries["clean-0"], samples, clean_model, repeats) for name in ATTACKS]
    record = {
        "schema": SCHEMA,
        "arch": entries["clean-0"].arch,
        "images": images,
        "epochs": entries["clean-0"].epochs,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "networks": networks,
        "attacks": rows,
        "seed": 0,
        "versions": versions(),
        "commit": commit(),
    }
    atomic_write_text(out, json.dumps(record, indent=1) + "\n")


def whole_training(entry: Entry, images: int, epochs: int = 4) -> dict[str, Any]:
    """The seconds that the entry's training takes, from the median of a few epochs on some of its images."""
    everything = len(load_dataset(entry.dataset, "train"))
    data = load_dataset(entry.dataset, "train", images)
    victim = train(None, entry.arch, data, epochs=epochs, batch_size=entry.batch_size, lr=entry.lr, flip=entry.flip)
    epoch = statistics.median(row["seconds"] for row in victim.history[1:])
    seconds = epoch * entry.epochs * everything / len(data)
    typer.echo(f"{entry.arch} on {entry.dataset}: {seconds / 60:.1f} minutes for {entry.epochs} epochs")
    return {
        "model": entry.name,
        "arch": entry.arch,
        "epoch_seconds": epoch,
        "images": len(data),
        "training_seconds": seconds,
    }


def measure(entry: Entry, plain: Entry, data: CleanSet, clean_model: BackdooredModel, repeats: int) -> dict[str, Any]:
    """The ratio of an epoch with the attack to one without, and the seconds of what is done once."""
    ratios, once = [], []
    for _ in range(repeats):
        alone, attacked = (_epochs(timed(*which)) for which in ((None, plain, data), (entry, plain, data, clean_model)))
        # What is done once falls before the first epoch or into it; the others show what an epoch costs.
        ratios.append(sum(attacked[2:]) / sum(alone[2:]))
        once.append(max(0.0, attacked[0] + attacked[1] - statistics.median(attacked[2:])))
    typer.echo(f"{entry.name}: {statistics.median(ratios):.2f} plain epochs, and {statistics.median(once):.1f} s once")
    return {"model": entry.name, "attack": entry.attack, "ratio": ratios, "seconds_once": once}


def _epochs(victim: BackdooredModel) -> list[float]:
    """Seconds before the first epoch, and of each epoch."""
    epochs = [row["seconds"] for row in victim.history]
    return [victim.seconds - sum(epochs), *epochs]


def timed(
    entry: Entry | None, plain: Entry, data: CleanSet, clean_model: BackdooredModel | None = None
) -> BackdooredModel:
    """One short training by the plain recipe."""
    attack = None if entry is None else make_attack(entry.attack, data, target=entry.target, **entry.parameters)
    start = None if clean_model is None else clean_model.model
    return train(
        attack, plain.arch, data, epochs=plain.epochs, batch_size=plain.batch_size, lr=plain.lr, clean_model=start
    )


if __name__ == "__main__":
    typer.run(main)
