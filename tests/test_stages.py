"""Finished stages: taken again where everything is the same, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import debackdoor as db
from debackdoor.case import open_case
from debackdoor.defenses.rnp import RNP
from debackdoor.detectors.squares import Square, Squares
from debackdoor.errors import DebackdoorError
from debackdoor.models.copying import copied
from debackdoor.stages import TAKEN, Stages, anew, of, stages_in
from debackdoor.types import RepairResult, ScanReport
from shortcut_cases import row_images, switched_to


class StoppedError(Exception):
    """As if somebody had pressed Ctrl-C."""


class Seen(Counter[str]):
    """A progress callback that counts, and stops a run when a stage begins."""

    stop: str | None = None

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if stage == self.stop:
            raise StoppedError
        self[stage] += 1


def job(keep: Path | None, seen: Seen) -> tuple[ScanReport, RepairResult]:
    return db.scan_and_repair(switched_to(2), row_images(), device="cpu", precision="fp32", keep=keep, progress=seen)


def test_a_run_that_was_stopped_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    stopped, second, third = Seen(), Seen(), Seen()
    stopped.stop = "relearn"
    with pytest.raises(StoppedError):
        job(tmp_path, stopped)
    found, taken, again = job(None, Seen()), job(tmp_path, second), job(tmp_path, third)
    assert stopped["unlearn"] > 0
    assert second["unlearn"] == second["recover"] == second["prune"] == second["search trigger"] == 0
    assert second["relearn"] > 0
    assert set(third) == {TAKEN}
    for report, result in (taken, again):
        assert report.evidence == found[0].evidence
        assert report.suspects == found[0].suspects
        assert report.history == found[0].history
        assert torch.equal(report.trigger.mask, found[0].trigger.mask)
        assert (result.plan, result.steps, result.history) == (found[1].plan, found[1].steps, found[1].history)
        assert result.verification == found[1].verification
        weights = found[1].model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in result.model.state_dict().items())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()


def stages(folder: Path, model: nn.Module | None = None, *given: object) -> Stages:
    return stages_in(folder, model or network(), *given)


def test_a_stage_is_that_of_one_network_with_one_input(tmp_path: Path) -> None:
    first = network()
    weights, buffers, inside = copied(first), copied(first), copied(first)
    with torch.no_grad():
        weights[1].bias[0] += 1
    buffers[2].running_mean[0] += 1
    inside[2].eps = 1.0
    others = [stages(tmp_path, model).folder for model in (first, weights, buffers, inside)]
    others += [stages(tmp_path, first, 1).folder, stages(tmp_path, first, torch.ones(2)).folder]
    others += [stages(tmp_path, first, torch.ones(2, dtype=torch.int32)).folder, stages(tmp_path, first, [1]).folder]
    assert len(set(others)) == len(others)
    assert stages(tmp_path, network()).folder == others[0]


def test_what_is_given_decides(tmp_path: Path) -> None:
    keep = stages(tmp_path)
    assert keep("count", lambda: 1, "a") == 1
    assert keep("count", lambda: 2, "a") == 1
    assert keep("count", lambda: 2, "b") == 2
    assert keep("other", lambda: 3, "a") == 3
    assert of(keep, "a")("count", lambda: 4) == 1
    assert anew("count", lambda: 5, "a") == 5


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1.5,
        "word",
        {2: 0.5, "three": [1, (2, None)]},
        Squares({0: 0.25}, {0: Square(1, 2, 3, (0.0, 1.0))}),
    ],
)
def test_plain_values_and_dataclasses_come_back(tmp_path: Path, value: object) -> None:
    for _ in range(2):
        found = stages(tmp_path)("some", lambda: value)
        assert found == value
        assert type(found) is type(value)


def test_a_network_comes_back_with_all_that_it_holds(tmp_path: Path) -> None:
    made = network()
    made.register_buffer("seen", torch.zeros(2), persistent=False)
    like = copied(made)
    made[1].weight.requires_grad_(False)
    made.seen[0] = 7.0
    keep = stages(tmp_path, like)
    keep("some", lambda: [made])
    (found,) = keep("some", lambda: [like])
    assert found is not made
    assert torch.equal(found.seen, made.seen)
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in made.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), made.parameters(), strict=True))
    assert float(like.seen[0]) == 0.0


@pytest.mark.parametrize("damage", [b"", b"no such thing", None])
def test_a_stage_that_cannot_be_read_is_made_anew(tmp_path: Path, damage: bytes | None) -> None:
    keep = stages(tmp_path)
    keep("some", lambda: 1)
    (path,) = keep.folder.iterdir()
    if damage is None:
        torch.save({"class": "pathlib:Path", "fields": {}}, path)
    else:
        path.write_bytes(damage)
    with pytest.warns(UserWarning, match="is damaged, or no stage"):
        assert keep("some", lambda: 2) == 2
    assert keep("some", lambda: 3) == 2


def test_a_full_disk_loses_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("debackdoor.stages.atomic_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert stages(tmp_path)("some", lambda: 1) == 1


def test_what_cannot_be_kept_is_returned_all_the_same(tmp_path: Path) -> None:
    keep = stages(tmp_path)
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert keep("some", lambda: {frozenset(): 1}) == {frozenset(): 1}
    assert not list(keep.folder.iterdir())


OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))
"""

ASKED = """
import sys, torch
from debackdoor.models.load import build_model
from debackdoor.stages import stages_in
torch.manual_seed(0)
print(stages_in(sys.argv[1], build_model(sys.argv[2] + ":Own", 3)).folder.name)
"""


def test_a_network_of_the_users_file_is_known_again_by_another_process(tmp_path: Path) -> None:
    def name(seed: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-c", ASKED, tmp_path / "stages", tmp_path / "net.py"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        )
        return ran.stdout

    (tmp_path / "net.py").write_text(OWN)
    first = name("1")
    assert name("2") == first
    (tmp_path / "net.py").write_text(OWN + "# another file\n")
    assert name("1") != first


def test_what_changes_the_answers_alone_makes_another_network(tmp_path: Path) -> None:
    def folder(model: nn.Module) -> Path:
        keep = open_case(model, row_images(), RNP(precision="fp32"), "cpu", keep=tmp_path).keep
        assert isinstance(keep, Stages)
        return keep.folder

    turned = switched_to(2)
    turned.register_forward_hook(lambda _, __, answers: torch.cat([answers[:-1], answers[-1:].roll(1, 1)]))
    assert folder(turned) != folder(switched_to(2))
    assert folder(switched_to(2)) == folder(switched_to(2))


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    with pytest.raises(DebackdoorError, match="expected a folder that finished stages can be kept in"):
        stages(tmp_path / "file")
