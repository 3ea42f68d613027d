"""Codes packed at exactly their width: b bits take b bits, from 1 to 33.

Bits beyond eight are split off as planes of eight, so that 12 bits are a plane of 8 and one of 4. In a plane of b bits,
eight codes make b bytes, the first code in the lowest bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Non-negative integers below ``2^bits`` ``(n,)`` to :func:`packed_bytes` bytes, uint8.

    >>> pack_bits(torch.tensor([1, 2, 3, 0]), bits=2).tolist()  # the first code in the lowest bits: 0b00111001
    [57]
    """
    planes = []
    for low, width in _planes(bits):
        plane = codes.new_zeros(_groups(len(codes)) * 8, dtype=torch.uint8)
        plane[: len(codes)] = codes >> low & 2**width - 1
        columns = plane.view(-1, 8)
        packed = columns.new_zeros(len(columns), width)
        for column in range(8):
            byte, shift = divmod(column * width, 8)
            packed[:, byte] |= columns[:, column] << shift
            if shift + width > 8:  # the code's upper bits lie in the next byte
                packed[:, byte + 1] |= columns[:, column] >> 8 - shift
        planes.append(packed.view(-1)[: _plane_bytes(len(codes), width)])
    return torch.cat(planes)


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of :func:`pack_bits`: ``count`` codes, uint8 up to eight bits, else int64.

    >>> unpack_bits(torch.tensor([57], dtype=torch.uint8), count=4, bits=2).tolist()
    [1, 2, 3, 0]
    """
    codes = packed.new_zeros(count, dtype=torch.uint8 if bits <= 8 else torch.int64)
    start = 0
    for low, width in _planes(bits):
        size = _plane_bytes(count, width)
        groups = packed.new_zeros(_groups(count) * width)
        groups[:size] = packed[start : start + size]
        start += size
        groups = groups.view(-1, width)
        columns = groups.new_empty(len(groups), 8)
        for column in range(8):
            byte, shift = divmod(column * width, 8)
            code = groups[:, byte] >> shift
            if shift + width > 8:
                code |= groups[:, byte + 1] << 8 - shift
            columns[:, column] = code & 2**width - 1
        codes |= columns.view(-1)[:count].to(codes.dtype) << low
    return codes


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take: ``count * bits / 8``, rounded up in each plane.

    >>> packed_bytes(1000, bits=3)
    375
    """
    return sum(_plane_bytes(count, width) for _, width in _planes(bits))


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """The lowest bit and the width of every plane."""
    return ((low, min(8, bits - low)) for low in range(0, bits, 8))


def _plane_bytes(count: int, width: int) -> int:
    return -(-count * width // 8)


def _groups(count: int) -> int:
    return -(-count // 8)
