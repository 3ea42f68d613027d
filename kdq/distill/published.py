"""How the published comparison trained two of its students (Gitelman et al. 2025, read from its public code), fault by
fault: an experiment's subject, not a method to use.

Its students lost 8 to 29 points when they were quantized to 2 bits. Each fault here can be mended by itself, to see
which of them makes a student hard to quantize. What the recipe and the data can say (a learning rate of 5e-4, no crops)
is in ``conf/experiment/published_training.yaml``.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kdq.distill.losses import decoupled_kl, distillation_kl, in_float32, one_hot
from kdq.distill.options import choice
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent

#: Of its learning rate, which a schedule meant for 20 epochs lets rise again five times in 200.
HALF_COSINES = 10


class _Published(TeacherStudent):
    """A student trained with all of :attr:`faults` but the one that is ``mended``: one of them, ``all`` or ``none``."""

    faults: tuple[str, ...] = ()
    mended: str

    def has(self, fault: str) -> bool:
        return fault in self.faults and self.mended not in (fault, "all")

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.teacher.network.train(self.has("teacher_trains"))

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        if self.has("rising_rate"):
            steps = self.trainer.estimated_stepping_batches
            for entry in made:
                entry["lr_scheduler"]["scheduler"] = rising(entry["optimizer"], steps)
        return made


class PublishedVKD(_Published):
    """``(1 - alpha) CE + alpha T^2 KL`` with alpha 2, so that the cross-entropy is *maximised*.

    Its faults: ``negative_ce``; ``teacher_trains``, whose BatchNorm uses the batch; ``rising_rate``, in place of
    the recipe's schedule.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> PublishedVKD(student, teacher=teacher, num_classes=10, mended="negative_ce").alpha
    0.9
    """

    faults = ("negative_ce", "teacher_trains", "rising_rate")
    mended: str = choice("none", *faults, "all")

    @property
    def alpha(self) -> float:
        """The teacher's share of the loss; mended it is that of kdq's own method."""
        return 2.0 if self.has("negative_ce") else 0.9

    @property
    def ce_weight(self) -> float:  # type: ignore[override]
        return 1 - self.alpha

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        return {"kl": self.alpha * distillation_kl(student, teacher, self.temperature)}


class PublishedDKD(_Published):
    """``alpha TCKD + beta NCKD`` with alpha 1 and beta 4, without a cross-entropy.

    Its faults: ``no_ce``; ``unnormalized``, terms that are no divergences, see :func:`unnormalized_terms`.
    """

    faults = ("no_ce", "unnormalized")
    mended: str = choice("none", *faults, "all")

    @property
    def ce_weight(self) -> float:  # type: ignore[override]
        return 0.0 if self.has("no_ce") else 1.0

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        parts = unnormalized_terms if self.has("unnormalized") else decoupled_kl
        tckd, nckd = parts(student, teacher, labels, self.temperature)
        return {"tckd": tckd, "nckd": 4 * nckd}


@in_float32
def unnormalized_terms(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The published TCKD and NCKD: ``q log(q / p)`` of the target class alone, and its sum over the other classes, of
    tempered probabilities that are not renormalised, without ``T^2``; scalars, means over the batch.

    The first falls below zero, without a bound, when the student is surer of the target than the teacher; together they
    are the KL between teacher and student.

    >>> import torch
    >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
    >>> [part.item() for part in unnormalized_terms(logits, logits, torch.tensor([2]), 4.0)]
    [0.0, 0.0]

    Args:
        student, teacher: logits ``(batch, classes)``.
        target: int64 ``(batch,)``.
    """
    log_p, log_q = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher.detach()))
    each = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    is_target = one_hot(target, student.shape[1])
    return each.where(is_target, 0).sum(1).mean(), each.masked_fill(is_target, 0).sum(1).mean()


def rising(optimizer: Optimizer, steps: float) -> LambdaLR:
    """A learning rate that goes down and up again as :data:`HALF_COSINES` halves of a cosine over ``steps``."""
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * HALF_COSINES * step / max(1, steps))))
