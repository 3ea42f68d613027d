"""What made a result: the version and the commit of kdq, and the versions of what it computes with."""

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from kdq.utils.cpu import cpu_name

__version__ = "0.1.0"


@cache
def git_sha() -> str:
    """The commit of kdq's own checkout, with ``+`` when it has local changes; empty for an installed package."""
    folder = Path(__file__).parent.parent.parent
    if not (folder / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> str:
    """What else a result's last digits depend on: libraries, the instructions that torch takes on this CPU, and its
    name, by which libraries choose among kernels."""
    import torch

    names = [f"{name} {version(name)}" for name in ("torch", "numpy", "lightning")]
    return ", ".join([*names, f"CPU {torch.backends.cpu.get_cpu_capability()} {cpu_name()}"])
