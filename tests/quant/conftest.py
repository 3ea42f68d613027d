"""Networks the tests of the quantizer share."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReluNet(nn.Module):
    """All that makes walks go wrong: in-place ReLUs, a sum, a concatenation and a split, grouped, depthwise, strided
    and dilated convolutions, torch functions between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.shortcut = nn.Conv2d(8, 8, 1, stride=2)
        self.mix = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.depthwise(self.relu(self.grouped(x)))
        y += self.shortcut(x)
        left, right = torch.split(F.relu(y), 4, dim=1)
        x = self.mix(torch.cat([left, right, left * right], dim=1))
        return self.head(F.adaptive_avg_pool2d(F.relu_(x), 1).flatten(1))


@pytest.fixture
def relu_net() -> nn.Module:
    torch.manual_seed(0)
    return trained_norms(ReluNet())


def trained_norms(model: nn.Module) -> nn.Module:
    """``model`` in eval mode with BatchNorm statistics other than the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()
