"""Ranges of the tensors of an ONNX graph, by the quantizer's own rule, from calibration images."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdq.deploy.runtime import session
from kdq.errors import KdqError
from kdq.quant.activations import ActivationQuantizer, Histogram

#: Images that run at a time: all the asked tensors of a chunk are in memory at once.
CHUNK = 16
#: Values of a tensor that are looked at, of each image: the same places of all.
SAMPLE = 8192


def ranges(
    model: Any, tensors: Collection[str], images: Iterable[Tensor], bits: int = 8, choice: str = "mse"
) -> dict[str, ActivationQuantizer]:
    """A quantizer for each of ``tensors``.

    Args:
        model: the float ``onnx.ModelProto``.
        images: batches ``(batch, channels, height, width)``.
        bits, choice: see :meth:`kdq.quant.activations.Histogram.quantizer`.

    Raises:
        KdqError: there are no images.
    """
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    inputs = {item.name for item in model.graph.input}
    computed = [name for name in tensors if name not in inputs]
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in computed)
    runner = session(probe.SerializeToString())
    histograms = {name: Histogram() for name in tensors}
    for batch in images:
        for chunk in batch.cpu().split(CHUNK):
            values = dict(zip(computed, runner.run(None, {"image": np.ascontiguousarray(chunk.numpy())}), strict=True))
            for name in tensors:
                histograms[name].add(_sample(chunk if name in inputs else torch.from_numpy(values[name])))
    if any(histogram.counts is None for histogram in histograms.values()):
        raise KdqError("INT8 needs calibration images and got none: give deploy.images of them, or some batches")
    return {name: histogram.quantizer(bits, choice) for name, histogram in histograms.items()}


def _sample(values: Tensor) -> Tensor:
    """``SAMPLE`` values of every image, or all if there are fewer."""
    flat = values.flatten(1)
    if flat.shape[1] <= SAMPLE:
        return flat
    places = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))[:SAMPLE]
    return flat[:, places]
