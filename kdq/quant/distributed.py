"""Sums over the processes that calibrate together."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def summed(value: Tensor) -> Tensor:
    """``value`` added up over all processes where torch.distributed runs, in place; else as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value
