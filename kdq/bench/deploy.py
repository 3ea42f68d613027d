"""A cell's model in every format: accuracy, bytes, latency in ONNX Runtime, and memory of the packed module.

    python -m kdq.bench deploy [kdq overrides] [bench.threads=1,2] [bench.repeats=3]

The overrides name the cell as ``kdq`` takes them; what is missing of it is made. INT8 and float take turns in one
process, and the ratios of their medians and of their fastest runs are given for each repeat: other work on the machine
moves both. Memory is that of a fresh process which loads the packed file and classifies one image.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from kdq.app import class_folders
from kdq.cell import Cell
from kdq.complaint import compose
from kdq.cores import usable_cores
from kdq.deploy import latency
from kdq.deploy.runtime import session
from kdq.files import write_text
from kdq.pipeline import run
from kdq.quant.packing import DECODE, load_packed
from kdq.results import Row


def main(arguments: list[str]) -> None:
    """Print the table and write it as JSON to ``report/bench_deploy.json`` below the output folder."""
    if arguments[:1] == ["--memory"]:  # what the memory part runs in processes of its own
        print(json.dumps(memory(Path(arguments[1]), arguments[2], json.loads(arguments[3]))))
        return
    threads = [int(value) for value in _own(arguments, "threads", f"1,{usable_cores()}").split(",")]
    repeats = int(_own(arguments, "repeats", "3"))
    OmegaConf.register_new_resolver("class_folders", class_folders, replace=True)
    overrides = [argument for argument in arguments if not argument.startswith("bench.")]
    cell = Cell(compose(overrides, "deploy=onnx"))
    shape = (cell.cfg.data.in_channels, cell.images.height, cell.images.width)
    found = [measure(cell, row, shape, sorted(set(threads)), repeats) for row in run(cell.cfg)]
    for row in found:
        text = Table("what", "value", title=f"{row['arch']}, {row['bits']} bits, {row['method']}, {row['data']}")
        for name, value in row.items():
            text.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        Console(width=120).print(text)
    write_text(cell.output / "report" / "bench_deploy.json", json.dumps(found, indent=1))


def measure(cell: Cell, row: Row, shape: tuple[int, ...], threads: list[int], repeats: int) -> dict[str, Any]:
    """One row's numbers by name; ratios are float over INT8, one of every repeat."""
    packed = cell.output / row.artifact
    columns = ("data", "method", "arch", "bits", "top1_float", "top1", "top1_onnx_fp32", "top1_onnx_int8")
    sizes = ("float_bytes", "size_bytes", "onnx_fp32_bytes", "onnx_int8_bytes")
    found = {name: getattr(row, name) for name in (*columns, *sizes, "macs", "bops")}
    for count in threads:
        files = {kind: packed.with_suffix(f".{kind}.onnx") for kind in ("fp32", "int8")}
        sessions = {kind: session(file, count) for kind, file in files.items()}
        for batch, runs in ((1, cell.cfg.deploy.runs), (cell.cfg.deploy.batch, max(3, cell.cfg.deploy.runs // 5))):
            taken = [latency.of_sessions(sessions, shape, batch, runs) for _ in range(repeats)]
            name = f"batch {batch}, {count} threads"
            for column in ("median_ms", "min_ms"):
                ratios = [getattr(each["fp32"], column) / getattr(each["int8"], column) for each in taken]
                found[f"{name}: float / INT8, {column}"] = " ".join(f"{ratio:.2f}" for ratio in ratios)
            for kind in files:
                best = min((each[kind] for each in taken), key=lambda each: each.median_ms)
                found[f"{name}: {kind} min, median, p95 ms"] = (
                    f"{best.min_ms:.3f} {best.median_ms:.3f} {best.p95_ms:.3f}"
                )
    for decode in DECODE:
        command = [sys.executable, "-m", "kdq.bench", "deploy", "--memory", str(packed), decode, json.dumps(shape)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found |= {f"decode={decode}: {name}": value for name, value in json.loads(result.stdout).items()}
    return found


def memory(packed: Path, decode: str, shape: list[int]) -> dict[str, float]:
    """Of this process: bytes that the loaded module holds, how much its peak grew, and milliseconds for an image."""
    image = torch.zeros(1, *shape)
    with torch.no_grad():
        nn.Conv2d(shape[0], 8, 3)(image)  # torch's own libraries are in memory now
        before = _peak_bytes()
        network = load_packed(packed, decode=decode)
        network(image)
        grown = _peak_bytes() - before
        times = latency.alternating({"image": lambda: network(image)}, batch=1, runs=20)
    return {"held_bytes": held_bytes(network), "peak_mb": grown / 2**20, "ms": times["image"].median_ms}


def _peak_bytes() -> int:
    """The most that was resident in this process; what getrusage says includes its parent's before the fork."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def held_bytes(network: nn.Module) -> int:
    """Bytes of all distinct tensors that ``network`` keeps, its packed codes included."""
    weights: Any = getattr(network, "quantized_weights", {})
    tensors = [*network.parameters(), *network.buffers()]
    tensors += [tensor for weight in weights.values() for tensor in (weight.packed, weight.scale, weight.zero)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _own(arguments: list[str], name: str, default: str) -> str:
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"bench.{name}=")]
    return given[-1] if given else default
