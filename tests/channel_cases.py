"""Toy networks with the channels that must be found in them, and what the channel tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import toys

Factory = Callable[[], nn.Module]


def images(channels: int = 3, size: int = 8, count: int = 2) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "identities": [id(value) for value in (*model.parameters(), *model.buffers())],
        "flags": [value.requires_grad for value in model.parameters()],
        "gradients": [None if value.grad is None else value.grad.clone() for value in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_as_found(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for name, value in before["tensors"].items():
        assert torch.equal(value, after["tensors"][name]), name
    for one, two in zip(before["gradients"], after["gradients"], strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    assert torch.equal(before["random"], after["random"])
    for key in ("identities", "flags", "modes", "hooks"):
        assert before[key] == after[key], key


CASES: dict[str, tuple[Factory, list[tuple[str, str, int]]]] = {
    "view and in-place": (toys.ViewNet, [("conv", "conv", 4), ("linear", "fc1", 6)]),
    # A linear layer on tokens returns a view; the in-place ReLU rewrites its history.
    "in-place ReLU on tokens": (
        lambda: nn.Sequential(
            nn.Flatten(2), nn.Linear(64, 5), nn.ReLU(True), nn.Linear(5, 4), nn.Flatten(), nn.Linear(12, 2)
        ),
        [("linear", "1", 5)],
    ),
    "dropout": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.Dropout2d(0.5), toys.pool(),
            nn.Linear(4, 5), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(5, 2),
        ),
        [("conv", "0", 4), ("linear", "4", 5)],
    ),
    "norm behind pooling, cast and ReLU": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.MaxPool2d(2), nn.BatchNorm2d(4), toys.pool(), nn.Linear(4, 2)
        ),
        [("norm", "3", 4)],
    ),
    "group and instance norms": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True),
            toys.pool(), nn.Linear(6, 2),
        ),
        [("norm", "1", 4), ("norm", "3", 6)],
    ),
    "norms in one and three dimensions": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, (1, 3, 3)), nn.BatchNorm3d(2), nn.Flatten(2), nn.Conv1d(2, 4, 1),
            nn.BatchNorm1d(4), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 5), nn.SyncBatchNorm(5), nn.ReLU(),
            nn.Linear(5, 2),
        ),
        [("norm", "2", 2), ("norm", "5", 4), ("norm", "9", 5)],
    ),
    "norm without weights": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.InstanceNorm2d(5),
            toys.pool(), nn.Linear(5, 2),
        ),
        [("conv", "0", 4), ("conv", "3", 5)],
    ),
    "LayerNorm is not such a norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6]), toys.pool(), nn.Linear(4, 2)),
        [("conv", "0", 4)],
    ),
    "norm of another size": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.BatchNorm2d(2), toys.pool(), nn.Linear(2, 2)),
        [("conv", "0", 8), ("norm", "2", 2)],
    ),
    "shared, a norm after one call": (lambda: toys.SharedConv(both=False), [("conv", "conv", 3), ("norm", "norm", 3)]),
    "shared, a norm after both calls": (lambda: toys.SharedConv(both=True), [("norm", "norm", 3)]),
    "tied hidden layers": (lambda: toys.TiedLinear(to_head=False), [("linear", "first", 12)]),
    "hidden layer of a residual block": (toys.ResidualToImage, [("linear", "fc1", 5)]),
    "transformer, fused attention": (
        lambda: toys.TinyViT(fused=True), [("linear", "blocks.0.fc1", 16), ("linear", "blocks.1.fc1", 16)]
    ),
    "transformer, attention by hand": (
        lambda: toys.TinyViT(fused=False), [("linear", "blocks.0.fc1", 16), ("linear", "blocks.1.fc1", 16)]
    ),
    "transformer, one projection": (
        lambda: toys.TinyViT(shared=True, fused=False), [("linear", "blocks.0.fc1", 16), ("linear", "blocks.1.fc1", 16)]
    ),
    # The stem and every conv that writes to the residual stream reach more than a norm.
    "pre-activation": (
        toys.PreAct,
        [
            ("conv", "stem", 4), ("norm", "bn1", 4), ("norm", "bn2", 4), ("conv", "conv2", 4), ("norm", "bn3", 4),
            ("conv", "shortcut", 8), ("norm", "bn4", 8), ("conv", "conv4", 8),
        ],
    ),
    "grouped convolutions": (toys.inverted_residual, [("norm", "1", 6), ("norm", "4", 6), ("norm", "7", 4)]),
    # Classifiers of many forms: only channel 0 of the body is maskable.
    "classifier: convolution and pooling": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU(), toys.pool()),
        [("conv", "0", 4)],
    ),
    "classifier: two heads averaged": (toys.TwoHeads, [("conv", "body.0", 4)]),
    "classifier: norm on convolutional logits": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), toys.pool()),
        [("conv", "0", 4)],
    ),
    "classifier: norm on linear logits": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), toys.pool(), nn.Linear(4, 2), nn.BatchNorm1d(2)), [("conv", "0", 4)]
    ),
    "classifier: LayerNorm and temperature on logits": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), toys.pool(), nn.LayerNorm(2), toys.Temperature()
        ),
        [("conv", "0", 4)],
    ),
    "classifier: cosine similarity": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), toys.pool(), toys.CosineHead(4, 2)),
        [("norm", "1", 4)],
    ),
    "classifier: weight norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), toys.pool(), parametrizations.weight_norm(nn.Linear(4, 2))
        ),
        [("norm", "1", 4)],
    ),
    "hidden layer with weight norm is skipped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), toys.pool(), parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)
        ),
        [("conv", "0", 4)],
    ),
    "grouped transposed convolution is skipped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2),
            toys.pool(), nn.Linear(5, 2),
        ),
        [("conv", "0", 4), ("conv", "3", 5)],
    ),
}  # fmt: skip
