"""How many cores kdq computes with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdq.utils import cpu as cores


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("", 8)],
)
def test_a_container_s_share_of_the_machine_counts(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert cores.usable_cores() == expected


def test_without_control_groups_the_binding_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "absent")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert cores.usable_cores() == 3


@pytest.mark.parametrize(("said", "expected"), [(None, "1"), ("2", "2")])
def test_torch_uses_them_unless_the_user_says_otherwise(said: str | None, expected: str, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if said is None else {"OMP_NUM_THREADS": said}
    code = (
        "import sys, pathlib, torch; from kdq.utils import cpu as cores; cores.QUOTA = pathlib.Path(sys.argv[1]); "
        "cores.use_cores(); print(torch.get_num_threads())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cpu.max")]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == expected
