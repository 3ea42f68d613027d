"""A quantized layer's weight as stored, decoded once, or every time its layer runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdq.quant.packing.bits import pack_bits, unpack_bits
from kdq.quant.solvers.alphabet import code_bits, decode


@dataclass(frozen=True)
class QuantizedWeight:
    """A layer's weight as stored: :meth:`decode` gives the tensor that the quantized network computes with.

    Attributes:
        packed: the codes in their bits and no more, uint8, see :mod:`kdq.quant.packing.bits`.
        shape: the weight's.
        scale, zero: ``(out_channels,)``.
        levels: size of the alphabet.
    """

    packed: Tensor
    shape: torch.Size
    scale: Tensor
    zero: Tensor
    levels: int

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Self:
        return cls(pack_bits(codes.flatten(), code_bits(levels)), codes.shape, scale, zero, levels)

    @property
    def bits(self) -> int:
        return code_bits(self.levels)

    @property
    def codes(self) -> Tensor:
        """int64, in the weight's own shape."""
        return self._unpacked().long()

    def decode(self) -> Tensor:
        rows = self._unpacked().flatten(1)
        return decode(rows, self.scale[:, None], self.zero[:, None], self.levels).view(self.shape)

    def _unpacked(self) -> Tensor:
        return unpack_bits(self.packed, self.shape.numel(), self.bits).view(self.shape)


class Decoding(nn.Module):
    """Makes a layer's weight from its packed codes: a parametrization, run whenever the weight is asked for.

    A network that is cast to 16 bits, ``network.half()``, has its weights rounded so, and not what they are made of.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.shape, self.levels = weight.shape, weight.levels
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.dtype = weight.scale.dtype

    def forward(self, packed: Tensor) -> Tensor:
        return QuantizedWeight(packed, self.shape, self.scale, self.zero, self.levels).decode().to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.scale, self.zero
        super()._apply(fn, recurse)
        self.dtype = self.scale.dtype
        self.scale, self.zero = (old.to(new.device) for old, new in zip(exact, (self.scale, self.zero), strict=True))
        return self


def keep_packed(module: nn.Module, attribute: str, weight: QuantizedWeight) -> None:
    """Let ``module`` hold nothing but ``weight``'s packed codes: its weight is decoded when it runs, and then freed."""
    setattr(module, attribute, nn.Parameter(weight.packed, requires_grad=False))
    # "unsafe": the decoded weight has another dtype and shape than what is stored.
    parametrize.register_parametrization(module, attribute, Decoding(weight), unsafe=True)


def is_packed(module: nn.Module, attribute: str) -> bool:
    """Whether :func:`keep_packed` holds the weight."""
    found = parametrize.is_parametrized(module, attribute)
    return found and isinstance(module.parametrizations[attribute][0], Decoding)  # type: ignore[index]


def keep_decoded(module: nn.Module) -> None:
    """Undo :func:`keep_packed` and any other parametrization: compute the weights once and hold them."""
    weights = {name: getattr(module, name) for name in getattr(module, "parametrizations", ())}
    if not weights:
        return
    # torch's remove_parametrizations would take the weights from the class, which copies of this module share.
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight.detach()))
