"""Deep mutual learning: students teach each other, without a teacher (Zhang et al. 2018, arXiv 1706.00384)."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from kdq.distill.checkpoint import Network, built
from kdq.distill.learner import Learner
from kdq.distill.losses import distillation_kl, soft_cross_entropy, standardized
from kdq.distill.module import FLAGS, DistillationModule
from kdq.distill.options import choice, number, switch
from kdq.quant.packing.weights import same_state
from kdq.utils.checks import is_peer
from kdq.utils.errors import KdqError


class DML(DistillationModule):
    """``L_k = CE_k + w(t) mean_l KL(p_l || p_k)`` over a student's peers l, which act as constants.

    All students take their step on the same batch, from logits computed before any of them moved: one backward
    through the sum, which is all that DDP can follow, then a step of each optimizer. The best one is the product.

    >>> from kdq.models import CifarResNet
    >>> student, *peers = (CifarResNet(depth, num_classes=10) for depth in (8, 14, 20))
    >>> list(DML(student, peer=peers[0], peer2=peers[1], num_classes=10).learners)
    ['student', 'peer', 'peer2']

    Args:
        peer: the second student, of any architecture. More are called ``peer2``, ``peer3`` and so on.
    """

    takes = ("peer",)
    weight: float = number(1.0)  # w, on average over the training
    #: ``constant``, or ``kl_first``: w falls linearly from ``2 weight`` to 0, so that the students first imitate each
    #: other and then follow the labels.
    schedule: str = choice("constant", "kl_first")
    temperature: float = number(1.0, 0.01)  # softens both distributions; 1 in the paper
    standardize: bool = switch()  # compare z-scored logits (Sun et al. 2024, arXiv 2403.01427)
    #: Which learner had the highest validation accuracy last: 0 the student, 1 its first peer.
    better: Tensor

    def __init__(self, student: Network, peer: Network, **options: Any) -> None:
        peers = {"peer": peer, **{name: options.pop(name) for name in sorted(options) if is_peer(name)}}
        super().__init__(student, **options)
        self.automatic_optimization, self.peers = False, tuple(peers)
        for name, network in peers.items():
            setattr(self, name, Learner(built(network, name), self.num_classes, self.config.ema))
            self.hparams.pop(name, None)  # where a subclass passes it on
        self.register_buffer("better", torch.tensor(0))

    @property
    def learners(self) -> dict[str, Learner]:
        return {"student": self.student, **{name: getattr(self, name) for name in self.peers}}

    @property
    def eval_network(self) -> nn.Module:
        """The network that did best in the last validation; of equals the first, the student before its peers."""
        return list(self.learners.values())[int(self.better)].eval_network

    def setup(self, stage: str) -> None:
        """Raises KdqError for two students that would stay equal, and for a precision that cannot serve them all."""
        super().setup(stage)
        for one, other in combinations(self.learners, 2) if stage == "fit" else ():
            if same_state(*(self.learners[name].network.state_dict() for name in (one, other))):
                raise KdqError(
                    f"the {one} and the {other} of dml start from equal weights and would stay equal: give them other "
                    "weights or seeds (method.weights, method.peer.weights, method.peer.seed)"
                )
        if stage == "fit" and str(self.trainer.precision) == "16-mixed":
            # Lightning would scale the losses and clip before it takes the scale off; one scale would serve all.
            raise KdqError("trainer.precision=16-mixed does not go with several learners: use bf16-mixed or 32-true")

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            scores = torch.stack([learner.val_top1.compute() for learner in self.learners.values()])
            self.better.fill_(int(torch.argmax(scores)))

    def configure_callbacks(self) -> list[Any]:
        """Raises KdqError for flags of the Trainer that do not reach a module which steps by hand; says what does."""
        for option, name, unset in FLAGS:
            if (value := getattr(self.trainer, name)) != unset:
                raise KdqError(
                    f"DML steps its optimizers by hand, so that Trainer({name}={value}) does not reach it: give "
                    f"DML(..., config=TrainConfig({option}={value}))"
                )
        return []

    def weight_at(self, progress: float) -> float:
        """w at ``progress`` (0 to 1) of the training."""
        return self.weight if self.schedule == "constant" else 2 * self.weight * (1 - progress)

    def terms(self, logits: Tensor, peers: Sequence[Tensor], labels: Tensor, weight: float) -> dict[str, Tensor]:
        """One student's loss terms, given the logits of its peers; no gradient flows into those."""
        ce = soft_cross_entropy(logits, labels, self.config.label_smoothing)
        if self.standardize:
            logits, *peers = map(standardized, (logits, *peers))
        kls = [distillation_kl(logits, peer, self.temperature) for peer in peers]
        return {"ce": ce, "kl": weight * torch.stack(kls).mean()}

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        images, labels, *_ = self.unpacked(batch)
        weight = self.weight_at(self.progress(batch_idx).share)
        logits = {name: learner(images) for name, learner in self.learners.items()}
        losses = []
        for name, mine in logits.items():
            peers = [theirs for other, theirs in logits.items() if other != name]
            losses.append(self.total(name, self.terms(mine, peers, labels, weight), mine, labels))
        # Lightning runs this method under autocast; a backward pass has its types from the forward one.
        with torch.autocast(images.device.type, enabled=False):
            self.manual_backward(torch.stack(losses).sum() / self.config.accumulate)
        if (batch_idx + 1) % self.config.accumulate == 0 or self.trainer.is_last_batch:
            self._step()

    def _step(self) -> None:
        """Lightning clips, steps schedulers and accumulates for one optimizer only; this does so for all."""
        optimizers: Any = self.optimizers()
        if not isinstance(optimizers, list) or len(optimizers) != len(self.learners):
            raise KdqError(f"configure_optimizers must give an optimizer for each of the {len(self.learners)} networks")
        schedulers: Any = self.lr_schedulers() or [None] * len(optimizers)
        for optimizer, scheduler, learner in zip(optimizers, schedulers, self.learners.values(), strict=True):
            self.clip_gradients(optimizer.optimizer, self.config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            learner.stepped()
