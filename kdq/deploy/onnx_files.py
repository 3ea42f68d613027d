"""ONNX models of packed networks: made, described in their metadata, checked, and measured."""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kdq.deploy.calibrate import divergence, histograms
from kdq.deploy.codes import TYPES, codes_graph
from kdq.deploy.graph import FloatGraph, float_graph
from kdq.deploy.qdq import ACT_BITS, int8_graph, unmeasured
from kdq.deploy.runtime import needs
from kdq.quant.activations import RANGES
from kdq.quant.packing.packed import QuantizedWeight
from kdq.utils.checks import one_of
from kdq.utils.errors import KdqError
from kdq.utils.version import __version__

log = logging.getLogger(__name__)

FORMATS = ("fp32", "int8", "codes")
#: A choice of activation ranges beside :data:`kdq.quant.activations.RANGES`; see :func:`onnx_models`.
CLOSEST = "closest"


def onnx_models(
    network: nn.Module,
    shape: tuple[int, ...],
    formats: Sequence[str] = FORMATS,
    calibration: Iterable[Tensor] | None = None,
    act_range: str = CLOSEST,
) -> dict[str, bytes]:
    """ONNX files by format.

    Args:
        network: a packed network as :func:`kdq.load` or :func:`kdq.quantize` gives it, or a float one.
        shape: of one image, ``(channels, height, width)``.
        formats: of :data:`FORMATS`. ``fp32``: float arithmetic on the network's own weights; rounded inputs of layers
            are left float. ``codes``: the same, its weights stored as codes of 2, 4, 8 or 16 bits. ``int8``: INT8
            arithmetic; up to seven bits a layer keeps its levels.
        calibration: normalised image batches ``(batch, channels, height, width)``, for the ranges of INT8 activations.
        act_range: how the ranges of INT8 activations are chosen: see :meth:`kdq.quant.activations.Histogram.quantizer`;
            ``closest``: whichever makes the INT8 model predict most nearly what the float one does, on those images.
            No rule is best for every network: the fewer values are far from the rest, the less should be clipped.

    Raises:
        KdqError: an operation cannot be exported, or INT8 lacks calibration images.
    """
    needs("onnx", "onnxruntime", "onnxscript")
    for name in formats:
        one_of("formats", name, FORMATS)
    source, found = float_graph(network, shape), {}
    card = _card(network, shape)
    if "fp32" in formats:
        found["fp32"] = _finished(source.model, card | {"kdq.weights": "float32"})
    if "codes" in formats:
        weights: Mapping[str, QuantizedWeight] = getattr(network, "quantized_weights", {})
        model, stored = codes_graph(source, weights)
        _tell_float("codes", {name for name, weight in weights.items() if weight.bits <= max(TYPES)} - set(stored))
        widths = ", ".join(f"{count} layers in {bits} bits" for bits, count in sorted(Counter(stored.values()).items()))
        found["codes"] = _finished(model, card | {"kdq.weights": f"codes: {widths or 'none'}"})
    if "int8" in formats:
        model, levels = _int8(source, network, calibration, act_range)
        found["int8"] = _finished(model, card | {"kdq.weights": levels})
    return found


def _int8(
    source: FloatGraph, network: nn.Module, calibration: Iterable[Tensor] | None, act_range: str
) -> tuple[Any, str]:
    """The INT8 model and what to say about its weights."""
    weights = getattr(network, "quantized_weights", {})
    own = getattr(network, "quantized_activations", {})
    tensors = unmeasured(source.model.graph, own)
    if tensors and calibration is None:
        raise KdqError(
            f"INT8 needs calibration images: {len(tensors)} tensors, such as {tensors[0]}, have no range; name a data "
            "set, for example data=cifar10"
        )
    batches = list(calibration or [])
    measured = histograms(source.model, tensors, batches)

    def quantized(choice: str) -> tuple[Any, dict[str, Tensor]]:
        chosen = {name: histogram.quantizer(ACT_BITS, choice) for name, histogram in measured.items()}
        return int8_graph(source, weights, own, chosen)

    choices = RANGES if act_range == CLOSEST and tensors else (act_range,)
    candidates = [quantized(choice) for choice in choices]
    if len(candidates) > 1:
        candidates.sort(key=lambda candidate: divergence(source.model, candidate[0], batches))
    model, exact = candidates[0]
    _tell_float("INT8", set(weights) - set(exact))
    channels = sum(len(mask) for mask in exact.values())
    kept = sum(int(mask.sum()) for mask in exact.values())
    bits = sorted({weights[name].bits for name, mask in exact.items() if name in weights and bool(mask.any())})
    text = f"int8; {kept} of {channels} channels hold the packed network's own levels"
    return model, text + (f" of {', '.join(map(str, bits))} bits" if bits else "")


def _tell_float(where: str, layers: Collection[str]) -> None:
    if layers:
        log.warning("these layers stay float in %s: the exporter changed them: %s", where, ", ".join(sorted(layers)))


def _card(network: nn.Module, shape: tuple[int, ...]) -> dict[str, str]:
    """What a user of the file must know, as ONNX metadata."""
    preprocess: Mapping[str, Any] = getattr(network, "kdq_preprocess", None) or {}
    card = {"kdq.version": __version__, "kdq.input": json.dumps(["batch", *shape])}
    if preprocess:
        resize = preprocess.get("resize", "size")
        steps = (
            f"scale the shorter side to {resize} ({preprocess.get('interpolation', 'bilinear')}), cut size from the "
            "centre, scale pixels to 0..1, subtract mean, divide by std; channels first, RGB or gray"
        )
        card |= {"kdq.preprocess": json.dumps(dict(preprocess)), "kdq.preprocess_steps": steps}
    if classes := getattr(network, "kdq_classes", None):
        card["kdq.classes"] = json.dumps(list(classes))
    return card


def _finished(model: Any, card: Mapping[str, str]) -> bytes:
    """The checked file: without the exporter's notes, with ours."""
    import onnx

    model.producer_name, model.producer_version = "kdq", __version__
    del model.metadata_props[:]
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        if hasattr(part, "metadata_props"):
            del part.metadata_props[:]
    for value in graph.output:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.helper.set_model_props(model, dict(card))
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data
