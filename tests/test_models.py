"""Built-in architectures, the --arch forms, and loading checkpoints into them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from debackdoor.checkpoint import write_checkpoint
from debackdoor.errors import CheckpointError, MissingDependencyError, ModelError
from debackdoor.models import (
    Normalized,
    build_model,
    infer_num_classes,
    load_model,
    logits_of,
    open_model,
    resolve_arch,
    state_dict_of,
    unwrap,
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


def saved(tmp_path: Path, model: nn.Module, name: str = "m.safetensors") -> Path:
    write_checkpoint(tmp_path / name, state_dict_of(model))
    return tmp_path / name


# --- built-in networks


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


def test_width_suffix_wins_over_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, build_model("resnet18-w4", 3))
    with pytest.raises(CheckpointError, match=r"does not fit resnet18-w8: .* mis-shaped \(first 'bn1\.bias'"):
        open_model(path, "resnet18-w8")


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


# --- the user's own code

USER_FILE = """
from dataclasses import dataclass
from torch import nn
import neighbour_of_this_file

@dataclass
class Options:
    size: "int" = 2

class Net(nn.Module):
    def __init__(self, num_classes=3, in_channels=1):
        super().__init__()
        self.fc = nn.Linear(in_channels, num_classes)
    def forward(self, x):
        return self.fc(x.mean((2, 3)))

def fixed():
    return Net(4)

def options(**kwargs):
    return Net(**kwargs)

def half(num_classes):
    return Net(num_classes).half()

ready = Net(5)
number = 3

def wrong():
    return 3

def failing(num_classes):
    raise RuntimeError("no such luck.\\nsecond line")
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour_of_this_file.py").write_text("")
    (tmp_path / "nets.py").write_text(USER_FILE)
    return tmp_path / "nets.py"


@pytest.mark.parametrize(("name", "classes"), [("Net", 6), ("fixed", 4), ("options", 6), ("half", 6), ("ready", 5)])
def test_factory_in_a_file(user_file: Path, name: str, classes: int) -> None:
    path_before = list(sys.path)
    model = build_model(f"{user_file}:{name}", 6, in_channels=1)
    assert model(torch.rand(2, 1, 4, 4)).shape == (2, classes)
    assert model.fc.weight.dtype == torch.float32
    assert sys.path == path_before


def test_checkpoint_into_a_factory(tmp_path: Path, user_file: Path) -> None:
    model = build_model(f"{user_file}:Net", 6, in_channels=1)
    path = saved(tmp_path, model)
    loaded = open_model(path, f"{user_file}:Net")
    assert loaded.num_classes == 6
    assert torch.equal(loaded.model.fc.weight, model.fc.weight)
    with pytest.raises(CheckpointError, match=r"does not fit .*nets\.py:fixed: of its keys 2 mis-shaped"):
        open_model(path, f"{user_file}:fixed")


def test_ready_made_module_is_not_changed(tmp_path: Path, user_file: Path) -> None:
    factory = resolve_arch(f"{user_file}:ready")
    first, second = factory(5), factory(5)
    assert first is not second
    assert torch.equal(first.fc.weight, second.fc.weight)


