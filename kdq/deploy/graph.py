"""A torch network as a float ONNX graph with BatchNorm folded into the layers before it."""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdq.deploy.runtime import needs
from kdq.quant.activations import ActivationQuantizer, remove_hooks
from kdq.quant.batches import logits_of
from kdq.quant.layers import layer_name, weight_of
from kdq.quant.packing.packed import keep_decoded
from kdq.quant.packing.weights import copied
from kdq.utils.errors import KdqError

#: The newest that ONNX Runtime fuses INT8 graphs of.
OPSET = 21
_aten = torch.ops.aten


@dataclass(frozen=True)
class FloatGraph:
    """An ONNX model, and what its weights are of the network's own.

    Attributes:
        model: ``onnx.ModelProto``; its input ``image`` ``(batch, channels, height, width)`` and its output ``logits``
            have a dynamic batch, and a layer's weight is the initializer ``<layer>.weight``.
        factors: quantized layer to ``(out_channels,)``, float64: what the BatchNorm folded into the layer multiplied
            its channels by; ones where there is none. A layer whose weight in the graph is anything else is not there.
    """

    model: Any
    factors: dict[str, Tensor]


def float_graph(network: nn.Module, shape: tuple[int, ...]) -> FloatGraph:
    """``network``, in eval mode and with its weights decoded, as ONNX.

    Args:
        shape: of one input image, ``(channels, height, width)``. Rounded activations are left out: they are added to
            the graph by :func:`kdq.deploy.qdq.int8_graph`.
    """
    needs("onnx", "onnxscript")
    plain = _decoded(network)
    for module in plain.modules():
        remove_hooks(module, ActivationQuantizer)
    forward = plain.forward
    plain.forward = lambda images: logits_of(forward(images))
    program = _exported(plain, shape)
    with _quietly():
        _pool(program.graph)
        _flatten(program.graph)
        try:
            exported = torch.onnx.export(
                program, (), input_names=["image"], output_names=["logits"], opset_version=OPSET, verbose=False
            )
        except Exception as error:
            raise KdqError(f"ONNX cannot hold this network: {_unsupported(error)}") from error
    assert exported is not None
    model = exported.model_proto
    _name_pools(model.graph)
    return FloatGraph(model, _factors(model.graph, plain))


def _decoded(network: nn.Module) -> nn.Module:
    """A copy on the CPU with every weight decoded."""
    plain = copied(network).cpu().to(memory_format=torch.contiguous_format).eval()
    for module in list(plain.modules()):
        keep_decoded(module)
    return plain


def torch_program(network: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """The network as it was evaluated, for ``torch.export.save``; arguments and errors as :func:`float_graph`'s.

    ``torch.export.load(path).module()`` runs it with torch alone, for any batch.
    """
    return _exported(_decoded(network), shape)


def _exported(network: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    with _quietly():
        try:
            dynamic = ({0: torch.export.Dim("batch")},)
            return torch.export.export(network, (torch.zeros(2, *shape),), dynamic_shapes=dynamic)
        except Exception as error:  # torch raises many kinds, for many reasons, over many lines
            raise KdqError(f"torch cannot export this network for {shape} images: {_first_line(error)}") from error


def _pool(graph: torch.fx.Graph) -> None:
    """Write pooling to one value a channel as a mean or maximum that keeps its axes. The exporter would keep an
    average's strides, by gathering indices made from the number of images; from those, and from a rounded maximum that
    loses its axes, OpenVINO computes something else."""
    for node in list(graph.nodes):
        if node.target == _aten.adaptive_avg_pool2d.default and tuple(node.args[1]) in ((1,), (1, 1)):
            node.target, node.args = _aten.mean.dim, (node.args[0], [-2, -1], True)
        elif node.target in (_aten.mean.dim, _aten.amax.default) and node.meta["val"].ndim == 2:
            images, axes = node.args[0], [axis % 4 for axis in node.args[1] or ()]
            if sorted(axes) != [2, 3] or images.meta["val"].ndim != 4:
                continue
            with graph.inserting_before(node):
                kept = graph.call_function(node.target, (images, axes, True), node.kwargs)
            kept.meta["val"] = node.target(images.meta["val"], axes, True, **node.kwargs)
            node.target, node.args, node.kwargs = _aten.reshape.default, (kept, [-1, kept.meta["val"].shape[1]]), {}
    graph.lint()


def _flatten(graph: torch.fx.Graph) -> None:
    """Give linear layers on tokens one row for each: ONNX has such layers for matrices alone, and of others it would
    make a product with a constant of its own."""
    for node in list(graph.nodes):
        if node.target != _aten.linear.default or (made := node.meta["val"]).ndim < 3:
            continue
        tokens, features = node.args[0], node.args[0].meta["val"].shape[-1]
        sides = [side if isinstance(side, int) else -1 for side in made.shape]
        if sides.count(-1) > 1:
            continue
        with graph.inserting_before(node):
            rows = graph.call_function(_aten.reshape.default, (tokens, [-1, features]))
        with graph.inserting_after(node):
            back = graph.call_function(_aten.reshape.default, (node, sides))
        node.replace_all_uses_with(back, lambda user, back=back: user is not back)
        node.args = (rows, *node.args[1:])
        rows.meta["val"], back.meta["val"] = tokens.meta["val"].reshape(-1, features), made
        node.meta["val"] = made.reshape(-1, made.shape[-1])
    graph.lint()


def _name_pools(graph: Any) -> None:
    """Name means over height and width, which torch makes of pooling, what runtimes have fast kernels for."""
    import onnx

    constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.value_info)}
    for node in graph.node:
        if node.op_type != "ReduceMean" or ranks.get(node.input[0]) != 4 or len(node.input) < 2:
            continue
        axes = {int(axis) % 4 for axis in constants.get(node.input[1], ())}
        if axes == {2, 3} and {entry.name: entry.i for entry in node.attribute}.get("keepdims", 1):
            node.op_type = "GlobalAveragePool"
            del node.attribute[:], node.input[1:]
    read = {name for node in graph.node for name in node.input}
    for item in [item for item in graph.initializer if item.name not in read]:  # the axes
        graph.initializer.remove(item)


def _factors(graph: Any, network: nn.Module) -> dict[str, Tensor]:
    """What ``graph``, whose BatchNorms were folded as the exporter sees fit, multiplied the weights' channels by."""
    import onnx

    weights, factors = getattr(network, "quantized_weights", {}), {}
    for item in graph.initializer:
        if not item.name.endswith("weight") or (layer := layer_name(item.name)) not in weights:
            continue
        own = weight_of(network, layer).detach().double()
        made = torch.from_numpy(onnx.numpy_helper.to_array(item).astype("float64"))
        if made.shape != own.shape:
            continue
        rows, own = made.flatten(1), own.flatten(1)
        factor = ((rows * own).sum(1) / (own * own).sum(1)).nan_to_num(1)
        if torch.allclose(rows, own * factor[:, None], rtol=1e-4, atol=1e-30):
            factors[layer] = factor
    return factors


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporters tell their progress and their plans; what concerns a user comes as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _unsupported(error: BaseException) -> str:
    """The operation that ONNX lacks, which is deep in the chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        if found := re.search(r"op='([\w.]+)'", str(cause)):
            return f"it has no {found[1]}; replace that operation, or use the packed or the torch format"
        cause = cause.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
