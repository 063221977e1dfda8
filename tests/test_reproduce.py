"""The published procedure, re-created: on the digits in small, and its parts by hand."""

import json
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner, Result

from debackdoor.attacks import load_trigger, make_attack, train, write_victim
from debackdoor.checkpoint import write_checkpoint
from debackdoor.data import load_dataset
from debackdoor.errors import ModelError
from debackdoor.evaluation import evaluate
from debackdoor.models import build_model, load_model
from debackdoor.runtime import generator
from debackdoor.types import CleanSet
from rnp_cases import TwoPixels, harmful_set, one_harmful_channel, two_pixel_set

SCRIPT = Path(__file__).parent.parent / "reproduce" / "official_rnp.py"
ARCH = "resnet18-w2"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield import_module(SCRIPT.stem)
        del sys.modules[SCRIPT.stem]


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_a_pass_of_ascent_by_hand(script: ModuleType) -> None:
    """The margin is 1: the gradient on each weight is 1 / (1 + e) / 2."""
    model, images = TwoPixels().eval(), two_pixel_set()
    row = script.one_pass(model, iter([(images.x, images.y)]), sgd(model, 0.5), -1.0)
    step = 0.25 / (1 + math.e)
    torch.testing.assert_close(model[1].weight.detach(), torch.tensor([[1 - step, step], [step, 1 - step]]))
    assert row == {"loss": pytest.approx(math.log(1 + math.exp(-1))), "train_accuracy": 1.0}
    assert model.training


def test_gradients_are_not_clipped(script: ModuleType) -> None:
    """A scale of 1000 in front of the head makes a gradient far above 20, and the step is as large."""
    images = two_pixel_set()
    model = TwoPixels()
    wrong = 1 - images.y
    row = script.one_pass(model, iter([(images.x * 1000, wrong)]), sgd(model, 1.0), 1.0)
    assert row["train_accuracy"] == 0.0
    torch.testing.assert_close(model[1].weight.detach(), torch.tensor([[1 - 500.0, 500.0], [500.0, 1 - 500.0]]))


def settings(script: ModuleType, **changes: Any) -> Any:
    published = {
        "ratio": 0.01, "batch_size": 128, "lr": 0.01, "stop_accuracy": 0.2, "unlearn_passes": 21, "recover_passes": 20,
        "seed": 98,
    }  # fmt: skip
    return script.Settings(**(published | changes))


def plain_batches(images: CleanSet, settings: Any, random: torch.Generator) -> Any:
    yield images.x, images.y


