"""A float ONNX graph made INT8: QuantizeLinear and DequantizeLinear where integer kernels want them.

Every tensor that a convolution, a linear layer or a sum of two activations reads is rounded to UINT8 once; all its
readers take the rounded one. A runtime then fuses ``DequantizeLinear -> Conv -> Relu -> QuantizeLinear`` into one
integer kernel, the sum at the end of a residual block into another and the last pooling into a third, so that nothing
between the network's input and its output is float. Weights are INT8 with a scale per output channel, biases INT32.
"""

from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdq.deploy.fold import int8_weight
from kdq.deploy.graph import FloatGraph
from kdq.quant.activations import ActivationQuantizer
from kdq.quant.layers import layer_name
from kdq.quant.packing.packed import QuantizedWeight

#: Bits of activations in INT8 kernels.
ACT_BITS = 8
#: What averages: with a rounded input, the sum before it is an integer kernel. (Not the mean over tokens: of a rounded
#: one OpenVINO computes something else.)
POOLS = ("AveragePool", "GlobalAveragePool")


def layer_of(node: Any, weights: Container[str]) -> str | None:
    """The name of the convolution or linear layer that ``node`` is, if its weight is one of ``weights``."""
    if node.op_type not in ("Conv", "Gemm") or not node.input[1].endswith("weight") or node.input[1] not in weights:
        return None
    # Gemm holds a linear layer's weight transposed, as torch does.
    if node.op_type == "Gemm" and {a.name: a.i for a in node.attribute}.get("transB", 0) != 1:
        return None
    return layer_name(node.input[1])


def rounded_inputs(graph: Any) -> Iterator[tuple[Any, int, str]]:
    """``(node, input, layer)`` of everything that is rounded: the inputs of layers, and of pools and sums of two
    activations, which have no layer's name."""
    constants = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        layer = layer_of(node, constants)
        if layer is not None or node.op_type in POOLS:
            yield node, 0, layer or ""
        elif node.op_type == "Add" and not constants & set(node.input):
            yield from ((node, position, "") for position in range(2))


def quantizers(
    graph: Any, layer_inputs: Mapping[str, ActivationQuantizer], tensors: Mapping[str, ActivationQuantizer]
) -> list[tuple[Any, int, str, ActivationQuantizer | None]]:
    """The :func:`rounded_inputs`, each with the quantizer that rounds it: the layer's own; else that of a layer that
    reads the same tensor, if it has eight bits (fewer would cost a sum the precision it had); else the one of
    ``tensors``."""
    places, shared = list(rounded_inputs(graph)), dict(tensors)
    for node, position, layer in places:
        if layer in layer_inputs and layer_inputs[layer].bits == ACT_BITS:
            shared.setdefault(node.input[position], layer_inputs[layer])
    return [(*place, layer_inputs.get(place[2]) or shared.get(place[0].input[place[1]])) for place in places]


def unmeasured(graph: Any, layer_inputs: Mapping[str, ActivationQuantizer]) -> list[str]:
    """The rounded tensors whose ranges the network's own quantizers do not tell."""
    chosen = quantizers(graph, layer_inputs, {})
    return list(dict.fromkeys(node.input[position] for node, position, _, quantizer in chosen if quantizer is None))


def int8_graph(
    source: FloatGraph,
    coded: Mapping[str, QuantizedWeight],
    layer_inputs: Mapping[str, ActivationQuantizer],
    tensors: Mapping[str, ActivationQuantizer],
) -> tuple[Any, dict[str, Tensor]]:
    """The INT8 model, and by layer which channels hold the quantized network's own levels.

    Layers without codes are rounded to eight bits. The network's own quantizers round the inputs of its layers, and
    those of ``tensors`` the :func:`unmeasured` ones.
    """
    build = Builder(source, coded)
    for node, position, layer, quantizer in quantizers(build.model.graph, layer_inputs, tensors):
        assert quantizer is not None
        node.input[position] = build.rounded(node.input[position], quantizer)
        if layer:
            build.quantize_layer(node, layer, quantizer.scale)
    return build.finish(), build.exact


