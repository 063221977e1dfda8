"""One training from the pruned model: what :mod:`~debackdoor.defenses.relearn` tries with one step size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.channels import MaskableLayer, masked_call
from debackdoor.data.augment import mixed, random_shift_by, random_view
from debackdoor.detectors.perturbations import Sizes
from debackdoor.detectors.squares import Square, stamped
from debackdoor.detectors.universal import Aim, UniversalSearch
from debackdoor.errors import check_between, check_count, check_fraction, check_positive
from debackdoor.fusing import fused
from debackdoor.models.copying import copied, same_gradients
from debackdoor.models.forward import hits, in_eval, logits_of
from debackdoor.rnp.modes import normalisation_in_train_mode
from debackdoor.rnp.prune import plan_mask, prune
from debackdoor.runtime import autocast, generator, parts, sent, shuffled_batches, to_report
from debackdoor.types import CleanSet, Plan, Progress


@dataclass(frozen=True, kw_only=True)
class RelearnSettings:
    """Hyper-parameters of relearning.

    Attributes:
        lr: largest step size of SGD with Nesterov momentum; it rises over the first ``warm_up`` of the steps and falls
            to 0 along a cosine.
        momentum: of SGD.
        weight_decay: of SGD.
        clip: largest gradient norm.
        steps: how many, whatever the size of the fit part.
        warm_up: a fraction of the steps, strictly between 0 and 1.
        batch_size: clean images a step; as many mixed ones come along.
        temperature: at which the answers of the pruned model are learned.
        labels: weight of the cross-entropy with the labels.
        answers: weight of the distance from the pruned model's answers.
        triggers: weight of the two, half each, on images with a trigger.
        triggered: how many of these a step; as many again with a plain square, where one was found.
        head_start: steps that the search for triggers is ahead, on the suspect model.
        sizes: of these triggers.
        shift: largest random shift, a fraction of the image's height and width.
        tries: how often learning begins anew, each time with half the step size, when it costs too much accuracy.
    """

    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 5.0
    steps: int = 120
    warm_up: float = 0.15
    batch_size: int = 64
    temperature: float = 2.0
    labels: float = 0.5
    answers: float = 2.0
    triggers: float = 0.3
    triggered: int = 16
    head_start: int = 60
    sizes: Sizes = field(default_factory=lambda: Sizes(additive=0.036))
    shift: float = 0.125
    tries: int = 4

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, clip=self.clip, temperature=self.temperature)
        check_positive(momentum=self.momentum)  # Nesterov's
        check_count(steps=self.steps, batch_size=self.batch_size, tries=self.tries)
        check_count(True, triggered=self.triggered, head_start=self.head_start)
        check_fraction(momentum=self.momentum, weight_decay=self.weight_decay, shift=self.shift)
        check_between(warm_up=self.warm_up)


@dataclass(frozen=True)
class Batch:
    """Images as the student sees them, as its teacher does, and the labels of all but the mixed ones.

    The parts are clean images, as many mixed ones, images with a trigger, whose perturbation ``trigger`` (on the
    CPU) names, and images with a plain square.
    """

    seen: Tensor
    taught: Tensor
    y: Tensor
    triggered_y: Tensor
    trigger: Tensor

    def split(self) -> list[Batch]:
        """Batches that together are this one and that memory allows, as even as can be; some may lack a kind.

        A clean image and its mixed one stay together.
        """
        number = len(parts(len(self.seen)))
        if number == 1:
            return [self]
        pairs = [list(range(len(self.y)))[first::number] for first in range(number)]
        singles: list[list[int]] = [[] for _ in range(number)]
        for row in range(len(self.triggered_y)):
            emptiest = min(range(number), key=lambda part: 2 * len(pairs[part]) + len(singles[part]))
            singles[emptiest].append(row)
        chosen = ([torch.tensor(rows, dtype=torch.int64) for rows in part] for part in zip(pairs, singles, strict=True))
        return [self._part(*part) for part in chosen]

    def _part(self, pairs: Tensor, singles: Tensor) -> Batch:
        rows = torch.cat([pairs, len(self.y) + pairs, 2 * len(self.y) + singles])
        trigger = self.trigger[singles[singles < len(self.trigger)]]
        rows, pairs, singles = (sent(index, self.seen.device) for index in (rows, pairs, singles))
        return Batch(self.seen[rows], self.taught[rows], self.y[pairs], self.triggered_y[singles], trigger)


class Lesson:
    """One training from the pruned model, with its answers and with triggers that keep up with the student."""

    def __init__(
        self,
        suspect: nn.Module,
        teacher: nn.Module,
        layers: Sequence[MaskableLayer],
        plan: Plan,
        fit: CleanSet,
        aims: Sequence[Aim],
        stamps: Sequence[Square],
        settings: RelearnSettings,
        seed: int,
        precision: str,
    ) -> None:
        self.suspect, self.teacher, self.layers, self.plan = suspect, teacher, layers, plan
        self.fit, self.stamps = fit, stamps
        self.settings, self.precision = settings, precision
        self.random, self.queue = generator(seed), list[Tensor]()
        self.mask = plan_mask(layers, plan, fit.x.device)
        self.triggers = UniversalSearch(aims, fit.x, settings.sizes, seed) if aims else None
        self.answering = fused(teacher, fit.x[:2])
        self.student = copied(teacher).requires_grad_(True)
        self.parameters = dict(self.student.named_parameters())
        self.buffers = dict(self.student.named_buffers())
        self.optimizer = torch.optim.SGD(
            self.parameters.values(),
            settings.lr,
            settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )

    def teach(self, history: list[dict[str, Any]], progress: Progress | None) -> nn.Module:
        """The student, its pruned channels zero, in eval mode; ``history`` gets a row a step."""
        s = self.settings
        if self.triggers is not None:
            # Where the backdoor is whole, what is found comes nearer to its trigger than after pruning.
            self.triggers.run(
                fused(self.suspect, self.fit.x[:2]),
                self.fit,
                s.head_start,
                precision=self.precision,
                progress=progress,
            )
        normalisation_in_train_mode(self.student)
        losses: list[Tensor] = []
        for step in range(1, s.steps + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = s.lr * _schedule(step / s.steps, s.warm_up)
            loss, right = self._step(self._draw())
            losses.append(loss)
            if progress is not None and to_report(step, s.steps):
                progress("relearn", step, s.steps, {"accuracy": right.item()})
        # Not before: a GPU would have to be waited for at every step.
        found = torch.stack(losses).tolist()
        history.extend({"lr": s.lr, "step": step, "loss": loss} for step, loss in enumerate(found, start=1))
        same_gradients(self.student, self.teacher)
        # Gradients and momentum make room for the copy.
        self.optimizer.zero_grad()
        self.optimizer.state.clear()
        return in_eval(prune(self.student, self.layers, self.plan))

    def _draw(self) -> Batch:
        s, fit = self.settings, self.fit
        self.queue = self.queue or shuffled_batches(len(fit), s.batch_size, self.random, fit.x.device)
        index = self.queue.pop()
        clean = self._shifted(index)
        clean = torch.cat([clean, mixed(random_view(clean, self.random), self.random)])
        if self.triggers is None:
            none = torch.arange(0)
            return Batch(clean, clean, fit.y[index], fit.y[none], none)
        count = s.triggered * (2 if self.stamps else 1)
        others = sent(torch.randint(len(fit), (count,), generator=self.random), clean.device)
        trigger = torch.randint(len(self.triggers), (s.triggered,), generator=self.random)
        plain = self._shifted(others)
        seen = [clean, self.triggers.apply(plain[: s.triggered], trigger)]
        if self.stamps:
            seen.append(stamped(plain[s.triggered :], self.stamps, self.random))
        return Batch(torch.cat(seen), torch.cat([clean, plain]), fit.y[index], fit.y[others], trigger)

    def _shifted(self, index: Tensor) -> Tensor:
        x = self.fit.x[index]
        return random_shift_by(x, self.settings.shift, self.random)

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One step of the student and one of the triggers against it; the loss, and the accuracy on clean images."""
        total = right = torch.zeros((), device=batch.seen.device)
        found = self.triggers.parameters if self.triggers is not None else []
        moves = [torch.zeros_like(value) for value in found]
        self.optimizer.zero_grad()
        for part in batch.split():
            if len(part.trigger):
                attack = self._attack(part) / len(batch.trigger)
                # The parts of a batch share the way from the triggers to the images.
                some = torch.autograd.grad(attack, found, retain_graph=True, allow_unused=True)
                moves = [a if b is None else a + b for a, b in zip(moves, some, strict=True)]
                del attack  # and with it what the student kept of this
            clean, triggered, wanted = self._answers(part)
            loss = torch.zeros((), device=batch.seen.device)
            if len(part.y):
                loss = len(part.y) / len(batch.y) * self._clean_loss(clean, wanted[: len(clean)], part.y)
            if len(triggered):
                away = self._triggered_loss(triggered, wanted[len(clean) :], part.triggered_y)
                loss = loss + self.settings.triggers * len(triggered) / len(batch.triggered_y) * away
            torch.autograd.backward(loss, inputs=list(self.parameters.values()))
            total = total + loss.detach()
            right = right + hits(clean[: len(part.y)].detach(), part.y) / len(batch.y)
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        self.optimizer.step()
        if self.triggers is not None:
            self.triggers.step(moves)
        return total, right

    def _answers(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The student's logits on clean and mixed images, those on images with a trigger, and the teacher's on all."""
        with autocast(batch.seen.device, self.precision):
            with torch.no_grad():
                wanted = logits_of(self.answering(batch.taught.clone())).float()  # it may work in place
            # Under the mask a pruned channel gets no gradient: it cannot grow again and bring the backdoor back.
            seen = batch.seen.detach()
            logits = masked_call(self.student, self.layers, self.mask, seen, self.parameters, self.buffers).float()
        clean = 2 * len(batch.y)
        return logits[:clean], logits[clean:], wanted

    def _clean_loss(self, logits: Tensor, wanted: Tensor, y: Tensor) -> Tensor:
        """Of clean and mixed images; the latter have no labels."""
        s = self.settings
        loss = s.labels * F.cross_entropy(logits[: len(y)], y)
        return loss + s.answers * _distance(logits, wanted, s.temperature)

    def _triggered_loss(self, logits: Tensor, wanted: Tensor, y: Tensor) -> Tensor:
        return (F.cross_entropy(logits, y) + _distance(logits, wanted, self.settings.temperature)) / 2

    def _attack(self, batch: Batch) -> Tensor:
        """What the triggers descend. Each is drawn a few times in a batch, and the sum is brought to one image each.

        The student answers them as it will when it has learned, in eval mode; a pass of their few images alone takes
        less time than another way back through all of the batch.
        """
        assert self.triggers is not None
        first, searched = 2 * len(batch.y), len(batch.trigger)
        seen = batch.seen[first : first + searched].clone()  # the student may work in place
        self.student.eval()
        with autocast(seen.device, self.precision):
            logits = masked_call(self.student, self.layers, self.mask, seen).float()
        normalisation_in_train_mode(self.student)
        return self.triggers.loss(logits, batch.triggered_y[:searched], batch.trigger) * len(self.triggers)


def _schedule(done: float, warm_up: float) -> float:
    if done < warm_up:
        return done / warm_up
    return (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2


def _distance(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the wanted answers, in nats, times the squared temperature."""
    now, then = (F.log_softmax(values / temperature, 1) for values in (logits, wanted))
    return F.kl_div(now, then, reduction="batchmean", log_target=True) * temperature**2
