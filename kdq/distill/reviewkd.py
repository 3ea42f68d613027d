"""ReviewKD: the student's deeper layers taught by the teacher's earlier ones (Chen et al. 2021, arXiv 2104.09044)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.distill.feature_losses import hierarchical_loss
from kdq.distill.features import FeatureMethod
from kdq.distill.options import number
from kdq.distill.progress import TrainingProgress


class Review(nn.Module):
    """One level: the student's features, reduced to ``middle`` channels and mixed with what the deeper level gave, if
    there is one, by a learned attention; and the same in the teacher's channels."""

    def __init__(self, student: int, middle: int, teacher: int, deepest: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(student, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.expand = nn.Sequential(nn.Conv2d(middle, teacher, 3, padding=1, bias=False), nn.BatchNorm2d(teacher))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        x = self.reduce(x)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:])
            mine, theirs = self.attention(torch.cat([x, deeper], 1)).split(1, dim=1)
            x = x * mine + deeper * theirs
        if tuple(x.shape[2:]) != tuple(size):
            x = F.interpolate(x, tuple(size))
        return x, self.expand(x)


class ReviewKD(FeatureMethod):
    """``CE + w weight sum_levels HCL(review, teacher)`` at the ends of the stages and the embedding, w rising linearly
    to 1. What a level reviews are the student's features there and at all deeper levels.

    The teacher's maps are those after the activation; the authors' code takes them before it.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> list(ReviewKD(student, teacher=teacher, num_classes=10).connect(torch.zeros(2, 3, 32, 32)).layers["teacher"])
    ['layer1', 'layer2', 'layer3', 'fc:input']
    """

    where, maps = "all", False
    warmup: float = number(0.0833, high=1)  # share of the training over which w rises; the authors' is 20 of 240 epochs

    def weight_at(self, progress: TrainingProgress) -> float:
        return self.weight * progress.ramp(self.warmup)

    def projector(self, student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
        *_, deepest = self.layers["student"].values()
        return Review(student[0], min(512, deepest[0]), teacher[0], deepest=student is deepest)

    def between(self, student: Sequence[Tensor], teacher: Sequence[Tensor], progress: TrainingProgress) -> Tensor:
        deeper, levels = None, []
        for review, mine, theirs in reversed(list(zip(self.projectors, student, teacher, strict=True))):
            mine, theirs = (x if x.ndim == 4 else x.flatten(1)[..., None, None] for x in (mine, theirs))
            deeper, seen = review(mine, deeper, theirs.shape[2:])
            levels.append(hierarchical_loss(seen, theirs))
        return torch.stack(levels).sum()
