"""Training loops that kdq's is measured against, and the random images that all of them see.

``bare`` does nothing but the mathematics: the same networks and losses on batches that already lie on the device.
``plain`` is what published distillation code looks like: images augmented one by one in torchvision's transforms,
two DataLoader workers, float32, the loss and the accuracy read after every step.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kdq.data.image_set import ImageSet
from kdq.distill.losses import decoupled_kl, distillation_kl, soft_cross_entropy
from kdq.distill.mixup import mix

#: Steps in one measured stretch; the median over stretches is reported.
STRETCH = 10


def random_images(count: int) -> ImageSet:
    """``count`` training and 64 test images of noise, the same every time: a ``data.source`` of ten classes."""
    generator = torch.Generator().manual_seed(0)

    def part(images: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator)
        return pixels, torch.randint(10, (images,), generator=generator)

    return ImageSet(*part(count), *part(64), classes=tuple("0123456789"))


class Step:
    """One optimizer step of ``method``; called with images and labels, it returns the loss and the logits."""

    def __init__(self, method: str, student: nn.Module, other: nn.Module, precision: str) -> None:
        self.method, self.student, self.other, self.precision = method, student.train(), other, precision
        learners = [student, other.train()] if method == "dml" else [student]
        if method != "dml":
            other.eval().requires_grad_(False)
        self.optimizers = [
            torch.optim.SGD(learner.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
            for learner in learners
        ]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            loss, logits = self._loss(images, labels)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach(), logits.detach()

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.method == "dml":
            mine, theirs = self.student(images), self.other(images)
            ce = soft_cross_entropy(mine, labels) + soft_cross_entropy(theirs, labels)
            return ce + distillation_kl(mine, theirs, 1.0) + distillation_kl(theirs, mine, 1.0), mine
        target: Tensor = labels
        if self.method == "mixup":
            lam = torch.rand(1, device=images.device).expand(len(images))
            images, target = mix(images, lam), mix(F.one_hot(labels, 10).float(), lam)
        logits = self.student(images)
        if self.method in ("baseline", "teacher"):
            return soft_cross_entropy(logits, labels), logits
        with torch.no_grad():
            teacher_logits = self.other(images)
        if self.method == "dkd":
            tckd, nckd = decoupled_kl(logits, teacher_logits, labels)
            return soft_cross_entropy(logits, labels) + tckd + 2 * nckd, logits
        kl = distillation_kl(logits, teacher_logits)
        return 0.1 * soft_cross_entropy(logits, target) + 0.9 * kl, logits


def bare(step: Step, batch_size: int, device: torch.device) -> Iterator[None]:
    """Yields after every step."""
    images = torch.randn(batch_size, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)
    while True:
        step(images, labels)
        yield


def plain(step: Step, batch_size: int, device: torch.device) -> Iterator[None]:
    """Yields after every step."""
    loader = DataLoader(_Single(random_images(20_000)), batch_size, shuffle=True, num_workers=2, drop_last=True)
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            loss, logits = step(images, labels)
            float(loss), float((logits.argmax(1) == labels).float().mean())
            yield


class _Single(Dataset[tuple[Tensor, int]]):
    """Images one by one through torchvision's transforms."""

    def __init__(self, images: ImageSet) -> None:
        from torchvision import transforms

        assert isinstance(images.train_images, Tensor)
        self.images, self.labels = images.train_images.numpy(), images.train_labels.tolist()
        normalise = transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        steps: list[Callable[[Any], Any]] = [transforms.ToPILImage(), transforms.RandomCrop(32, padding=4)]
        self.transform = transforms.Compose(
            [*steps, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def images_per_second(steps: Iterable[None], batch_size: int, seconds: float, device: torch.device) -> float:
    """The median over stretches of :data:`STRETCH` steps, for about ``seconds`` after a first stretch."""
    rates: list[float] = []
    begin = start = time.perf_counter()
    for done, _ in enumerate(steps, 1):
        if done % STRETCH:
            continue
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        rates.append(STRETCH * batch_size / (now - start))
        start = now
        if now - begin > seconds and len(rates) > 2:
            break
    return statistics.median(rates[1:])
