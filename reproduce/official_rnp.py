"""The published Reconstructive Neuron Pruning, re-created step by step, to compare ``debackdoor repair`` with.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, https://arxiv.org/abs/2305.14876, as the
authors' ``main.py`` (https://github.com/bboylyg/RNP) runs it:

1. Unlearn. On 1 % of the training images (random, crop and flip, batches of 128) all weights climb the cross-entropy:
   SGD 0.01, momentum 0.9, weight decay 5e-4, divided by ten after passes 10 and 20, train mode. It ends after the pass
   whose running training accuracy is at most 0.20. If 21 passes do not get there, the original saves no model and its
   next stage finds none; here the record says so and the exit code is 1.
2. Recover. One mask a batch-norm channel multiplies the weight, the bias is left alone; masks descend 0.2 times the
   cross-entropy (SGD 0.2, momentum 0.9, clamped to [0, 1] after each step) for 20 passes over the same images.
3. Prune. Masks go to a text file with four decimals and are read back. For every threshold 0, 0.05, ..., 0.90 the
   batch-norm weights of the original model whose mask is at most the threshold are set to zero, and the test set is
   evaluated. There is no rule for which threshold to use: the sweep is the result.

The test set, clean and triggered, is evaluated after every pass too, as the original does and a defender cannot;
``--no-test-evaluation`` leaves that out (it decides nothing). Everything runs in float32 on contiguous tensors.

Two differences, on purpose: the fault that keeps the original from being imported is not re-created, and its loaders
leave images of the target class out of clean accuracy, while here all test images count. ``masks.txt`` and
``record.json`` (schema ``debackdoor/reproduce/1``) go to the folder of ``--out``.

    python reproduce/official_rnp.py CKPT --arch resnet18 --data cifar10 --trigger DIR --out DIR
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from debackdoor.attacks import load_trigger
from debackdoor.cli import options
from debackdoor.data import load_dataset
from debackdoor.data.augment import random_shift
from debackdoor.errors import DebackdoorError, ModelError
from debackdoor.evaluation import evaluate
from debackdoor.files import atomic_write_text
from debackdoor.models import logits_of, open_model
from debackdoor.runtime import generator, resolve_device, shuffled_batches
from debackdoor.types import CleanSet

SCHEMA = "debackdoor/reproduce/1"
THRESHOLDS = [round(0.05 * step, 2) for step in range(19)]


@dataclass(frozen=True)
class Settings:
    """What the command line can change; everything else is a constant below."""

    ratio: float
    batch_size: int
    lr: float
    stop_accuracy: float
    unlearn_passes: int
    recover_passes: int
    seed: int
    flip: bool = True


Measure = Callable[[nn.Module], dict[str, float]]


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def augmented_batches(images: CleanSet, settings: Settings, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass in random order: cropped from a frame of four black pixels, and with ``flip`` half of them mirrored."""
    for index in shuffled_batches(len(images), settings.batch_size, random):
        x = random_shift(images.x[index], 4, random)
        mirrored = (torch.rand(len(x), 1, 1, 1, generator=random) < settings.flip / 2).to(x.device)
        yield torch.where(mirrored, x.flip(3), x), images.y[index]


def one_pass(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    factor: float,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Descends ``factor`` times the cross-entropy, in train mode; returns the running loss and accuracy."""
    model.train()
    loss_sum, right, seen = 0.0, 0, 0
    for x, y in batches:
        optimizer.zero_grad()
        logits = logits_of(model(x))
        loss = F.cross_entropy(logits, y)
        # The original clips gradients to norm 20 here, after they were cleared and before there are new ones: nothing
        # is clipped.
        (factor * loss).backward()
        optimizer.step()
        after_step()
        loss_sum += loss.item() * len(y)
        right += int((logits.argmax(1) == y).sum())
        seen += len(y)
    return {"loss": loss_sum / seen, "train_accuracy": right / seen}


def unlearn(
    model: nn.Module, images: CleanSet, settings: Settings, measure: Measure, clock: Clock
) -> tuple[bool, list[dict[str, float]]]:
    """Stage 1, on ``model`` itself: whether the target was reached, and one row a pass."""
    random = generator(settings.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[10, 20], gamma=0.1)
    history: list[dict[str, float]] = []
    for done in range(1, settings.unlearn_passes + 1):
        batches = augmented_batches(images, settings, random)
        row = {"pass": done, "lr": float(schedule.get_last_lr()[0])}
        with clock("unlearn"):
            row |= one_pass(model, batches, optimizer, -1.0)
        with clock("test while unlearning"):
            row |= measure(model)
        schedule.step()
        history.append(row)
        say("unlearn", row)
        if row["train_accuracy"] <= settings.stop_accuracy:
            return True, history
    return False, history


class Mask(nn.Module):
    """Multiplies a batch-norm weight by one mask value a channel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones(size))

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight


