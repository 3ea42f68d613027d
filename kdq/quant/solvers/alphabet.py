"""The finite sets of values a weight may take: integer codes on a scale, per output channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdq.utils.errors import KdqError

MIN_BITS, MAX_BITS = 2, 32
#: Up to here every code and its distance to the zero point are exact in float32.
_FLOAT32_LEVELS = 2**24


@dataclass(frozen=True)
class Alphabet:
    """The values ``scale * (code - zero)`` for ``code = 0 .. levels - 1``.

    >>> alphabet = Alphabet(scale=torch.full((1, 1), 0.5), zero=torch.full((1, 1), 2.0), levels=4)
    >>> alphabet.decode(torch.arange(4)[None])
    tensor([[-1.0000, -0.5000,  0.0000,  0.5000]])
    >>> alphabet.nearest(torch.tensor([[0.3, 9.0]]))
    tensor([[0.5000, 0.5000]])

    Attributes:
        scale: positive, ``(..., rows, 1)``: one per output channel of a weight ``(..., rows, columns)``.
        zero: the code that stands for zero, same shape. Where it is a whole number in range, zero is a value of the
            alphabet.
        levels: how many values there are; 2^b of them need b bits.
    """

    scale: Tensor
    zero: Tensor
    levels: int

    @property
    def bits(self) -> int:
        return code_bits(self.levels)

    def encode(self, values: Tensor) -> Tensor:
        """The codes, int64, of the alphabet's values nearest to ``values`` ``(..., rows, any)``."""
        dtype = self.exact_dtype(values)
        codes = torch.round(values.to(dtype) / self.scale.to(dtype) + self.zero.to(dtype))
        return codes.clamp_(0, self.levels - 1).long()

    def decode(self, codes: Tensor) -> Tensor:
        """The values that ``codes`` stand for, in the scale's dtype."""
        return decode(codes, self.scale, self.zero, self.levels)

    def nearest(self, values: Tensor) -> Tensor:
        """``values`` rounded to the alphabet: ``decode(encode(values))``."""
        dtype = self.exact_dtype(values)
        scale, zero = self.scale.to(dtype), self.zero.to(dtype)
        codes = torch.round(values.to(dtype) / scale + zero).clamp_(0, self.levels - 1)
        return codes.sub_(zero).mul_(scale).to(values.dtype)

    def exact_dtype(self, values: Tensor) -> torch.dtype:
        """A dtype, that of ``values`` if it will do, in which every code is exact."""
        return _exact(values.dtype, self.levels)


def _exact(dtype: torch.dtype, levels: int) -> torch.dtype:
    """``dtype``, or a wider one in which so many codes are exact."""
    return torch.promote_types(dtype, torch.float32) if levels <= _FLOAT32_LEVELS else torch.float64


def code_bits(levels: int) -> int:
    """Bits that a code of so many takes: ``ceil(log2(levels))``."""
    return max(1, (levels - 1).bit_length())


def decode(codes: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """``scale * (codes - zero)``, rounded once to the scale's dtype: the same bits wherever it is computed."""
    dtype = _exact(scale.dtype, levels)
    return codes.to(dtype, copy=True).sub_(zero.to(dtype)).mul_(scale.to(dtype)).to(scale.dtype)


def check_bits(bits: object, name: str = "bits") -> int:
    """``bits``, called ``name`` for people, refused unless they are a whole number from 2 to 32."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise KdqError(f"{name}={bits!r} must be a whole number from {MIN_BITS} to {MAX_BITS}")
    return bits
