"""Quantized networks as files whose size is what the bits promise.

A ``.kdq`` file is a safetensors file. Per quantized layer it holds ``<layer>.codes``, each code in exactly its number
of bits, and ``<layer>.scale`` (float32 per output channel); everything else of the state dict (biases, BatchNorm,
layers left float) is stored as it is, or in 16 bits where the network was rounded to them. The metadata entry ``kdq``
is a JSON header. FORMAT.md beside this file describes all of it. Nothing in a file is code, and reading it runs none.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdq.models.table import name_of, shape_of
from kdq.quant.activations import ActivationQuantizer, remove_hooks
from kdq.quant.layers import holders, place_of, unwrapped, weight_of
from kdq.quant.packing.bits import packed_bytes
from kdq.quant.packing.packed import QuantizedWeight, keep_packed
from kdq.quant.packing.weights import FLOAT_DTYPES, copied, float_entries
from kdq.quant.solvers.alphabet import MAX_BITS
from kdq.utils.errors import KdqError, one_line
from kdq.utils.files import parse_json, regular, replacing
from kdq.utils.hub import HUB, PACKED, fetch

#: Files whose layers all are modules' ``weight`` are of version 2, which older readers know.
FORMAT = 3
#: Name of the tensor of zeros near the middle; no entry of a state dict starts with a dot.
ZEROS = ".zeros"
#: When a loaded network decodes its weights.
DECODE = ("once", "layer")


def stored_bytes(weight: QuantizedWeight) -> int:
    """Bytes that a layer's tensors take in the file: codes, scales, and zeros where they differ."""
    zeros = _zeros(weight)
    return weight.packed.nbytes + weight.scale.nbytes + (zeros.nbytes if isinstance(zeros, Tensor) else 0)


def save_packed(
    network: nn.Module,
    path: str | Path,
    preprocess: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> int:
    """Write a network made by :func:`kdq.quantize`, or a float one, and return the file's size in bytes.

    Args:
        preprocess: ``{"mean": [...], "std": [...], "size": [height, width]}``: what the network's input was normalised
            with, and its size; where images are scaled to another size before it is cut out, ``resize`` (pixels of the
            shorter side) and ``interpolation``, too. By default what the network was loaded with.
        classes: names of the outputs. By default what the network was loaded with.

    Raises:
        KdqError: quantized weights, or values of a network rounded by ``float_dtype``, were changed since; or the path
            is a folder.
    """
    path, network = Path(path), unwrapped(network)
    if path.is_dir():
        raise KdqError(f"{path} is a folder: give the file's name, such as {path / 'model.kdq'}")
    weights: dict[str, QuantizedWeight] = getattr(network, "quantized_weights", {})
    tensors = _floats(network, weights)
    layers: dict[str, dict[str, Any]] = {}
    near: list[Tensor] = []
    for name, weight in weights.items():
        module, attribute = place_of(network, name)
        value = module._parameters.get(attribute)  # none where it is decoded as the layer runs
        if value is not None and not torch.equal(weight.decode().to(value), value):
            raise KdqError(f"the weight of {name} was changed since it was quantized: quantize again")
        layers[name] = {"shape": list(weight.shape), "levels": weight.levels}
        tensors[f"{name}.codes"] = weight.packed
        tensors[f"{name}.scale"] = weight.scale
        zeros = _zeros(weight)
        if not isinstance(zeros, Tensor):
            layers[name]["zero"] = zeros
        elif zeros.dtype == torch.int8:
            near.append(zeros)
        else:
            tensors[f"{name}.zero"] = zeros
    if near:
        tensors[ZEROS] = torch.cat(near)
    quantizers = getattr(network, "quantized_activations", {})
    plain = all(place_of(network, name)[1] == "weight" for name in weights)
    header: dict[str, Any] = {
        "format": 2 if plain else FORMAT,
        "net": name_of(network),
        "preprocess": dict(preprocess) if preprocess else getattr(network, "kdq_preprocess", None),
        "layers": layers,
        "activations": {name: {"scale": q.scale, "zero": q.zero, "bits": q.bits} for name, q in quantizers.items()},
    }
    if names := classes or getattr(network, "kdq_classes", None):
        header["classes"] = list(names)
    text = json.dumps(header, separators=(",", ":"))
    # Copies, for a file takes no memory under two names: a bias that two modules share is in it twice.
    tensors = {k: value.detach().cpu().clone(memory_format=torch.contiguous_format) for k, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"kdq": text, "sha256": checksum(text, tensors)})
    return path.stat().st_size


