"""Images per second of every distillation method: kdq's command against bare and plain loops, and what else matters.

    python -m kdq.bench train [--only methods pairs batch precision compile processes data] [--methods vkd at | all]
                              [--seconds 6] [--json FILE]

``kdq`` is the real command, in a process of its own: Lightning, augmentation, metrics, logging to CSV files; its rate
is the median of ``train/images_per_second`` within its second epoch. ``bare`` and ``plain`` are the loops of
:mod:`kdq.bench.loops`, each in a process of its own for ``--seconds``, too. The part ``data`` is the loader alone,
against what the fastest network consumes. The roofline is the share of the device's measured rate of matrix products,
in the case's precision, that the networks' own operations make up: a forward pass counts once, a backward pass twice.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdq.bench.common import NETS, apart, best_device, line, peak_mb, show, timed
from kdq.bench.loops import Step, bare, images_per_second, plain
from kdq.data.augment import Augment, Preprocess
from kdq.data.loader import TrainLoader
from kdq.data.source import Resident
from kdq.models.build import build
from kdq.quant.operations import multiply_adds
from kdq.utils.config import choices
from kdq.utils.files import write_text

#: Those that the loops beside kdq's have, too.
METHODS = ("baseline", "vkd", "mixup", "dkd", "dml")
PARTS = ("methods", "pairs", "batch", "precision", "compile", "processes", "data")
#: What tells trainings apart in the table, and its columns.
CASE = ("part", "method", "pair", "batch", "precision", "compile", "processes")
COLUMNS = (*CASE, "kdq", "bare", "plain", "kdq/bare", "kdq/plain", "step/vkd", "roofline", "peak MB")
#: Steps over which kdq logs its rate.
WINDOW = 20


@dataclass(frozen=True)
class Case:
    """One training to measure."""

    loop: str = "kdq"
    method: str = "vkd"
    teacher: str = "resnet56"
    student: str = "resnet20"
    batch_size: int = 128
    precision: str = "bf16-mixed"
    compile: bool = False
    processes: int = 1
    seconds: float = 6.0


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m kdq.bench train", add_help=False)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    known = [name for name in choices("method") if name not in ("teacher", "terms")]
    parser.add_argument("--methods", choices=[*known, "all"], nargs="+", default=METHODS)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case")  # what a loop's process runs
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(_loop(Case(**json.loads(options.case)))))
        return
    methods = known if "all" in options.methods else options.methods
    found: list[dict[str, Any]] = []
    peaks = machine()
    for part in options.only:
        for measured in _data(options.seconds) if part == "data" else _trainings(part, methods, options.seconds):
            if part != "data":
                measured["roofline"] = roofline(measured, peaks)
            found.append({"part": part, **measured})
            print(line(measured), flush=True)
            if options.json:
                write_text(options.json, json.dumps({"machine": peaks, "measured": found}, indent=1) + "\n")
    show("training: images per second", COLUMNS, list(_compared(found)), ".4g")


def machine() -> dict[str, Any]:
    """Device, versions, and billions of operations a second of a large matrix product."""
    device = best_device()
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        size = 8192 if device.type == "cuda" else 2048
        A = torch.randn(size, size, device=device).to(dtype)
        _, seconds = [timed(partial(_products, A, 5)) for _ in range(2)][1]  # the first one warms up
        peaks[f"gflops_{str(dtype).removeprefix('torch.')}"] = 5 * 2e-9 * size**3 / seconds
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, **peaks}


def _products(A: Tensor, times: int) -> list[Tensor]:
    return [A @ A for _ in range(times)]


def roofline(measured: dict[str, Any], peaks: dict[str, Any]) -> float:
    """The share of the device's rate of matrix products that a training of :class:`Case` reached."""
    dtype = "bfloat16" if measured["precision"] == "bf16-mixed" and measured["loop"] != "plain" else "float32"
    gflops = gflops_per_image(measured["method"], measured["student"], measured["teacher"])
    return float(measured["images_per_second"] * gflops / peaks[f"gflops_{dtype}"])


def gflops_per_image(method: str, student: str, teacher: str) -> float:
    """Billions of operations of a training step on one 32x32 image: 2 a multiply-accumulate, three passes' worth for a
    network that learns, one for a teacher."""
    macs = {name: multiply_adds(build(NETS[name]).eval(), torch.zeros(1, 3, 32, 32)) for name in (student, teacher)}
    learning, teaching = {
        "teacher": (macs[teacher], 0),
        "baseline": (macs[student], 0),
        "tfkd": (macs[student], 0),
        "dml": (2 * macs[student], 0),
    }.get(method, (macs[student], macs[teacher]))
    return 2e-9 * (3 * learning + teaching)


def trainings_of(part: str, methods: Sequence[str] = METHODS) -> list[Case]:
    """The trainings of a part; each is measured with kdq's loop and, where it has any, the loops beside it."""
    first = Case()
    if part == "methods":
        loops = {method: ("kdq", "bare", "plain") if method in METHODS else ("kdq",) for method in methods}
        return [replace(first, method=method, loop=loop) for method in methods for loop in loops[method]]
    if part == "pairs":
        large = replace(first, teacher="resnet50", student="resnet18", batch_size=64)
        cases = [replace(first, method="teacher"), large, replace(large, method="teacher")]
        return [replace(case, loop=loop) for case in cases for loop in ("kdq", "bare")]
    if part == "batch":
        return [replace(first, batch_size=size, loop=loop) for size in (32, 512) for loop in ("kdq", "bare")]
    if part == "precision":
        return [replace(first, precision="32-true", loop=loop) for loop in ("kdq", "bare")]
    if part == "compile":
        return [replace(first, compile=True, loop=loop, seconds=20.0) for loop in ("kdq", "bare")]
    return [replace(first, processes=2)]


