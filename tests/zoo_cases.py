"""What the tests of the zoo share: a small manifest, and an attack that works with a clean model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cli_cases import NETWORK
from debackdoor.attacks.badnets import BadNets
from debackdoor.attacks.base import Poison
from debackdoor.types import CleanSet


@dataclass(frozen=True, kw_only=True, eq=False)
class Borrowed(BadNets):
    """BadNets that keeps the clean model's answer to its first image."""

    name = "borrowed"
    needs_clean_model = True

    def _make_tensors(self) -> dict[str, Tensor]:
        return super()._make_tensors() | {"answer": torch.zeros(self.num_classes)}

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        assert clean_model is not None
        self.tensors["answer"] = clean_model(data.x[:1])[0]
        return super().poison(data, clean_model, precision)


def write_manifest(folder: Path, models: str, epochs: int = 4) -> Path:
    """A manifest of small networks on digits; ``models`` are its ``[[model]]`` tables."""
    (folder / "net.py").write_text(NETWORK)
    path = folder / "tiny.toml"
    defaults = f'dataset = "digits"\nlimit = 400\narch = "{folder / "net.py"}:make"\nepochs = {epochs}'
    path.write_text(f'tier = "tiny"\n[defaults]\n{defaults}\nbatch_size = 16\nlr = 0.1\nflip = false\n{models}')
    return path


SMALL = """
[[model]]
name = "clean-1"
attack = "clean"
seed = 1

[[model]]
name = "patch"
attack = "badnets"
target = 3
parameters = {poison_rate = 0.3}
notes = "a <note> & more"

[[model]]
name = "shifted"
attack = "blend"
mode = "all-to-all"
parameters = {poison_rate = 0.5, alpha = 0.5}
"""


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums come out the same in every process that has one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
