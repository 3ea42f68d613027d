"""What makes a stage that is run again continue its run, also offline, where W&B remembers nothing."""

import json
import os
import secrets
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def folder_id(runs: Path) -> str:
    """What tells the runs below ``runs`` from equal ones of another output folder: eight digits in a file there."""
    path = runs / ".id"
    if not path.exists():
        draft = runs / f".id-{secrets.token_hex(4)}"
        draft.write_text(secrets.token_hex(4))
        with suppress(FileExistsError):  # another process was faster
            try:
                os.link(draft, path)
            except PermissionError:  # a file system without hard links
                draft.replace(path)
        draft.unlink(missing_ok=True)
    return path.read_text()


def next_step(runs: Path, run_id: str) -> int:
    """The step after the last one that earlier offline segments of the run logged; 0 if there are none.

    A server takes rows of equal steps for one row: a second segment that began at 0 would overwrite the first.
    """
    steps = [_last_step(folder) for folder in (runs / "wandb").glob(f"offline-run-*-{run_id}")]
    return max(steps, default=-1) + 1


def _last_step(folder: Path) -> int:
    """The last step in an offline run's folder, read by W&B's own tool; -1 where it finds none."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(folder)]
    with suppress(OSError, subprocess.SubprocessError, ValueError, AttributeError):
        segment = json.loads(subprocess.run(command, capture_output=True, timeout=120, check=True).stdout)
        return int(segment["step"]) if "_step" in segment.get("summary", {}) else -1
    return -1
