"""Trains backdoored (or clean) classifiers from scratch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from debackdoor.attacks.base import Attack
from debackdoor.attacks.batches import PoisonedBatches
from debackdoor.attacks.registry import count_classes
from debackdoor.attacks.resume import TrainingState
from debackdoor.attacks.trigger_io import describe
from debackdoor.errors import DebackdoorError
from debackdoor.models import build_model, logits_of
from debackdoor.models.forward import accuracy, predict
from debackdoor.models.layout import memory_format
from debackdoor.runtime import autocast, generator, resolve_device
from debackdoor.types import CleanSet, Progress


@dataclass(frozen=True)
class Recipe:
    """How a victim is trained; ``train`` says what each entry means."""

    arch: str
    epochs: int
    batch_size: int
    lr: float
    seed: int
    flip: bool
    mean: Sequence[float] | None
    std: Sequence[float] | None
    precision: str

    def __post_init__(self) -> None:
        for name, low, high in (("epochs", 1, 99_999), ("batch_size", 2, 2**31), ("seed", 0, 2**31 - 1)):
            if not low <= getattr(self, name) <= high:
                raise DebackdoorError(f"expected {name} from {low} to {high}, got {getattr(self, name)}; correct it")
        if not 0 < self.lr < math.inf:
            raise DebackdoorError(f"expected a learning rate above 0, got {self.lr}; correct it")


@dataclass(frozen=True, eq=False)
class BackdooredModel:
    """What training ends with.

    Attributes:
        model: in eval mode, on the device it was trained on; takes images (N, C, H, W) in [0, 1].
        attack: what was built in, or None for a clean model.
        recipe: how it was trained.
        source: where the training images came from.
        history: one row an epoch: epoch, loss and accuracy on the (poisoned) training batches, seconds, and
            test_accuracy where a test set was given.
        seconds: spent training, resumed runs included.
    """

    model: nn.Module
    attack: Attack | None
    recipe: Recipe
    source: str
    history: list[dict[str, float]]
    seconds: float


def train(
    attack: Attack | None,
    arch: str,
    data: CleanSet,
    test: CleanSet | None = None,
    *,
    epochs: int = 9,
    batch_size: int = 256,
    lr: float = 0.4,
    seed: int = 0,
    flip: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    precision: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
    checkpoint_dir: str | Path | None = None,
) -> BackdooredModel:
    """Trains ``arch`` from random weights on ``data`` with the attack's poison in it.

    SGD with Nesterov momentum 0.9, weight decay 5e-4 and a one-cycle schedule; random shifts of up to an eighth of the
    image and horizontal flips, after poisoning. The same arguments give the same weights on one machine's CPU.

    Args:
        attack: what to build in; None trains a clean model.
        arch: as ``build_model`` takes it.
        data: the clean training set.
        test: clean images for ``test_accuracy`` after every epoch; they decide nothing.
        epochs: passes over the training set.
        batch_size: images a step.
        lr: the schedule's largest learning rate.
        seed: of the weights, the order and the augmentation; the attack has its own.
        flip: whether to flip images; wrong for digits and traffic signs, whose mirror images mean something else.
        mean, std: normalisation to put inside the model.
        precision: ``auto``, ``fp32`` or ``bf16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: called as ``progress("train", done, total, numbers)`` after every step.
        checkpoint_dir: a folder where ``training.pt`` is kept after every epoch; a killed run goes on from there.

    Raises:
        DebackdoorError: if an argument is out of range, the data does not fit the attack, training diverges, or
            ``checkpoint_dir`` holds another run.
    """
    recipe = Recipe(arch, epochs, batch_size, lr, seed, flip, mean, std, precision)
    place = resolve_device(device)
    batches = PoisonedBatches(data, attack, batch_size, flip)
    classes = count_classes(data) if attack is None else attack.num_classes
    run = {"recipe": asdict(recipe), "attack": describe(attack), "source": data.source, "samples": len(data)}
    # Weights and dropout draw from torch's own generator, which is left as it was found.
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        model = build_model(arch, classes, mean, std, in_channels=data.x.shape[1])
        model = convert_conv2d_weight_memory_format(model.to(place), memory_format(model, place))
        state = TrainingState(model, lr, epochs * len(batches), run, checkpoint_dir)
        for epoch in range(len(state.history), epochs):
            state.finish_epoch(_one_epoch(state, batches, epoch, recipe, test, progress))
    model = convert_conv2d_weight_memory_format(model, torch.contiguous_format).eval()
    seconds = sum(row["seconds"] for row in state.history)
    return BackdooredModel(model, attack, recipe, data.source, state.history, seconds)


def _one_epoch(
    state: TrainingState,
    batches: PoisonedBatches,
    epoch: int,
    recipe: Recipe,
    test: CleanSet | None,
    progress: Progress | None,
) -> dict[str, float]:
    """Trains for one pass and returns its row of the history."""
    started = time.perf_counter()
    # Seeded anew every epoch, so that a resumed run draws what an unbroken one would have drawn.
    seed = recipe.seed * 100_000 + epoch + 1
    torch.manual_seed(seed)
    model = state.model.train()
    place = next(model.parameters()).device
    layout = memory_format(model, place)
    loss_sum, correct, seen = 0.0, 0, 0
    for step, (images, labels) in enumerate(batches.one_pass(generator(seed)), 1):
        x, y = images.to(place).contiguous(memory_format=layout), labels.to(place)
        with autocast(place, recipe.precision):
            logits = logits_of(model(x)).float()
        loss = F.cross_entropy(logits, y)
        state.step(loss)
        if not math.isfinite(loss.item()):
            raise DebackdoorError(
                f"training diverged in epoch {epoch + 1}: got a loss of {loss:g}; lower the learning rate"
            )
        seen += len(y)
        loss_sum += loss.item() * len(y)
        correct += int((logits.argmax(1) == y).sum())
        if progress is not None:
            numbers = {"epoch": epoch + 1, "loss": loss_sum / seen, "accuracy": correct / seen}
            progress("train", epoch * len(batches) + step, recipe.epochs * len(batches), numbers)
    row = {"epoch": epoch + 1, "loss": loss_sum / seen, "accuracy": correct / seen}
    if test is not None:
        logits = predict(model.eval(), test.x.to(place), precision=recipe.precision)
        row["test_accuracy"] = accuracy(logits, test.y.to(place))
    return row | {"seconds": time.perf_counter() - started}