def _trainings(part: str, methods: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    for case in trainings_of(part, methods):
        case = replace(case, seconds=max(seconds, case.seconds if case.compile else 0))
        yield {**asdict(case), **(_kdq(case) if case.loop == "kdq" else _separately(case))}


def _separately(case: Case) -> dict[str, Any]:
    return dict(apart("train", "--case", json.dumps(asdict(case))))


def _networks(case: Case) -> tuple[nn.Module, nn.Module]:
    """What is trained, and the teacher or the peer."""
    names = (case.teacher, case.teacher) if case.method == "teacher" else (case.student, case.teacher)
    if case.method == "dml":
        names = (case.student, case.student)
    torch.manual_seed(0)
    layout = torch.contiguous_format if case.loop == "plain" else torch.channels_last
    first, second = (build(NETS[name]).to(best_device()).to(memory_format=layout) for name in names)
    return first, second


def _loop(case: Case) -> dict[str, Any]:
    device, networks = best_device(), _networks(case)
    if case.compile:
        for network in networks:
            network.compile()
    step = Step(case.method, *networks, "32-true" if case.loop == "plain" else case.precision)
    steps = {"bare": bare, "plain": plain}[case.loop](step, case.batch_size, device)
    rate = images_per_second(steps, case.batch_size, case.seconds, device)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_mb()
    return {"images_per_second": rate, "peak_mb": peak}


def _kdq(case: Case) -> dict[str, Any]:
    """The command, on random images, for some epochs of about ``case.seconds``."""
    guess = _separately(replace(case, loop="bare", seconds=1.0, processes=1))["images_per_second"]
    steps = max(2 * WINDOW, int(guess * case.seconds / 2 / case.batch_size) // WINDOW * WINDOW)
    count = steps * case.batch_size + 128
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        teacher = build(NETS[case.teacher])
        for module in teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        teacher(torch.randn(128, 3, 32, 32))  # as a trained one's, its features do not grow from block to block
        save_file(teacher.state_dict(), f"{folder}/teacher.safetensors")
        role = "teacher" if case.method == "teacher" else "student"
        overrides = [
            *("data=cifar10", "data.name=noise", "data.source._target_=kdq.bench.loops.random_images"),
            *("~data.source.root", "~data.source.cache", "~data.source.split"),
            *(f"+data.source.count={count}", f"data.val_fraction={128 / count}"),
            *(f"model@teacher={case.teacher}", f"model@student={case.student}", f"method={case.method}"),
            *("quant=none", "logger=csv", f"paths.output_dir={folder}/out", f"trainer.precision={case.precision}"),
            *(f"{role}.recipe.epochs=2", f"{role}.recipe.batch_size={case.batch_size}", f"{role}.recipe.lr=0.01"),
            *(f"trainer.compile={case.compile}", f"trainer.devices={case.processes}", "data.test_limit=16"),
        ]
        if case.processes > 1:
            overrides += ["trainer=ddp"]
        if role == "student":
            overrides += [f"teacher.weights={folder}/teacher.safetensors"]
        said = Path(folder, "said.txt")
        with said.open("w") as output:
            process = subprocess.Popen([sys.executable, "-m", "kdq", *overrides], stdout=output, stderr=output)
            # Of this process alone, unlike RUSAGE_CHILDREN.
            (_, status, usage), total = timed(partial(os.wait4, process.pid, 0))
        if status:
            raise RuntimeError(said.read_text())
        rates = []
        for file in Path(folder, "out", "runs").rglob("metrics.csv"):
            with open(file) as lines:
                rows = [row for row in csv.DictReader(lines) if row.get("train/images_per_second")]
            # Without the first epoch, and without the first window of each: it has the epoch's preparation in it.
            later = [row for row in rows if int(row["step"]) > steps and int(row["step"]) % steps > WINDOW]
            rates += [float(row["train/images_per_second"]) for row in later]
        peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"images_per_second": statistics.median(rates), "peak_mb": peak, "command_seconds": total}


def _data(seconds: float) -> Iterator[dict[str, Any]]:
    device, count = best_device(), 50_000
    images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (count,), device=device)
    source, preprocess = Resident(images, labels, device), Preprocess((0.5,) * 3, (0.25,) * 3)
    augments = {"none": Augment(), "crop+flip": Augment(4, True), "crop+flip+cutout": Augment(4, True, 8)}
    for name, augment in augments.items():
        shared: dict[str, Any] = {"preprocess": preprocess, "augment": augment}
        loader = TrainLoader(source, torch.arange(count), 128, **shared, seed=0, epoch=lambda: 0)
        steps = (None for _ in iter(int, 1) for _ in loader)
        yield {"augment": name, "images_per_second": images_per_second(steps, 128, seconds, device)}


def _compared(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One line for each training: the rates of its loops, and what kdq's is of the others'."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for measured in found:
        if measured["part"] != "data":
            case = {"pair": f"{measured['teacher']}-{measured['student']}", "batch": measured["batch_size"], **measured}
            cases.setdefault(tuple(case[name] for name in CASE), {})[measured["loop"]] = measured
    for case_values, loops in cases.items():
        row: dict[str, Any] = dict(zip(CASE, case_values, strict=True))
        row |= {loop: measured["images_per_second"] for loop, measured in loops.items()}
        row |= {f"kdq/{loop}": row["kdq"] / row[loop] for loop in ("bare", "plain") if loop in row}
        if vkd := cases.get((case_values[0], "vkd", *case_values[2:])):
            row["step/vkd"] = vkd["kdq"]["images_per_second"] / row["kdq"]
        yield row | {"roofline": loops["kdq"]["roofline"], "peak MB": loops["kdq"]["peak_mb"]}
