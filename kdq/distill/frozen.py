"""A teacher that gives logits and nothing else: never trained, never saved, never synchronised."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Frozen:
    """Holds ``network`` out of Lightning's sight.

    It is deliberately no ``nn.Module``: a module assigned to a LightningModule is registered, and then its weights
    land in every checkpoint, its parameters in DDP's buckets, and ``module.train()`` puts its BatchNorm into training
    mode. Here it stays in eval mode and its device follows the inputs.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` for ``images``, without gradient."""
        if next(self.network.parameters()).device != images.device:
            self.network.to(images.device)
        return self.network(images)
