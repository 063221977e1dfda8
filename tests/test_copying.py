"""Copies of networks, and what cannot be copied."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from debackdoor.errors import ModelError
from debackdoor.models.copying import copied


class Keeping(nn.Module):
    """A network that keeps what it computes: alone, in a list and in a dict."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.inner(x)
        self.more = {"maps": [self.seen.relu(), (self.seen * 2,)]}
        return self.seen


def test_what_a_network_keeps_is_copied_without_its_history() -> None:
    model = Keeping(nn.Linear(2, 3))
    kept = model(torch.ones(1, 2))
    copy = copied(model)
    assert copy.seen.equal(kept)
    assert copy.more["maps"][1][0].equal(2 * kept)
    assert not copy.seen.requires_grad
    assert model.seen is kept
    assert kept.requires_grad
    copy.inner.weight.data.zero_()
    copy.seen.zero_()
    assert bool(model.inner.weight.any())
    assert bool(kept.any())


@pytest.mark.parametrize("change", [weight_norm, spectral_norm])
@pytest.mark.parametrize("called", [False, True])
def test_weights_that_a_hook_computes_are_refused(change: type, called: bool) -> None:
    """To change them changes nothing."""
    model = nn.Sequential(nn.Linear(2, 2), change(nn.Linear(2, 2)))
    if called:
        with torch.no_grad():
            model(torch.ones(1, 2))
    with pytest.raises(ModelError, match=r"computed weights in '1'; after .* call remove_weight_norm or"):
        copied(model)


def test_weights_under_a_mask_of_torchs_pruning_are_refused() -> None:
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.3))
    with pytest.raises(ModelError, match=r"computed weights in '0'; .*after those of torch.nn.utils.prune its remove"):
        copied(model)
    prune.remove(model[0], "weight")
    assert copied(model)[0].weight.equal(model[0].weight)


def test_what_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"can be copied, got Linear, which cannot .*lock.*; take out of it"):
        copied(model)
