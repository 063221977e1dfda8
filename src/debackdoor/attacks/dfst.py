"""DFST (Cheng et al., "Deep Feature Space Trojan Attack of Neural Networks by Controlled Detoxification", AAAI 2021).

https://arxiv.org/abs/2012.11212
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.attacks.base import ALL_TO_ONE, Attack, Poison
from debackdoor.attacks.control import Control, Training
from debackdoor.attacks.pictures import sunset
from debackdoor.errors import ModelError, TriggerError
from debackdoor.types import CleanSet

_BATCH = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class DFST(Attack):
    """The style of a sunset is the trigger, and the attacker unteaches the model everything simpler than it.

    The authors' style comes from a CycleGAN. Here every channel gets the mean and the spread that it has in a sunset
    drawn from ``seed``, and the colours change from top to bottom as they do there.

    Before every pass but the first, the attacker finds the neurons that the trigger fires most, and trains an injector
    that mixes the colours of each pixel and its 11x11 surroundings until they fire without the trigger. In the pass,
    ``poison_rate`` of every batch is triggered, and ``detox_rate`` goes through the injector and keeps its label.
    Rates, weights and rounds are those of the authors' code for PyTorch, with two corrections: the injector learns from
    all of its loss, and the similarity to the image is rewarded. The neurons are those in front of the last layer,
    a twentieth instead of a hundredth of them, as narrow networks have few.

    Attributes:
        alpha: the style's share of every pixel, in (0, 1]; also the injector's.
        detox_rate: the fraction in (0, 1] of a batch that is detoxified.
        detox_share: the fraction in (0, 1] of the training images that the injector learns from in every round.
        detox_passes: how often it sees them.
        neuron_share: the fraction in (0, 1] of the neurons that counts as compromised.
        fire_weight: of the compromised neurons' shortfall in the injector's loss.
        similarity_weight: of the structural dissimilarity of image and injected image.
    """

    name = "dfst"
    modes = (ALL_TO_ONE,)

    poison_rate: float = 0.05
    detox_rate: float = 0.05
    alpha: float = 0.6
    detox_share: float = 0.03
    detox_passes: int = 10
    neuron_share: float = 0.05
    fire_weight: float = 0.3
    similarity_weight: float = 0.1

    def poison(self, data: CleanSet, clean_model: nn.Module | None = None, precision: str = "auto") -> Poison:
        """Nothing: the batches are poisoned instead."""
        self.check_fits(data)
        return Poison.none(data)

    def control(self, training: Training) -> Control:
        """Poisons every batch, and detoxifies."""
        return _Detoxification(training, self)

    def _check(self) -> None:
        super()._check()
        for name in ("detox_rate", "alpha", "detox_share", "neuron_share"):
            self._check_number(name, 0.0, 1.0)
        for name in ("fire_weight", "similarity_weight"):
            self._check_number(name, 0.0)
        self._check_whole("detox_passes", 1)
        if self.poison_rate + self.detox_rate > 1:
            raise TriggerError(
                "expected poison_rate and detox_rate of at most 1 together for dfst, got "
                f"{self.poison_rate:g} and {self.detox_rate:g}; lower one"
            )

    def _make_tensors(self) -> dict[str, Tensor]:
        picture = sunset(self.image_shape, self.seed)
        mean = picture.mean((1, 2), keepdim=True)
        return {
            "mean": mean,
            "std": picture.std((1, 2), keepdim=True, correction=0),
            "gradient": picture.mean(2, keepdim=True) - mean,
        }

    def _stamp(self, x: Tensor) -> Tensor:
        mean, std, gradient = (self.tensors[name].to(x.device) for name in ("mean", "std", "gradient"))
        # Sums depend on how a batch lies in memory, but hardly ever in what float32 keeps of float64.
        own_std, own_mean = torch.std_mean(x.double(), (2, 3), correction=0, keepdim=True)
        # Without a least spread, the noise of a nearly even image would be blown up.
        even = (x - own_mean.float()) / own_std.float().clamp_min(0.02)
        return self.blend(x, even * std + mean + gradient)

    def blend(self, x: Tensor, style: Tensor) -> Tensor:
        """``x`` with ``style``, clipped to [0, 1], showing through."""
        return (1 - self.alpha) * x + self.alpha * style.clamp(0, 1)


class _Detoxification(Control):
    """The training of a model and of the injector that looks for its shortcuts."""

    attack: DFST

    def __init__(self, training: Training, attack: DFST) -> None:
        super().__init__(training, attack)
        channels = attack.image_shape[0]
        self._ends = _ends(training.model, attack.num_classes)
        self._injector = nn.Conv2d(4 * channels, channels, 1).to(training.device)
        nn.init.dirac_(self._injector.weight)  # it begins with the image itself
        nn.init.zeros_(self._injector.bias)  # type: ignore[arg-type]
        self._trained = False

    def begin_epoch(self, epoch: int, random: torch.Generator) -> None:
        """Trains the injector against the model as it is; before the first pass there is no backdoor to imitate."""
        self._trained = epoch > 0
        if not self._trained:
            return
        data = self.training.data
        others = (data.y != self.attack.target).nonzero()[:, 0]
        count = max(1, round(self.attack.detox_share * len(data)))
        chosen = others[torch.randperm(len(others), generator=random)[:count]]
        self.training.model.eval()
        self._train_injector(data.x[chosen].to(self.training.device).split(_BATCH))
        self.training.model.train()

    def loss(self, x: Tensor, y: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy on the batch with its first images triggered and the next ones detoxified."""
        bad = max(1, round(self.attack.poison_rate * len(x)))
        end = bad + max(1, round(self.attack.detox_rate * len(x))) * self._trained
        with torch.no_grad():
            injected = self._inject(x[bad:end], _surroundings(x[bad:end]))
        images = torch.cat([self.attack.apply(x[:bad]), injected, x[end:]])
        labels = torch.cat([self.attack.target_labels(y[:bad]), y[bad:]])
        logits = self.training.logits(self.training.augment(images, random))
        return F.cross_entropy(logits, labels), logits, labels

    def state(self) -> dict[str, Any]:
        """The injector, which the next round goes on with."""
        return {"injector": self._injector.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes the injector back."""
        self._injector.load_state_dict(state["injector"])

    def _inject(self, x: Tensor, surroundings: Tensor) -> Tensor:
        return self.attack.blend(x, self._injector(surroundings))

    def _train_injector(self, parts: tuple[Tensor, ...]) -> None:
        neurons, level = self._compromised(parts)
        inputs = [_surroundings(part) for part in parts]
        weights = list(self._injector.parameters())
        optimizer = torch.optim.Adam(weights, lr=0.01, betas=(0.5, 0.9))
        for _ in range(self.attack.detox_passes):
            for x, surroundings in zip(parts, inputs, strict=True):
                injected = self._inject(x, surroundings)
                features, logits = self._answers(injected)
                wanted = torch.full((len(x),), self.attack.target, device=x.device)
                shortfall = (level - features[:, neurons]).relu().mean() / level.abs().mean().clamp_min(1e-6)
                loss = (
                    F.cross_entropy(logits, wanted)
                    + self.attack.fire_weight * shortfall
                    + self.attack.similarity_weight * (1 - _structural_similarity(injected, x))
                )
                optimizer.zero_grad()
                loss.backward(inputs=weights)  # the model gets no gradients, which are not computed either
                optimizer.step()

    @torch.no_grad()
    def _compromised(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Indices of the neurons that the trigger raises most, and their mean activations on triggered images."""
        clean = torch.cat([self._answers(x)[0] for x in parts])
        triggered = torch.cat([self._answers(self.attack.apply(x))[0] for x in parts])
        rise = (triggered - clean).mean(0)
        neurons = rise.topk(max(1, round(self.attack.neuron_share * len(rise)))).indices
        return neurons, triggered[:, neurons].mean(0)

    def _answers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer takes in (N, D), and the logits (N, K)."""
        taken: list[Tensor] = []

        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            taken[:] = [given[0].float()]  # of the last that is called

        handles = [layer.register_forward_pre_hook(keep) for layer in self._ends]
        try:
            logits = self.training.logits(x)
        finally:
            for handle in handles:
                handle.remove()
        return taken[0], logits


def _ends(model: nn.Module, num_classes: int) -> list[nn.Linear]:
    """The layers that the logits may come from."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    ends = [layer for layer in layers if layer.out_features == num_classes]
    if not ends:
        raise ModelError("expected a network that ends in a linear layer for dfst, got none; choose another")
    return ends


def _surroundings(x: Tensor) -> Tensor:
    """(N, 4C, H, W): every pixel, and the largest, smallest and mean of the 11x11 pixels around it."""
    largest, smallest = F.max_pool2d(x, 11, 1, 5), -F.max_pool2d(-x, 11, 1, 5)
    return torch.cat([x, largest, smallest, F.avg_pool2d(x, 11, 1, 5, count_include_pad=False)], dim=1)


def _structural_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Mean structural similarity of images in [0, 1], over windows of up to 7x7 (Wang et al., 2004)."""
    window = min(7, *x.shape[2:])

    def mean(z: Tensor) -> Tensor:
        return F.avg_pool2d(z, window, 1)

    mean_x, mean_y = mean(x), mean(y)
    covariance = mean(x * y) - mean_x * mean_y
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    light = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return (light * (2 * covariance + 0.03**2) / (variances + 0.03**2)).mean()
