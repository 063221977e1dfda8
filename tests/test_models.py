"""Built-in architectures: their names, sizes and layers, and the normalisation that stands inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpoint_cases import saved
from debackdoor.errors import ModelError
from debackdoor.models import (
    Normalized,
    build_model,
    load_model,
    resolve_arch,
    state_dict_of,
    unwrap,
)
from debackdoor.models.forward import predict
from debackdoor.models.layout import set_layout, to_faster_layout
from toys import ViewNet

# --- built-in networks


@pytest.mark.parametrize(
    "arch", ["resnet18-w4", "preactresnet18-w4", "wrn16-1", "vgg16-w4", "vgg11_bn-w4", "mobilenetv2-w8"]
)
@pytest.mark.parametrize("size", [8, 28, 40])
def test_other_image_sizes(arch: str, size: int) -> None:
    assert build_model(arch, 5, in_channels=1).eval()(torch.rand(2, 1, size, size)).shape == (2, 5)


@pytest.mark.parametrize(
    ("arch", "millions"),
    [
        ("resnet18", 11.17),
        ("preactresnet18", 11.17),
        ("wrn16-2", 0.69),
        ("wrn28-10", 36.48),
        ("vgg16_bn", 14.73),
        ("mobilenetv2", 2.30),
        ("resnet18-w16", 0.70),
    ],
)
def test_sizes_are_the_published_ones(arch: str, millions: float) -> None:
    with torch.device("meta"):
        model = build_model(arch, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("arch", "keys"),
    [
        ("preactresnet18-w4", ["layer1.0.bn1.weight", "layer2.0.shortcut.0.weight", "linear.weight"]),
        ("wrn16-2", ["block1.layer.0.convShortcut.weight", "block3.layer.1.conv2.weight", "bn1.weight", "fc.weight"]),
        ("vgg16_bn-w4", ["features.0.weight", "features.1.running_mean", "features.40.weight", "classifier.weight"]),
        ("vgg16-w4", ["features.0.bias", "features.28.weight", "classifier.bias"]),
        ("mobilenetv2-w8", ["layers.0.shortcut.1.weight", "layers.16.bn3.weight", "conv2.weight", "linear.weight"]),
    ],
)
def test_key_names_of_public_checkpoints(arch: str, keys: list[str]) -> None:
    assert set(keys) <= set(build_model(arch, 10).state_dict())


def test_shortcuts_stand_only_where_the_shape_changes() -> None:
    keys = build_model("preactresnet18-w4", 10).state_dict()
    assert [key for key in keys if "shortcut" in key] == [f"layer{i}.0.shortcut.0.weight" for i in (2, 3, 4)]
    # WRN-16-1 has as many planes in its first group as in its stem.
    assert "block1.layer.0.convShortcut.weight" not in build_model("wrn16-1", 10).state_dict()


def test_preact_block_by_hand() -> None:
    model = build_model("preactresnet18-w1", 10)
    block = model.layer1[0].eval()
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            conv.weight.copy_(torch.zeros(1, 1, 3, 3))
            conv.weight[0, 0, 1, 1] = 2.0
        block.bn1.bias.fill_(-1.0)
        # norm: x - 1 -> relu -> times 2 -> relu -> times 2, and x itself is added.
        out = block(torch.tensor([3.0, 0.5]).view(2, 1, 1, 1))
    assert out.flatten().tolist() == pytest.approx([2 * 2 * 2 + 3, 0.5], abs=1e-3)


@pytest.mark.parametrize("arch", ["vgg19-w16", "vgg16-w16"])
def test_plain_vgg_keeps_the_scale_of_its_input(arch: str) -> None:
    torch.manual_seed(0)
    model = build_model(arch, 10)
    with torch.no_grad():
        features = model.features(torch.randn(16, 3, 32, 32))
    # torch's default initialisation leaves 0.01 of the scale, nearly all from biases: images differ by less than 1e-6.
    assert 0.2 < features.pow(2).mean().sqrt() < 20
    assert features.std(0).mean() > 0.01


@pytest.mark.parametrize("arch", ["resnet18-w0", "wrn17-2", "wrn16-0", "vgg12", "resnet18-w", "", "w16", "-w16"])
def test_names_that_do_not_exist(arch: str) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(arch, 10)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_name_lists_the_names_and_the_closest() -> None:
    with pytest.raises(ModelError) as caught:
        resolve_arch("resnt18")
    assert "did you mean 'resnet18'?" in str(caught.value)
    for name in ("resnet50", "preactresnet18", "wrn16-2", "vgg16_bn", "mobilenetv2"):
        assert name in str(caught.value)
    with pytest.raises(ModelError, match=r"file\.py:factory"):
        resolve_arch("zzz")


def test_nothing_to_train_with_fewer_than_two_classes() -> None:
    with pytest.raises(ModelError, match="at least 2 classes"):
        build_model("resnet18", 1)


def test_the_faster_layout_changes_no_answer_and_is_left_where_it_cannot_be_taken() -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 36, 3))
    wide, narrow = (build_model(name, 3) for name in ("resnet18-w16", "resnet18-w4"))
    for model, taken in ((wide, True), (narrow, False), (grouped, False), (ViewNet(), False)):
        answers = predict(model.eval(), x, precision="fp32")
        to_faster_layout(model, x)
        conv = next(p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
        assert conv.is_contiguous(memory_format=torch.channels_last) is taken
        assert torch.allclose(predict(model, x, precision="fp32"), answers, atol=1e-5)
        set_layout(model, torch.contiguous_format)
        assert conv.is_contiguous()


# --- normalisation


def test_normalised_by_hand() -> None:
    model = Normalized(nn.Flatten(), [0.5, 0.25], [0.5, 0.25])
    assert model(torch.tensor([1.0, 0.75]).view(1, 2, 1, 1)).tolist() == [[1.0, 2.0]]
    assert model.state_dict() == {}
    assert Normalized(nn.Flatten(), [0.5], [0.25])(torch.ones(1, 3, 1, 1)).tolist() == [[2.0, 2.0, 2.0]]


def test_unwrap_gives_the_network_itself() -> None:
    network = nn.Linear(1, 1)
    assert unwrap(Normalized(Normalized(network, [0.0], [1.0]), [0.0], [1.0])) is network
    assert unwrap(network) is network


def test_normalisation_stands_inside_and_stays_out_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("resnet18-w4", 4, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1])
    assert next(iter(state_dict_of(model))) == "conv1.weight"
    loaded = load_model(saved(tmp_path, model), "resnet18", mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1])
    images = torch.rand(2, 3, 32, 32)
    by_hand = (images - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.2, 0.1])[:, None, None]
    assert torch.allclose(loaded(images), unwrap(loaded)(by_hand))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], [0.5, 0.5], "got 1 and 2"),
        ([], [], "got 0 and 0"),
        ([0.5], [0.0], "stds above 0"),
        ([0.5], [-1.0], "stds above 0"),
        ([float("nan")], [1.0], "finite means"),
        ([0.5], [float("inf")], "finite means"),
        ([0.5], None, "got only mean"),
        (None, [0.5], "got only std"),
    ],
)
def test_bad_normalisation(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model("vgg11-w4", 10, mean=mean, std=std)


def test_normalisation_for_other_channels_than_the_images_have() -> None:
    with pytest.raises(ModelError, match="expected images of 3 channels, as mean and std have, got 1"):
        Normalized(nn.Flatten(), [0.5] * 3, [0.5] * 3)(torch.ones(1, 1, 2, 2))
