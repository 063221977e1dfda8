"""Trains backdoored (or clean) classifiers from scratch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from debackdoor.attacks.base import Attack
from debackdoor.attacks.batches import PoisonedBatches
from debackdoor.attacks.control import Control, Training
from debackdoor.attacks.registry import count_classes
from debackdoor.attacks.resume import CLEAN_FOLDER, TrainingState, data_hash, keep_poison, weights_hash
from debackdoor.attacks.trigger_io import describe
from debackdoor.errors import DataError, DebackdoorError, ModelError
from debackdoor.models import build_model
from debackdoor.models.copying import copied
from debackdoor.models.forward import accuracy, in_eval, predict, predict_of_any
from debackdoor.models.layout import set_layout, to_faster_layout
from debackdoor.runtime import generator, resolve_device, seed_anew, seeded
from debackdoor.types import CleanSet, Progress

_USUAL: Mapping[str, Any] = {"epochs": 9, "batch_size": 256, "lr": 0.4}


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
        attack: what was built in, with the trigger as training left it, or None for a clean model.
        recipe: how it was trained.
        source: where the training images came from.
        history: one row an epoch: epoch, loss and accuracy on the (poisoned) training batches, seconds, and
            test_accuracy where a test set was given.
        seconds: spent poisoning and training, resumed runs included; a clean model trained on the way is not counted.
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
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    flip: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    precision: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
    checkpoint_dir: str | Path | None = None,
    clean_model: nn.Module | None = None,
) -> BackdooredModel:
    """Trains ``arch`` on ``data`` with the attack in it, from random weights unless the attack starts from others.

    SGD with Nesterov momentum 0.9, weight decay 5e-4 and a one-cycle schedule; random shifts of up to an eighth of the
    image and horizontal flips, after poisoning. The same arguments give the same weights on one machine's CPU.

    Args:
        attack: what to build in, not changed; None trains a clean model.
        arch: as ``build_model`` takes it.
        data: the clean training set.
        test: clean images for ``test_accuracy`` after every epoch; they decide nothing.
        epochs: passes over the training set; 9 unless the attack's ``recipe`` says otherwise.
        batch_size: images a step; 256 unless the attack's ``recipe`` says otherwise.
        lr: the schedule's largest learning rate; 0.4 unless the attack's ``recipe`` says otherwise.
        seed: of the weights, the order and the augmentation; the attack has its own.
        flip: whether to flip images; wrong for digits and traffic signs, whose mirror images mean something else.
        mean, std: normalisation to put inside the model.
        precision: ``auto``, ``fp32`` or ``bf16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: called as ``progress("train", done, total, numbers)`` after every step.
        checkpoint_dir: a folder where the state is kept after every epoch; a killed run goes on from there.
        clean_model: what attacks with ``needs_clean_model`` work with; where they get none, one is trained first, by
            this recipe with the next seed, in a folder of ``checkpoint_dir``. Not changed.

    Raises:
        DebackdoorError: if an argument is out of range, the data does not fit the attack, training diverges, or
            ``checkpoint_dir`` holds another run.
    """
    chosen = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    recipe = Recipe(arch=arch, seed=seed, flip=flip, mean=mean, std=std, precision=precision, **_usual(attack, chosen))
    place = resolve_device(device)
    attack = None if attack is None else attack.copy()
    run = {"recipe": asdict(recipe), "attack": describe(attack), "source": data.source, "data": data_hash(data)}
    poison, seconds = None, 0.0
    if attack is not None:
        if attack.needs_clean_model:
            clean_model = clean_model or _clean_model_for(attack, recipe, data, device, progress, checkpoint_dir)
            clean_model = in_eval(copied(clean_model).to(place)).requires_grad_(False)
            run["clean_model"] = weights_hash(clean_model)
        poison, seconds = keep_poison(attack, data, clean_model, run, checkpoint_dir, precision)
    batches = PoisonedBatches(data, attack, poison, recipe.batch_size)
    # Weights and dropout draw from torch's own generator, which is left as it was found.
    with seeded(seed, place):
        model = in_eval(_initial_model(recipe, attack, data, clean_model).to(place))
        _check_answers(model, attack, data, recipe, place)
        to_faster_layout(model, data.x[:2].to(place), precision)
        training = Training(model, data, recipe.epochs, len(batches), flip, precision)
        control = Control(training, None) if attack is None else attack.control(training)
        state = TrainingState(model, control, recipe.lr, recipe.epochs * len(batches), run, checkpoint_dir)
        for epoch in range(len(state.history), recipe.epochs):
            state.finish_epoch(_one_epoch(state, batches, epoch, recipe, test, progress))
        control.finish()
    set_layout(in_eval(model), torch.contiguous_format)
    seconds += sum(row["seconds"] for row in state.history)
    return BackdooredModel(model, attack, recipe, data.source, state.history, seconds)


def _usual(attack: Attack | None, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were chosen, then the attack's own, then the usual ones."""
    own = {} if attack is None else dict(attack.recipe)
    return dict(_USUAL) | own | {name: value for name, value in chosen.items() if value is not None}


