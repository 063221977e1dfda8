"""Clean models that poison is made with: which layers are looked at, what is refused, and steps within bounds."""

import pytest
import torch
from torch import Tensor, nn

from debackdoor.attacks.patch import patch_place, with_patch
from debackdoor.attacks.surrogate import Surrogate, descend
from debackdoor.errors import ModelError
from debackdoor.models import Normalized, build_model
from toys import CosineHead, TinyViT, ViewNet, conv_plain, pool


def test_features_are_what_the_last_convolution_at_each_resolution_and_the_head_are_given() -> None:
    surrogate = Surrogate(conv_plain(), torch.ones(1, 1, 2, 2), 2)
    x = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    image, pooled = surrogate.features(x)
    assert image.tolist() == [[1, 0, 0, 0]]
    torch.testing.assert_close(pooled, torch.tensor([[0.25 + 3, -0.5 + 8]]))
    torch.testing.assert_close(surrogate.logits(x), torch.tensor([[10.75, -4.25]]))
    assert surrogate.head.out_features == 2


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [("resnet18-w16", [16 * 1024, 32 * 256, 64 * 64, 128 * 16, 128]), ("vgg11_bn-w8", None), ("mobilenetv2", None)],
)
def test_built_in_networks_have_their_features(arch: str, sizes: list[int] | None) -> None:
    model = Normalized(build_model(arch, 10), [0.5] * 3, [0.2] * 3).eval()
    x = torch.rand(2, 3, 32, 32)
    surrogate = Surrogate(model, x[:1], 10)
    seen = surrogate.features(x)
    if sizes is not None:
        assert [layer.shape[1] for layer in seen] == sizes
    assert all(layer.dtype == torch.float32 and len(layer) == 2 for layer in seen)
    with torch.no_grad():
        found, wanted = surrogate.head(seen[-1]), surrogate.logits(x)
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()  # up to the rounding of bfloat16
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_networks_that_call_view_serve_too_and_keep_their_layout() -> None:
    model = ViewNet().eval()
    surrogate = Surrogate(nn.Sequential(model, nn.Linear(2, 10)).eval(), torch.rand(1, 3, 8, 8), 10)
    assert [len(layer) for layer in surrogate.features(torch.rand(2, 3, 8, 8))] == [2, 2]
    assert model.conv.weight.is_contiguous()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_it_computes_in_the_precision_asked_for(precision: str, dtype: torch.dtype) -> None:
    model, seen = conv_plain(), set[torch.dtype]()
    model.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    Surrogate(model, torch.ones(1, 1, 2, 2), 2, precision).logits(torch.ones(1, 1, 2, 2))
    assert seen == {dtype}


def test_a_vision_transformer_has_features_too() -> None:
    model = TinyViT().eval()
    surrogate = Surrogate(model, torch.rand(1, 3, 8, 8), 3)
    assert surrogate.head is model.head
    assert [layer.shape for layer in surrogate.features(torch.rand(2, 3, 8, 8))] == [(2, 8)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "got none; train one with the attack 'clean'"),
        (build_model("resnet18-w4", 7).eval(), "with 10 classes, got 7 classes from Linear of 7"),
        (nn.Conv2d(1, 2, 3), r"expected the model to take images of shape \(3, 8, 8\)"),
        (nn.Sequential(pool(), CosineHead(3, 10)), "got 10 classes from no linear layer"),
        (nn.Sequential(pool(), nn.Linear(3, 20), nn.Unflatten(1, (10, 2)), nn.AvgPool1d(2), nn.Flatten()), "of 20"),
    ],
)
def test_models_that_cannot_serve_are_refused(model: nn.Module | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Surrogate(model, torch.rand(1, 3, 8, 8), 10)


def test_hooks_come_off_after_an_error() -> None:
    model = conv_plain()
    surrogate = Surrogate(model, torch.ones(1, 1, 2, 2), 2)
    with pytest.raises(RuntimeError):
        surrogate.features(torch.ones(1, 5, 2, 2))
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_signed_steps_stay_within_eps_and_the_pixel_range() -> None:
    x = torch.tensor([[[[0.5, 0.02], [0.99, 0.4]]]])

    def loss(moved: Tensor) -> Tensor:
        return (moved * torch.tensor([[1.0, 1.0], [-1.0, 0.0]])).sum()

    out = descend(x, x, loss, eps=0.1, step=0.03, iterations=2)
    torch.testing.assert_close(out, torch.tensor([[[[0.44, 0.0], [1.0, 0.4]]]]))
    out = descend(x, x, loss, eps=0.1, step=0.03, iterations=9)
    torch.testing.assert_close(out, torch.tensor([[[[0.4, 0.0], [1.0, 0.4]]]]))
    out = descend(x, x + 1, loss, eps=0.1, step=torch.tensor([[0.0, 0.03], [0.03, 0.0]]), iterations=1)
    torch.testing.assert_close(out, torch.tensor([[[[0.6, 0.09], [1.0, 0.5]]]]))
    assert x.flatten().tolist() == pytest.approx([0.5, 0.02, 0.99, 0.4])


def test_patches_stay_clear_of_what_shifts_cut_off() -> None:
    assert patch_place((3, 32, 32), 0.25) == (slice(20, 28), slice(20, 28))
    assert patch_place((1, 8, 8), 0.25) == (slice(5, 7), slice(5, 7))
    assert patch_place((3, 20, 12), 0.25) == (slice(16, 19), slice(8, 11))
    assert patch_place((1, 4, 4), 0.75) == (slice(1, 4), slice(1, 4))
    assert patch_place((1, 4, 4), 0.01) == (slice(3, 4), slice(3, 4))
    x = torch.zeros(2, 1, 2, 3)
    out = with_patch(x, torch.tensor([[[0.5]]]), (slice(0, 1), slice(1, 2)))
    assert out.tolist() == [[[[0, 0.5, 0], [0, 0, 0]]]] * 2
    assert not x.any()
