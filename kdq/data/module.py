"""Lightning's view of the images."""

from __future__ import annotations

import lightning as L

from kdq.data.images import Images
from kdq.data.loader import EvalLoader, TrainLoader


class ImageDataModule(L.LightningDataModule):
    """Feeds one training: ``batch_size`` images a step over all processes and ``portions``, in the order that
    ``seed`` gives."""

    def __init__(self, images: Images, batch_size: int, seed: int, portions: int = 1) -> None:
        super().__init__()
        self.images, self.batch_size, self.seed, self.portions = images, batch_size, seed, portions

    def train_dataloader(self) -> TrainLoader:
        trainer = self._trainer()
        return TrainLoader(
            self.images.source("train", trainer.strategy.root_device),
            self.images.split.train,
            self.batch_size,
            preprocess=self.images.preprocess,
            augment=self.images.augment,
            seed=self.seed,
            epoch=lambda: trainer.current_epoch,
            portions=self.portions,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def val_dataloader(self) -> EvalLoader:
        trainer = self._trainer()
        return self.images.evaluation("val", trainer.strategy.root_device, trainer.global_rank, trainer.world_size)

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("ImageDataModule serves a Trainer: pass it to trainer.fit")
        return self.trainer
