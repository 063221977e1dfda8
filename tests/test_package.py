"""The package as a user imports it."""

import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import debackdoor as db


def run(code: str) -> Any:
    """What a fresh interpreter prints, as JSON."""
    found = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return json.loads(found.stdout)


def test_the_public_names() -> None:
    from debackdoor import attacks, defenses, evaluation
    from debackdoor.data import load_clean
    from debackdoor.models import load_model
    from debackdoor.types import CleanSet, RepairResult

    wanted = {
        "CleanSet": CleanSet, "RepairResult": RepairResult, "attacks": attacks, "defenses": defenses,
        "evaluation": evaluation, "load_clean": load_clean, "load_model": load_model,
        "repair": import_module("debackdoor.repair").repair, "__version__": "0.1.0",
    }  # fmt: skip
    assert {name: getattr(db, name) for name in wanted} == wanted
    assert set(wanted) <= set(db.__all__) == set(dir(db))
    assert db.defenses.RNP is import_module("debackdoor.defenses.rnp").RNP
    assert {"BadNets", "Blend", "SIG", "WaNet", "train"} <= set(dir(db.attacks))
    with pytest.raises(AttributeError, match="no attribute 'repare'"):
        _ = db.repare
    with pytest.raises(ImportError):
        exec("from debackdoor import repare")


def test_every_public_name_is_there() -> None:
    assert all(getattr(db, name) is not None for name in db.__all__)


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["version"] == db.__version__


def test_repair_is_the_function_however_it_is_imported() -> None:
    code = """
import sys
found = []
for how in (
    "import debackdoor.repair; found.append(debackdoor.repair)",
    "import debackdoor; found.append(debackdoor.repair)",
    "from debackdoor import repair; found.append(repair)",
    "import importlib, debackdoor; importlib.import_module('debackdoor.repair'); found.append(debackdoor.repair)",
    "from debackdoor.case import check_works; import debackdoor; found.append(debackdoor.repair)",
):
    for name in [name for name in sys.modules if name.startswith("debackdoor")]:
        del sys.modules[name]
    exec(how)
    assert found[-1] is sys.modules["debackdoor.repair"].repair, how
print(json.dumps([callable(item) for item in found]))
"""
    assert run(code) == [True] * 5


def test_the_package_alone_does_not_load_torch_and_all_of_it_changes_nothing_there() -> None:
    code = """
import sys, debackdoor as db
without_torch = "torch" not in sys.modules
import random, numpy, torch
def state():
    return [
        torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.get_rng_state().tolist(),
        torch.get_float32_matmul_precision(), random.getstate(), numpy.random.get_state()[1].tolist(),
    ]
torch.manual_seed(1)
before = state()
for name in db.__all__:
    getattr(db, name)
print(json.dumps([without_torch, "debackdoor.repair" in sys.modules, state() == before]))
"""
    assert run(code) == [True, True, True]


def test_what_a_scan_takes_loads_no_attack() -> None:
    code = """
import sys, debackdoor.bench.scan_many, debackdoor.detect, debackdoor.report.page
print(json.dumps([name for name in sys.modules if name.startswith(("debackdoor.attacks", "debackdoor.evaluation"))]))
"""
    assert run(code) == []
