"""Lightning's view of the images."""

import lightning as L
import torch

from kdq.data.images import Images
from kdq.data.loader import EvalLoader, TrainLoader
from kdq.utils.errors import KdqError


class ImageDataModule(L.LightningDataModule):
    """Feeds one training: ``batch_size`` images a step over all processes and ``portions``, in the order that
    ``seed`` gives; an evaluation, with all test images; and a quantizer.

    Args:
        calibration_images: how many of the training images a quantizer gets, without augmentation, drawn by
            ``calibration_seed``.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int = 128,
        seed: int = 0,
        portions: int = 1,
        calibration_images: int = 1024,
        calibration_seed: int = 0,
    ) -> None:
        super().__init__()
        self.images, self.batch_size, self.seed, self.portions = images, batch_size, seed, portions
        self.calibration_images, self.calibration_seed = calibration_images, calibration_seed

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train_dataloader()  # an error of it while Lightning asks would leave torch's DataLoader patched

    def train_dataloader(self) -> TrainLoader:
        trainer = self._trainer()
        return TrainLoader(
            self.images.source("train", trainer.strategy.root_device),
            self.images.split.train,
            self.batch_size,
            preprocess=self.images.preprocess,
            augment=self.images.augment,
            seed=self.seed,
            epoch=lambda: 0 if trainer.overfit_batches else trainer.current_epoch,  # type: ignore[attr-defined]
            portions=self.portions,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            indexed=getattr(trainer.lightning_module, "indexed", False),
        )

    def val_dataloader(self) -> EvalLoader:
        return self.images.evaluation("val", *self._place())

    def test_dataloader(self) -> EvalLoader:
        return self.images.evaluation("test", *self._place())

    def calibration_dataloader(self) -> EvalLoader:
        """What :mod:`kdq.quant.callback` quantizes with."""
        return self.images.calibration(self.calibration_images, self.calibration_seed, *self._place())

    def _place(self) -> tuple[torch.device, int, int]:
        """This process's device, rank and number of processes."""
        trainer = self._trainer()
        return trainer.strategy.root_device, trainer.global_rank, trainer.world_size

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise KdqError("ImageDataModule serves a Trainer: pass it to trainer.fit")
        return self.trainer
