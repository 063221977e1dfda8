"""Fine-Pruning: prune the channels that clean images leave dormant, then fine-tune.

Liu, Dolan-Gavitt and Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018,
https://arxiv.org/abs/1805.12185, section 3. As there, channels of the last convolutional layer are ranked by their mean
activation on clean images and pruned lowest first. Fine-tuning follows Wu et al., "BackdoorBench", NeurIPS 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debackdoor._graph import LAYERS
from debackdoor.channels import MaskableLayer, find_channels, masked_call
from debackdoor.defenses.base import Defense, differ, suspect_copy
from debackdoor.defenses.finetune import FineTuning
from debackdoor.defenses.levels import BUDGET, Level, blind_rule, cost, pruning_step, strongest
from debackdoor.errors import check_count, check_fraction, check_positive
from debackdoor.models.forward import in_eval, predict
from debackdoor.rnp.prune import plan_mask, prune, rank
from debackdoor.runtime import answered_at_once
from debackdoor.types import CleanSet, Plan, Progress, RepairResult, Step


@dataclass(frozen=True, kw_only=True)
class FinePruning(Defense):
    """Prunes dormant channels of one layer as far as the clean images allow, and fine-tunes what is left.

    The layer is the last maskable one with feature maps, or the last one where none has. A channel's activation is that
    of the last feature map that it makes before another layer follows: after a residual sum, if there is one. Where a
    linear layer takes the means or maxima of that map, its weights for a pruned channel are set to zero, so that
    nothing of the channel is left (as in BackdoorBench). Elsewhere the channel's own weights are, which leaves a
    residual stream's other parts, and a norm's shift, in place. What was pruned stays at zero in fine-tuning.

    Nothing is learned before fine-tuning, so all clean images rank and judge, and then teach.

    Attributes:
        share: of the layer's channels to prune, a fraction; None takes the strongest level within the budget.
        step: between two levels, a fraction of the layer's channels.
        budget: how far accuracy on the clean images may fall by pruning, a fraction.
        lr: first step size of fine-tuning.
        epochs: passes over the clean images.
        batch_size: images a step.

    Example:
        >>> result = FinePruning(budget=0.02)(model, clean)  # doctest: +SKIP
    """

    name: ClassVar[str] = "fine-pruning"

    share: float | None = None
    step: float = 0.05
    budget: float = BUDGET
    lr: float = 0.01
    epochs: int = 20
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_fraction(share=self.share, step=self.step, budget=self.budget)
        check_positive(step=self.step, lr=self.lr)
        check_count(epochs=self.epochs, batch_size=self.batch_size)

    def __call__(self, model: nn.Module, clean: CleanSet, *, progress: Progress | None = None) -> RepairResult:
        model = suspect_copy(model, clean, self.precision)
        layers, activation = dormancy(model, clean, self.precision)
        ranking = rank(layers, activation, ties=activation)
        measure = cost(model, layers, clean, self.precision)
        choice = strongest(
            self._levels(ranking), measure, self.budget if self.share is None else 1.0, progress=progress
        )
        tuning = FineTuning(
            lr=self.lr, epochs=self.epochs, batch_size=self.batch_size, seed=self.seed, precision=self.precision
        )
        taught = tuning(_Pruned(model, layers, choice.plan), clean, progress=progress)
        repaired = in_eval(prune(taught.model.get_submodule("network"), layers, choice.plan))
        after = taught.clean_accuracy["after"]
        rule = f"a share of {self.share} of the channels"
        if self.share is None:
            rule = blind_rule(self.budget, "clean images")
        where = f"mean activation of what {layers[0].name} {'takes' if layers[0].transposed else 'gives'}"
        steps = (
            Step("rank", f"{where} on clean images", {"channels": len(ranking)}),
            pruning_step(choice, rule),
            Step("fine-tune", taught.steps[0].reason, {"accuracy": after}),
        )
        history = {"levels": choice.history, **taught.history}
        rates = {"before": choice.before, "after": after}
        return RepairResult(repaired, choice.plan, rates, None, history, steps, changed=differ(model, repaired))

    def _levels(self, ranking: Plan) -> tuple[Level, ...]:
        """From none of the channels to all but one; the share alone where it is given."""
        size = len(ranking)
        if self.share is not None:
            return (Level(self.share, ranking[: round(self.share * size)]),)
        steps = math.ceil(1 / self.step)
        counts = sorted({min(round(i * self.step * size), size - 1) for i in range(steps + 1)})
        return tuple(Level(count / size, ranking[:count]) for count in counts)


def dormancy(model: nn.Module, images: CleanSet, precision: str) -> tuple[tuple[MaskableLayer], Tensor]:
    """What to prune, and the mean activation of the channels.

    They are those of the last maskable layer with feature maps, or else of the last one.

    Args:
        model: in eval mode; it is left as found.
        images: clean ones.
        precision: ``auto``, ``fp32`` or ``bf16``.

    Returns:
        In a tuple, the linear layer whose inputs are these channels' means or maxima, as one that is masked along its
        inputs; where there is none, the channels' own layer. And a float64 tensor (size,): the mean of the positive
        part over images and places.
    """
    layers = find_channels(model, images.x[:2])
    with _outputs(model, layers) as latest:
        predict(model, images.x[:2], precision=precision)
        spatial = [layer for layer in layers if layer.kind != "linear" and latest(layer).ndim > 2]
    layer = (spatial or list(layers))[-1]
    followed = _followed_by(model, layer, images.x[:2])
    total = torch.zeros(layer.size, dtype=torch.double, device=images.x.device)
    with _outputs(model, (layer,)) as latest:
        for batch in images.x.split(answered_at_once(images.x.device)):  # predict would take larger ones apart
            predict(model, batch, precision=precision)
            out = latest(layer).double().relu()
            axis = -1 if layer.kind == "linear" else 1
            total += out.movedim(axis, 0).flatten(1).mean(1) * len(batch)
    return (followed or layer,), total / len(images)


def _followed_by(model: nn.Module, layer: MaskableLayer, x: Tensor) -> MaskableLayer | None:
    """The linear layer whose inputs are means or maxima of the channels that ``layer`` makes, if there is one."""
    ran: list[bool] = []
    found: list[nn.Linear] = []

    def look(module: nn.Linear, args: tuple[Any, ...]) -> None:
        if not ran or latest(layer).ndim != 4 or args[0].shape != latest(layer).shape[:2]:
            return
        maps = (latest(layer), latest(layer).relu())  # where the network calls no module for the latter
        pooled = [pool(each, (2, 3)) for each in maps for pool in (torch.mean, torch.amax)]
        if any(torch.allclose(args[0], one, rtol=1e-3, atol=1e-5) for one in pooled):
            found.append(module)

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(look) for module in linear]
    hooks.append(model.get_submodule(layer.name).register_forward_hook(lambda *_: ran.append(True)))
    try:
        with _outputs(model, (layer,)) as latest:
            predict(model, x, precision="fp32")
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != 1:
        return None
    name = next(name for name, module in model.named_modules() if module is found[0])
    return MaskableLayer(name, "linear", found[0].in_features, (f"{name}.weight",), transposed=True)


@contextmanager
def _outputs(model: nn.Module, layers: Sequence[MaskableLayer]) -> Iterator[Callable[[MaskableLayer], Tensor]]:
    """Keeps, for each layer, the last output of its shape before another layer runs."""
    owners = {model.get_submodule(layer.name): layer for layer in layers}
    found: dict[str, Tensor] = {}
    latest: list[MaskableLayer] = []

    def begins(module: nn.Module, args: Any) -> None:
        if isinstance(module, LAYERS) or module in owners:
            latest.clear()

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if module in owners:
            latest[:] = [owners[module]]
            found[owners[module].name] = output
        elif latest and latest[0].kind != "linear" and _same_channels(found[latest[0].name], output):
            found[latest[0].name] = output

    hooks = [module.register_forward_pre_hook(begins) for module in model.modules()]
    hooks += [module.register_forward_hook(ends) for module in model.modules()]
    try:
        yield lambda layer: found[layer.name]
    finally:
        for hook in hooks:
            hook.remove()


def _same_channels(one: Tensor, two: Tensor) -> bool:
    """Whether a later output has the channels of an earlier one, as feature maps of any size."""
    return one.ndim > 2 and one.ndim == two.ndim and one.shape[1] == two.shape[1]


class _Pruned(nn.Module):
    """A network under a mask: a pruned channel gets no gradient, so fine-tuning cannot bring it back."""

    mask: Tensor

    def __init__(self, network: nn.Module, layers: Sequence[MaskableLayer], plan: Plan) -> None:
        super().__init__()
        self.network, self.layers = prune(network, layers, plan), tuple(layers)
        device = next(network.parameters()).device
        self.register_buffer("mask", plan_mask(layers, plan, device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        parameters, buffers = dict(self.network.named_parameters()), dict(self.network.named_buffers())
        return masked_call(self.network, self.layers, self.mask, x, parameters, buffers)
