"""How fast the quantizer is: against the published loop, brevitas, forward passes, itself at twelve widths; and its
memory.

    python -m kdq.bench quant [--images 256] [--bits 4] [--only kdq literal brevitas widths memory]
        [--memory-images 256 1024 4096] [--weights FILE --root FOLDER] [--json FILE]

The network is a ResNet-18 for 32 x 32 pixels with random weights and BatchNorm statistics of its inputs: times do not
depend on what it has learnt. With the ``--weights`` of a trained one, of ten classes, and the image folder ``--root``
calibration images are real ones, and accuracies on 2 000 test images are compared, too. Every ratio is of times taken
in one process, one after the other; memory is that of processes of their own.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kdq
from kdq.bench import literal
from kdq.bench.memory import peak_mb
from kdq.data.images import Images
from kdq.data.loader import EvalLoader
from kdq.models import resnet18
from kdq.models.weights import load_weights
from kdq.quant.calibrate.layer import patches
from kdq.quant.config import QuantConfig
from kdq.quant.network import quantize_widths
from kdq.train.evaluate import evaluate
from kdq.utils.config import compose, plain

WIDTHS = [2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 26, 32]
PARTS = ("kdq", "literal", "brevitas", "widths", "memory")
#: Columns per layer that the literal loop really solves; the rest of its time is extrapolated from them.
COLUMNS = 6


def main(arguments: list[str]) -> None:
    """Run the parts asked for and print a table."""
    parser = argparse.ArgumentParser(prog="python -m kdq.bench quant", add_help=False)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--memory-images", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--json", type=Path)
    # What the memory part runs in processes of its own.
    parser.add_argument("--peak", nargs=2, metavar=("WHOSE", "IMAGES"))
    options = parser.parse_args(arguments)
    if options.peak:
        whose, count = options.peak
        print(json.dumps(peak(whose, int(count), options.bits)))
        return
    found = measure(options)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def network_and_images(count: int) -> tuple[nn.Module, Tensor]:
    """A ResNet-18 in eval mode, and ``count`` images ``(count, 3, 32, 32)``, on the best device."""
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    net, images = resnet18(num_classes=10).to(device), torch.randn(count, 3, 32, 32, device=device)
    with torch.no_grad():
        for _ in range(3):
            net(images[:64])
    return net.eval(), images


def trained_network(weights: Path, root: Path, count: int) -> tuple[nn.Module, Tensor, EvalLoader]:
    """A trained ResNet-18, ``count`` calibration images of its training set, and test batches."""
    net, device = resnet18(num_classes=10), torch.accelerator.current_accelerator(check_available=True)
    load_weights(net, weights)
    config = compose(["data=cifar10_jpeg", f"data.root={root}", "data.test_limit=2000"]).data
    data = plain(config)
    images = Images(hydra.utils.instantiate(data["source"]), data)
    device = device or torch.device("cpu")
    calibration = torch.cat([inputs for inputs, _ in images.calibration(count, 0, device)])
    return net.to(device).eval(), calibration, images.evaluation("test", device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The numbers, by name; seconds unless the name says otherwise."""
    test = None
    if options.weights is None:
        net, images = network_and_images(options.images)
    else:
        net, images, test = trained_network(options.weights, options.root, options.images)
    device = torch.cuda.get_device_name() if images.is_cuda else f"{platform.processor() or platform.machine()} CPU"
    found: dict[str, Any] = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images": options.images,
        "bits": options.bits,
    }
    quantized, found["kdq"] = timed(lambda: kdq.quantize(net, images.split(64), bits=options.bits, solver="gpfq")[0])
    with torch.no_grad():
        _, found["two_forward_passes"] = timed(lambda: [net(x) for _ in range(2) for x in images.split(64)])
    found["kdq_over_two_forward_passes"] = found["kdq"] / found["two_forward_passes"]
    if "literal" in options.only:
        found |= against_literal(net, quantized, images)
        found["literal_over_kdq"] = found["literal_extrapolated"] / found["kdq"]
    if "brevitas" in options.only:
        found |= against_brevitas(net, quantized, images, test, options.bits)
        if "brevitas" in found:
            found["brevitas_over_kdq"] = found["brevitas"] / found["kdq"]
            found |= {
                f"{whose}_peak_mb": separate_peak(whose, options.images, options) for whose in ("kdq", "brevitas")
            }
    if "widths" in options.only:
        _, found["twelve_widths"] = timed(
            partial(quantize_widths, net, images.split(64), WIDTHS, QuantConfig(solver="gpfq"))
        )
        found["twelve_widths_over_one"] = found["twelve_widths"] / found["kdq"]
    if "memory" in options.only:
        for count in options.memory_images:
            found[f"peak_mb_{count}_images"] = separate_peak("kdq", count, options)
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns, and its seconds."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def against_literal(net: nn.Module, quantized: Any, images: Tensor) -> dict[str, Any]:
    """The published recursion on every layer's unfolded inputs: seconds for :data:`COLUMNS` columns, extrapolated to
    all, and how many of the codes it finds in these columns are kdq's."""
    seconds, same, total = 0.0, 0, 0
    for name, packed in quantized.quantized_weights.items():
        layer: Any = net.get_submodule(name)
        with torch.no_grad():
            (X,), (Xq,) = (patches(layer, literal.first_input(model, name, images)) for model in (net, quantized))
        W = layer.weight.detach().flatten(1)
        values = literal.alphabet_values(packed.scale[:, None], packed.zero[:, None], packed.levels)
        columns = min(COLUMNS, W.shape[1])
        Q, spent = timed(partial(literal.recursion, W, X, Xq, values, columns))
        seconds += spent * W.shape[1] / columns
        same += int(torch.isclose(Q, packed.decode().flatten(1)[:, :columns], atol=1e-7).sum())
        total += Q.numel()
    return {"literal_extrapolated": seconds, "literal_columns_per_layer": COLUMNS, "literal_same_codes": same / total}


