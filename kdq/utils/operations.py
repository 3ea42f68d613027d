"""What one forward pass of a network costs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Multiply-accumulate operations of one forward pass on ``image`` ``(1, channels, height, width)``."""
    codes = getattr(network, "quantized_weights", {}).values()  # not copied: they are larger than the network
    plain = copy.deepcopy(network, {id(weight): weight for weight in codes}).to("cpu").eval()
    fused = torch.backends.mha.get_fastpath_enabled()  # counts nothing
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            plain(image.cpu())
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2
