"""The published algorithms on whole networks, over :mod:`kdq.bench.literal`: what kdq's codes are held against."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kdq.bench.literal import alphabet_values, first_input, recursion

__all__ = ["alphabet_values", "conv_patches", "gpfq", "quantize_network"]


def gpfq(W: Tensor, X: Tensor, Xq: Tensor, values: Tensor) -> Tensor:
    """:func:`kdq.bench.literal.recursion` in float64."""
    return recursion(W.double(), X.double(), Xq.double(), values.double())


def conv_patches(layer: Any, x: Tensor) -> list[Tensor]:
    """The inputs of each group's neurons, one row per output position, read off pixel by pixel.

    Each filter of a convolution copies one pixel of its patch, so that the layer's own code decides what a patch is.
    """
    if isinstance(layer, nn.Linear):
        return [x.reshape(-1, x.shape[-1])]
    window = layer.weight[0].numel()
    result = []
    for group in x.chunk(layer.groups, 1):
        picker = copy.deepcopy(layer)
        picker.groups, picker.in_channels, picker.out_channels = 1, group.shape[1], window
        picker.weight = nn.Parameter(torch.eye(window, dtype=x.dtype).view(window, *layer.weight.shape[1:]))
        picker.bias = None
        result.append(picker(group).movedim(1, -1).reshape(-1, window).detach())
    return result


def quantize_network(model: Any, images: Tensor, weights: dict[str, Any]) -> dict[str, Tensor]:
    """Layer by layer from the image on, O(L^2): the input of each layer in the float network and in the network whose
    earlier layers hold what the recursion made of them. ``weights`` gives the alphabets (and the order of layers)."""
    model = copy.deepcopy(model).eval()
    quantized: Any = copy.deepcopy(model)
    done: dict[str, Tensor] = {}
    for name, packed in weights.items():
        x = first_input(model, name, images)
        xq = first_input(quantized, name, images)
        layer = model.get_submodule(name)
        groups = getattr(layer, "groups", 1)
        rows = zip(
            layer.weight.flatten(1).chunk(groups),
            conv_patches(layer, x),
            conv_patches(layer, xq),
            alphabet_values(packed.scale[:, None], packed.zero[:, None], packed.levels).chunk(groups),
            strict=True,
        )
        done[name] = torch.cat([gpfq(*row) for row in rows]).float().view(layer.weight.shape)
        quantized.get_submodule(name).weight.data.copy_(done[name])
    return done
