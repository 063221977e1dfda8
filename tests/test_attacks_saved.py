"""Trigger folders: what is saved comes back bit for bit, and damage is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from debackdoor.attacks import ATTACKS, Attack, Blend, load_trigger, save_trigger
from debackdoor.errors import TriggerError
from debackdoor.runtime import generator


@pytest.mark.parametrize("kind", ATTACKS.values())
def test_a_saved_trigger_makes_the_same_bits(kind: type[Attack], tmp_path: Path) -> None:
    attack = kind(target=3, seed=7, num_classes=5, image_shape=(3, 16, 12), poison_rate=0.15)
    for tensor in attack.tensors.values():  # what is on disk counts, not what the seed would give today
        tensor.mul_(0.9)
    x = torch.rand(5, 3, 16, 12, generator=generator(0))
    save_trigger(attack, tmp_path / "deep" / "trigger")
    again = load_trigger(tmp_path / "deep" / "trigger")
    assert type(again) is kind
    assert again.parameters == attack.parameters
    assert torch.equal(again.apply(x), attack.apply(x))
    assert sorted(path.name for path in (tmp_path / "deep" / "trigger").iterdir()) == [
        "trigger.json",
        "trigger.safetensors",
    ]


def test_trigger_description(tmp_path: Path) -> None:
    save_trigger(Blend(target=3, alpha=0.1), tmp_path)
    record = json.loads((tmp_path / "trigger.json").read_text())
    assert record["schema"] == "debackdoor/trigger/1"
    assert (record["attack"], record["target"], record["mode"]) == ("blend", 3, "all-to-one")
    assert record["image_shape"] == [3, 32, 32]
    assert record["parameters"] == {"poison_rate": 0.1, "seed": 0, "alpha": 0.1}
    save_trigger(Blend(mode="all-to-all"), tmp_path)
    assert json.loads((tmp_path / "trigger.json").read_text())["target"] is None
    assert load_trigger(tmp_path).mode == "all-to-all"


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "trigger.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _flip_last_byte(folder: Path) -> None:
    path = folder / "trigger.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "trigger.json").unlink(), "expected a saved trigger"),
        (lambda f: (f / "trigger.safetensors").unlink(), "no such file"),
        (lambda f: (f / "trigger.json").write_text('{"schema": '), "expected JSON"),
        (lambda f: (f / "trigger.json").write_bytes(b"\xff\xfe"), "expected JSON"),
        (lambda f: (f / "trigger.json").write_text("[]"), "expected schema"),
        (lambda f: _edit(f, schema="debackdoor/trigger/9"), "expected schema"),
        (lambda f: _edit(f, attack="magic"), "got 'magic'"),
        (lambda f: _edit(f, attack=["blend"]), "another type"),
        (lambda f: _edit(f, parameters=None), "another type"),
        (lambda f: _edit(f, parameters={"colour": 1}), "got 'colour'"),
        (lambda f: _edit(f, target=99), "target"),
        (lambda f: _edit(f, target="3"), "target"),
        (lambda f: _edit(f, image_shape=[3, 16, 16]), "expected tensors"),
        (lambda f: _edit(f, image_shape="3x32x32"), "image_shape"),
        (lambda f: _edit(f, image_shape=[3, 4_000_000, 4_000_000]), "expected sizes that fit memory, got larger ones"),
        (lambda f: (f / "trigger.json").write_text(100_000 * "["), "expected JSON"),
        (_flip_last_byte, "that trigger.json names"),
        (lambda f: (f / "trigger.safetensors").write_bytes(b"\x10"), "truncated or damaged"),
        (lambda f: save_file({"image": torch.zeros(3, 32, 32)}, f / "trigger.safetensors"), "that trigger.json names"),
    ],
)
def test_damaged_trigger_folders_are_refused(damage: object, message: str, tmp_path: Path) -> None:
    save_trigger(Blend(), tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(TriggerError, match=message):
        load_trigger(tmp_path)


def test_a_missing_trigger_key_is_named(tmp_path: Path) -> None:
    save_trigger(Blend(), tmp_path)
    record = json.loads((tmp_path / "trigger.json").read_text())
    del record["mode"]
    (tmp_path / "trigger.json").write_text(json.dumps(record))
    with pytest.raises(TriggerError, match="no mode"):
        load_trigger(tmp_path)


def test_a_trigger_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TriggerError, match="not written"):
        save_trigger(Blend(), tmp_path / "file" / "trigger")
