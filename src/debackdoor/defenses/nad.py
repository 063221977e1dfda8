"""Neural Attention Distillation (NAD).

Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR 2021,
https://arxiv.org/abs/2101.05930: the suspect model learns the clean set, and at the same time to look where its
fine-tuned copy looks. Attention maps as in Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.defenses.finetune import FineTuning
from debackdoor.defenses.tuning import Tuned, Tuning
from debackdoor.errors import DebackdoorError, ModelError, check_count, check_positive
from debackdoor.models.copying import copied
from debackdoor.models.forward import eval_mode, logits_of
from debackdoor.runtime import autocast
from debackdoor.types import CleanSet, Progress, Step


@dataclass(frozen=True)
class Place:
    """Where an attention map is taken: the output of a module's call number ``call``, counted from 0."""

    module: str
    call: int


@dataclass(frozen=True, kw_only=True)
class NAD(Tuning):
    """Fine-tuning that keeps the attention maps of a fine-tuned teacher, all weights.

    The teacher is what :class:`FineTuning` makes of the suspect model. Any network with feature maps will do: maps are
    taken from outside, at the end of each of its last three resolutions (see :func:`find_places`).

    Published: teacher and student learn 2,500 images in batches of 64, at 0.1 for two epochs and then 0.01, for 5 to 10
    and 20 epochs. Here both step sizes fall along a cosine. The teacher begins at the published 0.1: one that learned
    in small steps still holds the backdoor and hands it on. The student begins at 0.01, as in BackdoorBench: with the
    betas in front of the distances, 0.1 lost the clean task of a small ResNet on the images it learned from.

    Also other than published: images are neither mirrored nor cut out of (Cutout), and the teacher learns with the
    momentum and weight decay of :class:`FineTuning`, 0.9 and 5e-4 without Nesterov, whatever is set here, which is for
    the student. Published are Nesterov and 1e-4 for both.

    Attributes:
        lr: first step size of the student's SGD, with Nesterov momentum.
        betas: weights of the distances between the attention maps, the shallowest first.
        power: to which activations are raised before they are summed over the channels (``p`` in the paper).
        teacher_lr: first step size with which the teacher is fine-tuned.
        teacher_epochs: how long.
    """

    name: ClassVar[str] = "nad"

    weight_decay: float = 1e-4
    betas: tuple[float, float, float] = (500.0, 1000.0, 1000.0)
    power: float = 2.0
    teacher_lr: float = 0.1
    teacher_epochs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(power=self.power, teacher_lr=self.teacher_lr)
        check_positive(momentum=self.momentum)  # Nesterov's
        check_count(teacher_epochs=self.teacher_epochs)
        if len(self.betas) != 3 or not all(beta >= 0 for beta in self.betas):
            raise DebackdoorError(f"expected three betas of at least 0, got {self.betas}; give one a resolution")

    def _tune(self, model: nn.Module, fit: CleanSet, progress: Progress | None) -> Tuned:
        places = find_places(model, fit.x[:2])
        betas = self.betas[-len(places) :]
        tuning = FineTuning(
            lr=self.teacher_lr, epochs=self.teacher_epochs, batch_size=self.batch_size, shift=self.shift,
            seed=self.seed, precision=self.precision,
        )  # fmt: skip
        taught = tuning(model, fit, progress=progress)
        teacher, student = taught.model, model
        student.train()
        with watching(teacher, places) as looks, watching(student, places) as seen:

            def backward(x: Tensor, y: Tensor) -> Tensor:
                with autocast(x.device, self.precision):
                    with torch.no_grad():
                        teacher(x.clone())  # it may work in place
                    loss = F.cross_entropy(logits_of(student(x)).float(), y)
                for beta, wanted, got in zip(betas, looks(), seen(), strict=True):
                    loss = loss + beta * F.mse_loss(attention(got, self.power), attention(wanted, self.power))
                loss.backward()
                return loss.detach()

            history = self._descend(self.name, student.parameters(), fit, backward, progress, nesterov=True)
        where = ", ".join(place.module for place in places)
        steps = (
            Step("teach", f"the teacher is fine-tuned for {self.teacher_epochs} epochs", taught.steps[0].numbers),
            Step("distil", f"attention after {where}", history[-1]),
        )
        return Tuned(student, {**taught.history, self.name: history}, steps)


def attention(maps: Tensor, power: float = 2.0) -> Tensor:
    """Where a layer looks: ``sum over channels of |F|^p``, divided by its norm over all places.

    Args:
        maps: (N, C, H, W).

    Returns:
        float32 (N, H * W); a map of zeros stays one.
    """
    return F.normalize(maps.float().abs().pow(power).sum(1).flatten(1), dim=1)


def find_places(model: nn.Module, example: Tensor) -> tuple[Place, ...]:
    """The ends of the last three resolutions in a forward pass: where each was last some module's output.

    Outputs (N, C, H, W) that depend on parameters count. One of a single pixel does not, as its attention is always 1.
    Fewer than three resolutions give fewer places. The model is left as found.

    Args:
        model: in it, gradients must be asked for.
        example: images (N, C, H, W).

    Raises:
        ModelError: if there is no such output.
    """
    found: dict[tuple[int, int], Place] = {}

    def note(place: Place, output: Tensor) -> None:
        size = (output.shape[2], output.shape[3])
        if output.requires_grad and size != (1, 1):
            found.pop(size, None)  # so that the order is that of the last appearance
            found[size] = place

    # On a copy: some networks keep what they compute.
    traced = copied(model)
    with eval_mode(traced), torch.enable_grad(), _hooks(traced, dict(traced.named_modules()), note):
        traced(example.clone())
    if not found:
        raise ModelError(
            f"expected a network with feature maps (N, C, H, W) of more than one pixel, got {type(model).__name__} "
            "without; attention can only be distilled in a convolutional network, take another defence"
        )
    return tuple(found.values())[-3:]


@contextmanager
def watching(model: nn.Module, places: Sequence[Place]) -> Iterator[Callable[[], list[Tensor]]]:
    """Inside, a function that gives the outputs at ``places`` of the last forward pass, in that order, and once.

    The hooks are off afterwards, also after an error. The function raises ModelError where a place was not reached.
    """
    outputs: dict[Place, Tensor] = {}
    modules = {place.module: model.get_submodule(place.module) for place in places}

    def note(place: Place, output: Tensor) -> None:
        if place in places:
            outputs[place] = output

    with _hooks(model, modules, note) as calls:

        def take() -> list[Tensor]:
            missing = [place for place in places if place not in outputs]
            if missing:
                raise ModelError(
                    f"expected {missing[0].module} to run in every forward pass, got one without; "
                    "switch random depth off, or take another defence"
                )
            taken = [outputs[place] for place in places]
            outputs.clear()
            calls.clear()
            return taken

        yield take


@contextmanager
def _hooks(
    model: nn.Module, modules: dict[str, nn.Module], note: Callable[[Place, Tensor], None]
) -> Iterator[Counter[str]]:
    """Tells ``note`` of every four-dimensional output of ``modules``; yields how often each was called."""
    calls: Counter[str] = Counter()

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] += 1
            # Of a linear layer or a layer norm, channels are the last axis.
            if isinstance(output, Tensor) and output.ndim == 4 and not isinstance(module, (nn.Linear, nn.LayerNorm)):
                note(Place(name, calls[name] - 1), output)

        return hook

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(hook_of(name)))
        yield calls
    finally:
        for handle in handles:
            handle.remove()