def _initial_model(recipe: Recipe, attack: Attack | None, data: CleanSet, clean_model: nn.Module | None) -> nn.Module:
    """A model with random weights, or with the clean model's where the attack starts from them."""
    classes = _classes(attack, data)
    model = build_model(recipe.arch, classes, recipe.mean, recipe.std, in_channels=data.x.shape[1])
    if attack is not None and attack.starts_from_clean_model and clean_model is not None:
        try:
            model.load_state_dict(clean_model.state_dict())
        except RuntimeError as error:
            raise DebackdoorError(
                f"expected a clean model of {recipe.arch} with {classes} classes to start from, got other weights; "
                "give one that was trained with the same settings"
            ) from error
    return model


def _check_answers(
    model: nn.Module, attack: Attack | None, data: CleanSet, recipe: Recipe, place: torch.device
) -> None:
    """Refuses a network that does not fit before it has learned for hours, or a GPU has met a label out of range."""
    answered = predict_of_any(model, data.x[:2].to(place), precision=recipe.precision).shape[1]
    classes = _classes(attack, data)
    if answered != classes:
        raise ModelError(
            f"expected {recipe.arch} to tell {classes} classes apart, got {answered}; let its factory take num_classes"
        )


def _classes(attack: Attack | None, data: CleanSet) -> int:
    return count_classes(data) if attack is None else attack.num_classes


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
    model, control, random = state.model, state.control, generator(seed)
    model.train()
    place = next(model.parameters()).device
    seed_anew(seed, place)
    control.begin_epoch(epoch, random)
    loss_sum, correct, seen = 0.0, 0, 0
    for step, (x, y) in enumerate(batches.one_pass(random), 1):
        loss, logits, labels = control.loss(x.to(place), y.to(place), random)
        state.step(loss)
        control.after_step()
        if not math.isfinite(loss.item()):
            raise DebackdoorError(
                f"training diverged in epoch {epoch + 1}: got a loss of {loss:g}; lower the learning rate"
            )
        seen += len(labels)
        loss_sum += loss.item() * len(labels)
        correct += int((logits.argmax(1) == labels).sum())
        if progress is not None:
            numbers = {"epoch": epoch + 1, "loss": loss_sum / seen, "accuracy": correct / seen}
            progress("train", epoch * len(batches) + step, recipe.epochs * len(batches), numbers)
    row = {"epoch": epoch + 1, "loss": loss_sum / seen, "accuracy": correct / seen}
    if test is not None:
        logits = predict(in_eval(model), test.x.to(place), precision=recipe.precision)
        row["test_accuracy"] = accuracy(logits, test.y.to(place))
    return row | {"seconds": time.perf_counter() - started}


def _clean_model_for(
    attack: Attack,
    recipe: Recipe,
    data: CleanSet,
    device: str,
    progress: Progress | None,
    checkpoint_dir: str | Path | None,
) -> nn.Module:
    """The clean model of an attacker who has none, trained by the victim's recipe."""
    attack.check_fits(data)
    if (seen := count_classes(data)) != attack.num_classes:
        raise DataError(
            f"{data.source}: expected images of {attack.num_classes} classes to train a clean model for {attack.name} "
            f"on, got {seen}; give the attack as many, or a clean model"
        )
    if attack.starts_from_clean_model:
        raise DebackdoorError(
            f"expected the clean model that {attack.name} starts from, got none; "
            "train one with the attack 'clean' and give it"
        )
    folder = None if checkpoint_dir is None else Path(checkpoint_dir) / CLEAN_FOLDER
    settings = asdict(recipe) | {"seed": (recipe.seed + 1) % 2**31}
    return train(None, data=data, device=device, progress=progress, checkpoint_dir=folder, **settings).model
