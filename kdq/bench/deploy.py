"""A cell's model in every format: accuracy, bytes, latency, and memory of the packed module.

    python -m kdq.bench deploy [kdq overrides] [bench.threads=1,2] [bench.repeats=3]

The overrides name the cell as ``kdq`` takes them; what is missing of it is made. On the CPU, in ONNX Runtime, take
turns: the float graph, ours in INT8 and with codes, and ``static``, what ONNX Runtime's own ``quantize_static`` makes
of the float graph; at batch 1 our graphs in OpenVINO and the float network in torch with them
(:mod:`kdq.bench.runtimes`), as far as ``kdq[runtimes]`` is installed; in torch, on the device of
``trainer.accelerator``: the float network, and the packed file decoded once and decoded layer by layer. Given are the
ratios of their medians and of their fastest runs, one for each repeat; beside them, top-1 on the test images in ONNX
Runtime and in OpenVINO. Memory is that of a fresh process which loads the packed file and classifies one image.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from kdq.bench.common import apart, peak_mb, show, split_options
from kdq.bench.runtimes import others
from kdq.deploy.onnx_files import FORMATS
from kdq.deploy.runtime import openvino, runner, session, top1
from kdq.quant.calibrate.chunks import storage_bytes
from kdq.quant.packing.file import DECODE, load_packed
from kdq.records.rows import Row
from kdq.stages.cell import Cell
from kdq.stages.deploy import calibration
from kdq.stages.pipeline import run
from kdq.stages.train import float_model
from kdq.utils import latency
from kdq.utils.config import compose
from kdq.utils.cpu import usable_cores
from kdq.utils.files import write_text


def main(arguments: list[str]) -> None:
    """Print the table and write it as JSON to ``report/bench_deploy.json`` below the output folder."""
    if arguments[:1] == ["--memory"]:  # what the memory part runs in processes of its own
        print(json.dumps(memory(Path(arguments[1]), arguments[2], json.loads(arguments[3]))))
        return
    own, overrides = split_options(arguments, threads=f"1,{usable_cores()}", repeats="3")
    threads = sorted({int(value) for value in own["threads"].split(",")})
    cell, found = Cell(compose(overrides, "deploy=onnx", f"deploy.formats=[{','.join(FORMATS)}]")), []
    for row in run(cell.cfg):
        bench = Bench(cell, row, int(own["repeats"]))
        found.append(bench.about() | bench.openvino())
        found[-1] |= bench.onnx(threads) | bench.torch() | bench.memory()
        numbers = [{"what": name, "value": value} for name, value in found[-1].items()]
        show(f"{row.arch}, {row.bits} bits, {row.method}, {row.data}", ("what", "value"), numbers, ".6g")
    write_text(cell.output / "report" / "bench_deploy.json", json.dumps(found, indent=1))


@dataclass(frozen=True)
class Bench:
    """One row's numbers by name."""

    cell: Cell
    row: Row
    repeats: int

    @property
    def packed(self) -> Path:
        return self.cell.output / self.row.artifact

    @property
    def models(self) -> dict[str, Path]:
        return {kind: self.packed.with_suffix(f".{kind}.onnx") for kind in FORMATS}

    def about(self) -> dict[str, Any]:
        names = ["data", "method", "arch", "bits", "top1_float", "top1", "float_bytes", "size_bytes", "macs", "bops"]
        names += [f"top1_onnx_{kind}" for kind in self.models] + [f"onnx_{kind}_bytes" for kind in self.models]
        return {name: getattr(self.row, name) for name in names}

    def onnx(self, threads: Sequence[int]) -> dict[str, str]:
        """Latencies of the ONNX models in ONNX Runtime."""
        found: dict[str, str] = {}
        with TemporaryDirectory() as folder:
            models = self.models
            models["static"] = static(models["fp32"], calibration(self.cell), Path(folder) / "static.onnx")
            for count in threads:
                runs = {kind: runner(session(model, count)) for kind, model in models.items()}
                name = f"ONNX Runtime, {count} threads"
                found |= self.compared(name, lambda *many, each=runs: latency.of_runners(each, self.cell.shape, *many))
                found |= self.runtimes(count)
        return found

    def openvino(self) -> dict[str, float]:
        """Top-1 on the test images of the ONNX models in OpenVINO: it must compute what ONNX Runtime does."""
        if not find_spec("openvino"):
            return {}
        return {
            f"top1_openvino_{kind}": top1(run, self.cell.images.evaluation("test", torch.device("cpu")))
            for kind, run in openvino(self.models).items()
        }

    def runtimes(self, threads: int) -> dict[str, str]:
        """Latencies of the ONNX models in each runtime, and of the float network in torch, on the CPU."""
        before = torch.get_num_threads()
        try:
            images = torch.randn(1, *self.cell.shape, generator=torch.Generator().manual_seed(0))
            calls: dict[str, Callable[[], Any]] = {
                f"ONNX Runtime {kind}": partial(session(model, threads).run, None, {"image": images.numpy()})
                for kind, model in self.models.items()
            }
            calls |= others(self.models, self.cell.network(self.cell.role, float_model(self.cell)), images, threads)
            with torch.no_grad():
                return self.compared(
                    f"runtimes, {threads} threads", partial(latency.alternating, calls), first="ONNX Runtime int8"
                )
        finally:
            torch.set_num_threads(before)

    def torch(self) -> dict[str, str]:
        """Latencies of the networks in torch, in float arithmetic."""
        networks = {"float": self.cell.network(self.cell.role, float_model(self.cell))}
        networks |= {f"decode={decode}": load_packed(self.packed, decode=decode) for decode in DECODE}
        layout, device = torch.channels_last, self.cell.device
        networks = {name: network.to(device).to(memory_format=layout) for name, network in networks.items()}
        where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else self.row.device
        return self.compared(f"torch, {where}", partial(latency.of_networks, networks, self.cell.shape))

    def memory(self) -> dict[str, float]:
        """Memory of the packed module, in fresh processes."""
        found: dict[str, float] = {}
        for decode in DECODE:
            held = apart("deploy", "--memory", str(self.packed), decode, json.dumps(self.cell.shape))
            found |= {f"decode={decode}: {name}": value for name, value in held.items()}
        return found

    def compared(
        self, name: str, measure: Callable[[int, int], Mapping[str, latency.Latency]], first: str | None = None
    ) -> dict[str, str]:
        """What ``measure(batch, runs)`` finds, and how many times faster than the first the others are; at batch 1
        alone if ``first`` names it."""
        found, config = {}, self.cell.cfg.deploy
        for batch, runs in ((1, config.runs), (config.batch, max(3, config.runs // 5)))[: 1 if first else 2]:
            taken = [measure(batch, runs) for _ in range(self.repeats)]
            first = first or next(iter(taken[0]))
            kinds = [kind for kind in taken[0] if kind != first]
            for kind in kinds:
                for column in ("median_ms", "min_ms"):
                    ratios = [getattr(each[first], column) / getattr(each[kind], column) for each in taken]
                    key = f"{name}, batch {batch}: {first} / {kind}, {column}"
                    found[key] = " ".join(f"{ratio:.2f}" for ratio in ratios)
            for kind in (first, *kinds):
                best = min((each[kind] for each in taken), key=lambda each: each.median_ms)
                times = f"{best.min_ms:.3f} {best.median_ms:.3f} {best.p95_ms:.3f}"
                found[f"{name}, batch {batch}: {kind} min, median, p95 ms"] = times
        return found


def static(model: Path, batches: Iterable[Tensor], target: Path) -> Path:
    """``model`` in INT8 by ONNX Runtime's own means: the best of its settings on CPUs with VNNI."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.chunks = (chunk for batch in batches for chunk in batch.split(16))

        def get_next(self) -> dict[str, Any] | None:
            chunk = next(self.chunks, None)
            return None if chunk is None else {"image": chunk.contiguous().numpy()}

    options = {"per_channel": True, "reduce_range": False, "activation_type": quantization.QuantType.QUInt8}
    logging.disable(logging.WARNING)  # it advises to fold BatchNorm first, which the float graph has done
    try:
        quantization.quantize_static(model, target, Reader(), **options, weight_type=quantization.QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    return target


def memory(packed: Path, decode: str, shape: list[int]) -> dict[str, float]:
    """Bytes that the loaded module holds in this process, and how much loading it and an image made the peak grow."""
    image = torch.zeros(1, *shape)
    with torch.no_grad():
        nn.Conv2d(shape[0], 8, 3)(image)  # torch's own libraries are in memory now
        before = peak_mb()
        network = load_packed(packed, decode=decode)
        network(image)
        grown = peak_mb() - before
    weights: Any = network.quantized_weights
    kept = [tensor for weight in weights.values() for tensor in (weight.packed, weight.scale, weight.zero)]
    return {"held_bytes": storage_bytes([*network.parameters(), *network.buffers(), *kept]), "peak_mb": grown}
