"""How good a network is: a Lightning evaluation, each image counted once."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from torch import Tensor, nn

from kdq.distill import CrossEntropy
from kdq.train.trainer import evaluation_trainer, interruptible
from kdq.utils.kernels import exact_kernels


def evaluate(network: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> dict[str, float]:
    """:func:`test` of a network where it is, on the batches of a loader."""
    device = next(network.parameters()).device
    trainer = evaluation_trainer({"accelerator": device.type})
    scores = test(trainer, CrossEntropy(network, num_classes=num_classes), loader)
    network.to(device)
    return scores


def test(trainer: L.Trainer, module: L.LightningModule, data: Any) -> dict[str, float]:
    """What ``trainer.test`` finds of one of kdq's modules on a loader or a datamodule, in float32 (convolutions without
    TF32): ``top1``, ``top5`` (of fewer classes, all of them) and ``ece``, the expected calibration error with 15 bins,
    in percent, and ``nll``, the mean cross-entropy in nats."""
    _run(trainer, trainer.test, module, data)
    values = {name: float(trainer.callback_metrics[f"test/{name}"]) for name in ("top1", "top5", "ece", "loss")}
    nll = values.pop("loss")
    # float32 carries seven digits: the rest would be noise in the tables.
    return {name: round(100 * value, 4) for name, value in values.items()} | {"nll": round(nll, 6)}


def validation_top1(trainer: L.Trainer, module: L.LightningModule, data: Any) -> float:
    """The accuracy, in percent, that ``trainer.validate`` finds, in the same arithmetic as :func:`test`."""
    _run(trainer, trainer.validate, module, data)
    return round(100 * float(trainer.callback_metrics["val/top1"]), 4)


def _run(trainer: L.Trainer, loop: Callable[..., Any], module: L.LightningModule, data: Any) -> None:
    with exact_kernels(trainer.strategy.root_device), interruptible(trainer):
        loop(module, data, verbose=False)
