"""Whether any network is quantized: others' classification networks with random weights, each without an option.

    python -m kdq.bench networks [PATTERN ...] [--library torchvision|timm] [--bits 4] [--images 32] [--largest 150]
        [--json FILE]

Each is quantized, compared with its weights rounded to the nearest levels (relative errors of the outputs on the
calibration images), packed, and loaded: both must answer alike, bit for bit. Networks are named by patterns, all by
default (of timm's one for each of its files), and run from the smallest to the ``--largest``, in millions of
parameters, at the smallest of a few image sizes that they take. Times are of the processor. A ``--json`` file gets a
line for each; a second command goes on after those.
"""

import argparse
import json
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import kdq
from kdq.bench.common import line, show, timed
from kdq.models.table import NumbersOnCpu
from kdq.quant.config import QuantConfig
from kdq.quant.layers import weight_of

#: Sides of the images that are tried, in this order.
SIZES = (64, 96, 224, 240, 256, 384)
#: What small networks have in their names, the smallest first.
SMALL = ("atto", "femto", "pico", "nano", "xxs", "xx_small", "tiny", "_s0", "_b0", "_t0", "_n1", "small", "18", "26")
COLUMNS = ("network", "size", "weights", "layers", "left_float", "avg_bits", "cpu_s", "error", "rounding", "same")
CLASSES = 10


def main(arguments: list[str]) -> None:
    """Print the table; exit with 1 where a network failed, was no better than rounding, or came back changed."""
    parser = argparse.ArgumentParser(prog="python -m kdq.bench networks", add_help=False)
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--library", choices=("torchvision", "timm"), default="torchvision")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--largest", type=float, default=150)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    known = options.json.read_text().splitlines() if options.json and options.json.exists() else []
    rows = {row["network"]: row for row in map(json.loads, known)}
    for name in by_size(options.library, options.patterns, options.largest):
        if name in rows:
            continue
        rows[name] = tried(options.library, name, options.bits, options.images)
        print(line(rows[name]), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
    show(f"{options.bits} bits, {options.images} images, random weights", COLUMNS, list(rows.values()))
    if failed := [row["network"] for row in rows.values() if not row.get("passed")]:
        raise SystemExit(f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}")


def by_size(library: str, patterns: list[str], largest: float) -> list[str]:
    """Names that match one of the ``patterns``, from the smallest network to the ``largest``, in millions."""
    names = torchvision.models.list_models(module=torchvision.models) if library == "torchvision" else _timm_names()
    asked = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    sizes = {name: _parameters(library, name) / 1e6 for name in asked}
    return [name for name in sorted(asked, key=sizes.__getitem__) if sizes[name] <= largest]


def _timm_names() -> list[str]:
    """One of each of timm's files, which are about architectures: a small one, by its name."""
    import timm

    files = [timm.list_models(module=file) for file in timm.list_modules()]
    return [next((n for tag in SMALL for n in names if tag in n), names[0]) for names in files if names]


def _parameters(library: str, name: str) -> int:
    for size in SIZES:
        try:
            with torch.device("meta"), NumbersOnCpu():
                return sum(parameter.numel() for parameter in built(library, name, size).parameters())
        except Exception:  # made for another size
            continue
    return 0


def built(library: str, name: str, size: int) -> nn.Module:
    """The network with random weights, for images of ``size`` pixels where it is made for one size."""
    arguments: dict[str, Any] = {"num_classes": CLASSES}
    if library == "torchvision":
        if name.startswith("vit"):
            arguments["image_size"] = size
        if name.startswith("maxvit"):
            arguments["input_size"] = (size, size)
        if name in ("googlenet", "inception_v3"):
            arguments["init_weights"] = False  # takes a minute
        return torchvision.models.get_model(name, weights=None, **arguments)
    import timm

    try:
        return timm.create_model(name, img_size=size, **arguments)
    except TypeError:  # made for any size
        return timm.create_model(name, **arguments)


def settled(network: nn.Module, images: Tensor) -> nn.Module:
    """``network`` in eval mode as if it had been trained: what starts at zero, so that blocks do nothing, has values,
    and BatchNorm knows its inputs."""
    for name, parameter in network.named_parameters():
        if parameter.numel() > 1 and parameter.std() == 0 and parameter.abs().max() < 0.1 and not name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        network(images)
    return network.eval()


def fitting(library: str, name: str, count: int) -> tuple[nn.Module, Tensor]:
    """The network, and images of the smallest of :data:`SIZES` that it takes."""
    for size in SIZES:
        torch.manual_seed(0)
        images, seen = torch.randn(3 * count, 3, size, size).split([count, 2 * count])
        try:
            return settled(built(library, name, size), seen), images
        except Exception:
            if size == SIZES[-1]:
                raise
    raise AssertionError


def tried(library: str, name: str, bits: int, count: int) -> dict[str, Any]:
    row: dict[str, Any] = {"network": name, "passed": False}
    try:
        network, images = fitting(library, name, count)
        row |= {"size": images.shape[-1], "weights": sum(p.numel() for p in network.parameters())}
        row |= measured(network, images, bits)
        row["passed"] = row["same"] and row["error"] < row["rounding"]
    except Exception as error:
        row["says"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


def measured(network: nn.Module, images: Tensor, bits: int) -> dict[str, Any]:
    """What became of a network: layers, parameters left float, seconds, whether it came back, and the errors on other
    images than it was calibrated on."""
    (quantized, report), seconds = timed(lambda: kdq.quantize(network, [images], bits=bits), time.process_time)
    found: dict[str, Any] = {"cpu_s": seconds, "avg_bits": report.avg_bits}
    found |= {"layers": len(report.layers), "left_float": len(report.left)}
    others = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        exact, answers = network(others), quantized(others)
        kdq.save(quantized, Path(folder) / "network.kdq")
        loaded = kdq.load(Path(folder) / "network.kdq", network=network)
        found["same"] = torch.equal(loaded(others), answers)
        for layer in report.layers:
            weight = weight_of(loaded, layer.name)
            rows = weight_of(network, layer.name).detach().flatten(1)[None]
            unused = torch.empty(0)  # rounding knows nothing of inputs
            weight.copy_(QuantConfig("rtn").solve(rows, unused, unused, bits)[0].view(weight.shape))
        rounded = loaded(others)
    found |= {"error": float((answers - exact).norm() / exact.norm())}
    return found | {"rounding": float((rounded - exact).norm() / exact.norm())}
