"""What a training logs beside its losses, and whether it still goes well."""

import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from kdq.distill.module import DistillationModule
from kdq.utils.errors import KdqError


class Monitor(Callback):
    """Logs after ``every`` steps and at the end of each epoch; between these the host never waits for the device.

    ``train/lr`` (one for each learner); ``train/images_per_second`` over the steps since it last did, all processes
    together and without validation; on a GPU ``train/gpu_memory_gib``, the most that tensors took so far.

    Raises:
        KdqError: a loss is not finite; it says at which epoch and step that was seen, and what usually helps. (Once a
            loss is not finite the weights are not, so that no later one is; in ``16-mixed`` such steps are skipped.)
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
        if (batch_idx + 1) % self.every and not trainer.is_last_batch:
            return
        assert isinstance(pl_module, DistillationModule)
        losses = [value for name, value in trainer.callback_metrics.items() if name.startswith("train/loss")]
        wrong = [loss for loss in (torch.stack(losses).tolist() if losses else ()) if not math.isfinite(loss)]
        if wrong:
            raise KdqError(
                f"the loss became {wrong[0]} at epoch {trainer.current_epoch}, by step {batch_idx}: "
                f"lower the learning rate (recipe.lr={pl_module.config.lr}) or set recipe.clip_grad=1"
            )
        now = time.perf_counter()
        values: dict[str, float] = {"train/images_per_second": self._images / max(now - self._since, 1e-9)}
        self._images, self._since = 0, now
        for learner, optimizer in zip(pl_module.learners, trainer.optimizers, strict=True):
            values[f"train/lr{pl_module.suffix(learner)}"] = float(optimizer.param_groups[0]["lr"])
        if pl_module.device.type == "cuda":
            values["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        # The step that Lightning gives to what modules log; `global_step` counts every optimizer of a module.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(values | {"epoch": trainer.current_epoch}, step=step)
