"""Contrastive representation distillation (Tian, Krishnan & Isola 2020, arXiv 1910.10699)."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.distill.checkpoint import check_held
from kdq.distill.feature_losses import contrast_loss, contrast_scores
from kdq.distill.features import FeatureMethod
from kdq.distill.options import count, number
from kdq.distill.progress import TrainingProgress
from kdq.utils.errors import KdqError


class CRD(FeatureMethod):
    """``CE + weight (NCE(student, bank of the teacher) + NCE(teacher, bank of the student))`` between embeddings.

    What the last linear layers take is mapped to ``dim`` numbers, of length one, by two linear layers that are trained
    with the student. The bank holds a running embedding of each training image for both networks: an image is told
    from ``negatives`` others, drawn for each batch and shared by its images. Batches are ``(images, labels, indices)``:
    each image's place in the data set, from 0. Several processes have one bank: each gathers what all have seen. It
    takes 8 dim bytes an image, lies in checkpoints, and is no part of the product.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> CRD(student, teacher=teacher, num_classes=10).weight
    0.8
    """

    where, maps, indexed = "embedding", False, True
    weight: float = number(0.8)
    negatives: int = count(16384)  # images that each image is told from; all others where there are fewer
    tau: float = number(0.07, 0.001)  # the temperature of the similarities
    momentum: float = number(0.5, high=1)  # share of the old embedding in an update of the bank
    dim: int = count(128)  # of the embeddings
    #: Embeddings ``(2, images, dim)``: the student's, the teacher's.
    bank: Tensor
    #: The logarithms of the constants that make similarities to the student's and to the teacher's bank probabilities.
    log_norms: Tensor

    def projector(self, student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
        sizes = (torch.Size(shape).numel() for shape in (student, teacher))
        return nn.ModuleList(nn.Linear(size, self.dim) for size in sizes)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            loader = self.trainer.fit_loop._data_source.dataloader()
            images = len(loader.dataset if hasattr(loader, "dataset") else loader.indices)
            if not hasattr(self, "bank") or self.bank.shape[1] != images:  # fitted again, on other images
                self.check_not_copied(f"remember({images})")
                self.remember(images)

    def remember(self, images: int) -> Self:
        """Make a bank of random embeddings of so many images."""
        generator = torch.Generator().manual_seed(self.seed)
        self.register_buffer("bank", F.normalize(torch.randn(2, images, self.dim, generator=generator), dim=2))
        self.register_buffer("log_norms", torch.full((2,), torch.nan))
        return self

    def between(self, student: Sequence[Tensor], teacher: Sequence[Tensor], progress: TrainingProgress) -> Tensor:
        if (indices := progress.indices) is None:
            raise KdqError("CRD must know which images it sees: give a loader of batches (images, labels, indices)")
        (embed,), images, losses = self.projectors, self.bank.shape[1], []
        assert isinstance(embed, nn.ModuleList)
        pairs = zip(embed, (student[0], teacher[0].detach()), strict=True)
        mine = torch.stack([F.normalize(layer(features.flatten(1)).float()) for layer, features in pairs])
        drawn = progress.random(self.seed).choice(images, min(self.negatives, images), replace=False)
        others = torch.from_numpy(drawn).to(indices.device)
        for side, bank in enumerate(self.bank.flip(0)):
            scores = contrast_scores(mine[side], bank[indices], bank[others], self.tau)
            estimate = scores.detach().exp().mean().log() + math.log(images)  # of the first batch
            first = self.log_norms[side].isnan()
            norm = torch.where(first, self._of_all(estimate[None], progress).mean(), self.log_norms[side])
            losses.append(contrast_loss(scores, norm, images))
            self.log_norms[side] = norm
        seen, new = (self._of_all(values, progress) for values in (indices, mine.detach().transpose(0, 1)))
        new = new.transpose(0, 1)
        self.bank[:, seen] = F.normalize(self.momentum * self.bank[:, seen] + (1 - self.momentum) * new, dim=2)
        return torch.stack(losses).sum()

    def _of_all(self, values: Tensor, progress: TrainingProgress) -> Tensor:
        """``values (n, ...)`` of all processes, one after the other."""
        gathered = self.all_gather(values) if progress.world_size > 1 else values[None]
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        held = getattr(checkpoint["state_dict"].get("bank"), "shape", (2, 0))
        images = self.bank.shape[1] if hasattr(self, "bank") else held[1]
        check_held(checkpoint, {"bank": torch.empty(2, images, self.dim, device="meta")})
        if not hasattr(self, "bank"):
            self.remember(images)
