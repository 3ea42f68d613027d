"""How a training goes besides its losses: learning rates, images per second, memory of the device."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from kdq.distill.baseline import Baseline


class Vitals(Callback):
    """Logs ``train/lr`` (one for each learner), ``train/images_per_second`` over the steps since it last did, all
    processes together and without validation, and on a GPU its ``train/gpu_memory_gib``, the most that tensors took so
    far. It does so after ``every`` steps and at the end of each epoch.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._images, self._since = 0, 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._images, self._since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[1]) * trainer.world_size
        due = (batch_idx + 1) % self.every == 0 or trainer.is_last_batch
        if not due or trainer.logger is None:
            return
        assert isinstance(pl_module, Baseline)
        now = time.perf_counter()
        values = {"train/images_per_second": self._images / max(now - self._since, 1e-9)}
        for learner, optimizer in zip(pl_module.learners, trainer.optimizers, strict=True):
            values[f"train/lr{pl_module.suffix(learner)}"] = float(optimizer.param_groups[0]["lr"])
        if pl_module.device.type == "cuda":
            values["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        # The step that Lightning gives to what modules log; `global_step` counts every optimizer of a module.
        trainer.logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        self._images, self._since = 0, now
