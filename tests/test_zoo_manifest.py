"""Manifests: what they may say, what they add up to, and those that come with the package."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from debackdoor.attacks import ATTACKS, WaNet
from debackdoor.errors import DebackdoorError, TriggerError
from debackdoor.zoo import TIERS, Manifest, built_in_manifest, read_manifest
from zoo_cases import Borrowed

HEAD = """
tier = "tiny"
[defaults]
dataset = "digits"
arch = "resnet18-w4"
epochs = 5
batch_size = 64
lr = 0.2
"""


def manifest(folder: Path, models: str, head: str = HEAD) -> Manifest:
    path = folder / "some.toml"
    path.write_text(head + models)
    return read_manifest(path)


@pytest.fixture(autouse=True)
def _borrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS, "borrowed", Borrowed)


def test_a_model_then_its_attack_then_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WaNet, "recipe", {"epochs": 7, "lr": 0.3})
    found = manifest(
        tmp_path,
        """
[[model]]
name = "warp"
attack = "wanet"
target = 4
seed = 2
lr = 1
parameters = {strength = 0.75, noise_rate = 0.1}
notes = "why"
[[model]]
name = "plain"
attack = "clean"
flip = false
limit = 30
""",
    )
    assert found.tier == "tiny"
    warp, plain = found.entries
    assert (warp.epochs, warp.lr, warp.batch_size, warp.flip, warp.notes) == (7, 1, 64, True, "why")
    assert (plain.epochs, plain.lr, plain.flip, plain.limit, plain.notes) == (5, 0.2, False, 30, "")
    attack = warp.make_attack((3, 32, 32), 10)
    assert isinstance(attack, WaNet)
    assert (attack.target, attack.seed, attack.strength, attack.noise_rate) == (4, 2, 0.75, 0.1)
    assert plain.make_attack((3, 32, 32), 10) is None
    recipe = warp.recipe("fp32")
    assert (recipe.arch, recipe.epochs, recipe.seed, recipe.precision) == ("resnet18-w4", 7, 2, "fp32")
    assert recipe.mean is None


def test_clean_models_come_before_those_that_need_them(tmp_path: Path) -> None:
    found = manifest(
        tmp_path,
        """
