"""What the tests of whole trainings share: small networks and images, and a Trainer that says nothing."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdq.models import CifarResNet

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False}
COUNT = 48


def network(seed: int, width: float = 0.25) -> nn.Module:
    torch.manual_seed(seed)
    return CifarResNet(8, num_classes=4, in_channels=1, width=width)


def images_and_labels(size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, 1, size, size, generator=generator), torch.randint(4, (COUNT,), generator=generator)


class Indexed(Dataset[Any]):
    """As people write it: the index behind what the data set gives."""

    def __init__(self) -> None:
        self.images, self.labels = images_and_labels(8)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.images[index], self.labels[index], index


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """``work(rank, *arguments)`` in each, with what Lightning needs to make them one training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (port, work, arguments), nprocs=2)


def _rank(rank: int, port: int, work: Callable[..., None], arguments: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    work(rank, *arguments)
    torch.distributed.destroy_process_group()  # a spawned process ends without what Lightning does at the end of one
