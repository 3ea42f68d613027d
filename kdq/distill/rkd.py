"""Relational distillation (Park et al. 2019, arXiv 1904.05068)."""

from typing import Any

from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.feature_losses import relation_losses
from kdq.distill.features import FeatureMethod
from kdq.utils.checks import within


class RKD(FeatureMethod):
    """``CE + weight (distance L_D + angle L_A)`` of the embeddings: of all pairs and of all triples of a batch.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> RKD(student, teacher=teacher, num_classes=10).weight
    1.0

    Args:
        distance, angle: weights of the two relations.
        kwargs: of :class:`~kdq.distill.features.FeatureMethod`.
    """

    where, maps = "embedding", False

    def __init__(
        self,
        student: Network,
        teacher: nn.Module | None = None,
        *,
        distance: float = 25.0,
        angle: float = 50.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, **kwargs)
        self.distance, self.angle = within("method.distance", distance, 0), within("method.angle", angle, 0)

    def pair(self, student: Tensor, teacher: Tensor, layer: int) -> Tensor:
        distance, angle = relation_losses(student, teacher)
        return self.distance * distance + self.angle * angle
