"""A float ONNX graph whose weights are stored as the quantized network's codes, in the narrowest type that holds them.

Each weight becomes ``Cast -> Sub -> Mul`` over its codes: ``scale * (codes - zero)``, kdq's own decoding, so that zeros
half-way between two codes are exact, and a BatchNorm's factors are in the scale. The arithmetic stays float: a runtime
unpacks the weights when it loads the file, which is then as fast as the float model, and as small as the packed one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdq.deploy.graph import FloatGraph
from kdq.deploy.qdq import Builder, layer_of
from kdq.quant.packing.packed import QuantizedWeight

#: Bits to the type that holds codes of so many, and the opset and the version of ONNX that have it.
TYPES = {2: ("uint2", 25, 13), 4: ("uint4", 21, 10), 8: ("uint8", 13, 7), 16: ("uint16", 13, 7)}


def codes_graph(source: FloatGraph, weights: Mapping[str, QuantizedWeight]) -> tuple[Any, dict[str, int]]:
    """The model, and by layer the bits in which its codes are stored; layers of more than 16 bits stay float.
    ``weights`` are the quantized network's, by layer."""
    import ml_dtypes

    build, stored = Builder(source, weights), {}
    for node in build.model.graph.node:
        layer = layer_of(node, build.constants)
        weight, factor = weights.get(layer or ""), source.factors.get(layer or "")
        bits = None if weight is None else next((bits for bits in TYPES if weight.bits <= bits), None)
        if layer is None or weight is None or factor is None or bits is None:
            continue
        name = node.input[1]
        node.input[1] = f"{name}_mul"
        if layer in stored:  # it runs twice
            continue
        kind, opset, version = TYPES[bits]
        scale = (weight.scale.double() * factor).float().numpy()
        each = (-1,) + (1,) * (len(weight.shape) - 1)
        codes = weight.codes.numpy().astype(np.uint16).astype(getattr(ml_dtypes, kind, None) or kind)
        steps: tuple[tuple[str, list[str], dict[str, int]], ...] = (
            ("Cast", [build.constant(f"{name}_codes", codes)], {"to": build.onnx.TensorProto.FLOAT}),
            ("Sub", [f"{name}_cast", build.constant(f"{name}_zero", weight.zero.numpy().reshape(each))], {}),
            ("Mul", [f"{name}_sub", build.constant(f"{name}_scale", scale.reshape(each))], {}),
        )
        for step, inputs, options in steps:
            made = build.onnx.helper.make_node(step, inputs, [f"{name}_{step.lower()}"], **options)
            build.nodes.setdefault("", []).append(made)
        stored[layer] = bits
        standard = next(opsets for opsets in build.model.opset_import if opsets.domain == "")
        standard.version = max(standard.version, opset)
        build.model.ir_version = max(build.model.ir_version, version)
    return build.finish(), stored
