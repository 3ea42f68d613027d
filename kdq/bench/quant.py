"""How fast the quantizer is: against the published loop, brevitas, forward passes, itself at twelve widths and in two
processes; and its memory.

    python -m kdq.bench quant [--images 256] [--bits 4] [--only kdq literal brevitas widths processes memory]
        [--memory-images 256 1024 4096] [--json FILE]

The network is a ResNet-18 for 32 x 32 pixels with random weights and BatchNorm statistics of its inputs: times do not
depend on what it has learnt (``python -m kdq.bench peers`` compares accuracies). Every ratio is of times taken in one
process, one after the other; memory is that of processes of their own. The part ``processes`` is ``trainer.test`` with
:class:`~kdq.quant.callback.PostTrainingQuantization`, alone and in two processes under DDP with a GPU or a thread each,
three times each in turn: each tests its part of ten times as many images, and calibrates with its part of them.
"""

import argparse
import json
import platform
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdq
from kdq.bench import literal
from kdq.bench.common import apart, best_device, peak_mb, show, timed
from kdq.bench.peers import brevitas
from kdq.distill import CrossEntropy
from kdq.models import resnet18
from kdq.quant.calibrate.layer import patches
from kdq.quant.callback import PostTrainingQuantization
from kdq.quant.config import QuantConfig
from kdq.quant.distributed import rank
from kdq.quant.network import quantize_widths

WIDTHS = [2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 26, 32]
PARTS = ("kdq", "literal", "brevitas", "widths", "processes", "memory")
#: Columns per layer that the literal loop really solves; the rest of its time is extrapolated from them.
COLUMNS = 6


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m kdq.bench quant", add_help=False)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--memory-images", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--json", type=Path)
    # What the parts memory and processes run in processes of their own.
    parser.add_argument("--peak", nargs=2, metavar=("WHOSE", "IMAGES"))
    parser.add_argument("--devices", type=int)
    options = parser.parse_args(arguments)
    if options.devices:
        seconds = with_trainer(options.devices, options.images, options.bits)
        if rank() == 0:
            print(json.dumps(seconds))
        return
    if options.peak:
        whose, count = options.peak
        print(json.dumps(peak(whose, int(count), options.bits)))
        return
    found = measure(options)
    title = f"Quantizing a ResNet-18 at 32 x 32 pixels: {found['device']}, {found['threads']} threads"
    show(title, ("what", "value"), [{"what": name, "value": value} for name, value in found.items()])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def network_and_images(count: int) -> tuple[nn.Module, Tensor]:
    """A ResNet-18 in eval mode, and ``count`` images ``(count, 3, 32, 32)``, on the best device."""
    torch.manual_seed(0)
    device = best_device()
    net, images = resnet18(num_classes=10).to(device), torch.randn(count, 3, 32, 32, device=device)
    with torch.no_grad():
        for _ in range(3):
            net(images[:64])
    return net.eval(), images


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The numbers, by name; seconds unless the name says otherwise."""
    net, images = network_and_images(options.images)
    batches = images.split(64)
    device = torch.cuda.get_device_name() if images.is_cuda else f"{platform.processor() or platform.machine()} CPU"
    found: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= {"images": options.images, "bits": options.bits}
    quantized, found["kdq"] = timed(lambda: kdq.quantize(net, batches, bits=options.bits, solver="gpfq")[0])
    with torch.no_grad():
        _, found["two_forward_passes"] = timed(lambda: [net(x) for _ in range(2) for x in batches])
    found["kdq_over_two_forward_passes"] = found["kdq"] / found["two_forward_passes"]
    if "literal" in options.only:
        found |= against_literal(net, quantized, images)
        found["literal_over_kdq"] = found["literal_extrapolated"] / found["kdq"]
    if "brevitas" in options.only and find_spec("brevitas"):
        _, found["brevitas"] = timed(lambda: brevitas(net, batches, options.bits))
        found["brevitas_over_kdq"] = found["brevitas"] / found["kdq"]
        found |= {f"{whose}_peak_mb": separate_peak(whose, options.images, options) for whose in ("kdq", "brevitas")}
    if "widths" in options.only:
        work = partial(quantize_widths, net, batches, WIDTHS, QuantConfig(solver="gpfq"))
        _, found["twelve_widths"] = timed(work)
        found["twelve_widths_over_one"] = found["twelve_widths"] / found["kdq"]
    if "processes" in options.only:
        given = ("--images", str(options.images), "--bits", str(options.bits))
        runs = [[apart("quant", "--devices", str(count), *given) for count in (1, 2)] for _ in range(3)]
        for what in ("test", "calibrate"):
            alone, both = (median(run[index][what] for run in runs) for index in (0, 1))
            found |= {f"{what}_1_process": alone, f"{what}_2_processes": both, f"{what}_1_over_2": alone / both}
    if "memory" in options.only:
        for count in options.memory_images:
            found[f"peak_mb_{count}_images"] = separate_peak("kdq", count, options)
    return found


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


def with_trainer(devices: int, count: int, bits: int) -> dict[str, float]:
    """Seconds of ``trainer.test`` of the float network, and what its quantization adds, on so many devices."""
    torch.set_num_threads(1)
    net, images = network_and_images(10 * count)
    loader = DataLoader(TensorDataset(images.cpu(), torch.arange(len(images)) % 10), 64)
    quantization = PostTrainingQuantization(
        bits=bits, solver="gpfq", path=None, calibration=loader, calibration_images=count
    )
    trainer = L.Trainer(
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[quantization],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = CrossEntropy(net, num_classes=10)
    seconds = {}
    for name, what in (("warm", None), ("float", None), ("quantized", bits)):
        quantization.use(what)
        _, seconds[name] = timed(partial(trainer.test, module, loader, verbose=False))
    return {"test": seconds["float"], "calibrate": seconds["quantized"] - seconds["float"]}


def separate_peak(whose: str, count: int, options: argparse.Namespace) -> float:
    """:func:`peak` of a process of its own."""
    return float(apart("quant", "--peak", whose, str(count), "--bits", str(options.bits)))


def peak(whose: str, count: int, bits: int) -> float:
    """Megabytes at most resident in this process, above what it held before, for ``count`` images."""
    net, images = network_and_images(count)
    with torch.no_grad():
        net(images[:64])
    before = peak_mb()
    if whose == "kdq":
        kdq.quantize(net, images.split(64), bits=bits, solver="gpfq")
    else:
        brevitas(net, images.split(64), bits)
    return peak_mb() - before
