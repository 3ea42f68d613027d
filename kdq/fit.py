"""One training, from its last checkpoint if there is one, to its best weights."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor

from kdq.data.images import Images
from kdq.data.module import ImageDataModule
from kdq.distill.baseline import Baseline
from kdq.errors import KdqError
from kdq.progress import progress


class KeepBest(Callback):
    """Remembers the student's weights of the epoch with the highest validation accuracy (the last of equals, which
    saw the lowest learning rate).

    They travel inside the one checkpoint that is written each epoch: a crash can never separate the two.
    """

    def __init__(self) -> None:
        self.top1, self.epoch, self.seconds = -1.0, -1, 0.0
        self.weights: dict[str, Tensor] = {}
        self._since = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.perf_counter() - self._since
        top1 = float(trainer.callback_metrics["val/top1"])
        if top1 >= self.top1:
            assert isinstance(pl_module, Baseline)
            state = pl_module.student.state_dict()
            self.top1, self.epoch = top1, trainer.current_epoch
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"top1": self.top1, "epoch": self.epoch, "seconds": self.seconds, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.top1, self.epoch = state_dict["top1"], state_dict["epoch"]
        self.seconds, self.weights = state_dict["seconds"], state_dict["weights"]


class _Progress(Callback):
    """One bar for the whole training, which shows the last validation accuracy."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps, done = int(trainer.num_training_batches), trainer.current_epoch
        epochs = trainer.max_epochs or 0
        self.bar = progress(self.title, steps * epochs, "step")
        self.bar.update(steps * done)

    def on_train_batch_end(self, *_: Any) -> None:
        self.bar.update()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        top1 = 100 * float(trainer.callback_metrics["val/top1"])
        self.bar.set_postfix_str(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, val {top1:.2f}%", refresh=False
        )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class _SeedEpoch(Callback):
    """Starts every epoch from a random state of its own, so that networks with dropout resume exactly, too."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.manual_seed(self.seed * 1_000_003 + trainer.current_epoch)


def fit(
    module: Baseline,
    images: Images,
    trainer: Mapping[str, Any],
    seed: int,
    work: Path,
    logger: Logger | bool = False,
    title: str = "training",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train ``module`` and return its best weights (by validation accuracy) and how it went.

    Args:
        module: carries its network, its recipe and its losses.
        trainer: the ``trainer`` config: ``accelerator, devices, strategy, precision``.
        seed: the order of the images and their augmentation; the weights were initialised by the caller.
        work: where the checkpoint of the last finished epoch lives; a training found there is continued.

    Raises:
        KdqError: the loss became NaN, or the checkpoint in ``work`` cannot be read.
    """
    recipe, best = module.recipe, KeepBest()
    _quiet_lightning()
    lightning = L.Trainer(
        accelerator=trainer["accelerator"],
        devices=trainer["devices"],
        strategy=trainer["strategy"],
        precision=resolve_precision(trainer["precision"], trainer["accelerator"]),
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.clip_grad,
        callbacks=[
            best,
            _SeedEpoch(seed),
            _Progress(title),
            ModelCheckpoint(work, "last", save_on_train_epoch_end=True, enable_version_counter=False),
        ],
        logger=logger,
        default_root_dir=work,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        deterministic="warn",
        log_every_n_steps=20,
    )
    checkpoint = work / "last.ckpt"
    try:
        resume = str(checkpoint) if _readable(checkpoint) else None
        data = ImageDataModule(images, recipe.batch_size, seed)
        lightning.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    finally:
        _release(lightning)
    if lightning.interrupted:
        raise KeyboardInterrupt
    if not best.weights:
        raise KdqError("the training ended without a validated epoch")
    images_per_epoch = len(images.split.train) // recipe.batch_size * recipe.batch_size
    metrics = {
        "val_top1": 100 * best.top1,
        "best_epoch": best.epoch,
        "epochs": recipe.epochs,
        "train_seconds": best.seconds,
        "images_per_second": images_per_epoch * recipe.epochs / max(best.seconds, 1e-9),
        "precision": str(lightning.precision),
        "torch": torch.__version__,
    }
    return best.weights, metrics


def resolve_precision(requested: str, accelerator: str) -> Any:
    """Lightning's precision for ``requested``; ``auto`` is bf16 autocast where the hardware multiplies bf16 (CUDA
    from Ampere, CPUs with AMX or AVX-512-BF16), else float32."""
    if requested != "auto":
        return requested
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if fast else "32-true"


def _readable(checkpoint: Path) -> bool:
    """Whether a training can go on from ``checkpoint``.

    Raises:
        KdqError: the file is there but damaged.
    """
    if not checkpoint.is_file():
        return False
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        raise KdqError(
            f"the checkpoint {checkpoint} is damaged: delete {checkpoint.parent} to train again from the start"
        ) from error
    return True


def _release(trainer: L.Trainer) -> None:
    """Give back what the trainer holds on the device, for the next job of this process."""
    trainer.strategy.teardown()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _quiet_lightning() -> None:
    """Keep what is useful of Lightning's messages: errors. The rest describes choices kdq made on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
