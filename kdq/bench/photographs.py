"""Photographs: images a second of kdq's loader, once they are decoded, and of a DataLoader that decodes them each epoch
with Pillow in as many processes as there are cores, both cropped to 224 pixels, mirrored, jittered and normalised.

    python -m kdq.bench photographs bench.root=FOLDER [bench.seconds=20]

FOLDER holds photographs. ``GB/s`` is what the kept pixels are read at.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kdq.bench.common import best_device, show, split_options
from kdq.bench.loops import images_per_second
from kdq.data.augment import Preprocess
from kdq.data.folder import decode_image
from kdq.data.loader import TrainLoader
from kdq.data.photographs import ResizedCrop
from kdq.data.source import Resident, Streamed
from kdq.utils.cpu import usable_cores

MEAN, STD, BATCH, KEPT = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 64, 256


class _Files(Dataset[Tensor]):
    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        jitter = v2.ColorJitter(0.4, 0.4, 0.4)
        crop = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), jitter, v2.ToImage()]
        self.transform = v2.Compose([*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        found: Tensor = self.transform(Image.open(self.files[index]).convert("RGB"))
        return found


def main(arguments: Sequence[str]) -> None:
    options, _ = split_options(arguments, root="", seconds="20")
    files = sorted(file for file in Path(options["root"]).rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    seconds, device, rows = float(options["seconds"]), best_device(), []
    start = time.perf_counter()
    kept = np.stack([decode_image(file, KEPT, 3) for file in files])
    rows.append({"stage": "decoding, once, one core", "images/s": len(files) / (time.perf_counter() - start)})
    images, labels = torch.from_numpy(kept), torch.zeros(len(files), dtype=torch.long)
    shared: dict[str, Any] = {"preprocess": Preprocess(MEAN, STD, 224), "seed": 0, "epoch": lambda: 0}
    for jitter in (0.0, 0.4):
        for kind in (Resident, Streamed):
            augment, source = ResizedCrop(224, jitter=jitter), kind(images, labels, device)
            loader = TrainLoader(source, torch.arange(len(files)), BATCH, augment=augment, **shared)
            rows.append(_measured(f"kdq, {kind.__name__.lower()}, jitter {jitter}", loader, seconds, device))
    workers = usable_cores()
    plain = DataLoader(_Files(files), BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True)
    rows.append(_measured(f"DataLoader and Pillow, {workers} processes, jitter 0.4", plain, seconds, device))
    show(f"{len(files)} photographs, {device}", ["stage", "images/s", "GB/s"], rows)


def _measured(stage: str, loader: Any, seconds: float, device: torch.device) -> dict[str, Any]:
    def steps() -> Iterator[None]:
        while True:
            for batch in loader:
                (batch if isinstance(batch, Tensor) else batch[0]).to(device)
                yield

    rate = images_per_second(steps(), BATCH, seconds, device)
    return {"stage": stage, "images/s": rate, "GB/s": rate * KEPT * KEPT * 3 / 1e9}
