"""What holds for the channels of every network: counts, the effect of a mask, and the model staying as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from channel_cases import CASES, Factory, assert_as_found, images, snapshot
from debackdoor.channels import (
    MaskableLayer,
    count_channels,
    find_channels,
    flat_indices,
    mask_parameters,
    masked_call,
)
from debackdoor.models.forward import logits_of
from debackdoor.models.mobilenet_v2 import mobilenetv2
from debackdoor.models.preact_resnet import preactresnet18
from debackdoor.models.resnet import resnet18, resnet50
from debackdoor.models.vgg import VGG
from debackdoor.models.wrn import WideResNet


def hugging_face(name: str, **config: Any) -> Factory:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, f"{name}ForImageClassification")(
            getattr(transformers, f"{name}Config")(num_labels=3, **config)
        )

    return build


VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 32}
# name: factory, how many channels of each kind, the classifier's modules
ARCHITECTURES: dict[str, tuple[Factory, dict[str, int], set[str]]] = {
    "resnet18": (lambda: resnet18(3, width=2), {"norm": 4800 // 32}, {"linear"}),
    "resnet50": (lambda: resnet50(3, width=1), {"norm": 26560 // 64}, {"linear"}),
    "VGG with norms": (lambda: VGG(11, True, 3, width=1), {"norm": 1 + 2 + 4 * 2 + 8 * 4}, {"classifier"}),
    "VGG without norms": (lambda: VGG(11, False, 3, width=1), {"conv": 1 + 2 + 4 * 2 + 8 * 4}, {"classifier"}),
    # Norms: two a block. Convolutions: the stem, the last one of a block, the shortcuts.
    "PreAct": (
        lambda: preactresnet18(3, width=2),
        {"norm": 2 * 4 + (2 + 4 * 3) + (4 + 8 * 3) + (8 + 16 * 3), "conv": 2 + 2 * (2 + 4 + 8 + 16) + 4 + 8 + 16},
        {"linear"},
    ),
    # Here the stem reaches nothing but a norm.
    "WRN": (
        lambda: WideResNet(10, 2, 3, width=2),
        {"norm": (2 + 4 + 8) + (4 + 8 + 16) + 16, "conv": 2 * (4 + 8 + 16)},
        {"fc"},
    ),
    "MobileNetV2": (
        lambda: mobilenetv2(3, width=4),
        {"norm": sum(m.num_features for m in mobilenetv2(3, width=4).modules() if isinstance(m, nn.BatchNorm2d))},
        {"linear"},
    ),
    "transformers ViT": (hugging_face("ViT", **VIT), {"conv": 8, "linear": 2 * 12}, {"classifier"}),
    "transformers ConvNeXt": (
        hugging_face("ConvNext", hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=32),
        {"conv": 4 + 4 + 8 + 8, "linear": 16 + 32},
        {"classifier"},
    ),
    "transformers ResNet": (
        hugging_face("ResNet", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"),
        {"norm": 4 + 2 * 4 + 3 * 8},
        {"classifier.1"},
    ),
}


NETWORKS: dict[str, tuple[Factory, int]] = {name: (factory, 8) for name, (factory, _) in CASES.items()}
NETWORKS |= {name: (factory, 32) for name, (factory, _, _) in ARCHITECTURES.items()}


@pytest.mark.parametrize(("factory", "expected", "classifier"), ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_counts_on_real_architectures(factory: Factory, expected: dict[str, int], classifier: set[str]) -> None:
    torch.manual_seed(0)
    model = factory()
    layers = find_channels(model, images(size=32))
    assert {kind: sum(x.size for x in layers if x.kind == kind) for kind in expected} == expected
    assert count_channels(layers) == sum(expected.values())
    assert not classifier & {layer.name for layer in layers}
    assert classifier <= {name for name, _ in model.named_modules()}


def outputs_of(module: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    """What ``module`` returns during ``call``, channels first."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _m, _a, output: seen.append(output.detach().clone()))
    try:
        call()
    finally:
        hook.remove()
    return [out.movedim(-1 if isinstance(module, nn.Linear) else 1, 0) for out in seen]


@pytest.mark.parametrize(("factory", "size"), NETWORKS.values(), ids=NETWORKS.keys())
def test_masks_act_on_their_channel_and_leave_the_model_as_found(factory: Factory, size: int) -> None:
    torch.manual_seed(0)
    model, x = factory(), images(size=size)
    model.train()
    first, *_, last = model.parameters()
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    before = snapshot(model)
    layers = find_channels(model, x)
    assert_as_found(model, before)

    model.eval()
    with torch.no_grad():
        expected = logits_of(model(x))
        ones, parameters = torch.ones(count_channels(layers)), dict(model.named_parameters())
        kept = mask_parameters(layers, ones, parameters)
        assert all(torch.equal(value, parameters[name]) for name, value in kept.items())
        # Equal weights at another address may take another kernel: equal to rounding.
        torch.testing.assert_close(masked_call(model, layers, ones, x), expected, rtol=1e-5, atol=1e-6)
        for layer in layers:
            assert_only_one_channel_is_masked(model, layers, layer, x)
    model.train()
    assert_as_found(model, before)


def assert_only_one_channel_is_masked(
    model: nn.Module, layers: tuple[MaskableLayer, ...], layer: MaskableLayer, x: Tensor
) -> None:
    index, module = layer.size // 2, model.get_submodule(layer.name)
    mask = torch.ones(count_channels(layers))
    mask[flat_indices(layers, [(layer.name, index)])] = 0.0
    plain = outputs_of(module, lambda: logits_of(model(x)))
    masked = outputs_of(module, lambda: masked_call(model, layers, mask, x))
    left = module.get_parameter("bias")[index] if layer.kind == "norm" else torch.tensor(0.0)
    assert all(torch.equal(out[index], left.expand_as(out[index])) for out in masked), layer.name
    others = [i for i in range(layer.size) if i != index]
    torch.testing.assert_close(masked[0][others], plain[0][others])  # the first call still has the same input
