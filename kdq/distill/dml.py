"""Deep mutual learning: two students teach each other, without a teacher (Zhang et al. 2018, arXiv 1706.00384)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from kdq.distill.checkpoint import built
from kdq.distill.learner import Learner
from kdq.distill.losses import distillation_kl, soft_cross_entropy, standardized
from kdq.distill.module import DistillationModule
from kdq.utils.checks import one_of, within
from kdq.utils.errors import KdqError

SCHEDULES = ("constant", "kl_first")


class DML(DistillationModule):
    """``L1 = CE1 + w(t) KL(p2 || p1)`` and ``L2 = CE2 + w(t) KL(p1 || p2)``, the peer acting as a constant.

    Both students take their step on the same batch, from logits computed before either of them moved: one backward
    through the sum, which is all that DDP can follow, then a step of each optimizer.

    >>> from kdq.models import CifarResNet
    >>> module = DML(CifarResNet(8, num_classes=10), peer=CifarResNet(14, num_classes=10), num_classes=10)
    >>> sorted(module.learners)
    ['peer', 'student']

    Args:
        peer: the second student, of any architecture.
        weight: w, on average over the training.
        schedule: ``constant``, or ``kl_first``: w falls linearly from ``2 weight`` to 0, so that the students first
            imitate each other and then follow the labels.
        temperature: softens both distributions; 1 in the paper.
        standardize: compare z-scored logits (Sun et al. 2024, arXiv 2403.01427).
    """

    takes = ("peer",)
    #: Which learner had the higher validation accuracy last: 0 the student, 1 its peer.
    better: Tensor

    def __init__(
        self,
        student: nn.Module | Mapping[str, Any],
        peer: nn.Module | Mapping[str, Any],
        *,
        weight: float = 1.0,
        schedule: str = "constant",
        temperature: float = 1.0,
        standardize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        self.automatic_optimization = False
        self.peer = Learner(built(peer, "peer"), self.num_classes, self.config.ema)
        self.weight = within("method.weight", weight, 0)
        self.schedule = one_of("method.schedule", schedule, SCHEDULES)
        self.temperature, self.standardize = within("method.temperature", temperature, 0.01), standardize
        self.register_buffer("better", torch.tensor(0))

    @property
    def learners(self) -> dict[str, Learner]:
        return {"student": self.student, "peer": self.peer}

    @property
    def eval_network(self) -> nn.Module:
        """The network that did better in the last validation; of equals the student."""
        return list(self.learners.values())[int(self.better)].eval_network

    def setup(self, stage: str) -> None:
        """Raises KdqError for two students that would stay equal, and for a precision that cannot serve both."""
        super().setup(stage)
        if stage == "fit" and _equal(self.student.network, self.peer.network):
            raise KdqError(
                "the two students of dml start from equal weights and would stay equal: "
                "give method.weights and method.peer.weights, or their seeds, different values"
            )
        if stage == "fit" and str(self.trainer.precision) == "16-mixed":
            # Lightning would scale the losses and clip before it takes the scale off; one scale would serve two.
            raise KdqError("trainer.precision=16-mixed does not go with two learners: use bf16-mixed or 32-true")

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.better.fill_(int(self.peer.val_top1.compute() > self.student.val_top1.compute()))

    def configure_callbacks(self) -> list[Any]:
        """Raises KdqError for flags of the Trainer that do not reach a module which steps by hand; says what does."""
        trainer = self.trainer
        for flag, option, unset in (
            ("gradient_clip_val", "clip_grad", None),
            ("accumulate_grad_batches", "accumulate", 1),
        ):
            if (value := getattr(trainer, flag)) != unset:
                raise KdqError(
                    f"DML steps two optimizers by hand, so that Trainer({flag}={value}) does not reach it: give "
                    f"DML(..., config=TrainConfig({option}={value}))"
                )
        return []

    def weight_at(self, progress: float) -> float:
        """w at ``progress`` (0 to 1) of the training."""
        return self.weight if self.schedule == "constant" else 2 * self.weight * (1 - progress)

    def terms(self, logits: Tensor, peer_logits: Tensor, labels: Tensor, weight: float) -> dict[str, Tensor]:
        """One student's loss terms, given its peer's logits; no gradient flows into those."""
        ce = soft_cross_entropy(logits, labels, self.config.label_smoothing)
        if self.standardize:
            logits, peer_logits = standardized(logits), standardized(peer_logits)
        return {"ce": ce, "kl": weight * distillation_kl(logits, peer_logits, self.temperature)}

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        images, labels, *_ = batch
        weight = self.weight_at(self.progress(batch_idx).share)
        mine, theirs = self.student(images), self.peer(images)
        losses = [
            self.total("student", self.terms(mine, theirs, labels, weight), mine, labels),
            self.total("peer", self.terms(theirs, mine, labels, weight), theirs, labels),
        ]
        # Lightning runs this method under autocast; a backward pass has its types from the forward one.
        with torch.autocast(images.device.type, enabled=False):
            self.manual_backward(torch.stack(losses).sum() / self.config.accumulate)
        if (batch_idx + 1) % self.config.accumulate == 0 or self.trainer.is_last_batch:
            self._step()

    def _step(self) -> None:
        """Lightning clips, steps schedulers and accumulates for one optimizer only; this does so for two."""
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizers, list)
        assert isinstance(schedulers, list)
        for optimizer, scheduler, learner in zip(optimizers, schedulers, self.learners.values(), strict=True):
            assert isinstance(optimizer, LightningOptimizer)
            self.clip_gradients(optimizer.optimizer, self.config.clip_grad, "norm")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            learner.stepped()


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    same_shapes = {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    return same_shapes and all(torch.equal(mine[name], theirs[name]) for name in mine)