def norms_of(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The model's batch norms by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    if not found or not all(norm.affine for norm in found.values()):
        raise ModelError("expected a network with affine batch norms, got none; the published RNP masks nothing else")
    return found


def recover(
    model: nn.Module, images: CleanSet, settings: Settings, measure: Measure, clock: Clock
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Stage 2, on the unlearned ``model`` itself: the masks of every batch norm, and one row a pass."""
    random = generator(settings.seed)
    norms = norms_of(model.requires_grad_(False))
    masks = {name: Mask(norm.num_features).to(images.x.device) for name, norm in norms.items()}
    for name, norm in norms.items():
        parametrize.register_parametrization(norm, "weight", masks[name])
    optimizer = torch.optim.SGD([mask.mask for mask in masks.values()], lr=0.2, momentum=0.9)

    def clamp() -> None:
        for mask in masks.values():
            mask.mask.data.clamp_(0, 1)

    history = []
    for done in range(1, settings.recover_passes + 1):
        batches = augmented_batches(images, settings, random)
        row: dict[str, float] = {"pass": done}
        with clock("recover"):
            row |= one_pass(model, batches, optimizer, 0.2, clamp)
        with clock("test while recovering"):
            row |= measure(model)
        history.append(row)
        say("recover", row)
    return {name: mask.mask.detach().cpu() for name, mask in masks.items()}, history


def write_masks(path: Path, masks: dict[str, Tensor]) -> None:
    """A line a channel: layer, index and the mask with four decimals, separated by tabs."""
    lines = [f"{name}\t{index}\t{value:.4f}" for name, mask in masks.items() for index, value in enumerate(mask)]
    atomic_write_text(path, "\n".join(["layer\tchannel\tmask", *lines]) + "\n")


def read_masks(path: Path) -> list[tuple[str, int, float]]:
    """What ``write_masks`` wrote, the lowest mask first."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return sorted(((name, int(index), float(value)) for name, index, value in rows), key=lambda row: row[2])


def sweep(model: nn.Module, masks: list[tuple[str, int, float]], measure: Measure) -> list[dict[str, float]]:
    """Stage 3, on a copy of the original model: what is left at every threshold."""
    model = copy.deepcopy(model)
    norms = norms_of(model)
    rows = []
    for threshold in THRESHOLDS:
        pruned = [(name, index) for name, index, value in masks if value <= threshold]
        for name, index in pruned:
            norms[name].weight.data[index] = 0.0
        rows.append({"threshold": threshold, "pruned": len(pruned), **measure(model)})
        say("prune", rows[-1])
    return rows


def say(stage: str, row: dict[str, float]) -> None:
    typer.echo(f"{stage}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items()))


def reproduce(
    model: nn.Module, train: CleanSet, measure: Measure, settings: Settings, masks_file: Path, test_evaluation: bool
) -> dict[str, Any]:
    """All three stages; the numbers for the record."""
    clock = Clock()
    count = max(2, int(settings.ratio * len(train)))
    images = train.subset(torch.randperm(len(train), generator=generator(settings.seed))[:count])
    images = images.to(next(model.parameters()).device)
    between = measure if test_evaluation else lambda _: {}
    masks_file.unlink(missing_ok=True)  # an earlier run's would be taken for this one's where unlearning fails
    record: dict[str, Any] = {"images": count, "before": measure(model), "recover": [], "sweep": [], "error": None}
    exposed = copy.deepcopy(model)
    record["reached"], record["unlearn"] = unlearn(exposed, images, settings, between, clock)
    if record["reached"]:
        masks, record["recover"] = recover(exposed, images, settings, between, clock)
        write_masks(masks_file, masks)
        with clock("sweep"):
            record["sweep"] = sweep(model, read_masks(masks_file), measure)
    else:
        missed = f"training accuracy stayed above {settings.stop_accuracy} in {settings.unlearn_passes} passes"
        record["error"] = f"{missed} of unlearning: the published procedure saves no unlearned model then and ends here"
    record["seconds"] = {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()}
    return record


def main(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="The backdoored model.")],
    arch: Annotated[str, typer.Option(help="As for debackdoor repair.")],
    data: Annotated[str, typer.Option(help="Training and test images, such as cifar10.")],
    trigger: Annotated[Path, typer.Option(metavar="DIR", help="The trigger's folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where masks.txt and record.json go.")],
    mean: options.Mean = None,
    std: options.Std = None,
    test_evaluation: Annotated[bool, typer.Option(help="Evaluate the test set after every pass.")] = True,
    ratio: Annotated[float, typer.Option(help="Share of the training images that is used.")] = 0.01,
    batch_size: int = 128,
    lr: Annotated[float, typer.Option(help="Step size of unlearning.")] = 0.01,
    stop_accuracy: Annotated[float, typer.Option(help="Running accuracy at which unlearning ends.")] = 0.20,
    unlearn_passes: Annotated[int, typer.Option(min=1)] = 21,
    recover_passes: Annotated[int, typer.Option(min=1)] = 20,
    flip: Annotated[bool, typer.Option(help="Mirror half of the images; wrong for traffic signs.")] = True,
    seed: int = 98,
    device: str = "auto",
) -> None:
    """Runs the published RNP on a backdoored model and prints its pruning sweep."""
    settings = Settings(ratio, batch_size, lr, stop_accuracy, unlearn_passes, recover_passes, seed, flip)
    try:
        loaded = open_model(checkpoint, arch, None, mean, std)
        attack = load_trigger(trigger)
        train, test = load_dataset(data, "train"), load_dataset(data, "test")
        out.mkdir(parents=True, exist_ok=True)

        def measure(model: nn.Module) -> dict[str, float]:
            found = asdict(evaluate(model, test, attack, precision="fp32"))
            return {name: value for name, value in found.items() if not name.endswith("images")}

        model = loaded.model.to(resolve_device(device))
        numbers = reproduce(model, train, measure, settings, out / "masks.txt", test_evaluation)
        record = {
            "schema": SCHEMA,
            "method": "rnp, as published",
            "checkpoint": str(checkpoint),
            "sha256": loaded.checkpoint.sha256,
            "arch": arch,
            "data": data,
            "attack": attack.name,
            "settings": asdict(settings) | {"test_evaluation": test_evaluation},
            "torch": str(torch.__version__),
            **numbers,
        }
        atomic_write_text(out / "record.json", json.dumps(record, indent=2) + "\n")
    except (DebackdoorError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if record["error"]:
        typer.echo(f"error: {record['error']}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
