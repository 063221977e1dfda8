"""Which channels are found in toy networks, and what masks do to them, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import toys
from channel_cases import CASES, Factory, assert_as_found, images, snapshot
from debackdoor.channels import (
    MaskableLayer,
    all_channels,
    count_channels,
    find_channels,
    flat_indices,
    layer_slices,
    mask_parameters,
    masked_call,
)
from debackdoor.errors import ModelError


def found(model: nn.Module, example: Tensor | None = None) -> list[tuple[str, str, int]]:
    example = images() if example is None else example
    return [(layer.kind, layer.name, layer.size) for layer in find_channels(model, example)]


@pytest.mark.parametrize(
    ("model", "x", "kind", "logits", "gradient"),
    [
        # Masked norm: (0.5 * 2 * 1 + 1, 0 + 10) = (2, 10). d(first logit)/d mask = (2 * 1, 3 * -2).
        (toys.conv_norm(), torch.ones(1, 1, 2, 2), "norm", [12.0, -8.0], [2.0, -6.0]),
        # Masked convolution: (0.5 * 4, 0 * 6) = (2, 0), bias included. The ReLU stops the gradient of 6 at 0.
        (toys.conv_plain(), torch.ones(1, 1, 2, 2), "conv", [2.0, 2.0], [4.0, 0.0]),
        # Masked transposed convolution: (0.5 * 5, 0 * 6) = (2.5, 0).
        (toys.conv_transposed(), torch.ones(1, 2, 2, 2), "conv", [2.5, 2.5], [5.0, 6.0]),
        # Masked hidden neurons: (0.5 * 3, 0 * 3) = (1.5, 0).
        (toys.mlp(), torch.tensor([1.0, 2.0]).reshape(1, 1, 1, 2), "linear", [1.5, 1.5], [3.0, 0.0]),
    ],
    ids=["norm", "conv", "transposed", "hidden"],
)
def test_masked_outputs_and_gradients_by_hand(
    model: nn.Module, x: Tensor, kind: str, logits: list[float], gradient: list[float]
) -> None:
    layers = find_channels(model, x)
    assert [(layer.kind, layer.size) for layer in layers] == [(kind, 2)]
    mask = torch.tensor([0.5, 0.0], requires_grad=True)
    out = masked_call(model, layers, mask, x)
    assert out.tolist() == [logits]
    out[0, 0].backward()
    assert mask.grad is not None
    assert mask.grad.tolist() == gradient
    assert all(parameter.grad is None for parameter in model.parameters())


def test_masking_all_but_one_norm_channel_leaves_its_beta() -> None:
    model, x = toys.conv_norm(), torch.ones(1, 1, 2, 2)
    out = masked_call(model, find_channels(model, x), torch.zeros(2), x)
    assert out.tolist() == [[11.0, -9.0]]  # betas 1 and 10


@pytest.mark.parametrize(("factory", "expected"), CASES.values(), ids=CASES.keys())
def test_finds_exactly_these_channels(factory: Factory, expected: list[tuple[str, str, int]]) -> None:
    torch.manual_seed(0)
    assert found(factory()) == expected


@pytest.mark.parametrize("frozen", [False, True])
def test_finds_the_same_without_gradients(frozen: bool) -> None:
    model = toys.PreAct().requires_grad_(not frozen)
    expected = found(toys.PreAct())
    with torch.no_grad():
        assert found(model) == expected
    with torch.inference_mode():
        assert found(toys.PreAct(), images()) == expected


def test_tied_hidden_layers_are_masked_with_both_biases() -> None:
    model = toys.TiedLinear(to_head=False)
    (layer,) = find_channels(model, images())
    assert layer.parameters == ("first.weight", "first.bias", "second.bias")
    out = masked_call(model, (layer,), torch.zeros(12), images())
    torch.testing.assert_close(out, model.head.bias.detach().expand(2, -1))


def test_a_weight_tied_to_the_classifier_is_never_listed() -> None:
    with pytest.raises(ModelError, match="no channel that can be masked"):
        find_channels(toys.TiedLinear(to_head=True), images())


class Noisy(nn.Module):
    """Draws noise and counts its calls even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.conv(x + torch.randn_like(x)).mean((2, 3)))


def test_buffers_and_random_state_stay() -> None:
    model = Noisy().train()
    before = snapshot(model)
    layers = find_channels(model, images())
    assert_as_found(model, before)
    masked_call(model, layers, torch.ones(4), images())
    assert model.calls == 0


