"""Batch normalisation that becomes part of the convolution before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from channel_cases import assert_as_found, snapshot
from debackdoor import fusing
from debackdoor.channels import count_channels, find_channels, masked_call
from debackdoor.fusing import fused, fused_under_masks
from debackdoor.models import build_model
from debackdoor.models.forward import predict


def images(count: int = 6, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def lived(model: nn.Module, size: int = 8) -> nn.Module:
    """With statistics, scales and shifts that are not those of a new network."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                for value in (module.weight, module.bias):
                    value.add_(0.3 * torch.randn(value.shape, generator=random))
        for _ in range(3):
            model.train()(images(16, size))
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def assert_same_answers(model: nn.Module, found: nn.Module, x: Tensor) -> None:
    ways = []
    for network in (model, found):
        image = x.clone().requires_grad_()
        logits = network(image)
        ways.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), image)))
    for before, after in zip(*ways, strict=True):
        # Not one by one: where a rectifier is at zero, rounding decides whether a gradient passes.
        assert float((after - before).norm()) <= 1e-2 * float(before.norm())


@pytest.mark.parametrize(
    ("arch", "left"),
    [("resnet18-w8", 0), ("resnet50-w8", 0), ("vgg11_bn-w8", 0), ("mobilenetv2-w8", 0), ("preactresnet18-w8", 8)],
)
def test_the_same_answers_and_gradients_with_fewer_norms(arch: str, left: int) -> None:
    torch.manual_seed(0)
    model = lived(build_model(arch, 10), 32)
    before, x = snapshot(model), images(size=32)
    found = fused(model, x[:2])
    assert norms(found) == left
    assert_same_answers(model, found, x)
    assert_as_found(model, before)
    assert not any(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("arch", ["resnet18-w8", "vgg11_bn-w8", "vgg11-w8", "preactresnet18-w8", "mobilenetv2-w8"])
def test_the_same_answers_under_masks(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a mask is neither 0 nor 1, and for what is no norm; no model is called but the fused one."""
    torch.manual_seed(0)
    model = lived(build_model(arch, 10), 32)
    before, x = snapshot(model), images(size=32)
    layers = find_channels(model, x[:2])
    answer = fused_under_masks(model, layers, x[:2])
    masks = [torch.ones(count_channels(layers)), *images(3, count_channels(layers))[:, 0, 0]]
    masks.append((masks[1] > 0.2).float())
    with torch.no_grad():
        expected = [masked_call(model, layers, mask, x) for mask in masks]
        monkeypatch.setattr(fusing, "masked_call", None)
        for mask, wanted in zip(masks, expected, strict=True):
            assert float((answer(mask, x) - wanted).norm()) <= 1e-2 * float(wanted.norm())
    assert_as_found(model, before)


class Net(nn.Module):
    """A convolution and a norm, and what comes of their outputs."""

    def __init__(self, convolution: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = convolution or nn.Conv2d(3, 4, 3)
        self.norm = norm or nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).relu().mean((2, 3)))


class Between(Net):
    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).relu())


class Both(Net):
    """What the convolution says counts beside the norm, too, and no layer takes it."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.conv(x)
        return self.head(self.norm(before).relu().mean((2, 3))) + before.mean((1, 2, 3))[:, None]


class Twice(Net):
    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(x.flip(3)))


class Asks(Net):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x) / self.norm.num_features


class Insists(Net):
    def features(self, x: Tensor) -> Tensor:
        assert isinstance(self.norm, nn.BatchNorm2d)
        return super().features(x)


class Gated(Net):
    """A branch that opens where the convolution says more than it ever does on images."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.conv(x)
        gate = (before.detach().amax((1, 2, 3)) > 0.99 * self.conv(torch.ones_like(x)).detach().max()).float()
        return self.head(self.norm(before).relu().mean((2, 3))) * (1 + gate[:, None])


class Stubborn(Net):
    """Says to be in another mode than it is."""

    def train(self, mode: bool = True) -> Stubborn:
        return self


class Special(nn.BatchNorm2d):
    pass


def hooked() -> Net:
    model = Net()
    model.norm.register_forward_hook(lambda _, __, output: 2 * output)
    return model


@pytest.mark.parametrize(
    "model",
    [
        Net(nn.Conv2d(3, 4, 3, bias=False)),
        Net(nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect")),
    ],
    ids=["no-bias", "reflected"],
)
def test_small_networks(model: nn.Module) -> None:
    lived(model)
    found = fused(model, images(2))
    assert norms(found) == 0
    assert_same_answers(model, found, images())


@pytest.mark.parametrize(
    "model",
    [
        Between(),
        Both(),
        Twice(),
        Asks(),
        Insists(),
        Gated(),
        hooked(),
        Net(norm=Special(4)),
        Net(norm=nn.BatchNorm2d(4, track_running_stats=False)),
        Net(norm=nn.BatchNorm2d(4, affine=False)),
        Net(norm=nn.GroupNorm(2, 4)),
        Net(nn.ConvTranspose2d(3, 4, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 5)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_what_is_not_fused_stays_itself(model: nn.Module) -> None:
    assert fused(lived(model), images(2)) is model


def test_a_network_that_overrides_train() -> None:
    model = Stubborn()
    model.conv.training = model.norm.training = False
    found = fused(model, images(2))
    assert norms(found) == 0
    assert_same_answers(model, found, images())


def test_a_network_that_breaks_stays_itself() -> None:
    model = lived(Net())
    assert fused(model, torch.rand(2, 5, 8, 8)) is model


def test_half_precision_is_no_further_from_the_truth() -> None:
    model = lived(build_model("resnet18-w8", 10), 32)
    x = images(64, 32)
    truth = predict(model, x, precision="fp32")
    errors = [
        float((predict(network, x, precision="bf16") - truth).abs().mean()) for network in (model, fused(model, x[:2]))
    ]
    assert errors[1] <= 1.5 * errors[0]
