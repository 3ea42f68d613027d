"""What the tests of the methods share: a batch, and modules around small networks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdq.distill.config import TrainConfig
from kdq.distill.module import DistillationModule


def network(seed: int) -> nn.Module:
    """Grey 8x8 images, five classes; with the parts that behave differently in training: BatchNorm and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * 36, 5)
    )


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 1, 8, 8, generator=generator), torch.randint(5, (12,), generator=generator)


@pytest.fixture
def make() -> Callable[..., Any]:
    """``make(Method, recipe={...}, **options)``: a module around the student of seed 1; ``teacher`` and ``peer`` are
    networks of their own where the method takes them."""

    def build(method: type[DistillationModule], recipe: dict[str, Any] | None = None, **options: Any) -> Any:
        others = {name: network(seed) for name, seed in (("teacher", 2), ("peer", 3)) if name in method.takes}
        return method(network(1), num_classes=5, config=TrainConfig(**(recipe or {})), **(others | options))

    return build


@pytest.fixture
def gradients(batch: tuple[Tensor, Tensor]) -> Callable[..., dict[str, Tensor]]:
    """``gradients(module, moment)``: of the total loss on the batch, by parameter, always with the same dropout."""

    def compute(module: DistillationModule, moment: Any) -> dict[str, Tensor]:
        torch.manual_seed(7)
        module.zero_grad()
        terms, _ = module.losses(*batch, moment)
        torch.stack(list(terms.values())).sum().backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    return compute
