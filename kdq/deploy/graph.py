"""A torch network as a float ONNX graph with BatchNorm folded into the layers before it."""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from kdq.deploy.fold import folded
from kdq.deploy.runtime import needs
from kdq.quant.activations import ActivationQuantizer, remove_hooks
from kdq.quant.packing.packed import keep_decoded
from kdq.quant.packing.weights import copied
from kdq.utils.errors import KdqError

#: The newest that ONNX Runtime fuses INT8 graphs of.
OPSET = 21
_aten = torch.ops.aten
_LAYERS = {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.linear.default}
_LAYERS |= {_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding}


@dataclass(frozen=True)
class FloatGraph:
    """An ONNX model, and by layer the factors of the BatchNorms folded into their weights.

    Attributes:
        model: ``onnx.ModelProto``; its input ``image`` ``(batch, channels, height, width)`` and its output ``logits``
            have a dynamic batch, and a layer's weight is the initializer ``<layer>.weight``.
        factors: layer name to ``(out_channels,)``.
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
    program = _exported(plain, shape)
    with _quietly():
        factors = _fold(program, plain)
        _flatten(program.graph)
        try:
            exported = torch.onnx.export(
                program, (), input_names=["image"], output_names=["logits"], opset_version=OPSET, verbose=False
            )
        except Exception as error:
            raise KdqError(f"ONNX cannot hold this network: {_unsupported(error)}") from error
    assert exported is not None
    model = exported.model_proto
    _pool(model.graph)
    return FloatGraph(model, factors)


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


def _fold(program: torch.export.ExportedProgram, network: nn.Module) -> dict[str, Tensor]:
    """Fold every BatchNorm that alone reads a layer's output; its bias becomes the layer's. Only where both take what
    their modules hold: what a forward pass computes (a weight, a bias, statistics) is not what folding would change."""
    held = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    factors = {}
    for node in list(program.graph.nodes):
        if node.target not in _LAYERS or len(node.users) != 1:
            continue
        norm, weight = next(iter(node.users)), node.args[1]
        if norm.target != _aten.batch_norm.default or norm.args[0] is not node or not _own(norm.args[2], weight):
            continue
        layer, module = (held.get(each.name, "").rpartition(".")[0] for each in (weight, norm.args[2]))
        bias_of_layer = node.args[2] if len(node.args) > 2 else None
        taken = {"weight": weight} | ({} if bias_of_layer is None else {"bias": bias_of_layer})
        affine = dict(zip(("weight", "bias", "running_mean", "running_var"), norm.args[1:5], strict=True))
        if not (_held(held, layer, taken) and _held(held, module, affine)):
            continue
        norm_module: Any = network.get_submodule(module)
        owner = network.get_submodule(layer)
        bias = None if bias_of_layer is None else owner.bias
        new_weight, new_bias, factor = folded(owner.weight, bias, norm_module)  # type: ignore[arg-type]
        program.state_dict[f"{layer}.weight"] = nn.Parameter(new_weight)
        program.state_dict[f"{module}.bias"] = nn.Parameter(new_bias)
        node.args = (*node.args[:2], norm.args[2], *node.args[3:])
        norm.replace_all_uses_with(node)
        program.graph.erase_node(norm)
        factors[layer] = factor
        node.graph.lint()
    return factors


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


def _pool(graph: Any) -> None:
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


def _held(held: Mapping[str, str], module: str, taken: Mapping[str, Node | None]) -> bool:
    """Every one of the inputs taken is the module's own of that name."""
    own = {name: f"{module}.{name}".removeprefix(".") for name in taken}
    return all(node is not None and held.get(node.name) == own[name] for name, node in taken.items())


def _own(*parameters: Node | None) -> bool:
    """The parameters exist and are used once: changing them changes nothing else."""
    return all(parameter is not None and len(parameter.users) == 1 for parameter in parameters)


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
