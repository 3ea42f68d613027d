"""What a callback takes of a Trainer: images from its loaders, the best weights of its checkpoints."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from kdq.quant import batches
from kdq.quant.distributed import share
from kdq.utils.errors import KdqError


class Loaders:
    """Calibration images and images that choose, this process's share of them.

    Calibration images come from the first of these that is there: ``calibration``, which gives what the network takes,
    the datamodule's ``calibration_dataloader()``, the first validation loader. ``count`` is of all processes together;
    ``user`` is the callback's name, for messages.
    """

    def __init__(
        self, user: str, trainer: L.Trainer, module: L.LightningModule, calibration: Iterable[Any] | None, count: int
    ) -> None:
        self.user, self.count, self.trainer, self._own = user, count, trainer, calibration is not None
        self.images_of: Callable[[Any], Tensor] = getattr(module, "images_of", batches.images_of)
        self.labels_of: Callable[[Any], Tensor] = getattr(module, "labels_of", batches.labels_of)
        data = getattr(trainer, "datamodule", None)
        self._validation: Any = trainer.val_dataloaders
        for owner in (data, module):
            if self._validation is None and owner is not None and is_overridden("val_dataloader", owner):
                self._validation = owner.val_dataloader()
        while isinstance(self._validation, (list, tuple, Mapping)):
            several = list(self._validation.values() if isinstance(self._validation, Mapping) else self._validation)
            self._validation = several[0] if several else None
        self._calibration = calibration
        if calibration is None and (loader := getattr(data, "calibration_dataloader", None)):
            self._calibration = loader()

    @property
    def calibrates_with_validation(self) -> bool:
        return self._calibration is None

    @property
    def validation(self) -> Iterable[Any]:
        """The first validation loader."""
        if self._validation is None:
            raise KdqError(
                f"{self.user} needs images that are not augmented: pass a validation loader to the Trainer, or "
                f"{self.user}(calibration=loader)"
            )
        return self._validation

    def calibration(self) -> Iterator[Tensor]:
        """Calibration images in batches."""
        left, found = share(self.count), False
        loader = self.validation if self._calibration is None else self._calibration
        for batch in loader if self._own else self._batches(loader):
            if left <= 0:
                break
            images, found = self.images_of(batch), True
            yield images[:left]
            left -= len(images)
        if not found:
            raise KdqError(f"{self.user} has no calibration image: the loader is empty")

    def _batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Batches as a validation step gets them: in the Trainer's precision, on its device, through the hooks of the
        module and the datamodule, which may normalise there."""
        trainer = self.trainer
        for batch in loader:
            stage, trainer.state.stage = trainer.state.stage, RunningStage.VALIDATING  # no hook is to augment
            try:
                prepared = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            finally:
                trainer.state.stage = stage
            yield prepared

    def disjoint(self, choosing: int) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Calibration images, and ``choosing`` validation images with their labels, of all processes together.

        Where both come from the validation loader, its images 0, 2, 4 ... calibrate and 1, 3, 5 ... choose.
        """
        calibration: list[Tensor] = []
        parts = [(0, 1, share(choosing))]  # the first image, the step to the next, how many
        if self._calibration is not None:
            calibration = list(self.calibration())
        else:
            parts = [(1, 2, share(choosing)), (0, 2, share(self.count))]
        left, seen = [count for *_, count in parts], 0
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in parts]
        for batch in self._batches(self.validation):  # one pass: a loader that shuffles has another order in the next
            if max(left) <= 0:
                break
            images, labels = self.images_of(batch), self.labels_of(batch)
            for index, (first, step, _) in enumerate(parts):
                part = slice((first - seen) % step, None, step)
                if left[index] > 0 and len(images[part]):
                    found[index].append((images[part][: left[index]], labels[part][: left[index]]))
                    left[index] -= len(images[part])
            seen += len(images)
        if not all(found):
            raise KdqError(f"{self.user} has too few validation images to calibrate with some and choose with others")
        return calibration or [images for images, _ in found[1]], found[0]


def checkpoints(trainer: L.Trainer) -> list[ModelCheckpoint]:
    return [checkpoint for checkpoint in trainer.checkpoint_callbacks if isinstance(checkpoint, ModelCheckpoint)]


def load_best(module: L.LightningModule, trainer: L.Trainer, restored: Collection[str]) -> None:
    """Give ``module`` the best weights of the first ModelCheckpoint that monitors something, if there is one.

    Args:
        restored: files that a resumed checkpoint names. They may be anybody's, and no code in them runs; what this run
            has written holds whatever hyperparameters the module saves.
    """
    paths = (checkpoint.best_model_path for checkpoint in checkpoints(trainer) if checkpoint.monitor)
    best = next((path for path in paths if path and get_filesystem(path).exists(path)), None)  # s3:// and the like, too
    if best is not None:
        with get_filesystem(best).open(best, "rb") as file:
            stored = torch.load(file, map_location="cpu", weights_only=best in restored)
        module.on_load_checkpoint(stored)
        module.load_state_dict(stored["state_dict"], strict=module.strict_loading)
