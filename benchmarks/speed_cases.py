"""The networks that ``speed.py`` times, and the images they get."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import debackdoor as db
from debackdoor.attacks import Attack, load_trigger, make_attack, save_trigger, train
from debackdoor.checkpoint import write_checkpoint
from debackdoor.models import build_model, load_model
from debackdoor.models.forward import predict
from debackdoor.types import CleanSet

BATCH = 128
"""Images a step, as published."""


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        name: what it is called.
        arch: as ``--arch`` takes it; None for one of transformers' networks, with random weights.
        size: of the images, in pixels.
        whole: whether whole repairs are timed, of a network trained for it; else only steps of learning are.
        batch: images a step.
    """

    name: str
    arch: str | None
    size: int = 32
    whole: bool = True
    batch: int = BATCH


CASES = {
    case.name: case
    for case in (
        Case("resnet18-w64", "resnet18-w64"),
        Case("resnet18-w16", "resnet18-w16"),
        Case("vgg16_bn", "vgg16_bn"),
        Case("mobilenetv2", "mobilenetv2"),
        Case("resnet50-224", None, size=224, whole=False, batch=32),
        Case("vit-s-224", None, size=224, whole=False, batch=32),
    )
}


def victim_of(name: str, arch: str, train_on: CleanSet, folder: Path, epochs: int) -> tuple[nn.Module, Attack]:
    """A network with a Blend backdoor, trained once and kept in ``folder`` under its name.

    Of one sample in five and with small batches the backdoor is there after two or three passes. But a network that
    knows its task badly takes other time: the answers of the unlearned one pile up anywhere, and it forgets sooner.
    """
    weights, trigger = folder / f"{name}-blend.safetensors", folder / f"{name}-blend.trigger"
    if not weights.exists():
        attack = make_attack("blend", train_on, target=0, seed=0, poison_rate=0.2)
        state = folder / f".{name}-blend"  # where a training that was stopped goes on
        trained = train(attack, arch, train_on, epochs=epochs, batch_size=64, lr=0.05, seed=0, checkpoint_dir=state)
        save_trigger(attack, trigger)
        _training_of(name, folder).write_text(json.dumps({"train_on": len(train_on), "epochs": epochs}) + "\n")
        write_checkpoint(weights, trained.model.state_dict())
        shutil.rmtree(state)
    return load_model(weights, arch), load_trigger(trigger)


def training_of(name: str, folder: Path) -> dict[str, int]:
    """From how many images, and in how many passes, the network in ``folder`` learned, whatever is asked for now."""
    found: dict[str, int] = json.loads(_training_of(name, folder).read_text())
    return found


def _training_of(name: str, folder: Path) -> Path:
    return folder / f"{name}-blend.json"


def random_network(case: Case) -> nn.Module:
    """The network with random weights."""
    torch.manual_seed(0)
    if case.arch is not None:
        return build_model(case.arch, 10).eval()
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    if case.name.startswith("resnet50"):
        return ResNetForImageClassification(ResNetConfig(num_labels=10)).eval()
    small = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=10)
    return ViTForImageClassification(small).eval()


def fit_head(model: nn.Module, images: CleanSet) -> None:
    """Teaches the last linear layer these images, by ridge regression, so that a random network can be examined."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    predict(model, images.x, batch_size=16, precision="fp32")
    hook.remove()
    features = torch.cat(seen)
    centre, spread = features.mean(0), features.std(0) + 1e-6
    features = (features - centre) / spread
    wanted = 10 * F.one_hot(images.y, head.out_features).double()
    inner = features.T @ features + len(features) * torch.eye(features.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(inner, features.T @ wanted).T / spread
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(-weight @ centre)


def images_of(case: Case, count: int) -> CleanSet:
    """Clean CIFAR-10 training images, enlarged to the case's size."""
    clean = db.load_clean("cifar10", limit=count, seed=0)
    if clean.x.shape[-1] == case.size:
        return clean
    return CleanSet(F.interpolate(clean.x, size=case.size, mode="bilinear").clamp(0, 1), clean.y, clean.class_names)
