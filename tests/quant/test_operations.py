"""What a forward pass costs, against published counts and counting by hand."""

import math

import pytest
import torch
from torch import nn

import kdq
from kdq.models import CifarResNet, resnet18, resnet50
from kdq.quant.config import QuantConfig
from kdq.quant.network import quantize_widths
from kdq.quant.operations import bit_operations, multiply_adds
from tests.quant.conftest import ReluNet, trained_norms


def test_multiply_adds_are_the_published_counts() -> None:
    """torchvision documents 1.81 and 4.09 GFLOPS (multiply-adds) for one 224x224 image."""
    image = torch.zeros(1, 3, 224, 224)
    assert multiply_adds(resnet18(1000, stem="imagenet"), image) / 1e9 == pytest.approx(1.814, abs=0.002)
    assert multiply_adds(resnet50(1000, stem="imagenet"), image) / 1e9 == pytest.approx(4.089, abs=0.002)


def test_attention_counts_at_its_widths_wherever_its_weights_are_used() -> None:
    network = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3))
    image = torch.randn(1, 5, 8)
    total = 5 * 8 * (3 * 8 + 8 + 16 + 16) + 40 * 3 + 2 * 5 * 5 * 8  # layers, and the products of q, k and v
    assert multiply_adds(network, image) == total
    quantized, _ = kdq.quantize(network, [image], bits=4)
    assert bit_operations(quantized, image) == 32 * 32 * total - 32 * (32 - 4) * (total - 2 * 5 * 5 * 8)


def test_bit_operations_are_multiply_adds_times_both_widths() -> None:
    relu_net = trained_norms(ReluNet())
    image = torch.randn(1, 3, 9, 9)
    assert bit_operations(relu_net, image) == 32 * 32 * multiply_adds(relu_net, image)
    positions: dict[str, int] = {}
    for name, module in relu_net.named_modules():
        if hasattr(module, "weight") and not isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda layer, _, y, name=name: positions.__setitem__(name, layer.weight[0].numel() * y.numel())
            )
    relu_net(image)
    assert sum(positions.values()) == multiply_adds(relu_net, image)
    widths = {name: 2 + index for index, name in enumerate(positions) if name != "mix"}
    for act_bits in (None, 6):
        network, _ = kdq.quantize(relu_net, [image], bits=widths, keep_float=["mix"], act_bits=act_bits)
        expected = sum(positions[name] * widths[name] * (act_bits or 32) for name in widths)
        assert bit_operations(network, image) == expected + positions["mix"] * 32 * 32


def test_lower_widths_cost_fewer_bit_operations() -> None:
    network, image = CifarResNet(8, 10, width=0.5), torch.zeros(1, 3, 8, 8)
    (two, _), (four, _) = quantize_widths(network, [torch.randn(2, 3, 8, 8)], [2, 4], QuantConfig("rtn"))
    assert math.isclose(bit_operations(four, image), 2 * bit_operations(two, image))
    assert bit_operations(network, image) == 16 * bit_operations(two, image)
