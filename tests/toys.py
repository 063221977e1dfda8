"""Small networks whose answers can be worked out on paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def set_values(parameter: Tensor | None, values: Sequence[float]) -> None:
    """Write ``values`` into a parameter or buffer, in row order."""
    assert parameter is not None
    with torch.no_grad():
        parameter.copy_(torch.tensor(values, dtype=parameter.dtype).reshape(parameter.shape))


def pool() -> nn.Sequential:
    """Global average pooling to (N, C)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def conv_norm() -> nn.Sequential:
    """On an image of ones: convolution (1, -2), norm (2 * 1 + 1, 3 * -2 + 10) = (3, 4), logits (3 + 4, 3 - 4)."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0), pool(), nn.Linear(2, 2))
    conv, norm, head = model[0], model[1], model[3]
    set_values(conv.weight, [1, -2])
    set_values(norm.weight, [2, 3])
    set_values(norm.bias, [1, 10])
    set_values(head.weight, [1, 1, 1, -1])
    set_values(head.bias, [0, 0])
    return model.eval()


def conv_plain() -> nn.Sequential:
    """On an image of ones: convolution (1 + 3, -2 + 8) = (4, 6), logits (4 + 6, 4 - 6)."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), pool(), nn.Linear(2, 2))
    set_values(model[0].weight, [1, -2])
    set_values(model[0].bias, [3, 8])
    set_values(model[3].weight, [1, 1, 1, -1])
    set_values(model[3].bias, [0, 0])
    return model.eval()


def conv_transposed() -> nn.Sequential:
    """On a two-channel image of ones: outputs (1 + 3 + 1, 2 + 4 + 0) = (5, 6), then the sum and the difference."""
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 1), pool(), nn.Linear(2, 2))
    set_values(model[0].weight, [1, 2, 3, 4])  # stored as (inputs, outputs)
    set_values(model[0].bias, [1, 0])
    set_values(model[2].weight, [1, 1, 1, -1])
    set_values(model[2].bias, [0, 0])
    return model.eval()


def mlp() -> nn.Sequential:
    """On the image (1, 2): hidden relu(1 + 2, 1 - 2 + 4) = (3, 3), logits (3 + 3, 3 - 3)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    set_values(model[1].weight, [1, 1, 1, -1])
    set_values(model[1].bias, [0, 4])
    set_values(model[3].weight, [1, 1, 1, -1])
    set_values(model[3].bias, [0, 0])
    return model.eval()


class ViewNet(nn.Module):
    """In-place ReLU, ``.view`` and slices between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc1 = nn.Linear(4 * 8 * 8, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv(x)).view(x.size(0), -1)
        hidden = self.fc1(out)
        hidden.view(-1).relu_()
        return self.fc2(hidden)[:, :2]


class SharedConv(nn.Module):
    """One convolution called twice; a norm follows the first call, and the second if ``both``."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Sequential(pool(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(F.relu(self.norm(self.conv(x))))
        return self.head(F.relu(self.norm(out) if self.both else out))


class TiedLinear(nn.Module):
    """Two hidden layers with one weight and a bias each; with ``to_head`` the classifier has that weight too."""

    def __init__(self, to_head: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        if to_head:
            self.head.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(F.gelu(self.first(F.adaptive_avg_pool2d(x, 2).flatten(1))))))


class ResidualToImage(nn.Module):
    """The residual stream starts at the pixels: fc2 writes to it, so only fc1 has hidden neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(12, 5), nn.Linear(5, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(x + self.fc2(F.relu(self.fc1(input=x))))


class TwoHeads(nn.Module):
    """Two heads, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.heads = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 3, 1), pool()), nn.Sequential(pool(), nn.Linear(4, 3))])

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return torch.stack([head(out) for head in self.heads]).mean(0)


class Temperature(nn.Module):
    """Divides logits by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(1.5))

    def forward(self, logits: Tensor) -> Tensor:
        return logits / self.value


class CosineHead(nn.Module):
    """A classifier that is no ``nn.Linear``."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Block(nn.Module):
    """A transformer block as timm writes it; ``shared`` uses one projection as query, key and value."""

    def __init__(self, dim: int, shared: bool, fused: bool) -> None:
        super().__init__()
        self.shared, self.fused = shared, fused
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, dim if shared else 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv(self.norm1(x))
        q, k, v = (made, made, made) if self.shared else made.chunk(3, dim=-1)
        fused = F.scaled_dot_product_attention
        x = x + self.proj(fused(q, k, v) if self.fused else (q @ k.transpose(1, 2)).softmax(-1) @ v)
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class TinyViT(nn.Module):
    """Linear patches, a class token, two blocks, a linear head."""

    def __init__(self, shared: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.Sequential(Block(8, shared, fused), Block(8, shared, fused))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2))
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class PreAct(nn.Module):
    """Two pre-activation blocks: norm, ReLU, convolution; the second has a convolution as its shortcut."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn4, self.conv4 = nn.BatchNorm2d(2 * width), nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.head = nn.Sequential(pool(), nn.Linear(2 * width, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        out = F.relu(self.bn3(x))
        return self.head(self.shortcut(out) + self.conv4(F.relu(self.bn4(self.conv3(out)))))


def inverted_residual() -> nn.Sequential:
    """MobileNet's expansion, depthwise convolution and projection, with norms."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(inplace=True),
        nn.Conv2d(6, 4, 1, groups=2, bias=False), nn.BatchNorm2d(4), pool(), nn.Linear(4, 3),
    )  # fmt: skip
