"""A layer as a matrix problem: its weights as rows, its inputs as the patches those rows are multiplied with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

#: What can be quantized. All of them compute ``rows @ patch`` for patches of their input.
QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weights as ``(groups, rows, columns)``: one row per output channel, one column per weight of its patch."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = getattr(layer, "groups", 1)
    assert isinstance(groups, int)
    return weight.detach().reshape(groups, weight.shape[0] // groups, -1)


def patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs as ``(groups, patches, columns)``, so that ``patches @ weight_matrix.mT`` is the layer's output
    (without bias), one row per output position.

    Convolutions take their patches with their own stride, padding and dilation.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(layer._reversed_padding_repeated_twice):
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    spatial = len(layer.kernel_size)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        extent = dilation * (kernel - 1) + 1
        inputs = inputs.unfold(2 + axis, extent, stride)[..., ::dilation]
    # (batch, channels, *positions, *kernel) -> (batch, *positions, channels, *kernel)
    inputs = inputs.movedim(1, 1 + spatial)
    grouped = inputs.unflatten(1 + spatial, (layer.groups, -1)).movedim(1 + spatial, 0)
    return grouped.flatten(2 + spatial).flatten(1, 1 + spatial)


def channel_axis(layer: nn.Module) -> int:
    """The axis of the layer's output that its bias runs along."""
    return -1 if isinstance(layer, nn.Linear) else 1
