"""Quantized networks as files whose size is what the bits promise.

A ``.kdq`` file is a safetensors file. Per quantized layer it holds ``<layer>.codes``, each code in exactly its number
of bits, and ``<layer>.scale`` (float32 per output channel); everything else of the state dict (biases, BatchNorm,
layers left float) is stored as it is. The metadata entry ``kdq`` is a JSON header:

    format      version of this layout; readers read all earlier ones
    net         the architecture's recipe (a builder of kdq.models or torchvision.models, its arguments), or null
    preprocess  {"mean": [...], "std": [...]} the network expects its input normalised with, or null
    layers      {name: {"shape": [...], "levels": n, "zero": z}} in execution order
    activations {name: {"scale": s, "zero": z, "bits": b}} of the layers whose inputs are rounded (since format 2)

Where zeros differ between channels the layer has no ``"zero"``. If they all lie near the middle of the alphabet, their
distances in half steps, ``2 * zero - (levels - 1)``, are in the one int8 tensor ``.zeros``, all such layers' one after
the other (since format 2); else there is a tensor ``<layer>.zero``. ``sha256`` is a checksum over the header and all
tensors. Nothing in it is code, and reading it runs none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdq.errors import KdqError
from kdq.files import replacing
from kdq.models import build_trusted
from kdq.quant.activations import ActivationQuantizer
from kdq.quant.alphabet import MAX_BITS
from kdq.quant.weights import QuantizedWeight, with_quantized_weights

FORMAT = 2
#: Name of the tensor of zeros near the middle; no entry of a state dict starts with a dot.
ZEROS = ".zeros"


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Non-negative integers below ``2^bits`` ``(n,)`` to :func:`packed_bytes` bytes, uint8.

    Bits beyond eight are split off as planes of eight, so that 12 bits are a plane of 8 and one of 4. In a plane
    of b bits, eight codes make b bytes, the first code in the lowest bits.
    """
    values = codes.detach().cpu().numpy().astype(np.uint64)
    planes = []
    for low in range(0, bits, 8):
        width = min(8, bits - low)
        plane = np.zeros(-(-len(values) // 8) * 8, np.uint64)
        plane[: len(values)] = (values >> np.uint64(low)) & np.uint64(2**width - 1)
        words = np.zeros(len(plane) // 8, np.uint64)
        for position, column in enumerate(plane.reshape(-1, 8).T):
            words |= column << np.uint64(position * width)
        as_bytes = words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)
        planes.append(as_bytes[: _plane_bytes(len(values), width)])
    return torch.from_numpy(np.concatenate(planes) if planes else np.zeros(0, np.uint8))


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of :func:`pack_bits`: ``count`` codes, int64.

    Raises:
        KdqError: ``packed`` does not have the length that ``count`` codes take.
    """
    if packed.numel() != packed_bytes(count, bits):
        raise KdqError(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, not {packed.numel()}")
    raw, codes, start = packed.numpy(), np.zeros(count, np.uint64), 0
    for low in range(0, bits, 8):
        width = min(8, bits - low)
        size, groups = _plane_bytes(count, width), -(-count // 8)
        as_bytes = np.zeros(groups * width, np.uint8)
        as_bytes[:size] = raw[start : start + size]
        start += size
        words = np.zeros((groups, 8), np.uint8)
        words[:, :width] = as_bytes.reshape(-1, width)
        word = words.reshape(-1).view("<u8")
        plane = np.stack([(word >> np.uint64(i * width)) & np.uint64(2**width - 1) for i in range(8)], axis=1)
        codes |= plane.reshape(-1)[:count].astype(np.uint64) << np.uint64(low)
    return torch.from_numpy(codes.astype(np.int64))


def stored_bytes(weight: QuantizedWeight) -> int:
    """Bytes that a layer's tensors take in the file: codes, scales, and zeros where they differ."""
    offsets = _offsets(weight)
    constant = bool((weight.zero == weight.zero[0]).all())
    zeros = 0 if constant else (weight.zero if offsets is None else offsets).nbytes
    return packed_bytes(weight.codes.numel(), weight.bits) + weight.scale.nbytes + zeros


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take: ``count * bits / 8``, rounded up in each plane."""
    return sum(_plane_bytes(count, min(8, bits - low)) for low in range(0, bits, 8))


def _plane_bytes(count: int, width: int) -> int:
    return -(-count * width // 8)


def save_packed(network: nn.Module, path: str | Path, preprocess: Mapping[str, Any] | None = None) -> int:
    """Write a network made by :func:`kdq.quantize`, or a float one, and return the file's size in bytes.

    Args:
        preprocess: ``{"mean": [...], "std": [...]}`` that the network's input was normalised with.
    """
    weights: dict[str, QuantizedWeight] = getattr(network, "quantized_weights", {})
    quantized = {f"{name}.weight" for name in weights}
    tensors = {name: value for name, value in network.state_dict().items() if name not in quantized}
    layers: dict[str, dict[str, Any]] = {}
    near: list[Tensor] = []
    for name, weight in weights.items():
        layers[name] = {"shape": list(weight.codes.shape), "levels": weight.levels}
        tensors[f"{name}.codes"] = pack_bits(weight.codes.flatten(), weight.bits)
        tensors[f"{name}.scale"] = weight.scale
        if bool((weight.zero == weight.zero[0]).all()):
            layers[name]["zero"] = weight.zero[0].item()
        elif (offsets := _offsets(weight)) is not None:
            near.append(offsets)
        else:
            tensors[f"{name}.zero"] = weight.zero
    if near:
        tensors[ZEROS] = torch.cat(near)
    activations = {
        name: {"scale": quantizer.scale, "zero": quantizer.zero, "bits": quantizer.bits}
        for name, quantizer in getattr(network, "quantized_activations", {}).items()
    }
    header = json.dumps(
        {
            "format": FORMAT,
            "net": getattr(network, "kdq_net", None),
            "preprocess": dict(preprocess) if preprocess else None,
            "layers": layers,
            "activations": activations,
        },
        separators=(",", ":"),
    )
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"kdq": header, "sha256": _checksum(header, tensors)}
    path = Path(path)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path.stat().st_size


def load_packed(path: str | Path, network: nn.Module | None = None) -> nn.Module:
    """The network in ``path``, in eval mode, with outputs equal bit for bit to the saved one's.

    Args:
        network: an instance of the architecture, needed when it is not one of kdq's or torchvision's; it is not
            modified.

    Raises:
        KdqError: the file is not a complete, undamaged packed network, or does not fit ``network``.
    """
    path = Path(path)
    header, tensors = _read(path)
    try:
        if network is None:
            if header["net"] is None:
                raise KdqError(f"{path} does not say its architecture: build it and pass load(path, network=...)")
            network = build_trusted(header["net"])
        tensors = _with_zeros(header, tensors)
        weights = {name: _layer(tensors, name, layer) for name, layer in header["layers"].items()}
        state = network.state_dict()
        floats = {name: value for name, value in tensors.items() if name in state}
        expected = {name for name in state if name.removesuffix(".weight") not in weights}
        if set(floats) != expected or len(tensors) != len(floats) + sum(
            2 + ("zero" not in x) for x in header["layers"].values()
        ):
            raise KdqError(f"{path} does not fit the network: they name different tensors")
        activations = {name: _activation(fields) for name, fields in header.get("activations", {}).items()}
        network = with_quantized_weights(network, weights, activations, floats)
    except KdqError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise KdqError(f"{path} does not fit the network: {' '.join(str(error).split())}") from error
    return network


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        text = metadata["kdq"]
        header = json.loads(text)
        version = int(header["format"])
    except FileNotFoundError as error:
        raise KdqError(f"no file {path}") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise KdqError(f"{path} is not a packed kdq network: {' '.join(str(error).split())}") from error
    if version > FORMAT:
        raise KdqError(f"{path} has format {version}, this kdq reads up to {FORMAT}: update kdq")
    if metadata.get("sha256") != _checksum(text, tensors):
        raise KdqError(f"{path} is damaged: its checksum does not match")
    return header, tensors


def _layer(tensors: Mapping[str, Tensor], name: str, layer: Mapping[str, Any]) -> QuantizedWeight:
    shape, levels = torch.Size(layer["shape"]), int(layer["levels"])
    if not 2 <= levels <= 2**MAX_BITS:
        raise KdqError(f"layer {name} has {levels} levels")
    scale = tensors[f"{name}.scale"]
    zero = torch.full_like(scale, layer["zero"]) if "zero" in layer else tensors[f"{name}.zero"]
    codes = unpack_bits(tensors[f"{name}.codes"], shape.numel(), (levels - 1).bit_length())
    if codes.numel() and int(codes.max()) >= levels:
        raise KdqError(f"layer {name} has a code beyond its {levels} levels")
    return QuantizedWeight(codes.view(shape), scale, zero, levels)


def _offsets(weight: QuantizedWeight) -> Tensor | None:
    """How many half steps the zeros lie off the middle of the alphabet, int8, where that says it all."""
    offsets = 2 * weight.zero.double() - (weight.levels - 1)
    fits = weight.levels <= 2**20 and bool((offsets == offsets.round()).all()) and bool(offsets.abs().max() <= 127)
    return offsets.to(torch.int8) if fits else None


def _with_zeros(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with a ``<layer>.zero`` of its own for every layer whose zeros lie in :data:`ZEROS`."""
    near = {k: layer for k, layer in header["layers"].items() if "zero" not in layer and f"{k}.zero" not in tensors}
    tensors = dict(tensors)
    parts = tensors.pop(ZEROS, torch.zeros(0)).split([layer["shape"][0] for layer in near.values()])
    for (name, layer), offsets in zip(near.items(), parts, strict=True):
        dtype = tensors[f"{name}.scale"].dtype
        tensors[f"{name}.zero"] = ((offsets.double() + layer["levels"] - 1) / 2).to(dtype)
    return tensors


def _activation(fields: Mapping[str, Any]) -> ActivationQuantizer:
    scale, zero, bits = float(fields["scale"]), int(fields["zero"]), int(fields["bits"])
    if not (scale > 0 and 2 <= bits <= 8 and 0 <= zero < 2**bits):
        raise KdqError(f"an activation quantizer of {bits} bits, scale {scale} and zero {zero} makes no sense")
    return ActivationQuantizer(scale, zero, bits)


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()
