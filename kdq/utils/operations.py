"""What one forward pass of a network costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Multiply-accumulate operations of one forward pass on ``image`` ``(1, channels, height, width)``."""
    return multiply_adds_by_module(network, image)[""]


def bit_operations(network: nn.Module, image: Tensor) -> int:
    """Bit operations (BOPs) of one forward pass on ``image``: multiply-adds times the bits of the weights times the
    bits of the activations, 32 where they are float (Baskin et al. 2021, arXiv 1804.10969)."""
    counts = multiply_adds_by_module(network, image)
    weights = getattr(network, "quantized_weights", {})
    activations = getattr(network, "quantized_activations", {})
    bits = {
        name: weight.bits * (activations[name].bits if name in activations else 32) for name, weight in weights.items()
    }
    return 32 * 32 * counts[""] + sum((bits[name] - 32 * 32) * counts.get(name, 0) for name in bits)


def multiply_adds_by_module(network: nn.Module, image: Tensor) -> Mapping[str, int]:
    """Multiply-adds of each module that has some, by its name in ``named_modules``; those of the whole under ``""``."""
    codes = getattr(network, "quantized_weights", {}).values()  # not copied: they are larger than the network
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(network, {id(weight): weight for weight in codes}).to("cpu").eval()(image.cpu())
    return {
        name.partition(".")[2]: sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
        if name != "Global"
    }
