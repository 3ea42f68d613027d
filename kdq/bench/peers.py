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

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kdq
from kdq.bench.options import own_options
from kdq.cli.app import class_folders
from kdq.quant.config import PRESETS
from kdq.stages.cell import Cell
from kdq.stages.train import float_model
from kdq.train.evaluate import evaluate
from kdq.utils.config import compose
from kdq.utils.errors import KdqError
from kdq.utils.files import write_text

PEERS = {"brevitas gpfq": "GPFQ", "brevitas qronos": "Qronos"}
COLUMNS = ("who", "bits", "images", "top1", "sd", "levels", "seconds")


def main(arguments: list[str]) -> None:
    """Print a table, and write one entry for every draw as JSON where ``bench.keep`` names a file."""
    default = ",".join(["rtn", "gpfq", "gptq", "qronos", "best", *(PEERS if find_spec("brevitas") else ())])
    own = own_options(arguments, bits="2,3,4", images="256", draws="3", part="test", who=default, keep="")
    who = own["who"].split(",")
    if unknown := [name for name in who if name not in (*PRESETS, *PEERS)]:
        raise KdqError(f"bench.who={unknown[0]} is unknown: {', '.join((*PRESETS, *PEERS))}")
    OmegaConf.register_new_resolver("class_folders", class_folders, replace=True)
    cell = Cell(compose([a for a in arguments if not a.startswith("bench.")]))
    bits, images = ([int(value) for value in own[name].split(",")] for name in ("bits", "images"))
    measured, console = [], Console(width=140)
    for one in measure(cell, who, bits, images, int(own["draws"]), own["part"]):
        console.print(" ".join(f"{name}={value}" for name, value in one.items()))
        measured.append(one)
    show(console, cell, measured)
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
            batches = list(cell.images.calibration(count, draw, cell.device))
            for width in bits:
                for name in who:
                    start = time.process_time()
                    quantized = quantizer(name)(network, batches, width)
                    seconds = time.process_time() - start
                    top1 = evaluate(quantized, test, cell.cfg.data.num_classes)["top1"]
                    entry = {"who": name, "bits": width, "images": count, "draw": draw, "top1": top1}
                    yield entry | {"levels": levels(network, quantized), "seconds": seconds}


def quantizer(name: str) -> Callable[[nn.Module, list[Any], int], nn.Module]:
    """What quantizes a network on batches ``(images, labels)`` to a width, by its name."""
    if name in PEERS:
        return lambda network, batches, bits: brevitas(network, [x for x, _ in batches], bits, PEERS[name])
    return lambda network, batches, bits: kdq.quantize(network, batches, bits, solver=name).network


def brevitas(network: nn.Module, batches: list[Tensor], bits: int, algorithm: str) -> nn.Module:
    """A copy quantized by brevitas: columns by falling energy, scales by squared error.

    Its symmetric grid of 2 bits has three levels, so that the shifted one is taken; and it solves a copy of weights
    that do not lie contiguously.
    """
    from brevitas.graph.gpfq import GPFQ, gpfq_mode  # type: ignore[import-not-found]
    from brevitas.graph.qronos import Qronos  # type: ignore[import-not-found]
    from brevitas.graph.quantize import layerwise_quantize  # type: ignore[import-not-found]
    from brevitas.nn import QuantConv2d, QuantLinear  # type: ignore[import-not-found]
    from brevitas.quant.shifted_scaled_int import (  # type: ignore[import-not-found]
        ShiftedUint8WeightPerChannelFloatMSE,
    )

    arguments = {"weight_quant": ShiftedUint8WeightPerChannelFloatMSE, "weight_bit_width": bits}
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


def show(console: Console, cell: Cell, measured: list[dict[str, Any]]) -> None:
    """Print means over draws."""
    table = Table(
        *COLUMNS, title=f"{cell.cfg.data.name}, {cell.cfg[cell.role].name}, {torch.get_num_threads()} threads"
    )
    for key in dict.fromkeys((one["who"], one["bits"], one["images"]) for one in measured):
        mine = [one for one in measured if (one["who"], one["bits"], one["images"]) == key]
        top1 = [one["top1"] for one in mine]
        spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        seconds = statistics.fmean(one["seconds"] for one in mine)
        most = str(max(one["levels"] for one in mine))
        table.add_row(key[0], str(key[1]), str(key[2]), f"{statistics.fmean(top1):.2f}", spread, most, f"{seconds:.1f}")
    console.print(table)
