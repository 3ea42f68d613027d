"""Kernels whose results can be repeated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_kernels(device: torch.device) -> Iterator[None]:
    """Float32 sums in float32, the same every time: no TF32, no kernel that adds in a random order, whatever the caller
    set for its own training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
