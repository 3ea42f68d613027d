"""Presets and peers side by side: the same weights, images and levels, one after the other.

    python -m kdq.bench peers data=cifar10 paths.data_dir=FOLDER method=teacher model@teacher=resnet20
        teacher.weights=FILE teacher.net.shortcut=A +normalization@teacher.net=imagenet
        [bench.bits=2,3,4] [bench.images=256,1024] [bench.draws=3] [bench.part=test] [bench.who=rtn,gpfq,best,...]
        [bench.keep=JSON]

The overrides name the model as ``kdq`` takes them. ``rtn``, ``gpfq``, ``qronos`` and the like are kdq's presets;
``brevitas gpfq`` and ``brevitas qronos`` run where brevitas can be imported (0.13.4 was tried; nothing is installed).
Every quantizer gets the same draws of calibration images, has a scale for every output channel and exactly 2^bits
levels (counted in what comes out), and is measured on the same images: ``bench.part=val`` are those to choose with.
Seconds are of CPU time, kdq's first run included.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kdq
from kdq.bench.common import line, show, split_options, timed
from kdq.quant.config import PRESETS
from kdq.stages.cell import Cell
from kdq.stages.train import float_model
from kdq.train.evaluate import evaluate
from kdq.utils.checks import one_of
from kdq.utils.config import compose
from kdq.utils.files import write_text

PEERS = {"brevitas gpfq": "GPFQ", "brevitas qronos": "Qronos"}
COLUMNS = ("who", "bits", "images", "top1", "sd", "levels", "seconds")


def main(arguments: list[str]) -> None:
    """Print a table, and write one entry for every draw as JSON where ``bench.keep`` names a file."""
    default = ",".join(["rtn", "gpfq", "gptq", "qronos", "best", *(PEERS if find_spec("brevitas") else ())])
    own, overrides = split_options(arguments, bits="2,3,4", images="256", draws="3", part="test", who=default, keep="")
    who = [one_of("bench.who", name, (*PRESETS, *PEERS)) for name in own["who"].split(",")]
    cell = Cell(compose(overrides))
    bits, images = ([int(value) for value in own[name].split(",")] for name in ("bits", "images"))
    measured = []
    for entry in measure(cell, who, bits, images, int(own["draws"]), own["part"]):
        print(line(entry), flush=True)
        measured.append(entry)
    title = f"{cell.cfg.data.name}, {cell.cfg[cell.role].name}, {torch.get_num_threads()} threads"
    show(title, COLUMNS, list(means(measured)), ".2f")
    if own["keep"]:
        write_text(Path(own["keep"]), json.dumps(measured, indent=1))


def measure(
    cell: Cell, who: list[str], bits: list[int], images: list[int], draws: int, part: str
) -> Iterator[dict[str, Any]]:
    """One entry for every width, count of images, draw and quantizer, these alternating; the float network first."""
    network = cell.network(cell.role, float_model(cell)).to(cell.device).eval()
    test = cell.images.evaluation(part, cell.device)
    accuracy = evaluate(network, test, cell.cfg.data.num_classes)["top1"]
    yield {"who": "float", "bits": 32, "images": 0, "draw": 0, "top1": accuracy, "levels": 0, "seconds": 0.0}
    for count in images:
        for draw in range(draws):
            batches = [inputs for inputs, _ in cell.images.calibration(count, draw, cell.device)]
            for width in bits:
                for name in who:
                    work = quantizer(name, network, batches, width)
                    quantized, seconds = timed(work, time.process_time)
                    top1 = evaluate(quantized, test, cell.cfg.data.num_classes)["top1"]
                    entry = {"who": name, "bits": width, "images": count, "draw": draw, "top1": top1}
                    yield entry | {"levels": levels(network, quantized), "seconds": seconds}


def quantizer(name: str, network: nn.Module, batches: Sequence[Tensor], bits: int) -> Callable[[], nn.Module]:
    """What quantizes ``network`` on ``batches`` to ``bits``, by its name."""
    if name in PEERS:
        return lambda: brevitas(network, batches, bits, PEERS[name])
    return lambda: kdq.quantize(network, batches, bits=bits, solver=name).network


def brevitas(network: nn.Module, batches: Sequence[Tensor], bits: int, algorithm: str = "GPFQ") -> nn.Module:
    """A copy quantized by brevitas: columns by falling energy, scales by squared error.

    Its symmetric grid of 2 bits has three levels, so that the shifted one is taken; and it solves a copy of weights
    that do not lie contiguously.
    """
    from brevitas.graph.gpfq import GPFQ, gpfq_mode  # type: ignore[import-not-found]
    from brevitas.graph.qronos import Qronos  # type: ignore[import-not-found]
    from brevitas.graph.quantize import layerwise_quantize  # type: ignore[import-not-found]
    from brevitas.nn import QuantConv2d, QuantLinear  # type: ignore[import-not-found]
    from brevitas.quant import shifted_scaled_int as shifted  # type: ignore[import-not-found]

    arguments = {"weight_quant": shifted.ShiftedUint8WeightPerChannelFloatMSE, "weight_bit_width": bits}
    layers = {nn.Conv2d: (QuantConv2d, arguments), nn.Linear: (QuantLinear, arguments)}
    model: nn.Module = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    model = layerwise_quantize(model, compute_layer_map=layers).eval()
    solver = {"GPFQ": GPFQ, "Qronos": Qronos}[algorithm]
    with torch.no_grad():
        model(batches[0][:1])  # sets the scales
        with gpfq_mode(model, use_quant_activations=False, act_order=True, algorithm_impl=solver) as mode:
            for _ in range(mode.num_layers):
                for batch in batches:
                    mode.model(batch)
                mode.update()
    return model


def levels(network: nn.Module, quantized: nn.Module) -> int:
    """Most values that one output channel's weights take."""
    found = 0
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            other: Any = quantized.get_submodule(name)
            weight = other.quant_weight().value if hasattr(other, "quant_weight") else other.weight
            found = max(found, *(len(row.unique()) for row in weight.detach().flatten(1)))
    return found


def means(measured: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for all draws of a quantizer, a width and a count of images."""
    for key in dict.fromkeys((entry["who"], entry["bits"], entry["images"]) for entry in measured):
        mine = [entry for entry in measured if (entry["who"], entry["bits"], entry["images"]) == key]
        row = dict(zip(COLUMNS, key, strict=False))
        row |= {name: statistics.fmean(entry[name] for entry in mine) for name in ("top1", "seconds")}
        row["levels"] = max(entry["levels"] for entry in mine)
        yield row | ({"sd": statistics.stdev(entry["top1"] for entry in mine)} if len(mine) > 1 else {})