def test_norm_statistics_move_only_in_buffers_that_are_given() -> None:
    model, x = toys.conv_norm().train(), torch.ones(1, 1, 2, 2)
    model[1].eps = 1e-5  # torch wants one above 0 in train mode
    layers = find_channels(model, x)
    masked_call(model, layers, torch.ones(2), x)
    assert model[1].running_mean.tolist() == [0.0, 0.0]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    masked_call(model, layers, torch.ones(2), x, buffers=buffers)
    torch.testing.assert_close(buffers["1.running_mean"], torch.tensor([0.1, -0.2]))  # momentum 0.1 of (1, -2)
    assert model[1].running_mean.tolist() == [0.0, 0.0]


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        self.drop(self.conv(x))
        raise KeyError("no such stage")


def test_everything_is_restored_after_an_exception() -> None:
    model = Fails().train()
    model.drop.eval()
    before = snapshot(model)
    with pytest.raises(ModelError, match="KeyError: 'no such stage'"):
        find_channels(model, images())
    assert_as_found(model, before)


LAYERS = (MaskableLayer("a", "norm", 2, ("a.weight",)), MaskableLayer("b", "conv", 3, ("b.weight", "b.bias")))


def test_flat_indices_and_back() -> None:
    assert count_channels(LAYERS) == 5
    assert layer_slices(LAYERS) == {"a": slice(0, 2), "b": slice(2, 5)}
    assert all_channels(LAYERS) == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2)]
    assert flat_indices(LAYERS, all_channels(LAYERS)) == [0, 1, 2, 3, 4]


def test_mask_parameters_returns_only_what_it_scales() -> None:
    parameters = {
        "a.weight": torch.tensor([1.0, 2.0]), "a.bias": torch.ones(2),
        "b.weight": torch.ones(3, 1, 1, 1, dtype=torch.float16), "b.bias": torch.tensor([2.0, 4.0, 6.0]),
    }  # fmt: skip
    masked = mask_parameters(LAYERS, torch.tensor([0.5, 1.0, 0.0, 1.0, 0.5]), parameters)
    assert set(masked) == {"a.weight", "b.weight", "b.bias"}
    assert masked["a.weight"].tolist() == [0.5, 2.0]
    assert masked["b.weight"].flatten().tolist() == [0.0, 1.0, 0.5]
    assert masked["b.weight"].dtype == torch.float16
    assert masked["b.bias"].tolist() == [0.0, 4.0, 3.0]


def test_a_bias_that_two_layers_share_gets_the_masks_of_both() -> None:
    layers = tuple(MaskableLayer(name, "conv", 2, (f"{name}.weight", "a.bias")) for name in ("a", "b"))
    parameters = {"a.weight": torch.ones(2, 1), "b.weight": torch.ones(2, 1), "a.bias": torch.tensor([3.0, 5.0])}
    masked = mask_parameters(layers, torch.tensor([0.0, 1.0, 1.0, 0.5]), parameters)
    assert masked["a.bias"].tolist() == [0.0, 2.5]


def test_gradients_reach_parameters_that_are_given() -> None:
    model, x = toys.conv_plain(), torch.ones(1, 1, 2, 2)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    masked_call(model, find_channels(model, x), torch.tensor([0.5, 0.0]), x, parameters)[0, 0].backward()
    assert parameters["0.weight"].grad is not None
    assert parameters["0.weight"].grad.flatten().tolist() == [0.5, 0.0]
    assert model[0].weight.grad is None


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ModelError, match="got 'c'"):
        flat_indices(LAYERS, [("c", 0)])
    with pytest.raises(ModelError, match="channel of b from 0 to 2, got 3"):
        flat_indices(LAYERS, [("a", 1), ("b", 3)])
    with pytest.raises(ModelError, match=r"mask of shape \(5,\), got \(4,\)"):
        mask_parameters(LAYERS, torch.ones(4), {})


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), images(), "no channel that can be masked"),
        (toys.conv_plain(), images(), "takes torch.float32 images of shape .2, 3, 8, 8., got RuntimeError"),
        (toys.conv_plain(), torch.ones(1, 1, 2, 2, dtype=torch.int64), "takes torch.int64 images"),
        (nn.Conv2d(3, 4, 3), images(), "return logits"),
    ],
    ids=["nothing to mask", "channels", "integers", "no logits"],
)
def test_bad_models_and_examples_are_refused(model: nn.Module, example: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_channels(model, example)


def test_logits_without_gradient_are_refused() -> None:
    class Detached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(ModelError, match=r"remove torch.no_grad\(\)"):
        find_channels(Detached(*toys.conv_plain()), torch.ones(1, 1, 2, 2))
