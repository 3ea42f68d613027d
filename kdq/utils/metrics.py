"""How good a network is, each image counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> dict[str, float]:
    """Metrics of ``network`` in eval mode, in float32 (convolutions without TF32).

    Returns:
        ``top1`` and ``top5`` in percent (top5 is top-k with k = the number of classes where there are fewer than
        five), ``nll``, the mean cross-entropy in nats, and ``ece``, the expected calibration error with 15 bins in
        percent.
    """
    network = network.eval()
    device = next(network.parameters()).device
    accuracy = classification_metrics(num_classes).to(device)
    nll = MeanMetric().to(device)
    cudnn = torch.backends.cudnn
    with torch.inference_mode(), cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for images, labels in batches:
            logits = network(images).float()
            accuracy.update(logits.softmax(1), labels)
            nll.update(nn.functional.cross_entropy(logits, labels), weight=len(labels))
    # float32 carries seven digits: the rest would be noise in the tables.
    result = {name: round(100 * float(value), 4) for name, value in accuracy.compute().items()}
    return result | {"nll": round(float(nll.compute()), 6)}


def classification_metrics(num_classes: int) -> MetricCollection:
    """``top1``, ``top5`` (of fewer classes: all of them) and ``ece``, the expected calibration error with 15 bins.

    They are shares, and are updated with probabilities ``(batch, classes)`` and labels ``(batch,)``.
    """
    return MetricCollection(
        {
            # "micro" counts images; torchmetrics' default averages over classes.
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15),
        }
    )
