"""BYOT: its loss against the definition in float64, and what its exits are no part of."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from kdq.distill import BYOT
from kdq.distill.progress import TrainingProgress
from kdq.utils.errors import KdqError
from tests.distill.small import images_and_labels, network


def make(**options: Any) -> BYOT:
    return BYOT(network(1), num_classes=4, **options)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    images, labels = images_and_labels()
    return images[:24], labels[:24]


def test_the_terms_are_their_definition(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    module = make(alpha=0.2, weight=0.5, temperature=2.0).connect(images[:2]).double()
    terms, logits = module.losses(images.double(), labels, TrainingProgress())
    net: Any = module.student.network
    x = net.relu(net.bn1(net.conv1(images.double())))
    maps = [x := stage(x) for stage in (net.layer1, net.layer2, net.layer3)]
    z = logits.detach().numpy()
    expected = {"ce": -log_softmax(z, 1)[range(24), labels].mean(), "exits": 0.0, "kl": 0.0, "features": 0.0}
    for leave, stage in zip(module.projectors, maps, strict=False):
        own = leave.maps(stage).detach().numpy().mean((2, 3))  # type: ignore[operator, union-attr]
        weight, bias = (p.detach().numpy() for p in leave.classifier.parameters())  # type: ignore[union-attr]
        guess = own @ weight.T + bias
        p = softmax(z / 2, 1)
        expected["exits"] += -0.8 * log_softmax(guess, 1)[range(24), labels].mean()
        expected["kl"] += 0.2 * 4 * (p * (np.log(p) - log_softmax(guess / 2, 1))).sum(1).mean()
        expected["features"] += 0.5 * ((own - maps[-1].detach().numpy().mean((2, 3))) ** 2).sum(1).mean()
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_what_the_exits_learn_from_is_a_constant(batch: tuple[Tensor, Tensor]) -> None:
    """The last stage has its gradient from the labels alone, the first one from the exits, too."""
    module = make().connect(batch[0][:2])
    terms, _ = module.losses(*batch, TrainingProgress())
    net: Any = module.student.network
    taught = terms["exits"] + terms["kl"] + terms["features"]
    *last, first = torch.autograd.grad(
        taught, [net.fc.weight, *net.layer3.parameters(), net.conv1.weight], allow_unused=True
    )
    assert all(slope is None for slope in last)
    assert first.abs().sum() > 0


def test_a_network_of_one_stage_is_refused() -> None:
    one = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    with pytest.raises(KdqError, match="BYOT needs two stages"):
        BYOT(one, num_classes=4).connect(torch.zeros(2, 1, 8, 8))