def test_factory_in_a_module_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_file: Path
) -> None:
    (tmp_path / "users_package_for_test").mkdir()
    (tmp_path / "users_package_for_test" / "__init__.py").touch()
    user_file.rename(tmp_path / "users_package_for_test" / "nets.py")
    monkeypatch.chdir(tmp_path)
    assert build_model("users_package_for_test.nets:fixed", 9)(torch.rand(1, 1, 2, 2)).shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "which defines Net, Options, failing, fixed, half, options, ready, wrong; give"),
        ("wrong", "to return a torch.nn.Module, got int"),
        ("number", "got int; give a function or a class"),
        ("failing", "failed to build a network: RuntimeError: no such luck; correct"),
        ("", "expected file.py:factory"),
    ],
)
def test_bad_factory(user_file: Path, name: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(f"{user_file}:{name}", 6)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_file_that_does_not_run(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(code)
    modules = set(sys.modules)
    with pytest.raises(ModelError, match=f"failed when run: {message}"):
        resolve_arch(f"{tmp_path}/bad.py:f")
    assert set(sys.modules) == modules


def test_file_or_module_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="got no file"):
        resolve_arch(f"{tmp_path}/none.py:f")
    with pytest.raises(ModelError, match="module 'no_such_module_here' failed to import: ModuleNotFoundError"):
        resolve_arch("no_such_module_here:f")
    with pytest.raises(ModelError, match=r"expected file\.py:factory"):
        resolve_arch(":f")


# --- libraries


def fake_library(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_library_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    # Stands before any installed one, and breaks as a build against another torch does.
    (tmp_path / f"{library}.py").write_text("raise RuntimeError('operator does not exist\\nsee above')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, library, raising=False)
    with pytest.raises(MissingDependencyError) as caught:
        resolve_arch(f"{library}:resnet18")
    assert str(caught.value) == (
        f'expected {library} to import, got RuntimeError: operator does not exist; run pip install "debackdoor[vision]"'
    )


def test_timm_is_asked_for_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def create_model(name: str, **arguments: Any) -> nn.Module:
        calls.append((name, arguments))
        if name == "nope":
            raise RuntimeError("Unknown model (nope)")
        return nn.Linear(1, arguments["num_classes"])

    monkeypatch.setitem(sys.modules, "timm", fake_library("timm", create_model=create_model))
    build_model("timm:vit", 5, in_channels=1)
    resolve_arch("timm:vit")(5)
    assert [call[1]["in_chans"] for call in calls] == [1, 3]
    assert calls[0] == ("vit", {"pretrained": False, "num_classes": 5, "in_chans": 1})
    with pytest.raises(ModelError, match=r"timm cannot build 'nope': RuntimeError: Unknown model \(nope\); see timm"):
        build_model("timm:nope", 5)


def test_torchvision_is_asked_for_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_model(name: str, weights: None, num_classes: int) -> nn.Module:
        if name == "nope":
            raise ValueError("Unknown model nope")
        return nn.Linear(1, num_classes)

    models = SimpleNamespace(get_model=get_model)
    monkeypatch.setitem(sys.modules, "torchvision", fake_library("torchvision", models=models))
    assert build_model("torchvision:resnet18", 5).out_features == 5
    with pytest.raises(ModelError, match="torchvision cannot build 'nope': ValueError: Unknown model nope"):
        build_model("torchvision:nope", 5)
    with pytest.raises(ModelError, match="expected images of 3 channels"):
        build_model("torchvision:resnet18", 5, in_channels=1)


def test_import_stays_light() -> None:
    code = "import sys, debackdoor.models; print({'transformers', 'timm', 'torchvision'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- transformers


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    config.num_labels = 6
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_transformers_folder(tmp_path: Path, vit_folder: Path) -> None:
    loaded = open_model(vit_folder / "model.safetensors", f"hf:{vit_folder}", mean=[0.5], std=[0.5])
    reference = type(unwrap(loaded.model)).from_pretrained(vit_folder, local_files_only=True).eval()
    images = torch.rand(2, 3, 8, 8)
    assert loaded.num_classes == 6
    assert torch.allclose(logits_of(loaded.model(images)), reference((images - 0.5) / 0.5).logits, atol=1e-6)
    assert set(state_dict_of(loaded.model)) == set(loaded.checkpoint.keys)
    # Its file and its classes have names of their own; a repaired file has the file's.
    write_checkpoint(tmp_path / "out.safetensors", state_dict_of(loaded.model), like=loaded.checkpoint)
    before, after = (
        safetensors.torch.load_file(file) for file in (vit_folder / "model.safetensors", tmp_path / "out.safetensors")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_transformers_weights_under_the_names_of_its_classes(tmp_path: Path, vit_folder: Path) -> None:
    model = build_model(f"hf:{vit_folder}", 6)
    loaded = open_model(saved(tmp_path, model), f"hf:{vit_folder}")
    assert set(loaded.checkpoint.keys.values()) == set(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.model.state_dict().items())


def test_transformers_weights_that_do_not_fit(
    tmp_path: Path, vit_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = safetensors.torch.load_file(vit_folder / "model.safetensors")
    weights["vit.embeddings.cls_token"] = torch.zeros(1, 1, 9)
    weights["stray.weight"] = weights.pop("vit.layernorm.weight")
    write_checkpoint(tmp_path / "m.pt", weights)
    with pytest.raises(CheckpointError) as caught:
        open_model(tmp_path / "m.pt", f"hf:{vit_folder}")
    assert "1 missing (first 'vit.layernorm.weight'), 1 unexpected (first 'stray.weight')" in str(caught.value)
    assert "1 mis-shaped (first 'vit.embeddings.cls_token'" in str(caught.value)
    assert capfd.readouterr().err == ""


def test_transformers_config_for_other_classes(vit_folder: Path) -> None:
    model = build_model(f"hf:{vit_folder}", 9, in_channels=1)
    assert logits_of(model(torch.rand(1, 1, 8, 8))).shape == (1, 9)


def test_transformers_folder_problems(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a folder with a config\.json"):
        resolve_arch(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match=r"transformers cannot build hf:.*: ValueError"):
        build_model(f"hf:{tmp_path}", 3)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    with pytest.raises(ModelError, match="transformers cannot build"):
        build_model(f"hf:{tmp_path}", 3)
    assert not (tmp_path / "pwned").exists()
