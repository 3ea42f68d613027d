"""A quantized layer's weight as stored, and networks that compute with such weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdq.quant.activations import ActivationQuantizer
from kdq.quant.alphabet import decode


@dataclass(frozen=True)
class QuantizedWeight:
    """A layer's weight as stored: ``decode(codes)`` is the tensor the quantized network computes with.

    Attributes:
        codes: int64, in the weight's own shape.
        scale, zero: float32 ``(out_channels,)``.
        levels: size of the alphabet.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    levels: int

    @property
    def bits(self) -> int:
        return max(1, (self.levels - 1).bit_length())

    def decode(self) -> Tensor:
        rows = self.codes.flatten(1)
        return decode(rows, self.scale[:, None], self.zero[:, None], self.levels).view(self.codes.shape)


def with_quantized_weights(
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    activations: Mapping[str, ActivationQuantizer] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of ``model`` in eval mode that computes with ``weights``, kept as its ``quantized_weights``.

    Args:
        activations: quantizers of the inputs of layers, by name, kept as its ``quantized_activations``.
        state: new values of other entries of the state dict.
    """
    quantized = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, weight in weights.items():
            parameter = quantized.get_submodule(name).weight
            assert isinstance(parameter, Tensor)
            parameter.copy_(weight.decode())
    if state:
        quantized.load_state_dict(dict(state), strict=False)
    for name, quantizer in (activations or {}).items():
        quantized.get_submodule(name).register_forward_pre_hook(quantizer)
    quantized.quantized_weights = dict(weights)  # type: ignore[assignment]
    quantized.quantized_activations = dict(activations or {})  # type: ignore[assignment]
    return quantized
