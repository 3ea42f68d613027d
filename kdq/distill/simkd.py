"""SimKD: the student's maps, projected, under the teacher's classifier (Chen et al. 2022, arXiv 2203.14001)."""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.feature_losses import hint_loss
from kdq.distill.features import FeatureMethod
from kdq.distill.layers import averaged_maps, to_look_into
from kdq.distill.learner import Learner
from kdq.models.reused import reused_classifier
from kdq.utils.errors import KdqError


class SimKD(FeatureMethod):
    """``weight MSE(projector(student), teacher)`` of the maps whose means over pixels the classifiers take; no labels.

    The product is the student with the projector and with the teacher's classifier, which is not trained:
    :func:`~kdq.models.reused.reused_classifier`. A student that is none yet becomes one when ``trainer.fit`` starts.
    Where its maps are larger than the teacher's they are averaged behind the projector; in the authors' code, before.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = CifarResNet(8, num_classes=10), CifarResNet(14, num_classes=10, width=2)
    >>> SimKD.product(student, teacher, torch.randn(2, 3, 32, 32)).layer3.projector
    Projector(64, 128)
    """

    ce_weight, loss = 0.0, staticmethod(hint_loss)

    def __init__(self, student: Network, teacher: nn.Module | None = None, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        if any(self.asked.values()):
            raise KdqError("SimKD compares what the classifiers take: it has no student_layers and no teacher_layers")
        if names := getattr(self.student.network, "kdq_reused", None):
            self.student.network.get_submodule(names["classifier"]).requires_grad_(False)

    @staticmethod
    def product(student: nn.Module, teacher: nn.Module, images: Tensor) -> nn.Module:
        """A copy of ``student`` with a projector and the classifier of ``teacher``; both are looked at on ``images``.

        Raises:
            KdqError: the classifier of one of them does not take means of maps over their pixels.
        """
        looked = [averaged_maps(to_look_into(network, "SimKD"), images) for network in (student, teacher)]
        (maps, shape, classifier), (_, features, _) = looked
        network = reused_classifier(copy.deepcopy(student).cpu(), maps, classifier, shape[0], features[0])
        first = next(student.parameters())
        return network.to(first.device, first.dtype)

    def connect(self, images: Tensor) -> Self:
        """Make the product, unless the student is one, with the teacher's classifier."""
        teacher = to_look_into(self.teacher.network, "SimKD")
        maps, _, classifier = averaged_maps(teacher, images)
        if not hasattr(self.student.network, "kdq_reused"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                product = self.product(self.student.network, teacher, images)
            self.student = Learner(product, self.num_classes, self.config.ema)
        names: Any = self.student.network.kdq_reused
        theirs: Any = teacher.get_submodule(classifier)
        for network in (self.student.network, self.student.eval_network):  # the average is a network of its own
            mine: Any = network.get_submodule(names["classifier"]).requires_grad_(False)
            mine.weight.copy_(theirs.weight)
            mine.bias.copy_(torch.zeros_like(mine.bias) if theirs.bias is None else theirs.bias)
        self.asked = {"student": [names["maps"]], "teacher": [maps]}
        super().connect(images)
        return self

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not hasattr(self.student.network, "kdq_reused"):
            raise KdqError("give load_from_checkpoint(path, student=SimKD.product(student, teacher, images))")
        super().on_load_checkpoint(checkpoint)
