"""Curriculum temperature (Li et al. 2023, arXiv 2211.16231): a temperature that learns to make it harder."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kdq.distill.learner import Learner
from kdq.distill.options import number
from kdq.distill.progress import TrainingProgress
from kdq.distill.vkd import VKD
from kdq.utils.errors import KdqError


class CTKD(VKD):
    """The loss of vkd with a temperature ``low + (high - low) sigmoid(raw)`` that is trained against the student: the
    gradient of ``raw`` is reversed and multiplied by a weight that rises from 0 to 1 in half a cosine.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> round(CTKD(student, teacher=teacher, num_classes=10).current(weight=1.0).item(), 4)
    15.62
    """

    temperature: float = number(15.62, 0.01)  # where it starts
    low: float = number(1.0, 0.01)  # between which it stays
    high: float = number(21.0, 0.01)
    warmup: float = number(0.0417, high=1)  # share of the training over which the weight rises; theirs is 10 of 240

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        low, high, temperature = self.low, self.high, self.temperature
        if not low < temperature < high:
            raise KdqError(f"method.temperature={temperature} must lie between method.low={low} and method.high={high}")
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
