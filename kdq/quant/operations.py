"""What one forward pass of a network costs, and each of its layers at its width."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from kdq.quant.calibrate.layer import EachLayer
from kdq.quant.calibrate.order import eager
from kdq.quant.layers import weight_of
from kdq.quant.packing.weights import copied


def multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Multiply-accumulate operations of one forward pass on ``image`` ``(1, channels, height, width)``."""
    fused = torch.backends.mha.get_fastpath_enabled()  # counts nothing
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copied(network).eval()(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2


def bit_operations(network: nn.Module, image: Tensor) -> int:
    """Bit operations (BOPs) of one forward pass on ``image``: multiply-adds times the bits of the weights times the
    bits of the activations, 32 where they are float (Baskin et al. 2021, arXiv 1804.10969)."""
    weights = getattr(network, "quantized_weights", {})
    activations = getattr(network, "quantized_activations", {})
    bits = {
        name: weight.bits * (activations[name].bits if name in activations else 32) for name, weight in weights.items()
    }
    counts = multiply_adds_by_layer(network, image, weights)
    return 32 * 32 * multiply_adds(network, image) + sum((bits[name] - 32 * 32) * counts[name] for name in bits)


def multiply_adds_by_layer(network: nn.Module, image: Tensor, layers: Collection[str]) -> dict[str, int]:
    """Multiply-adds of each of the ``layers`` in one forward pass on ``image``, whatever module carries them out.

    >>> attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    >>> multiply_adds_by_layer(attention, torch.zeros(1, 5, 8), ["self_attn.in_proj", "linear1"])
    {'self_attn.in_proj': 960, 'linear1': 640}
    """
    counts = dict.fromkeys(layers, 0)

    def counted(weight: Tensor, run: Callable[[], Tensor]) -> Tensor:
        output = run()
        if (name := names.get(id(weight))) is not None:
            counts[name] += weight[0].numel() * output.numel()
        return output

    plain = copied(network).to("cpu").eval()
    with torch.no_grad(), eager(), parametrize.cached():
        weights = {name: weight_of(plain, name) for name in layers}
        names = {id(weight): name for name, weight in weights.items()}
        with EachLayer(counted):
            plain(image.cpu())
    return counts
