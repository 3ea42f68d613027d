"""How a process ends on signals: the code of the first one, whatever a library made of it."""

import subprocess
import sys

import pytest

BLOCK = """
import os, signal, sys
from kdq.utils.signals import ending_on_signals
with ending_on_signals():
    try:
        os.kill(os.getpid(), signal.{name})
        while True: pass
    except KeyboardInterrupt as interrupt:
        {answer}
"""


@pytest.mark.parametrize("answer", ["raise", "sys.exit(1)"])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_process_with_its_code(name: str, code: int, answer: str) -> None:
    script = BLOCK.format(name=name, answer=answer)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.count("kdq: ") == 1
    assert "Traceback" not in done.stderr


def test_an_exit_without_a_signal_is_left_alone() -> None:
    script = "from kdq.utils.signals import ending_on_signals\nwith ending_on_signals(): raise SystemExit(7)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 7


def test_an_error_of_work_that_a_signal_broke_off_is_not_told() -> None:
    script = """
import os, signal
from kdq.utils.signals import ending_on_signals
with ending_on_signals():
    from kdq.cli.app import fail
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        while True: pass
    except KeyboardInterrupt:
        fail(ValueError("half a config"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("kdq: ")) == (143, 1)
    assert "half a config" not in done.stderr
