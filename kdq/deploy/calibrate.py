"""Where the values of an ONNX graph's tensors lie, on calibration images, and how far a graph is from another."""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdq.deploy.runtime import logits, session
from kdq.quant.activations import Histogram
from kdq.utils.errors import KdqError

#: Images that run at a time: all the asked tensors of a chunk are in memory at once.
CHUNK = 16
#: Values of a tensor that are looked at, of each image: the same places of all.
SAMPLE = 8192


def histograms(model: Any, tensors: Collection[str], images: Iterable[Tensor]) -> dict[str, Histogram]:
    """The values of each of ``tensors`` of a float ``onnx.ModelProto`` on ``images``, batches ``(batch, channels,
    height, width)``."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    inputs = {item.name for item in model.graph.input}
    computed = [name for name in tensors if name not in inputs]
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in computed)
    runner = session(probe.SerializeToString()) if computed else None
    found = {name: Histogram() for name in tensors}
    for batch in images if tensors else ():
        for chunk in batch.cpu().split(CHUNK):
            made = runner.run(None, {"image": np.ascontiguousarray(chunk.numpy())}) if runner else ()
            values = dict(zip(computed, made, strict=True))
            for name in tensors:
                found[name].add(_sample(chunk if name in inputs else torch.from_numpy(values[name])))
    if any(histogram.counts is None for histogram in found.values()):
        raise KdqError(
            "INT8 needs calibration images and got none: give deploy.calibration_images of them, or some batches"
        )
    return found


def divergence(model: Any, other: Any, images: Iterable[Tensor]) -> float:
    """The mean KL divergence in nats of what ``other`` predicts from what ``model`` does, both ``onnx.ModelProto``."""
    runners, total, count = [session(each.SerializeToString()) for each in (model, other)], 0.0, 0
    for batch in images:
        reference, found = (torch.from_numpy(logits(runner, batch)).log_softmax(1) for runner in runners)
        total += float(F.kl_div(found, reference, reduction="sum", log_target=True))
        count += len(batch)
    return total / count


def _sample(values: Tensor) -> Tensor:
    """``SAMPLE`` values of every image, or all if there are fewer."""
    flat = values.flatten(1)
    if flat.shape[1] <= SAMPLE:
        return flat
    places = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))[:SAMPLE]
    return flat[:, places]
