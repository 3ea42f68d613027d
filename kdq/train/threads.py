"""How many CPU threads a training uses, found out by its own first steps."""

import logging
import time
from collections import Counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from kdq.utils.cpu import AUTO, ThreadChooser, thread_numbers

log = logging.getLogger(__name__)


class ThreadProbe(Callback):
    """Trains on the number of threads whose steps are fastest, see :class:`~kdq.utils.cpu.ThreadChooser`; a choice is a
    line in the log and the metric ``train/threads``.

    The steps of a try are the training's own: none is added, none repeated. Sums differ in their last digits between
    numbers of threads. To repeat a training digit for digit, or to resume one as if it had never stopped, give the
    number: ``threads``, or OMP_NUM_THREADS. Such a number is never changed. Nothing is tried on a GPU, and nothing with
    several processes, of which each has its share of the cores.

    >>> trainer = L.Trainer(callbacks=[ThreadProbe()], logger=False, accelerator="cpu")

    Args:
        threads: the option ``trainer.threads``, ``auto`` or a number (for each process).
    """

    def __init__(self, threads: int | str = AUTO) -> None:
        self.numbers, self.asked = thread_numbers(threads), threads
        #: Steps by the number of threads they were taken on.
        self.steps: Counter[int] = Counter()
        self._chooser: ThreadChooser | None = None
        self._since = 0.0

    @property
    def threads(self) -> int:
        """The number on which most steps were taken: what a row says."""
        return self.steps.most_common(1)[0][0] if self.steps else torch.get_num_threads()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        alone = trainer.world_size == 1 and pl_module.device.type == "cpu"
        if self.asked != AUTO or (alone and len(self.numbers) > 1):
            self._chooser = ThreadChooser(self.numbers)
            torch.set_num_threads(self._chooser.threads)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    on_validation_end = on_train_epoch_start  # which is no part of the next step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps[torch.get_num_threads()] += 1
        if self._chooser is None:
            return
        tried, now = self._chooser.trying, time.perf_counter()
        self._chooser.step(now - self._since)
        self._since = now
        torch.set_num_threads(self._chooser.threads)
        if tried and not self._chooser.trying:
            self._tell(trainer, self._chooser.threads)

    def on_train_end(self, *_: Any) -> None:
        if self._chooser is not None:  # perhaps in the middle of a try
            torch.set_num_threads(self._chooser.best)

    def _tell(self, trainer: L.Trainer, threads: int) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        log.info("step %d: training on %d of %d CPU threads, the fastest now", step, threads, self.numbers[-1])
        for logger in trainer.loggers:
            logger.log_metrics({"train/threads": float(threads), "epoch": trainer.current_epoch}, step=step)
