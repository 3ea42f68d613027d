"""How good a network is, each image counted once."""

from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


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
