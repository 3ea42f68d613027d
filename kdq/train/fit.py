"""One training, from its last checkpoint if there is one, to its best weights."""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from tqdm import tqdm

from kdq.data.images import Images
from kdq.data.module import ImageDataModule
from kdq.distill.module import DistillationModule
from kdq.train.halving import SuccessiveHalving
from kdq.train.monitor import Monitor
from kdq.train.recipe import Recipe
from kdq.train.threads import ThreadProbe
from kdq.train.trainer import interruptible, training_trainer
from kdq.utils.errors import KdqError, StoppedTrialError
from kdq.utils.files import replacing
from kdq.utils.progress import progress

log = logging.getLogger(__name__)


@dataclass
class Best:
    """A learner at its best: validation accuracy 0 to 1, the epoch (from 0), and the weights on the CPU."""

    top1: float = -1.0
    epoch: int = -1
    weights: dict[str, Tensor] = field(default_factory=dict)


def ranked(best: Mapping[str, Best]) -> list[str]:
    """The learners from the best one down; of equals the first comes first: the student before its peers."""
    return sorted(best, key=lambda name: -best[name].top1)


class KeepBest(Callback):
    """Remembers each learner's weights of the epoch with its highest validation accuracy (the last of equals, which
    saw the lowest learning rate), or of the last one where its module ``keeps`` that.

    They travel inside the one checkpoint that is written each epoch: a crash can never separate the two. So does
    whether a callback such as EarlyStopping ended the training, which then stays ended.
    """

    def __init__(self) -> None:
        self.best: dict[str, Best] = {}
        self.seconds = 0.0
        self._since, self._validated = 0.0, -1
        self._stopped = False
        self._trainer: L.Trainer | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer = trainer
        trainer.should_stop |= self._stopped

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = trainer.current_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1  # the last epoch is validated, whichever others are

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        self.seconds += time.perf_counter() - self._since
        if self._validated != trainer.current_epoch:  # check_val_every_n_epoch, or max_steps ended it
            return
        for name, learner in pl_module.learners.items():
            top1, loss = pl_module.last_validated("top1", name), pl_module.last_validated("loss", name)
            if not math.isfinite(loss):
                raise KdqError(
                    f"the validation loss became {loss} at epoch {trainer.current_epoch}: "
                    f"lower the learning rate (recipe.lr={pl_module.config.lr}) or set recipe.clip_grad=1"
                )
            if pl_module.keeps == "last" or name not in self.best or top1 >= self.best[name].top1:
                state = learner.eval_network.state_dict()
                plain = torch.contiguous_format
                weights = {key: tensor.detach().cpu().clone(memory_format=plain) for key, tensor in state.items()}
                self.best[name] = Best(top1, trainer.current_epoch, weights)

    def state_dict(self) -> dict[str, Any]:
        # Asked now: Lightning lets EarlyStopping decide after all other callbacks.
        stopped = self._stopped or (self._trainer is not None and self._trainer.should_stop)
        best = {name: vars(best) for name, best in self.best.items()}
        return {"best": best, "seconds": self.seconds, "stopped": stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = {name: Best(**best) for name, best in state_dict["best"].items()}
        self.seconds, self._stopped = state_dict["seconds"], state_dict.get("stopped", False)


class _Progress(Callback):
    """One bar for the whole training, which shows the last validation accuracy."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Only the first process has a terminal to itself.
        steps, done = int(trainer.num_training_batches), trainer.current_epoch
        epochs = trainer.max_epochs or 0
        self.bar = progress(self.title, steps * epochs, "step") if trainer.is_global_zero else tqdm(disable=True)
        self.bar.update(steps * done)

    def on_train_batch_end(self, *_: Any) -> None:
        self.bar.update()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        top1 = 100 * float(trainer.callback_metrics.get("val/top1", math.nan))
        self.bar.set_postfix_str(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, val {top1:.2f}%", refresh=False
        )

    def teardown(self, *_: Any, **__: Any) -> None:
        if hasattr(self, "bar"):
            self.bar.close()

    on_exception = teardown  # Lightning tears callbacks down only after a good end


class _Beside(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then renames it. Lightning writes to the system's temporary folder:
    where that is on another disk, the last step is a copy, and a training killed meanwhile has lost its checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def _seed_epoch(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Start an epoch from a random state of its own, so that networks with dropout resume exactly, too. Each process
    has its own state: it sees other images."""
    assert isinstance(pl_module, DistillationModule)
    epoch = pl_module.seed * 1_000_003 + trainer.current_epoch
    torch.manual_seed(epoch * trainer.world_size + trainer.global_rank)


def fit(
    module: DistillationModule,
    images: Images,
    trainer: Mapping[str, Any],
    recipe: Recipe,
    work: Path,
    loggers: Iterable[Logger] = (),
    callbacks: Sequence[Callback] = (),
    title: str = "training",
) -> tuple[dict[str, Best], dict[str, Any]]:
    """Train ``module`` and return its learners at their best (by validation accuracy) and how it went.

    Raises:
        StoppedTrialError: a :class:`SuccessiveHalving` among the ``callbacks`` ended it.

    Args:
        trainer: the ``trainer`` config, see :mod:`kdq.train.trainer`. With several devices this process must be one of
            :mod:`kdq.train.processes`.
        work: where the checkpoint of the last finished epoch lives; a training found there is continued.
    """
    best, checkpoint, probe = KeepBest(), work / "last.ckpt", ThreadProbe(trainer.get("threads", "auto"))
    steps = len(images.split.train) // recipe.batch_size
    every = trainer.get("log_every_n_steps") or max(1, min(20, steps))  # at least once an epoch
    bar = [] if trainer.get("enable_progress_bar") is False else [_Progress(title)]
    lightning = training_trainer(
        trainer,
        recipe.epochs,
        callbacks=[
            *callbacks,
            best,
            LambdaCallback(on_train_epoch_start=_seed_epoch),
            *bar,
            Monitor(every),
            probe,
            ModelCheckpoint(work, "last", save_on_train_epoch_end=True, enable_version_counter=False),
        ],
        logger=list(loggers) or False,
        log_every_n_steps=every,
        default_root_dir=work,
        plugins=[_Beside()],
    )
    try:
        for network in module.networks():
            network.to(memory_format=torch.channels_last)  # as the images are: what convolutions are fastest in
            if trainer["compile"]:
                network.compile()
        finished = finished_epochs(checkpoint)
        resume = str(checkpoint) if finished else None
        if resume and lightning.is_global_zero:
            log.info("%s: going on after epoch %d of %d", title, finished, recipe.epochs)
        data = ImageDataModule(images, recipe.batch_size, module.seed, recipe.accumulate)
        with interruptible(lightning, lambda: f"epoch {finished_epochs(checkpoint) + 1}"):
            lightning.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    finally:  # what it holds on the device is for the next job of this process
        lightning.strategy.teardown()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not best.best:
        raise KdqError("the training ended without a validated epoch")
    for callback in callbacks:
        if isinstance(callback, SuccessiveHalving) and (value := callback.stopped) is not None:
            raise StoppedTrialError(
                f"{title} was stopped after {lightning.current_epoch} of {recipe.epochs} epochs: {callback.monitor} "
                f"{value:.4g} is not among the best of every {callback.factor} of its search", value
            )  # fmt: skip
    trained_images = max(1, steps) * min(recipe.batch_size, len(images.split.train)) * lightning.current_epoch
    metrics = {
        "epochs": lightning.current_epoch,
        "train_seconds": best.seconds,
        "images_per_second": trained_images / max(best.seconds, 1e-9),
        "precision": str(lightning.precision),
        "processes": lightning.world_size,  # of which each has BatchNorm statistics of its own images
        "threads": probe.threads,
        "torch": str(torch.__version__),
    }
    return best.best, metrics


def finished_epochs(checkpoint: Path) -> int:
    """How far the training got whose last checkpoint this is; 0 without one."""
    if not checkpoint.is_file():
        return 0
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["epoch"]) + 1
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        raise KdqError(
            f"the checkpoint {checkpoint} is damaged: delete {checkpoint.parent} to train again from the start"
        ) from error
