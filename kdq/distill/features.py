"""The base of the methods that compare features: what layers of a student and of its teacher give inside."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.connected import Connected
from kdq.distill.layers import check_names, found_layers, looked_at, to_look_into
from kdq.distill.losses import distillation_kl
from kdq.distill.options import layer_names, number
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import Outputs, TeacherStudent
from kdq.utils.errors import KdqError


class FeatureMethod(Connected, TeacherStudent):
    """``CE + weight sum_layers distance(student, teacher)``, and with ``kd`` the KL of vkd beside it.

    A method is a subclass with a ``loss``, or :meth:`pair`, and with :meth:`projector` where it trains something of
    its own:

    >>> class Mean(FeatureMethod):
    ...     where = "stages"
    ...     loss = staticmethod(lambda student, teacher: (student.mean() - teacher.mean()).square())
    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> module = Mean(student, teacher=teacher, num_classes=10)
    >>> module.connect(torch.zeros(2, 3, 32, 32)).layers["teacher"]
    {'layer1': [16, 32, 32], 'layer2': [32, 16, 16], 'layer3': [64, 8, 8]}
    """

    looks_inside = True
    #: What is compared by default: ``stages``, the ``middle`` or the ``last`` of them, or a name of
    #: :func:`~kdq.distill.layers.found_layers`.
    where = "stages"
    #: ``loss(student, teacher)``, of the features of one layer.
    loss: Callable[[Tensor, Tensor], Tensor]
    #: Whether features must be maps ``(batch, channels, height, width)``.
    maps = True
    weight: float = number(1.0)  # of the features' distance: that of the method's paper or of the literature's code
    kd: float = number(0.0)  # weight of ``T^2 KL(teacher || student)`` beside it, as in CRD + KD
    #: As many names each; None for those of :func:`found_layers` that the method compares: of stages the last ones that
    #: both networks have.
    student_layers: Sequence[str] | None = layer_names()
    teacher_layers: Sequence[str] | None = layer_names()

    def __init__(self, student: Network, teacher: nn.Module | None = None, **options: Any) -> None:
        if options.get("weight", 0) is None:  # the method's own
            del options["weight"]
        super().__init__(student, teacher, **options)
        self.asked = {"student": self.student_layers, "teacher": self.teacher_layers}
        check_names(self.student.network, "student", self.student_layers or ())
        if teacher is not None:
            check_names(self.teacher.network, "teacher", self.teacher_layers or ())

    def pair(self, student: Tensor, teacher: Tensor, layer: int) -> Tensor:
        """The distance of one layer's features, a scalar; the student's are projected."""
        return self.loss(student, teacher)

    def between(self, student: Sequence[Tensor], teacher: Sequence[Tensor], progress: TrainingProgress) -> Tensor:
        """The distance of all layers: the sum over :meth:`pair`, unless a method relates layers to each other."""
        triples = zip(self.projectors, student, teacher, strict=True)
        pairs = [self.pair(project(mine), theirs, layer) for layer, (project, mine, theirs) in enumerate(triples)]
        return torch.stack(pairs).sum()

    def weight_at(self, progress: TrainingProgress) -> float:
        return self.weight

    def projector(self, student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
        """What makes the student's features comparable, given both shapes without the batch."""
        return nn.Identity()

    def watches(self, role: str) -> Iterable[str]:
        return self.layers[role]

    def added(
        self, student: Outputs, teacher: Outputs, labels: Tensor, progress: TrainingProgress
    ) -> dict[str, Tensor]:
        """The terms ``features`` and, if it has a weight, ``kl``."""
        terms = {}
        if self.kd:
            terms["kl"] = self.kd * distillation_kl(*self.comparable(student.logits, teacher.logits), self.temperature)
        mine, theirs = (
            [outputs.features[name] for name in self.watches(role)]
            for role, outputs in (("student", student), ("teacher", teacher))
        )
        return {**terms, "features": self.weight_at(progress) * self.between(mine, theirs, progress)}

    def look(self, images: Tensor) -> dict[str, dict[str, list[int]]]:
        """The names of the compared layers with their features' shapes, without the batch, by role."""
        both = {"student": self.student.network, "teacher": self.teacher.network}
        networks = {role: to_look_into(network, type(self).__name__) for role, network in both.items()}
        layers = {role: self.asked[role] or found_layers(net, images, self.where) for role, net in networks.items()}
        if not (self.asked["student"] or self.asked["teacher"]):
            count = min(len(names) for names in layers.values())
            middle = slice((count - 1) // 2, (count - 1) // 2 + 1)
            part = {"middle": middle, "last": slice(-1, None)}.get(self.where, slice(None))
            layers = {role: list(names)[len(names) - count :][part] for role, names in layers.items()}
        if len(set(map(len, layers.values()))) > 1:
            raise KdqError(
                "student_layers and teacher_layers must be as many: "
                + "; ".join(f"the {role}'s are {', '.join(names)}" for role, names in layers.items())
            )
        return {role: self._shapes(networks[role], role, names, images) for role, names in layers.items()}

    def _shapes(self, network: nn.Module, role: str, names: Iterable[str], images: Tensor) -> dict[str, list[int]]:
        features = looked_at(network, images, names)
        if missing := [name for name in names if name not in features]:
            raise KdqError(f"the {role}'s layer {missing[0]} gives no tensor when the network runs")
        for name, (feature, changed) in features.items():
            if changed:
                raise KdqError(f"the {role}'s layer {name} is changed in place by what follows it: name that layer")
            if self.maps and feature.ndim != 4:
                raise KdqError(
                    f"{type(self).__name__} compares maps (batch, channels, height, width), but the {role}'s layer "
                    f"{name} gives {tuple(feature.shape)}"
                )
        return {name: list(features[name][0].shape[1:]) for name in names}

    def parts(self) -> Iterator[nn.Module]:
        pairs = zip(self.layers["student"].values(), self.layers["teacher"].values(), strict=True)
        return (self.projector(mine, theirs) for mine, theirs in pairs)


def regressor(student: int, teacher: int) -> nn.Module:
    """A 1x1 convolution with BatchNorm, from the student's channels to the teacher's."""
    return nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), nn.BatchNorm2d(teacher))