def _floats(network: nn.Module, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of the state dict that are not quantized, in the dtype they are stored in."""
    rounded: str | None = getattr(network, "kdq_float_dtype", None)
    found = float_entries(network, weights)
    for name, value in found.items():
        if rounded is not None and value.is_floating_point():
            found[name] = value.to(FLOAT_DTYPES[rounded])
            if not torch.equal(found[name].to(value.dtype), value):
                raise KdqError(f"{name} was changed since the network was rounded to {rounded}: round it again")
    return found


def load_packed(path: str | Path, network: nn.Module | None = None, decode: str = "once") -> nn.Module:
    """The network in ``path``, a file or ``hf:owner/name[:file]``, in eval mode, with outputs equal bit for bit to the
    saved one's.

    Its ``kdq_preprocess`` and ``kdq_classes`` say what the file says about its inputs and outputs.

    Args:
        network: an instance of the architecture, needed unless the file names one: networks that
            :func:`kdq.models.build.build` made, kdq's or torchvision's (:mod:`kdq.models.table`), say what they are. It
            is not modified.
        decode: ``"once"``: weights are decoded now, for speed; ``"layer"``: each layer's whenever it runs, so that
            memory holds the packed codes and one layer's weights.

    Raises:
        KdqError: the file is not a complete, undamaged packed network, or does not fit ``network``.
    """
    if decode not in DECODE:
        raise KdqError(f"decode={decode!r} is unknown: use one of {', '.join(DECODE)}")
    path = fetch(str(path), (PACKED,)) if str(path).startswith(HUB) else Path(path)
    header, tensors = _read(path)
    try:
        tensors = _with_zeros(header, tensors)
        weights = {name: _layer(tensors, name, layer) for name, layer in header["layers"].items()}
        network = _architecture(path, header, tensors, weights) if network is None else copied(unwrapped(network)).cpu()
        for module in network.modules():  # a given one may round by its own ranges
            remove_hooks(module, ActivationQuantizer)
        if not isinstance(header["preprocess"] or {}, dict) or not isinstance(header.get("classes", []), list):
            raise KdqError("its preprocess is no object, or its classes are no list")
        activations = {name: _activation(fields) for name, fields in header.get("activations", {}).items()}
        _fill(network, path, header, tensors, weights, decode)
        for name, quantizer in activations.items():
            network.get_submodule(name).register_forward_pre_hook(quantizer)
        network.quantized_weights, network.quantized_activations = weights, activations  # type: ignore[assignment]
        network.kdq_preprocess = header["preprocess"]
        network.kdq_classes = header.get("classes")  # type: ignore[assignment]
    except KdqError as error:
        raise KdqError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise KdqError(f"{path} does not fit the network: {one_line(error)}") from error
    return network.eval()


def read_header(path: Path) -> dict[str, Any]:
    """The header of a packed file (FORMAT.md), whose checksum matches."""
    return _read(path)[0]


def _architecture(
    path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight]
) -> nn.Module:
    """The network that the file names, without memory for its weights, if it is what the file holds."""
    if header["net"] is None:
        raise KdqError(f"{path} does not say its architecture: build it and pass kdq.load(path, network=...)")
    packed = {f"{name}.{part}" for name in weights for part in ("codes", "scale", "zero")}
    sizes = [tensor.numel() for name, tensor in tensors.items() if name not in packed]
    sizes += [weight.shape.numel() for weight in weights.values()]
    dtype = next((weight.scale.dtype for weight in weights.values()), torch.float32)  # a double network's is double
    return shape_of(header["net"], len(sizes), sum(sizes)).to(dtype)


def _fill(
    network: nn.Module,
    path: Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, QuantizedWeight],
    decode: str,
) -> None:
    for name in weights:
        if parametrize.is_parametrized(*place_of(network, name)):
            raise KdqError(
                f"the given network computes its weight of {name} as it runs, by decode='layer' or a parametrization: "
                "pass it as it was built"
            )
    places = holders(network)
    holding = {name: places[id(weight_of(network, name))] for name in weights}
    state, expected = network.state_dict(), float_entries(network, weights)
    floats = {name: value for name, value in tensors.items() if name in state}
    # Files of earlier versions hold the second name of a shared weight, too.
    if not expected.keys() <= floats.keys() or len(tensors) != len(floats) + sum(
        2 + ("zero" not in x) for x in header["layers"].values()
    ):
        raise KdqError(f"{path} does not fit the network: they name different tensors")
    # What the network itself holds in 16 bits was not rounded to them.
    dtypes = {value.dtype for name, value in floats.items() if value.dtype != state[name].dtype}
    network.kdq_float_dtype = next((name for name, dtype in FLOAT_DTYPES.items() if dtype in dtypes), None)  # type: ignore[assignment]
    for name, weight in weights.items():
        if weight.shape != weight_of(network, name).shape:
            raise KdqError(f"{path} does not fit the network: {name} has the shape {tuple(weight.shape)} in it")
    given = network.state_dict()  # with the versions of modules, which some ask for
    for name in state:
        if name in floats:
            given[name] = floats[name].to(state[name].dtype)
        else:
            del given[name]
    network.load_state_dict(given, strict=False, assign=True)
    for name, weight in weights.items():
        dtype = weight_of(network, name).dtype
        decoded = nn.Parameter(weight.decode().to(dtype)) if decode == "once" else None
        for module, attribute in holding[name]:
            if decoded is None:
                keep_packed(module, attribute, replace(weight, scale=weight.scale.to(dtype)))
            else:
                setattr(module, attribute, decoded)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(regular(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        text = metadata["kdq"]
        header = parse_json(text)
        version = int(header["format"])
    except FileNotFoundError as error:
        raise KdqError(f"no file {path}") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise KdqError(f"{path} is not a packed kdq network, or not all of one: {one_line(error)}") from error
    if version > FORMAT:
        raise KdqError(f"{path} has format {version}, this kdq reads up to {FORMAT}: update kdq")
    if metadata.get("sha256") != checksum(text, tensors):
        raise KdqError(f"{path} is damaged: its checksum does not match")
    return header, tensors


def _layer(tensors: Mapping[str, Tensor], name: str, layer: Mapping[str, Any]) -> QuantizedWeight:
    shape, levels = torch.Size(layer["shape"]), int(layer["levels"])
    if not 2 <= levels <= 2**MAX_BITS + 1:  # the paper alphabet has 2^b + 1
        raise KdqError(f"layer {name} has {levels} levels")
    scale = tensors[f"{name}.scale"]
    # Above 24 bits a zero point may need more digits than float32 has.
    exact = torch.float64 if levels > 2**24 else scale.dtype
    zero = torch.full_like(scale, layer["zero"], dtype=exact) if "zero" in layer else tensors[f"{name}.zero"]
    if not scale.shape == zero.shape == shape[:1] or not scale.is_floating_point():
        raise KdqError(f"layer {name} does not hold a scale and a zero for each of its {shape[:1].numel()} channels")
    weight = QuantizedWeight(tensors[f"{name}.codes"], shape, scale, zero, levels)
    size = packed_bytes(shape.numel(), weight.bits)
    if weight.packed.shape != (size,) or weight.packed.dtype != torch.uint8:
        raise KdqError(f"layer {name} does not hold {shape.numel()} codes of {weight.bits} bits in {size} bytes")
    if shape.numel() and levels < 2**weight.bits and int(weight.codes.max()) >= levels:
        raise KdqError(f"layer {name} has a code beyond its {levels} levels")
    return weight


def _zeros(weight: QuantizedWeight) -> float | Tensor:
    """The zeros as they are stored: the one that all channels have; else how many half steps they lie off the middle of
    the alphabet, int8, where that says it all; else themselves."""
    if bool((weight.zero == weight.zero[0]).all()):
        return weight.zero[0].item()
    offsets = 2 * weight.zero.double() - (weight.levels - 1)
    fits = weight.levels <= 2**20 and bool((offsets == offsets.round()).all()) and bool(offsets.abs().max() <= 127)
    return offsets.to(torch.int8) if fits else weight.zero


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


def checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a file, over its header and its tensors, by name."""
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()
