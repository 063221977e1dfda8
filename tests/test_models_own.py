"""Networks that the package does not hold: the user's own files and modules, timm, torchvision, transformers."""

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

from checkpoint_cases import saved
from debackdoor.checkpoint import write_checkpoint
from debackdoor.errors import CheckpointError, MissingDependencyError, ModelError
from debackdoor.models import (
    build_model,
    logits_of,
    open_model,
    resolve_arch,
    state_dict_of,
    unwrap,
)

# --- the user's own code

USER_FILE = """
from dataclasses import dataclass
import torch
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

def nowhere(num_classes):
    with torch.device("meta"):
        return Net(num_classes)

def lazy(num_classes):
    return nn.LazyLinear(num_classes)

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


@pytest.mark.parametrize(
    ("name", "got"), [("nowhere", "'fc.weight' on the meta device"), ("lazy", "'weight' whose shape is not known yet")]
)
def test_a_network_without_weights_is_refused(tmp_path: Path, user_file: Path, name: str, got: str) -> None:
    path = saved(tmp_path, build_model(f"{user_file}:Net", 6, in_channels=1))
    with pytest.raises(ModelError, match=f"to build a network with weights of its own, got {got}"):
        open_model(path, f"{user_file}:{name}")


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
        ("missing", "which defines Net, Options, failing, fixed, half, lazy, nowhere, options, ready, wrong; give"),
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
        return nn.Linear(1, num_classes)

    # Others come with a backbone, whose weights they fetch.
    models = SimpleNamespace(get_model=get_model, list_models=lambda module: ["resnet18"])
    monkeypatch.setitem(sys.modules, "torchvision", fake_library("torchvision", models=models))
    assert build_model("torchvision:resnet18", 5).out_features == 5
    with pytest.raises(
        ModelError, match="torchvision cannot build 'fcn_resnet50': ValueError: fcn_resnet50 is none of"
    ):
        build_model("torchvision:fcn_resnet50", 5)
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
