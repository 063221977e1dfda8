"""Checkpoints loaded into built-in architectures: width, channels and classes from the file, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_cases import saved
from debackdoor.checkpoint import write_checkpoint
from debackdoor.errors import CheckpointError
from debackdoor.models import (
    build_model,
    infer_num_classes,
    load_model,
    open_model,
)

# Small enough to be built and run in milliseconds; the width is the stem's.
ARCHES = {
    "resnet18": 4,
    "resnet34": 4,
    "resnet50": 4,
    "preactresnet18": 4,
    "wrn10-1": 4,
    "wrn16-2": 4,
    "vgg11": 4,
    "vgg13_bn": 4,
    "vgg16": 4,
    "vgg16_bn": 4,
    "vgg19": 4,
    "mobilenetv2": 8,
}


@pytest.mark.parametrize(("arch", "width"), ARCHES.items())
def test_round_trip_with_width_channels_and_classes_from_the_file(tmp_path: Path, arch: str, width: int) -> None:
    torch.manual_seed(0)
    model = build_model(f"{arch}-w{width}", num_classes=7, in_channels=2).eval()
    path = saved(tmp_path, model)
    loaded = open_model(path, arch)
    images = torch.rand(3, 2, 32, 32)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(loaded.model(images), expected)
    assert expected.shape == (3, 7)
    assert expected.std() > 0
    assert (loaded.num_classes, loaded.arch) == (7, arch)
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    model.load_state_dict(loaded.checkpoint.state_dict, strict=True)


def test_width_suffix_wins_over_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, build_model("resnet18-w4", 3))
    with pytest.raises(CheckpointError, match=r"does not fit resnet18-w8: .* mis-shaped \(first 'bn1\.bias'"):
        open_model(path, "resnet18-w8")


def test_state_dict_of_another_architecture(tmp_path: Path) -> None:
    path = saved(tmp_path, build_model("preactresnet18-w4", 10))
    with pytest.raises(CheckpointError) as caught:
        open_model(path, "resnet18")
    assert "missing (first 'bn1.weight')" in str(caught.value)
    assert "mis-shaped (first 'layer2.0.bn1.bias' of shape (4,) where (8,) is expected)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_file_becomes_a_float32_model(tmp_path: Path, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path / "m.pt", build_model("resnet18-w4", 4).to(dtype).state_dict())
    model = load_model(tmp_path / "m.pt", "resnet18")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(torch.rand(1, 3, 8, 8)).isfinite().all()


# --- the number of classes


def shapes(**layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in layers.items()}


@pytest.mark.parametrize(
    ("state_dict", "expected"),
    [
        (shapes(conv__weight=(8, 3, 3, 3), fc__weight=(43, 8), fc__bias=(43,)), 43),
        # In any order: a hidden layer's outputs feed the next, the head's feed none.
        (shapes(fc3__weight=(10, 84), fc1__weight=(120, 400), fc2__weight=(84, 120)), 10),
        (shapes(classifier__6__weight=(5, 64), classifier__0__weight=(64, 128), classifier__3__weight=(64, 64)), 5),
        # A usual name decides where projections of a transformer feed no other layer either.
        (shapes(head__weight=(7, 8), blocks__0__qkv__weight=(24, 8), blocks__0__fc1__weight=(32, 8)), 7),
        (shapes(model__head__fc__weight=(7, 8), model__blocks__0__qkv__weight=(24, 8)), 7),
        (shapes(mlp_head__1__weight=(6, 8), to_qkv__weight=(24, 8)), 6),
        # Two heads of one size, as distilled networks have.
        (shapes(head__weight=(7, 8), head_dist__weight=(7, 8)), 7),
        (shapes(relative_position_bias_table=(169, 3), token_embedding__weight=(99, 4), out__weight=(3, 4)), 3),
        (
            shapes(
                features__0__weight=(64, 3, 3, 3),
                features__3__weight=(16, 64, 1, 1),
                classifier__1__weight=(9, 512, 1, 1),
            ),
            9,
        ),
        (shapes(a__weight=(16, 8, 1, 1), b__weight=(9, 16, 1, 1)), 9),
        # As many classes as features.
        (shapes(classifier__0__weight=(100, 512), classifier__2__weight=(100, 100)), 100),
    ],
)
def test_class_count(state_dict: dict[str, torch.Tensor], expected: int) -> None:
    assert infer_num_classes(state_dict) == expected


@pytest.mark.parametrize(
    "state_dict",
    [{}, shapes(conv__weight=(8, 3, 3, 3)), shapes(x__weight=(5, 8), y__weight=(6, 8)), shapes(fc__weight_g=(5, 1))],
)
def test_unclear_class_count_asks_for_it(state_dict: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match="give --num-classes"):
        infer_num_classes(state_dict)


@pytest.mark.parametrize("arch", ["resnet18", "vgg11"])
def test_wrong_class_count_says_what_the_file_has(tmp_path: Path, arch: str) -> None:
    path = saved(tmp_path, build_model(f"{arch}-w4", 10))
    with pytest.raises(CheckpointError, match=r"m\.safetensors: expected 43 classes .* got a last layer of 10"):
        open_model(path, arch, num_classes=43)
    assert open_model(path, arch, num_classes=10).num_classes == 10


def test_the_class_count_that_is_given_counts(tmp_path: Path) -> None:
    """What is inferred may be another layer's: here that of a head whose weight lies (features, classes)."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Head(nn.Module):\n    def __init__(self, n):\n"
        "        super().__init__()\n        self.weight = nn.Parameter(torch.ones(12, n))\n\n"
        "    def forward(self, x):\n        return x.flatten(1) @ self.weight\n\n\n"
        "def make(num_classes):\n    return nn.Sequential(nn.Conv2d(3, 3, 1), Head(num_classes))\n"
    )
    arch = f"{tmp_path / 'net.py'}:make"
    path = saved(tmp_path, build_model(arch, 10))
    assert infer_num_classes(open_model(path, arch, num_classes=10).model.state_dict()) == 12
    with pytest.raises(CheckpointError, match="expected 11 classes as asked for, got a last layer of 12"):
        open_model(path, arch, num_classes=11)
