"""Calling a network with other weights: wherever they sit, and what is left behind."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from channel_cases import assert_as_found, snapshot
from debackdoor.models.stateless import call_with
from debackdoor.rnp.modes import normalisation_in_train_mode


class TwoNames(nn.Module):
    """One module under two names, and called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


class TwoOwners(nn.Module):
    """Two modules that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", [TwoNames, TwoOwners])
def test_a_shared_weight_is_replaced_everywhere_and_put_back(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = network().eval(), torch.rand(4, 3)
    (name,) = [name for name, value in model.named_parameters() if value.shape == (3, 3)]
    weight = torch.rand(3, 3)
    before, usual = snapshot(model), model(x)
    replaced = call_with(model, {name: weight}, x)
    assert_as_found(model, before)
    torch.testing.assert_close(model(x), usual)
    assert all(value.requires_grad for value in model.parameters())
    with torch.no_grad():
        model.get_parameter(name).copy_(weight)
    torch.testing.assert_close(replaced, model(x))


def test_statistics_that_move_are_the_given_ones() -> None:
    model = TwoNames()
    normalisation_in_train_mode(model)
    x = torch.rand(4, 3)
    before = snapshot(model)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    call_with(model, buffers, x)
    assert_as_found(model, before)
    assert int(buffers["first.1.num_batches_tracked"]) == 2
    assert not torch.equal(buffers["first.1.running_mean"], torch.zeros(3))


def test_gradients_reach_what_was_given() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    name = "parametrizations.weight.original0"
    given = model.get_parameter(name).detach().clone().requires_grad_()
    call_with(model, {name: given}, torch.rand(4, 3)).sum().backward()
    assert given.grad is not None
    assert model.get_parameter(name).grad is None
