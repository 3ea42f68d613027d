"""How good and how large a network is, each image counted once."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
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
    # "micro" counts images; torchmetrics' default averages over classes.
    accuracy = MetricCollection(
        {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15),
        }
    ).to(device)
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


def multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Multiply-accumulate operations of one forward pass on ``image`` ``(1, channels, height, width)``."""
    return sum(_multiply_adds_by_module(network, image)[""].values()) // 2


def bit_operations(network: nn.Module, image: Tensor) -> int:
    """Bit operations (BOPs) of one forward pass on ``image``: multiply-adds times the bits of the weights times the
    bits of the activations, 32 where they are float (Baskin et al. 2021, arXiv 1804.10969)."""
    weights = getattr(network, "quantized_weights", {})
    activations = getattr(network, "quantized_activations", {})
    by_module = _multiply_adds_by_module(network, image)
    total = 32 * 32 * (sum(by_module[""].values()) // 2)
    for name, weight in weights.items():
        bits = weight.bits * (activations[name].bits if name in activations else 32)
        total += (bits - 32 * 32) * (sum(by_module.get(name, {}).values()) // 2)
    return total


def _multiply_adds_by_module(network: nn.Module, image: Tensor) -> dict[str, dict[Any, int]]:
    """FLOPs (two a multiply-add) by module, named as in ``named_modules``, and by operation."""
    codes = getattr(network, "quantized_weights", {}).values()  # not copied: they are larger than the network
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(network, {id(weight): weight for weight in codes}).to("cpu").eval()(image.cpu())
    return {
        name.partition(".")[2]: dict(flops) for name, flops in counter.get_flop_counts().items() if name != "Global"
    }
