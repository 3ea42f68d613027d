"""Be your own teacher: a network's last stage teaches the earlier ones (Zhang et al. 2019, arXiv 1905.08094)."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from kdq.distill.checkpoint import Network, rebuilt
from kdq.distill.layers import found_layers, looked_at, to_look_into, watched
from kdq.distill.learner import Learner
from kdq.distill.losses import distillation_kl, soft_cross_entropy
from kdq.distill.module import DistillationModule
from kdq.distill.progress import TrainingProgress
from kdq.utils.checks import within
from kdq.utils.errors import KdqError


class Exit(nn.Module):
    """From the map of a stage to features ``(batch, channels of the last stage)`` and logits ``(batch, classes)``: a
    3x3 convolution, BatchNorm and ReLU for each stage that it leaves out, the mean over pixels, a linear layer."""

    def __init__(self, shapes: Sequence[Sequence[int]], num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for (planes, height, _), (deeper, lower, _) in pairwise(shapes):
            stride = max(1, round(height / lower))
            layers += [nn.Conv2d(planes, deeper, 3, stride, 1, bias=False), nn.BatchNorm2d(deeper), nn.ReLU()]
        self.maps, self.classifier = nn.Sequential(*layers), nn.Linear(shapes[-1][0], num_classes)

    def forward(self, stage: Tensor) -> tuple[Tensor, Tensor]:
        features = self.maps(stage).mean((2, 3))
        return features, self.classifier(features)


class BYOT(DistillationModule):
    """``CE + sum_exits [(1 - alpha) CE(exit) + alpha T^2 KL(network || exit) + weight |F(exit) - F(network)|^2]``.

    Every stage but the last gets an exit, trained with the network and no part of it; F is the mean of the last stage
    over its pixels, and what an exit makes of its own stage. What the exits learn from acts as a constant.

    >>> from kdq.models import CifarResNet
    >>> module = BYOT(CifarResNet(8, num_classes=10), num_classes=10).connect(torch.zeros(2, 3, 32, 32))
    >>> list(module.stages), len(module.exits)
    (['layer1', 'layer2', 'layer3'], 2)

    Args:
        alpha: the network's share of what an exit learns.
        weight: of the distance of features, the squared one of an image.
        temperature: softens both distributions.
        kwargs: of :class:`~kdq.distill.module.DistillationModule`.
    """

    def __init__(
        self, student: Network, *, alpha: float = 0.3, weight: float = 0.01, temperature: float = 3.0, **kwargs: Any
    ) -> None:
        super().__init__(student, **kwargs)
        self.alpha, self.weight = within("method.alpha", alpha, 0, 1), within("method.weight", weight, 0)
        self.temperature = within("method.temperature", temperature, 0.01)
        #: The stages and the shapes of their maps, without the batch; empty until connected.
        self.stages: dict[str, list[int]] = {}
        self.exits = nn.ModuleList()

    def losses(self, images: Tensor, labels: Tensor, progress: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        with watched(self.student.network, self.stages) as maps:
            logits = self.student(images)
        *early, last = (maps[name] for name in self.stages)
        ces, kls, distances = [], [], []
        for leave, stage in zip(self.exits, early, strict=True):
            features, guess = leave(stage)
            ces.append(soft_cross_entropy(guess, labels, self.config.label_smoothing))
            kls.append(distillation_kl(guess, logits.detach(), self.temperature))
            distances.append((features - last.detach().mean((2, 3))).float().square().sum(1).mean())
        factors = {"exits": 1 - self.alpha, "kl": self.alpha, "features": self.weight}
        sums = (torch.stack(values).sum() for values in (ces, kls, distances))
        terms = {name: factor * total for (name, factor), total in zip(factors.items(), sums, strict=True)}
        return {"ce": soft_cross_entropy(logits, labels, self.config.label_smoothing), **terms}, logits

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and not self.stages:
            self.connect(self.first_images())

    def connect(self, images: Tensor) -> Self:
        """Find the stages and build the exits by a look at what the network makes of ``images``.

        Raises:
            KdqError: it has no stages, or only one.
        """
        network = to_look_into(self.student.network, type(self).__name__)
        names = found_layers(network, images, "stages")
        if len(names) < 2:
            raise KdqError(f"BYOT needs two stages of maps or more, and the network has only {names[0]}")
        features = looked_at(network, images, names)
        self.stages = {name: list(features[name][0].shape[1:]) for name in names}
        self.exits = self._exits()
        return self

    def _exits(self) -> nn.ModuleList:
        shapes = list(self.stages.values())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return nn.ModuleList(Exit(shapes[place:], self.num_classes) for place in range(len(shapes) - 1))

    def trained_parameters(self, learner: Learner) -> Iterator[nn.Parameter]:
        yield from super().trained_parameters(learner)
        yield from self.exits.parameters()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stages"] = self.stages

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.stages:
            self.stages = checkpoint["stages"]
            self.exits = rebuilt(checkpoint, "exits", self._exits)
