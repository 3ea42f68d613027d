"""Deep mutual learning: two students teach each other, without a teacher (Zhang et al. 2018, arXiv 1706.00384)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from kdq.distill.config import within
from kdq.distill.learner import Learner
from kdq.distill.losses import distillation_kl, soft_cross_entropy, standardized
from kdq.distill.module import Baseline
from kdq.utils.errors import KdqError

SCHEDULES = ("constant", "kl_first")


class DML(Baseline):
    """``L1 = CE1 + w(t) KL(p2 || p1)`` and ``L2 = CE2 + w(t) KL(p1 || p2)``, the peer acting as a constant.

    Both students take their step on the same batch, from logits computed before either of them moved: one backward
    through the sum, which is all that DDP can follow, then a step of each optimizer.

    Args:
        peer: the second student, of any architecture.
        weight: w, on average over the training.
        schedule: ``constant``, or ``kl_first``: w falls linearly from ``2 weight`` to 0, so that the students first
            imitate each other and then follow the labels.
        temperature: softens both distributions; 1 in the paper.
        standardize: compare z-scored logits (Sun et al. 2024, arXiv 2403.01427).
    """

    takes = ("peer",)

    def __init__(
        self,
        student: nn.Module,
        *args: Any,
        peer: nn.Module,
        weight: float = 1.0,
        schedule: str = "constant",
        temperature: float = 1.0,
        standardize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, *args, **kwargs)
        if schedule not in SCHEDULES:
            raise KdqError(f"method.schedule={schedule!r} is unknown: use one of {', '.join(SCHEDULES)}")
        if _equal(student, peer):
            raise KdqError(
                "the two students of dml start from equal weights and would stay equal: "
                "give method.weights and method.peer.weights, or their seeds, different values"
            )
        self.automatic_optimization = False
        self.peer = Learner(peer, self.num_classes, self.recipe.ema)
        self.weight, self.schedule = within("method.weight", weight, 0), schedule
        self.temperature, self.standardize = within("method.temperature", temperature, 0.01), standardize

    @property
    def learners(self) -> dict[str, Learner]:
        return {"student": self.student, "peer": self.peer}

    def weight_at(self, progress: float) -> float:
        """w at ``progress`` (0 to 1) of the training."""
        return self.weight if self.schedule == "constant" else 2 * self.weight * (1 - progress)

    def terms(self, logits: Tensor, peer_logits: Tensor, labels: Tensor, weight: float) -> dict[str, Tensor]:
        """One student's loss terms, given its peer's logits; no gradient flows into those."""
        ce = soft_cross_entropy(logits, labels, self.recipe.label_smoothing)
        if self.standardize:
            logits, peer_logits = standardized(logits), standardized(peer_logits)
        return {"ce": ce, "kl": weight * distillation_kl(logits, peer_logits, self.temperature)}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        weight = self.weight_at(self.moment(batch_idx).progress)
        mine, theirs = self.student(images), self.peer(images)
        losses = [
            self.total("student", self.terms(mine, theirs, labels, weight), mine, labels),
            self.total("peer", self.terms(theirs, mine, labels, weight), theirs, labels),
        ]
        # Lightning runs this method under autocast; a backward pass has its types from the forward one.
        with torch.autocast(images.device.type, enabled=False):
            self.manual_backward(torch.stack(losses).sum() / self.recipe.accumulate)
        if (batch_idx + 1) % self.recipe.accumulate == 0:
            self._step()

    def _step(self) -> None:
        """Lightning clips, steps schedulers and accumulates for one optimizer only; this does so for two."""
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizers, list)
        assert isinstance(schedulers, list)
        for optimizer, scheduler, learner in zip(optimizers, schedulers, self.learners.values(), strict=True):
            assert isinstance(optimizer, LightningOptimizer)
            self.clip_gradients(optimizer.optimizer, self.recipe.clip_grad, "norm")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            learner.stepped()


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    same_shapes = {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    return same_shapes and all(torch.equal(mine[name], theirs[name]) for name in mine)
