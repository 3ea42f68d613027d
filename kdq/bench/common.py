"""What several benchmarks need: their options beside kdq's own, the device, a clock, a table."""

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kdq.cli.app  # noqa: F401  the resolvers of configs

#: Networks by name, for images of ten classes.
NETS: dict[str, dict[str, Any]] = {
    "resnet50": {"_target_": "kdq.models.resnet50", "num_classes": 10},
    "resnet18": {"_target_": "kdq.models.resnet18", "num_classes": 10},
    "resnet56": {"_target_": "kdq.models.CifarResNet", "depth": 56, "num_classes": 10},
    "resnet20": {"_target_": "kdq.models.CifarResNet", "depth": 20, "num_classes": 10},
}


def split_options(arguments: Sequence[str], **defaults: str) -> tuple[dict[str, str], list[str]]:
    """The values of ``bench.NAME=VALUE`` by name, and the other arguments: overrides of kdq's config. A name that is
    not among ``defaults`` ends the process."""
    given = dict(a.removeprefix("bench.").split("=", 1) for a in arguments if a.startswith("bench.") and "=" in a)
    if unknown := given.keys() - defaults:
        sys.exit(f"unknown: bench.{', bench.'.join(unknown)}; there are bench.{', bench.'.join(defaults)}")
    return defaults | given, [a for a in arguments if not a.startswith("bench.")]


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def peak_mb() -> float:
    """Megabytes that this process held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss begins with what the parent held when it started this process
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[Any, float]:
    """What ``work`` returns, and its seconds by the ``clock``."""
    start = clock()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, clock() - start


def apart(*arguments: str) -> Any:
    """What ``python -m kdq.bench`` with these arguments prints last, JSON, in a process of its own."""
    command = [sys.executable, "-m", "kdq.bench", *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def show(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], form: str = ".4g") -> None:
    """Print a table. ``form`` is how fractions are written; what a row lacks is left empty."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(_text(row.get(column, ""), form) for column in columns))
    Console(width=160).print(table)


def line(row: Mapping[str, Any]) -> str:
    """One measurement as it is told while others still run."""
    return " ".join(f"{key}={_text(value, '.4g')}" for key, value in row.items())


def _text(value: Any, form: str) -> str:
    return f"{value:{form}}" if isinstance(value, float) else str(value)