class Builder:
    """The model in the making."""

    def __init__(self, source: FloatGraph, coded: Mapping[str, QuantizedWeight]) -> None:
        import onnx

        self.onnx, self.coded, self.factors = onnx, coded, source.factors
        self.model = onnx.ModelProto()
        self.model.CopyFrom(source.model)
        self.constants = {item.name: onnx.numpy_helper.to_array(item) for item in self.model.graph.initializer}
        self.exact: dict[str, Tensor] = {}
        self.made: dict[tuple[str, ActivationQuantizer], str] = {}
        self.made_constants: dict[tuple[str, bytes, bytes], str] = {}
        self.nodes: dict[str, list[Any]] = {}

    def rounded(self, tensor: str, quantizer: ActivationQuantizer) -> str:
        """The name of ``tensor`` after rounding; each pair of nodes is made once."""
        if (tensor, quantizer) in self.made:
            return self.made[tensor, quantizer]
        others = sum(tensor == other for other, _ in self.made)  # a layer of few bits and a sum may read one tensor
        name = f"{tensor}_rounded{others or ''}"
        scale = self.constant(f"{name}_scale", np.float32(quantizer.scale))
        zero = self.constant(f"{name}_zero", np.uint8(quantizer.zero))
        nodes, source = [], tensor
        if quantizer.bits < ACT_BITS:  # UINT8 saturates at 255 only
            low, high = -quantizer.zero, 2**quantizer.bits - 1 - quantizer.zero
            limits = [
                self.constant(f"{name}_{end}", np.float32(quantizer.scale * code))
                for end, code in (("low", low), ("high", high))
            ]
            nodes.append(self.onnx.helper.make_node("Clip", [tensor, *limits], [f"{name}_clipped"]))
            source = f"{name}_clipped"
        nodes.append(self.onnx.helper.make_node("QuantizeLinear", [source, scale, zero], [name]))
        nodes.append(self.onnx.helper.make_node("DequantizeLinear", [name, scale, zero], [f"{name}_float"]))
        self.nodes.setdefault(tensor, []).extend(nodes)
        self.made[tensor, quantizer] = f"{name}_float"
        return f"{name}_float"

    def quantize_layer(self, node: Any, layer: str, input_scale: float) -> None:
        """Replace the weight of ``node`` by INT8 codes and its bias by INT32 ones."""
        weight = torch.from_numpy(self.constants[node.input[1]].copy())
        bias = torch.from_numpy(self.constants[node.input[2]].copy()) if len(node.input) > 2 else None
        factor = self.factors.get(layer)
        coded = None if factor is None else self.coded.get(layer)
        int8 = int8_weight(weight, coded, factor, bias, input_scale)
        self.exact[layer] = int8.exact
        node.input[1] = self.dequantized(f"{layer}.weight", int8.codes.numpy(), int8.scale.numpy())
        if bias is not None:
            scale = int8.scale.numpy() * np.float32(input_scale)
            codes = np.round(bias.double().numpy() / scale.astype(np.float64)).astype(np.int32)
            node.input[2] = self.dequantized(f"{layer}.bias", codes, scale)

    def dequantized(self, name: str, codes: np.ndarray, scale: np.ndarray) -> str:
        """A constant as codes and scales along its first axis. A layer that runs again takes the one that is made, or,
        where its input's other scale makes another one of its bias, that."""
        key = (name, codes.tobytes(), scale.tobytes())
        if key in self.made_constants:
            return self.made_constants[key]
        others = sum(name == other for other, *_ in self.made_constants) or ""
        inputs = [self.constant(f"{name}_codes{others}", codes), self.constant(f"{name}_scale{others}", scale)]
        inputs.append(self.constant(f"{name}_zero", np.zeros(len(scale), codes.dtype)))
        output = self.made_constants[key] = f"{name}_float{others}"
        self.nodes.setdefault("", []).append(self.onnx.helper.make_node("DequantizeLinear", inputs, [output], axis=0))
        return output

    def constant(self, name: str, value: Any) -> str:
        if name not in self.constants:
            self.constants[name] = np.asarray(value)
        return name

    def finish(self) -> Any:
        """Put the new nodes behind what they read, and keep the constants that are read."""
        graph = self.model.graph
        nodes = list(self.nodes.get("", []))
        for source in graph.input:
            nodes += self.nodes.get(source.name, [])
        for node in graph.node:
            nodes.append(node)
            for output in node.output:
                nodes += self.nodes.get(output, [])
        read = {name for node in nodes for name in node.input}
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        to_proto = self.onnx.numpy_helper.from_array
        graph.initializer.extend(to_proto(value, name) for name, value in self.constants.items() if name in read)
        return self.model