def test_unlearning_stops_after_the_pass_that_reaches_the_target(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running accuracy is measured before each step, so it lags one step behind the weights."""
    monkeypatch.setattr(script, "augmented_batches", plain_batches)
    measured = []

    def measure(model: nn.Module) -> dict[str, float]:
        measured.append(model)
        return {"clean_accuracy": 0.5}

    clock = script.Clock()
    reached, history = script.unlearn(TwoPixels(), two_pixel_set(), settings(script, lr=2.0), measure, clock)
    assert reached is True
    accuracies = [row["train_accuracy"] for row in history]
    assert accuracies[-1] == 0.0
    assert set(accuracies[:-1]) == {1.0}
    assert len(measured) == len(history)
    assert all(row["clean_accuracy"] == 0.5 for row in history)
    assert set(clock.seconds) == {"unlearn", "test while unlearning"}


def test_unlearning_gives_up_after_its_passes_and_its_step_size_falls(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "augmented_batches", plain_batches)
    reached, history = script.unlearn(
        TwoPixels(), two_pixel_set(), settings(script, lr=1e-4), lambda _: {}, script.Clock()
    )
    assert reached is False
    assert [row["pass"] for row in history] == list(range(1, 22))
    assert [row["lr"] for row in history] == pytest.approx([1e-4] * 10 + [1e-5] * 10 + [1e-6])


def test_recovery_finds_the_harmful_channel_and_learns_nothing_else(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "augmented_batches", plain_batches)
    model = one_harmful_channel()
    model[2].p = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks, history = script.recover(model, harmful_set(), settings(script), lambda _: {}, script.Clock())
    assert masks["0"].tolist() == [1.0, 1.0, 0.0]
    assert len(history) == 20
    assert (history[0]["train_accuracy"], history[-1]["train_accuracy"]) == (0.0, 1.0)
    assert torch.equal(model[0].parametrizations.weight.original, before["0.weight"])
    assert torch.equal(model[0].bias, before["0.bias"])
    assert torch.equal(model[3].weight, before["3.weight"])
    assert not torch.equal(model[0].running_mean, before["0.running_mean"])  # as in the original
    first, _ = script.recover(
        one_harmful_channel_without_dropout(), harmful_set(), settings(script, recover_passes=1), lambda _: {},
        script.Clock(),
    )  # fmt: skip
    assert first["0"].tolist() == pytest.approx([1.0, 1.0, 1 - 0.2 * 0.2 * 6 / (1 + math.exp(-2))])


def one_harmful_channel_without_dropout() -> nn.Sequential:
    model = one_harmful_channel()
    model[2].p = 0.0
    return model


def test_masks_pass_through_text_with_four_decimals(script: ModuleType, tmp_path: Path) -> None:
    masks = {"bn1": torch.tensor([1.0, 0.30004, 0.0]), "layer1.bn": torch.tensor([0.29996, 1 / 3])}
    script.write_masks(tmp_path / "masks.txt", masks)
    text = (tmp_path / "masks.txt").read_text().splitlines()
    assert text[:3] == ["layer\tchannel\tmask", "bn1\t0\t1.0000", "bn1\t1\t0.3000"]
    assert script.read_masks(tmp_path / "masks.txt") == [
        ("bn1", 2, 0.0), ("bn1", 1, 0.3), ("layer1.bn", 0, 0.3), ("layer1.bn", 1, 0.3333), ("bn1", 0, 1.0),
    ]  # fmt: skip


def test_the_sweep_zeroes_weights_at_or_below_each_threshold_and_keeps_biases(script: ModuleType) -> None:
    model = one_harmful_channel()
    seen = []

    def measure(pruned: nn.Module) -> dict[str, float]:
        assert torch.equal(pruned[0].bias, model[0].bias)
        seen.append(pruned[0].weight.tolist())
        return {"clean_accuracy": 1.0}

    rows = script.sweep(model, [("0", 2, 0.0), ("0", 1, 0.3), ("0", 0, 0.9001)], measure)
    assert [row["threshold"] for row in rows] == pytest.approx([0.05 * step for step in range(19)])
    assert [row["pruned"] for row in rows] == [1] * 6 + [2] * 13
    assert seen == [[1, 1, 0]] * 6 + [[1, 0, 0]] * 13
    assert model[0].weight.tolist() == [1, 1, 1]


def test_only_batch_norms_are_masked(script: ModuleType) -> None:
    with pytest.raises(ModelError, match="affine batch norms"):
        script.norms_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False)))
    with pytest.raises(ModelError, match="affine batch norms"):
        script.norms_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)))


def test_half_of_the_images_are_mirrored(script: ModuleType) -> None:
    x = torch.zeros(400, 1, 16, 16)
    x[:, :, 8, 3] = 1.0
    x[:, :, 8, 4] = 0.5
    images = CleanSet(x, torch.arange(400))
    (seen, y), *_ = script.augmented_batches(images, settings(script, batch_size=400), generator(0))
    assert sorted(y.tolist()) == list(range(400))
    mirrored = sum(int(_first(image) == 0.5) for image in seen)
    assert 150 < mirrored < 250
    assert {tuple(image.sum(2).nonzero()[0].tolist())[1] for image in seen} == set(range(4, 13))
    (seen, _), *_ = script.augmented_batches(images, settings(script, batch_size=400, flip=False), generator(0))
    whole = [image for image in seen if image.sum() == 1.5]
    assert {_first(image) for image in whole} == {1.0}


def _first(image: torch.Tensor) -> float:
    """The value of the leftmost pixel that is not black."""
    row = image.amax((0, 1))
    return float(row[row > 0][0])


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow network, three passes over a few digits: its folder."""
    out = tmp_path_factory.mktemp("victim")
    data = load_dataset("digits", limit=400)
    attack = make_attack("badnets", data)
    trained = train(attack, ARCH, data, epochs=3, batch_size=50, lr=0.1, flip=False, precision="fp32")
    write_victim(trained, out, {})
    return out


def _app(script: ModuleType) -> typer.Typer:
    app = typer.Typer()
    app.command()(script.main)
    return app


def run(script: ModuleType, victim: Path, out: Path, *options: str) -> Result:
    common = [
        str(victim / "model.safetensors"), "--arch", ARCH, "--data", "digits", "--trigger", str(victim / "trigger"),
        "--out", str(out), "--device", "cpu", "--ratio", "0.05",
    ]  # fmt: skip
    return CliRunner().invoke(_app(script), [*common, *options])


def test_the_whole_procedure(script: ModuleType, victim: Path, tmp_path: Path) -> None:
    small = ("--unlearn-passes", "2", "--stop-accuracy", "1", "--recover-passes", "2", "--batch-size", "32")
    found = run(script, victim, tmp_path / "one", *small)
    assert found.exit_code == 0, found.output
    record = json.loads((tmp_path / "one" / "record.json").read_text())
    assert record["schema"] == "debackdoor/reproduce/1"
    assert (record["images"], record["reached"], record["error"]) == (64, True, None)  # 5 % of 1297
    assert record["settings"]["seed"] == 98
    assert len(record["unlearn"]) == 1  # accuracy 1 is reached at once
    assert len(record["recover"]) == 2
    assert {"clean_accuracy", "attack_success_rate", "train_accuracy"} <= set(record["recover"][0])
    assert [row["threshold"] for row in record["sweep"]] == script.THRESHOLDS
    counts = [row["pruned"] for row in record["sweep"]]
    assert counts == sorted(counts)
    masks = (tmp_path / "one" / "masks.txt").read_text().splitlines()
    # resnet18-w2: the stem and two blocks of two norms a stage, of widths 2 to 16, and three shortcuts.
    assert len(masks) == 1 + 2 + 4 * (2 + 4 + 8 + 16) + (4 + 8 + 16)
    assert set(record["seconds"]) == {
        "unlearn", "test while unlearning", "recover", "test while recovering", "sweep",
    }  # fmt: skip
    assert found.output.count("prune: threshold") == 19
    assert "attack success rate" in found.output
    again = run(script, victim, tmp_path / "two", *small, "--no-test-evaluation")
    assert again.exit_code == 0, again.output
    other = json.loads((tmp_path / "two" / "record.json").read_text())
    assert "clean_accuracy" not in other["recover"][0]
    assert other["sweep"] == record["sweep"]  # the test set decides nothing, and the seed everything
    assert other["before"] == record["before"]


def test_the_record_starts_with_what_the_evaluator_says(script: ModuleType, victim: Path, tmp_path: Path) -> None:
    (tmp_path / "masks.txt").write_text("of an earlier run")
    found = run(script, victim, tmp_path, "--unlearn-passes", "1", "--stop-accuracy", "0", "--no-test-evaluation")
    assert found.exit_code == 1
    assert "published procedure saves no unlearned model" in found.output
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["reached"] is False
    assert record["sweep"] == record["recover"] == []
    assert record["error"]
    assert not (tmp_path / "masks.txt").exists()
    wanted = evaluate(
        load_model(victim / "model.safetensors", ARCH), load_dataset("digits", "test"),
        load_trigger(victim / "trigger"), precision="fp32",
    )  # fmt: skip
    assert record["before"] == {
        "clean_accuracy": wanted.clean_accuracy,
        "attack_success_rate": wanted.attack_success_rate,
        "robust_accuracy": wanted.robust_accuracy,
    }


def test_bad_input_is_one_sentence(script: ModuleType, victim: Path, tmp_path: Path) -> None:
    found = run(script, victim, tmp_path / "out", "--trigger", str(tmp_path / "none"))
    assert found.exit_code == 2
    assert "error:" in found.output
    assert "trigger.json" in found.output
    found = run(script, victim, tmp_path / "out", "--mean", "a,b")
    assert (found.exit_code, "expected numbers such as 0.49,0.48,0.45" in found.output) == (2, True)
    write_checkpoint(victim / "vgg.safetensors", build_model("vgg11-w2", 10).state_dict())
    found = CliRunner().invoke(
        _app(script),
        [
            str(victim / "vgg.safetensors"), "--arch", "vgg11-w2", "--data", "digits", "--trigger",
            str(victim / "trigger"), "--out", str(tmp_path / "out"), "--device", "cpu", "--stop-accuracy", "1",
        ],
    )  # fmt: skip
    assert found.exit_code == 2
    assert "affine batch norms" in found.output
