"""Relational distillation (Park et al. 2019, arXiv 1904.05068)."""

from torch import Tensor

from kdq.distill.feature_losses import relation_losses
from kdq.distill.features import FeatureMethod
from kdq.distill.options import number


class RKD(FeatureMethod):
    """``CE + weight (distance L_D + angle L_A)`` of the embeddings: of all pairs and of all triples of a batch.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> RKD(student, teacher=teacher, num_classes=10).weight
    1.0
    """

    where, maps = "embedding", False
    distance: float = number(25.0)  # weight of the pairs
    angle: float = number(50.0)  # weight of the triples

    def pair(self, student: Tensor, teacher: Tensor, layer: int) -> Tensor:
        distance, angle = relation_losses(student, teacher)
        return self.distance * distance + self.angle * angle
