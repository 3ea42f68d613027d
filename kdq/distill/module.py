"""What every method shares: an ordinary LightningModule around one or more networks in training.

In a plain script, with one's own loaders:

    module = VKD(student, teacher=teacher, num_classes=10)
    trainer = L.Trainer(max_epochs=30, callbacks=[ModelCheckpoint(monitor="val/top1", mode="max")])
    trainer.fit(module, train_loader, val_loader)
    trainer.test(module, test_loader, ckpt_path="best")

A method is a subclass with :meth:`DistillationModule.losses`; see :mod:`kdq.distill.vkd` for a short one.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from inspect import Parameter, Signature, signature
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from kdq.distill.checkpoint import Network, built, described, unpickled
from kdq.distill.config import TrainConfig
from kdq.distill.learner import Learner, classification_metrics
from kdq.distill.losses import soft_cross_entropy
from kdq.distill.options import options_of
from kdq.distill.progress import TrainingProgress
from kdq.utils.checks import is_peer
from kdq.utils.errors import KdqError

#: Options of :class:`TrainConfig` that flags of a Trainer ask for, too, and the value that asks for nothing.
FLAGS = (("clip_grad", "gradient_clip_val", None), ("accumulate", "accumulate_grad_batches", 1))


class DistillationModule(L.LightningModule):
    """Trains ``student`` with the sum of the terms that :meth:`losses` names.

    It logs ``train/loss`` and ``train/<term>`` of each step, ``train/top1``, ``val/top1`` and ``val/loss`` of each
    epoch, ``test/top1``, ``test/top5``, ``test/ece`` and ``test/loss``; shares, not percent. Batches are ``(images,
    labels)``: float images ``(batch, channels, height, width)`` and int64 labels ``(batch,)``; a third entry, int64
    indices ``(batch,)``, reaches methods as ``progress.indices``.

    >>> class Plain(DistillationModule):
    ...     def losses(self, images, labels, progress):
    ...         logits = self.student(images)
    ...         return {"ce": soft_cross_entropy(logits, labels)}, logits
    >>> module = Plain(nn.Linear(4, 3), num_classes=3)

    Args:
        student: the network, which gives logits ``(batch, num_classes)``.
        num_classes: classes of the data.
        config: optimizer, schedule and the like; override ``configure_optimizers`` for others.
        seed: of whatever a method draws.
        options: those that the method declares, see :mod:`kdq.distill.options`.
    """

    #: The config group that its options lie in, for messages.
    group = "method"
    #: The networks that the method takes beside the student, as keyword arguments: ``teacher``, ``peer``.
    takes: tuple[str, ...] = ()
    #: Whether it needs each image's place in the training set; kdq's loader gives it where this is set.
    indexed = False
    #: Whether it looks at what layers inside of its networks give, where compiled ones show nothing.
    looks_inside = False
    #: Which epoch kdq's own training keeps: the ``best`` on validation images, or the ``last``.
    keeps = "best"

    def __init__(
        self,
        student: Network,
        *,
        num_classes: int,
        config: TrainConfig | Mapping[str, Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        known = options_of(type(self))
        if unknown := sorted(options.keys() - known):
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {unknown[0]!r}")
        given = {name: options.get(name, each.default) for name, each in known.items()}
        chosen = {name: each.check(f"{self.group}.{name}", given[name]) for name, each in known.items()}
        vars(self).update(chosen)
        # Of this class's and of the method's own arguments. The teacher's network stays out of every checkpoint, and so
        # does how LightningCLI would build the module.
        self.save_hyperparameters(ignore=["student", "teacher", "peer", "config", "_instantiator", "_class_path"])
        self.hparams.update(chosen)
        self.config = TrainConfig(**config) if isinstance(config, Mapping) else config or TrainConfig()
        self.hparams["config"] = asdict(self.config)  # plain values: checkpoints are loaded weights-only
        self.num_classes, self.seed = num_classes, seed
        self.student = Learner(built(student, "student"), num_classes, self.config.ema)
        self.test_metrics = classification_metrics(num_classes)
        self.test_loss = MeanMetric()

    def __init_subclass__(cls) -> None:
        """Say by the signature of the class what it takes: arguments of its own and of its bases, and all options."""
        super().__init_subclass__()
        bases = [base for base in cls.__mro__ if issubclass(base, DistillationModule) and "__init__" in vars(base)]
        each = [parameter for base in bases for parameter in signature(base.__init__).parameters.values()]
        taken: dict[str, Parameter] = {}
        for p in each:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self":
                taken.setdefault(p.name, p)
        for name, option in options_of(cls).items():
            taken.setdefault(name, Parameter(name, Parameter.KEYWORD_ONLY, default=option.default))
        order = sorted(taken.values(), key=lambda p: (p.kind, p.default is not p.empty))
        cls.__signature__ = Signature(order)  # type: ignore[attr-defined]

        def new(kind: type[Self], *args: Any, **options: Any) -> Self:
            return object.__new__(kind)

        # LightningCLI asks a class for the arguments of its own __new__, and only without one for those of __init__.
        new.__signature__ = Signature([Parameter("kind", Parameter.POSITIONAL_OR_KEYWORD), *order])  # type: ignore[attr-defined]
        cls.__new__ = staticmethod(new)  # type: ignore[assignment, method-assign]

    @property
    def hparams_initial(self) -> Any:
        """What loggers record of the module."""
        return self.hparams

    @property
    def learners(self) -> dict[str, Learner]:
        """The networks in training, by name. The first one's metrics have the plain names."""
        return {"student": self.student}

    @property
    def eval_network(self) -> nn.Module:
        """The network that is validated and that the training is for: the averaged one where ``config.ema`` is set."""
        return self.student.eval_network

    @staticmethod
    def product(student: nn.Module, teacher: nn.Module, images: Tensor) -> nn.Module:
        """The network that is trained and kept where ``student`` is given: itself, unless a method makes another one of
        it by a look at what both make of ``images``."""
        return student

    def networks(self) -> list[nn.Module]:
        """Every network that a step runs, the frozen ones too: what ``trainer.compile`` compiles."""
        return [learner.network for learner in self.learners.values()]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of :attr:`eval_network`."""
        return self.eval_network(images)

    def losses(self, images: Tensor, labels: Tensor, progress: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        """The named terms whose sum is minimised, and the student's logits."""
        raise NotImplementedError(f"{type(self).__name__} must define losses(images, labels, progress)")

    def setup(self, stage: str) -> None:
        if stage != "fit" or not self.automatic_optimization:
            return
        self._portions = self.trainer.accumulate_grad_batches
        for option, flag, unset in FLAGS:
            mine, theirs = getattr(self.config, option), getattr(self.trainer, flag)
            if unset not in (mine, theirs) and mine != theirs:
                raise KdqError(f"{option}={mine} and Trainer({flag}={theirs}) differ: give one of them")
        if self.config.accumulate > 1:
            self.trainer.accumulate_grad_batches = self.config.accumulate

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self.automatic_optimization:  # the Trainer is its owner's, for another fit
            self.trainer.accumulate_grad_batches = self._portions

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor | None:
        images, labels, *rest = self.unpacked(batch)
        progress = self.progress(batch_idx)
        terms, logits = self.losses(images, labels, replace(progress, indices=rest[0]) if rest else progress)
        return self.total("student", terms, logits, labels)

    @staticmethod
    def unpacked(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A training batch. Raises KdqError for labels that are no indices."""
        if batch[1].is_floating_point():
            raise KdqError("labels must be class indices, not probabilities: to mix images, use the method Mixup")
        return batch

    def first_images(self) -> Tensor:
        """Two of the training's first batch, before it starts; the look changes nothing that is drawn later."""
        with torch.random.fork_rng(devices=[]):
            # The loader itself: Lightning shows it as trainer.train_dataloader only when the optimizers are there.
            images, *_ = next(iter(self.trainer.fit_loop._data_source.dataloader()))
        return images[:2]

    def progress(self, batch_idx: int) -> TrainingProgress:
        trainer, steps = self.trainer, self.trainer.num_training_batches
        epochs: float = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else math.inf  # type: ignore[assignment]
        epoch, last = trainer.current_epoch, self.max_steps * trainer.accumulate_grad_batches
        if math.isinf(steps) and not math.isinf(last):  # nobody knows how long an epoch is: all are one
            epoch, batch_idx, epochs, steps = 0, trainer.fit_loop.total_batch_idx, 1, last
        elif trainer.max_steps > 0:
            epochs = min(epochs, last / steps)
        return TrainingProgress(epoch, batch_idx, epochs, steps, trainer.global_rank, trainer.world_size)

    @property
    def max_steps(self) -> float:
        """The steps of each optimizer at which the Trainer, which counts those of all, ends; infinite without such."""
        return self.trainer.max_steps / len(self.learners) if self.trainer.max_steps > 0 else math.inf

    def total(self, name: str, terms: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of one learner's ``terms``; it and they are logged, without waiting for the device.

        Only where a logger takes them, and at an epoch's end: a call of ``log`` costs a tenth of a millisecond.
        """
        loss = torch.stack(list(terms.values())).sum()
        learner, suffix = self.learners[name], self.suffix(name)
        learner.train_top1.update(logits.detach(), labels)
        if self.trainer._logger_connector.should_update_logs or self.trainer.is_last_batch:
            values = {f"train/{term}{suffix}": value.detach() for term, value in {"loss": loss, **terms}.items()}
            self.log_dict(values, on_step=True, on_epoch=False)
        return loss

    def on_train_epoch_start(self) -> None:
        for learner in self.learners.values():
            learner.train_top1.reset()

    def on_train_epoch_end(self) -> None:
        for name, learner in self.learners.items():
            self.log(f"train/top1{self.suffix(name)}", learner.train_top1)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        value = self.config.clip_grad if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, value, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.student.stepped()

    def on_validation_epoch_start(self) -> None:
        """Give all processes one network: BatchNorm statistics are each process's own, and their mean uses all."""
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.trainer.strategy.reduce(buffer, reduce_op="mean"))
        for learner in self.learners.values():  # as they were left by a loop under inference_mode they cannot go on
            learner.val_top1.reset()
            learner.val_loss.reset()

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        images, labels, *_ = batch
        for name, learner in self.learners.items():
            logits, suffix = learner.eval_network(images), self.suffix(name)
            learner.val_top1.update(logits, labels)
            learner.val_loss.update(soft_cross_entropy(logits, labels), weight=len(labels))
            self.log(f"val/top1{suffix}", learner.val_top1, prog_bar=True)
            self.log(f"val/loss{suffix}", learner.val_loss)

    def on_test_epoch_start(self) -> None:
        self.test_metrics.reset()
        self.test_loss.reset()

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        images, labels, *_ = batch
        logits = self(images).float()
        self.test_metrics.update(logits.softmax(1), labels)
        self.test_loss.update(soft_cross_entropy(logits, labels), weight=len(labels))
        self.log_dict({f"test/{name}": metric for name, metric in self.test_metrics.items(keep_base=True)})
        self.log("test/loss", self.test_loss)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits ``(batch, classes)``; ``batch`` is images, or a tuple that begins with them."""
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def last_validated(self, metric: str, name: str) -> float:
        """A learner's ``top1`` (0 to 1) or ``loss`` in the last validation."""
        return float(self.trainer.callback_metrics[f"val/{metric}{self.suffix(name)}"])

    def configure_optimizers(self) -> Any:
        steps, batches = self.trainer.estimated_stepping_batches, self.trainer.num_training_batches
        if steps < 0:  # of a data set without a length
            steps = math.inf
        if not self.automatic_optimization and not math.isinf(steps):  # its Trainer takes every batch for a step
            epochs, steps = self.trainer.max_epochs or -1, self.max_steps
            if epochs > 0 and not math.isinf(batches):
                steps = min(steps, epochs * math.ceil(batches / self.config.accumulate))
        if math.isinf(steps) and self.config.schedule != "constant":
            raise KdqError(
                f"schedule={self.config.schedule} needs an end: give Trainer(max_epochs=...), or max_steps for data "
                "without a length, or TrainConfig(schedule='constant')"
            )
        # Lightning cannot clip the gradients of a fused optimizer under autocast.
        fused = self.config.clip_grad is None and self.trainer.gradient_clip_val is None
        optimizers = [self.optimizer(learner, fused) for learner in self.learners.values()]
        return [
            {"optimizer": each, "lr_scheduler": {"scheduler": self.config.scheduler(each, steps), "interval": "step"}}
            for each in optimizers
        ]

    def trained_parameters(self, learner: Learner) -> Iterator[nn.Parameter]:
        """What a learner's optimizer trains: its network, and what a method has beside it."""
        return learner.network.parameters()

    def optimizer(self, learner: Learner, fused: bool) -> Optimizer:
        """What trains a learner; ``fused`` where nothing clips its gradients under autocast."""
        return self.config.optimizer(self.trained_parameters(learner), fused)

    def suffix(self, name: str) -> str:
        """What a learner's metrics have behind their names."""
        return "" if name == next(iter(self.learners)) else f"_{name}"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the trained networks are, so that ``load_from_checkpoint(path)`` needs no more."""
        described_networks = {name: described(learner.network) for name, learner in self.learners.items()}
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] |= described_networks

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """The module of a checkpoint, as :meth:`lightning.LightningModule.load_from_checkpoint` gives it.

        Networks of kdq's and torchvision's are built again; others are given, ``student=network``, or read from the
        file with ``weights_only=False``, which runs code that is in it. The teacher is in no checkpoint: give
        ``teacher=network`` to train on.
        """
        if kwargs.get("weights_only") is False:
            found = torch.load(checkpoint_path, map_location="cpu", weights_only=False)
            hyper = found.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
            networks = (name for name in hyper if name == "student" or is_peer(name))
            kwargs = {name: unpickled(hyper[name]) for name in networks} | kwargs
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
