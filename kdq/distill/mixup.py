"""Distillation on mixed images (Zhang et al. 2018, arXiv 1710.09412; Beyer et al. 2022, arXiv 2106.05237)."""

import torch
from torch import Tensor

from kdq.distill.losses import one_hot
from kdq.distill.options import number, switch
from kdq.distill.progress import TrainingProgress
from kdq.distill.vkd import VKD


class Mixup(VKD):
    """The loss of vkd on ``lam x_i + (1 - lam) x_j`` with the target ``lam y_i + (1 - lam) y_j``, lam ~ Beta(a, a).

    Student and teacher see the same mixed image. The batch is in random order already, so that neighbours make a
    random pair; pairs of neighbours stay together when several processes divide the batch into even parts. Every
    portion of an accumulated batch draws its own lam.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> Mixup(student, teacher=teacher, num_classes=10, per_sample=True).alpha
    0.9
    """

    mixup_alpha: float = number(1.0)  # a of the Beta distribution: 1 is uniform, 0 mixes nothing
    per_sample: bool = switch()  # every image draws its own lam, instead of one for the batch

    def losses(self, images: Tensor, labels: Tensor, progress: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        lam = sent(self.draw(len(images), progress), images.device)
        probabilities = one_hot(labels, self.num_classes).float()
        return super().losses(mix(images, lam), mix(probabilities, lam), progress)

    def draw(self, count: int, progress: TrainingProgress) -> Tensor:
        """``lam`` of this process's ``count`` images, float32 ``(count,)``."""
        if self.mixup_alpha == 0:
            return torch.ones(count)
        everyone = count * progress.world_size if self.per_sample else 1
        drawn = progress.random(self.seed).beta(self.mixup_alpha, self.mixup_alpha, everyone)
        lam = torch.from_numpy(drawn).float()
        return lam[progress.rank * count :][:count] if self.per_sample else lam.expand(count)


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """``drawn`` on the ``device``, which does not wait for it."""
    if device.type == "cuda":  # from pageable memory the host would wait for the copy
        drawn = drawn.contiguous().pin_memory()
    return drawn.to(device, non_blocking=True)


def neighbours(count: int, device: torch.device) -> Tensor:
    """The neighbour of each of ``count`` images: 0 has 1, 2 has 3, and so on; the last of an odd number has the
    first."""
    neighbour = torch.arange(count, device=device) ^ 1
    return neighbour.where(neighbour < count, 0)


def mix(batch: Tensor, lam: Tensor) -> Tensor:
    """``lam_i batch_i + (1 - lam_i) batch_j`` with j the neighbour of i."""
    other = batch[neighbours(len(batch), batch.device)]
    return torch.lerp(other, batch, lam.view(-1, *[1] * (batch.ndim - 1)).to(batch.dtype))
