"""Curriculum temperature (Li et al. 2023, arXiv 2211.16231): a temperature that learns to make it harder."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.learner import Learner
from kdq.distill.progress import TrainingProgress
from kdq.distill.vkd import VKD
from kdq.utils.checks import within
from kdq.utils.errors import KdqError


class CTKD(VKD):
    """The loss of vkd with a temperature ``low + (high - low) sigmoid(raw)`` that is trained against the student: the
    gradient of ``raw`` is reversed and multiplied by a weight that rises from 0 to 1 in half a cosine.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> round(float(CTKD(student, teacher=teacher, num_classes=10).current(weight=1.0)), 4)
    15.62

    Args:
        temperature: where it starts.
        low, high: between which it stays.
        warmup: the share of the training over which the weight rises, 0 to 1; the authors' is 10 of 240 epochs.
        kwargs: of :class:`~kdq.distill.vkd.VKD`.
    """

    def __init__(
        self,
        student: Network,
        teacher: nn.Module | None = None,
        *,
        temperature: float = 15.62,
        low: float = 1.0,
        high: float = 21.0,
        warmup: float = 0.0417,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, temperature=temperature, **kwargs)
        self.low, self.high = within("method.low", low, 0.01), within("method.high", high, 0.01)
        if not low < temperature < high:
            raise KdqError(f"method.temperature={temperature} must lie between method.low={low} and method.high={high}")
        self.warmup = within("method.warmup", warmup, 0, 1)
        share = (temperature - low) / (high - low)
        self.raw = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def current(self, weight: float) -> Tensor:
        """The temperature, whose gradient arrives at ``raw`` times ``-weight``."""
        raw = (1 + weight) * self.raw.detach() - weight * self.raw
        return self.low + (self.high - self.low) * raw.sigmoid()

    def tempered(self, progress: TrainingProgress) -> Tensor:
        return self.current((1 - math.cos(math.pi * progress.ramp(self.warmup))) / 2)

    def trained_parameters(self, learner: Learner) -> Iterator[nn.Parameter]:
        yield from super().trained_parameters(learner)
        yield self.raw
