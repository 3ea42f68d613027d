"""Variational information distillation (Ahn et al. 2019, arXiv 1904.05835)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.distill.feature_losses import gaussian_loss
from kdq.distill.features import FeatureMethod


class Gaussian(nn.Sequential):
    """The mean of the teacher's features given the student's: three 1x1 convolutions; with a variance a channel that is
    trained, too, and starts at 5."""

    def __init__(self, student: int, teacher: int) -> None:
        convolutions = [nn.Conv2d(channels, teacher, 1, bias=False) for channels in (student, teacher, teacher)]
        super().__init__(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        self.log_scale = nn.Parameter(torch.full((teacher,), math.log(math.expm1(5.0))))

    def variance(self) -> Tensor:
        return F.softplus(self.log_scale) + 1e-5


class VID(FeatureMethod):
    """``CE - weight sum_stages E[log q(teacher | student)]``, q a Gaussian, at the ends of the stages.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> VID(student, teacher=teacher, num_classes=10).weight
    1.0
    """

    def projector(self, student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
        return Gaussian(student[0], teacher[0])

    def pair(self, student: Tensor, teacher: Tensor, layer: int) -> Tensor:
        gaussian: Any = self.projectors[layer]
        return gaussian_loss(student, teacher, gaussian.variance())
