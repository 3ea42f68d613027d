"""What the processes that calibrate together have in common."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def summed(value: Tensor) -> Tensor:
    """``value`` added up over all processes where torch.distributed runs, in place; else as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value


def share(count: int) -> int:
    """This process's part of ``count`` where torch.distributed runs, rounded up; else all of it."""
    return -(-count // (dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1))


def rank() -> int:
    """This process's number where torch.distributed runs; else 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gathered(value: Any) -> list[Any]:
    """The ``value`` (anything that pickles) of every process where torch.distributed runs, by rank; else this one's."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