[[model]]
name = "first"
attack = "borrowed"
clean_model = "helper"
[[model]]
name = "second"
attack = "badnets"
[[model]]
name = "third"
attack = "borrowed"
clean_model = "helper"
[[model]]
name = "helper"
attack = "clean"
""",
    )
    assert [entry.name for entry in found.wanted()] == ["helper", "first", "second", "third"]
    assert [entry.name for entry in found.wanted(["third"])] == ["helper", "third"]
    assert [entry.name for entry in found.wanted(["second"])] == ["second"]
    with pytest.raises(DebackdoorError, match="out of first, second, third, helper in the tier tiny, got 'fourth'"):
        found.wanted(["second", "fourth"])


GOOD = '[[model]]\nname = "a"\nattack = "badnets"\n'
CLEAN = '[[model]]\nname = "c"\nattack = "clean"\n'
BORROWED = '[[model]]\nname = "b"\nattack = "borrowed"\nclean_model = "c"\n'


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("", r"some.toml: expected at least one \[\[model\]\] table, got none"),
        ("[[model]", "some.toml: expected TOML, got an error"),
        ("[extra]\n" + GOOD, r"expected tier, \[defaults\] and \[\[model\]\], got 'extra'"),
        (GOOD + "colour = 3", "some.toml model a: expected settings out of name, attack.*, got 'colour'"),
        (GOOD + 'epochs = "many"', "model a: expected epochs as a whole number, got 'many'"),
        (GOOD + "epochs = true", "model a: expected epochs as a whole number, got True"),
        (GOOD + "flip = 1", "model a: expected flip as true or false, got 1"),
        (GOOD + "epochs = 0", "model a: expected epochs from 1 to 99999, got 0"),
        (GOOD + "lr = -0.1", "model a: expected a learning rate above 0, got -0.1"),
        (GOOD + "limit = 0", "model a: expected a limit of at least 1 image, got 0"),
        (GOOD + "parameters = 3", "model a: expected parameters as a table, got 3"),
        (GOOD + "parameters = {target = 3}", "expected parameters of the attack alone, got target"),
        ('[[model]]\nname = "a"\n', "model a: expected an attack out of badnets.*, clean, got None"),
        ('[[model]]\nname = "a"\nattack = "nets"', "expected an attack out of badnets.*, got 'nets'"),
        ('[[model]]\nattack = "clean"', "model 1: expected name, got none"),
        ('[[model]]\nname = "../a"\nattack = "clean"', "expected a name of letters, digits, - and _, got '../a'"),
        ('[[model]]\nname = ""\nattack = "clean"', "expected a name of letters"),
        (GOOD + GOOD.replace('"a"', '"A"'), "expected different names, got 'A' twice"),
        (GOOD + 'clean_model = "c"\n' + CLEAN, "model a: expected no clean_model for badnets"),
        (BORROWED, "model b: expected a clean model 'c', got none"),
        (GOOD + BORROWED.replace('"c"', '"a"'), "model b: expected a clean model 'a', got one with badnets"),
        (BORROWED + "limit = 9\n" + CLEAN, "expected a clean_model with the same limit, got None"),
        (CLEAN + "parameters = {alpha = 1}", "expected no parameters for a clean model"),
    ],
)
def test_bad_manifests(tmp_path: Path, models: str, message: str) -> None:
    with pytest.raises(DebackdoorError, match=message):
        manifest(tmp_path, models)


def test_bad_heads_and_files(tmp_path: Path) -> None:
    for head, message in (
        ("", "expected tier as a name"),
        ('tier = "a/b"\n', "expected tier as a name of letters, digits, - and _, got 'a/b'"),
        ('tier = "a"\n', "model a: expected dataset, got none; add it there or to"),
        ('tier = "a"\ndefaults = 3\n', r"\[defaults\]: expected a table, got int"),
        (HEAD + 'notes = "all"\n', r"\[defaults\]: expected settings out of dataset"),
    ):
        with pytest.raises(DebackdoorError, match=message):
            manifest(tmp_path, GOOD, head)
    with pytest.raises(DebackdoorError, match=r"none\.toml: expected a manifest, got an error \(No such file"):
        read_manifest(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DebackdoorError, match="not text in UTF-8"):
        read_manifest(tmp_path / "bytes.toml")


def test_an_attack_that_starts_from_a_clean_model_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Borrowed, "starts_from_clean_model", True)
    with pytest.raises(DebackdoorError, match="expected the clean_model that borrowed starts from, got none"):
        manifest(tmp_path, GOOD.replace("badnets", "borrowed"))


def test_an_unknown_parameter_is_named(tmp_path: Path) -> None:
    entry = manifest(tmp_path, GOOD + "parameters = {alpha = 0.1}").entries[0]
    with pytest.raises(TriggerError, match=r"parameters of badnets out of .*, got 'alpha'"):
        entry.make_attack((3, 32, 32), 10)


TWELVE = {
    "badnets", "trojan", "blend", "cl", "sig", "dynamic", "wanet", "fc", "dfst", "awp", "lira", "a-blend",
}  # fmt: skip


@pytest.mark.parametrize("tier", TIERS)
def test_the_built_in_manifests_can_be_made(tier: str) -> None:
    for entry in built_in_manifest(tier).entries:
        attack = entry.make_attack((3, 32, 32), 43 if entry.dataset == "gtsrb" else 10)
        assert attack is None or attack.name == entry.attack
        assert not re.search(r"[A-Z]", entry.name)
        assert entry.flip is (entry.dataset != "gtsrb")


def test_the_slim_tier_holds_what_it_is_for() -> None:
    found = built_in_manifest("slim")
    assert found.tier == "slim"
    main = [entry for entry in found.entries if (entry.dataset, entry.arch) == ("cifar10", "resnet18-w16")]
    assert {entry.attack for entry in main if entry.mode == "all-to-one"} - {"clean"} == TWELVE
    assert "badnets" in {entry.attack for entry in main if entry.mode == "all-to-all"}
    clean = [entry for entry in main if entry.attack == "clean"]
    assert len(clean) >= 8
    assert len({entry.seed for entry in clean}) == len(clean)
    assert len({(entry.epochs, entry.batch_size, entry.lr, entry.flip) for entry in clean}) == 1
    signs = {entry.attack for entry in found.entries if entry.dataset == "gtsrb"}
    assert {"badnets", "blend", "wanet", "clean"} <= signs
    others = Counter(
        entry.arch.split("-")[0]
        for entry in found.entries
        if entry.dataset == "cifar10" and entry.attack in ("badnets", "blend", "clean") and entry not in main
    )
    assert others == {"vgg11_bn": 3, "vgg11": 3, "mobilenetv2": 3, "wrn16": 3}


def test_the_full_tier_holds_what_it_is_for() -> None:
    found = built_in_manifest("full")
    assert {(entry.dataset, entry.arch) for entry in found.entries} == {("cifar10", "resnet18")}
    count = Counter(entry.attack for entry in found.entries)
    assert set(count) == TWELVE | {"clean"}
    assert count["clean"] >= 4


def test_there_is_no_other_tier() -> None:
    with pytest.raises(DebackdoorError, match="expected a tier out of slim, full, got 'fat'"):
        built_in_manifest("fat")
