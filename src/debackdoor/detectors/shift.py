"""Which images carry the trigger, told by what a repair changes.

The repaired model answers clean images as the suspect model does, and triggered ones otherwise. That holds for
backdoors to many labels, too, and for those that do not survive unlearning.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from debackdoor.detectors.sample_base import checked_numbers
from debackdoor.models.forward import eval_mode, predict

REPAIR_SHIFT = "repair-shift"


def repair_shift(suspect: nn.Module, repaired: nn.Module, images: Tensor, *, precision: str = "auto") -> Tensor:
    """How far the repair moved the model's answers: the Kullback-Leibler divergence (N,), float32, in nats.

    Args:
        suspect: the model that may hide a backdoor, taking images (N, C, H, W) in [0, 1]; it is not changed.
        repaired: the same after a repair.
        images: float32 (N, C, H, W) in [0, 1], on the models' device.
        precision: ``auto``, ``fp32`` or ``bf16``.

    Raises:
        ModelError: if a model gives numbers that are not finite.
    """
    with eval_mode(suspect), eval_mode(repaired):
        before, after = (
            F.log_softmax(checked_numbers(predict(model, images, precision=precision)), 1)
            for model in (suspect, repaired)
        )
    return F.kl_div(after, before, reduction="none", log_target=True).sum(1)
