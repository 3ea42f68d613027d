"""Signals at random moments of a grid: one line, the signal's code, no process left, and a rerun that ends well."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.conftest import TINY

#: The rest, fifty or a thousand, are for people: KDQ_SIGNALS=50 pytest -s tests/sweep/test_signals.py
SIGNALS = int(os.environ.get("KDQ_SIGNALS", "2"))
NAMES = {int(signal.SIGINT): "interrupted", int(signal.SIGTERM): "terminated"}
ARGUMENTS = [*TINY, "method=vkd,mixup", "student.recipe.epochs=3", "quant.bits=[2,8]"]

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked for in /proc")


def start(output: Path, mark: str, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kdq", "-m", *ARGUMENTS, *overrides, f"paths.output_dir={output}"]
    environment = os.environ | {"KDQ_MARK": mark}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def heeds(process: subprocess.Popen[str]) -> bool:
    """Whether its handlers are there: Python itself has none for SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def marked(mark: str) -> list[str]:
    """The processes, not yet dead, that were started below the one with this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"KDQ_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.timeout(600 + 40 * SIGNALS)
@pytest.mark.parametrize("launcher", [["hydra/launcher=local"], []])
def test_signals_end_a_command_with_one_line_and_leave_nothing(launcher: list[str], tmp_path: Path) -> None:
    draw, took = random.Random(0), []
    undisturbed = start(tmp_path / "undisturbed", uuid.uuid4().hex, *launcher)
    said = undisturbed.communicate()[1]
    assert undisturbed.returncode == 0, said
    output, outputs = tmp_path / "0", 1
    for number in range(SIGNALS):
        first = draw.choice([signal.SIGINT, signal.SIGTERM])
        more = draw.choice([(), (), (signal.SIGINT,), (signal.SIGTERM, signal.SIGINT)])
        mark, delay = uuid.uuid4().hex, draw.uniform(0, 12)  # each gets a little further
        process = start(output, mark, *launcher)
        while process.poll() is None and not heeds(process):
            time.sleep(0.01)
        time.sleep(delay)
        if process.poll() is not None:  # it got to its end
            output, outputs = tmp_path / str(outputs), outputs + 1
        sent = time.monotonic()
        to = draw.choice([os.kill, os.killpg])
        alive = process.poll() is None
        for one in (first, *more) if alive else ():
            try:
                to(process.pid, one)
            except ProcessLookupError:
                break
            time.sleep(draw.uniform(0.01, 0.3))
        said = process.communicate(timeout=60)[1]
        seconds, left = time.monotonic() - sent, marked(mark)
        lines = [line for line in said.splitlines() if "kdq: " in line]
        print(number, first.name, [one.name for one in more], to.__name__, f"{delay:.1f} s", process.returncode,
              f"{seconds:.2f} s", left, lines, sep=" | ")  # fmt: skip
        assert not left
        if alive and process.returncode:
            took.append(seconds)
            # Of two that come while the process waits for a core the kernel delivers the smaller one first.
            assert process.returncode in [128 + one for one in (first, *more)], said
            assert len(lines) == 1, said
            assert f"kdq: {NAMES[process.returncode - 128]}; the same command goes on from " in lines[0]
            assert "Traceback" not in said, said
            assert seconds < 30
    print(f"{len(took)} signals, {max(took, default=0):.2f} s at most")
    last = start(output, uuid.uuid4().hex, *launcher)
    said = last.communicate()[1]
    assert last.returncode == 0, said
    rows = {path.name for path in (tmp_path / "undisturbed/rows").glob("*.json")}
    assert {path.name for path in (output / "rows").glob("*.json")} == rows
