"""Be your own teacher: a network's last stage teaches the earlier ones (Zhang et al. 2019, arXiv 1905.08094)."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kdq.distill.connected import Connected
from kdq.distill.layers import found_layers, looked_at, to_look_into, watched
from kdq.distill.losses import distillation_kl, soft_cross_entropy
from kdq.distill.options import number
from kdq.distill.progress import TrainingProgress
from kdq.utils.errors import KdqError


class BYOT(Connected):
    """``CE + sum_exits [(1 - alpha) CE(exit) + alpha T^2 KL(network || exit) + weight |F(exit) - F(network)|^2]``.

    Every stage but the last gets an exit, trained with the network and no part of it; F is the mean of the last stage
    over its pixels, and what an exit makes of its own stage. What the exits learn from acts as a constant.

    >>> from kdq.models import CifarResNet
    >>> module = BYOT(CifarResNet(8, num_classes=10), num_classes=10).connect(torch.zeros(2, 3, 32, 32))
    >>> list(module.layers), len(module.projectors)
    (['layer1', 'layer2', 'layer3'], 2)
    """

    looks_inside = True
    alpha: float = number(0.3, high=1)  # the network's share of what an exit learns
    weight: float = number(0.01)  # of the distance of features, the squared one of an image
    temperature: float = number(3.0, 0.01)  # softens both distributions

    def losses(self, images: Tensor, labels: Tensor, progress: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        with watched(self.student.network, self.layers) as maps:
            logits = self.student(images)
        smoothing, (*early, last) = self.config.label_smoothing, (maps[name] for name in self.layers)
        weights, learnt = {"exits": 1 - self.alpha, "kl": self.alpha, "features": self.weight}, list[list[Tensor]]()
        exits: Any = zip(self.projectors, early, strict=True)
        for leave, stage in exits:
            features = leave.maps(stage).mean((2, 3))
            guess, apart = leave.classifier(features), (features - last.detach().mean((2, 3))).float()
            kl = distillation_kl(guess, logits.detach(), self.temperature)
            learnt.append([soft_cross_entropy(guess, labels, smoothing), kl, apart.square().sum(1).mean()])
        sums = (torch.stack(each).sum() for each in zip(*learnt, strict=True))
        terms = {name: weight * total for (name, weight), total in zip(weights.items(), sums, strict=True)}
        return {"ce": soft_cross_entropy(logits, labels, smoothing), **terms}, logits

    def look(self, images: Tensor) -> dict[str, list[int]]:
        network = to_look_into(self.student.network, type(self).__name__)
        names = found_layers(network, images, "stages")
        if len(names) < 2:
            raise KdqError(f"BYOT needs two stages of maps or more, and the network has only {names[0]}")
        features = looked_at(network, images, names)
        return {name: list(features[name][0].shape[1:]) for name in names}

    def parts(self) -> Iterator[nn.Module]:
        """Each exit: a 3x3 convolution, BatchNorm and ReLU for each stage that it leaves out, and a linear layer."""
        shapes = list(self.layers.values())
        for place in range(len(shapes) - 1):
            maps = nn.Sequential()
            for (planes, height, _), (deeper, lower, _) in pairwise(shapes[place:]):
                stride = max(1, round(height / lower))
                maps.extend([nn.Conv2d(planes, deeper, 3, stride, 1, bias=False), nn.BatchNorm2d(deeper), nn.ReLU()])
            yield nn.ModuleDict({"maps": maps, "classifier": nn.Linear(shapes[-1][0], self.num_classes)})
