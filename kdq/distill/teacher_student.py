"""A teacher that gives logits and nothing else: never trained, never saved, never synchronised."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdq.distill.checkpoint import Network
from kdq.distill.layers import watched
from kdq.distill.learner import compiled_in_place
from kdq.distill.losses import soft_cross_entropy, standardized
from kdq.distill.module import DistillationModule
from kdq.distill.options import number, switch
from kdq.distill.progress import TrainingProgress
from kdq.utils.errors import KdqError


class FrozenTeacher:
    """Holds ``network`` out of Lightning's sight.

    It is deliberately no ``nn.Module``: a module assigned to a LightningModule is registered, and then its weights
    land in every checkpoint, its parameters in DDP's buckets, and ``module.train()`` puts its BatchNorm into training
    mode. Here it stays in eval mode, its device follows the inputs, and it runs under the caller's autocast. It keeps
    its dtype, which is its owner's: for inputs of another one copies of its values stand in.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = compiled_in_place(network).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` for ``images``, without gradient."""
        first = next(self.network.parameters())
        if first.device != images.device:
            self.network.to(images.device)
        # Not inference_mode: what that makes may not take part in the student's backward pass.
        with torch.no_grad():
            if first.dtype == images.dtype:
                return self.network(images)
            named = chain(self.network.named_parameters(), self.network.named_buffers())
            values = {name: value.to(images.dtype) for name, value in named if value.is_floating_point()}
            return functional_call(self.network, values, images)


class Outputs(NamedTuple):
    """What a network made of a batch: logits ``(batch, classes)``, and the features of the layers that are compared."""

    logits: Tensor
    features: Mapping[str, Tensor]


class TeacherStudent(DistillationModule):
    """A student that learns from a frozen teacher: what such methods share.

    A method of logits is a subclass with :meth:`terms`; any other has its own
    :meth:`~kdq.distill.module.DistillationModule.losses`:

    >>> class LogitDistance(TeacherStudent):
    ...     def terms(self, student, teacher, labels, progress):
    ...         return {"distance": (student - teacher).square().mean()}
    >>> module = LogitDistance(nn.Linear(4, 3), nn.Linear(4, 3), num_classes=3)

    Args:
        teacher: the trained network; it is frozen, and no checkpoint holds it. Needed to train, not to evaluate.
    """

    takes = ("teacher",)
    #: The weight of the cross-entropy.
    ce_weight = 1.0
    temperature: float = number(4.0, 0.01)  # softens both distributions
    standardize: bool = switch()  # compare z-scored logits (Sun et al. 2024, arXiv 2403.01427)

    def __init__(self, student: Network, teacher: nn.Module | None = None, **options: Any) -> None:
        super().__init__(student, **options)
        self._teacher = None if teacher is None else FrozenTeacher(teacher)

    @property
    def teacher(self) -> FrozenTeacher:
        """The teacher, which is called on images and gives logits."""
        if self._teacher is None:
            name = type(self).__name__
            raise KdqError(
                f"{name} has no teacher to learn from: {name}(student, teacher=network, ...), or "
                f"{name}.load_from_checkpoint(path, teacher=network)"
            )
        return self._teacher

    def losses(self, images: Tensor, labels: Tensor, progress: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        """The cross-entropy and what the method adds to it; ``labels`` are indices ``(batch,)``, or probabilities
        ``(batch, classes)`` where the method's terms take them."""
        with watched(self.student.network, self.watches("student")) as features:
            student = Outputs(self.student(images), features)
        with watched(self.teacher.network, self.watches("teacher")) as features:
            teacher = Outputs(self.teacher(images), features)
        ce = soft_cross_entropy(student.logits, labels, self.config.label_smoothing)
        return {"ce": self.ce_weight * ce, **self.added(student, teacher, labels, progress)}, student.logits

    def watches(self, role: str) -> Iterable[str]:
        """The layers of ``student`` or ``teacher`` whose features :meth:`added` compares."""
        return ()

    def added(
        self, student: Outputs, teacher: Outputs, labels: Tensor, progress: TrainingProgress
    ) -> dict[str, Tensor]:
        """The named terms that are minimised beside the cross-entropy."""
        return self.terms(*self.comparable(student.logits, teacher.logits), labels, progress)

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        """The same, of logits ``(batch, classes)`` alone; z-scores if ``standardize``."""
        raise NotImplementedError(f"{type(self).__name__} must define terms(student, teacher, labels, progress)")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            _ = self.teacher

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), self.teacher.network]

    def comparable(self, logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both logits in the form in which they are compared."""
        return (standardized(logits), standardized(teacher_logits)) if self.standardize else (logits, teacher_logits)
