"""Which kdq made a result."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import kdq


@cache
def git_sha() -> str:
    """The commit of kdq's own checkout, with ``+`` when it has local changes; empty for an installed package."""
    folder = Path(kdq.__file__).parent.parent
    if not (folder / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