def against_brevitas(
    net: nn.Module, quantized: nn.Module, images: Tensor, test: EvalLoader | None, bits: int
) -> dict[str, Any]:
    """brevitas' GPFQ: its seconds, and how far both are from the float network: the relative error of the logits on the
    calibration images, and the accuracy on ``test``."""
    try:
        import brevitas  # type: ignore[import-not-found]
    except ImportError:
        return {"brevitas_missing": "pip install brevitas==0.13.4 to compare with it"}
    model, seconds = timed(lambda: brevitas_gpfq(net, images, bits))
    found: dict[str, Any] = {"brevitas": seconds, "brevitas_version": brevitas.__version__}
    with torch.no_grad():
        exact, ours, theirs = (torch.cat([one(x) for x in images.split(64)]) for one in (net, quantized, model))
    for whose, logits in (("kdq", ours), ("brevitas", theirs)):
        found[f"{whose}_logits_error"] = float((logits - exact).norm() / exact.norm())
    if test is not None:
        for whose, one in (("float", net), ("kdq", quantized), ("brevitas", model)):
            found[f"{whose}_top1"] = evaluate(one, test, 10)["top1"]
    return found


def brevitas_gpfq(net: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """brevitas' GPFQ with the same width, per-channel scales by squared error and no activation quantizers."""
    from brevitas.graph.gpfq import gpfq_mode  # type: ignore[import-not-found]
    from brevitas.graph.quantize import layerwise_quantize  # type: ignore[import-not-found]
    from brevitas.nn import QuantConv2d, QuantLinear  # type: ignore[import-not-found]
    from brevitas.quant import Int8WeightPerChannelFloatMSE  # type: ignore[import-not-found]

    arguments = {"weight_quant": Int8WeightPerChannelFloatMSE, "weight_bit_width": bits}
    layers = {nn.Conv2d: (QuantConv2d, arguments), nn.Linear: (QuantLinear, arguments)}
    model: nn.Module = layerwise_quantize(copy.deepcopy(net), compute_layer_map=layers)
    with torch.no_grad():
        model(images[:1])  # sets the scales
        with gpfq_mode(model, use_quant_activations=False) as gpfq:
            for _ in range(gpfq.num_layers):
                for batch in images.split(64):
                    gpfq.model(batch)
                gpfq.update()
    return model.eval()


def separate_peak(whose: str, count: int, options: argparse.Namespace) -> float:
    """:func:`peak` of a process of its own."""
    command = [sys.executable, "-m", "kdq.bench", "quant", "--peak", whose, str(count), "--bits", str(options.bits)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def peak(whose: str, count: int, bits: int) -> float:
    """Megabytes at most resident in this process, above what it held before, for ``count`` images."""
    net, images = network_and_images(count)
    with torch.no_grad():
        net(images[:64])
    before = peak_mb()
    if whose == "kdq":
        kdq.quantize(net, images.split(64), bits=bits, solver="gpfq")
    else:
        brevitas_gpfq(net, images, bits)
    return peak_mb() - before


def show(found: dict[str, Any]) -> None:
    """Print the numbers."""
    table = Table(title=f"Quantizing a ResNet-18 at 32 x 32 pixels: {found['device']}, {found['threads']} threads")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
