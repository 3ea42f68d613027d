"""Slurm's warning, SIGUSR2, at the first moments of a job: programs of three lines stand in for Slurm's own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdq.train.slurm import start_worker
from tests.conftest import TINY

PROGRAMS = {
    # Runs the script, and again whenever the job was requeued.
    "sbatch": """
export SLURM_JOB_ID=$(($(ls "$STATE" | grep -c ^job-) + 1))
touch "$STATE/job-$SLURM_JOB_ID"
(while bash "${@: -1}"; test -e "$STATE/requeue-$SLURM_JOB_ID"; do rm "$STATE/requeue-$SLURM_JOB_ID"; done
 touch "$STATE/ended-$SLURM_JOB_ID") >>"$STATE/printed" 2>&1 </dev/null &
echo "Submitted batch job $SLURM_JOB_ID"
""",
    # The first step is warned while Python imports what its job needs.
    "srun": """
while [[ $1 == --* ]]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
export SLURM_NTASKS=1 SLURM_PROCID=0
"$@" &
if mkdir "$STATE/warned" 2>/dev/null; then
    until tr '\\0' ' ' <"/proc/$!/cmdline" | grep -q "python[0-9.]* -u -m submitit"; do sleep 0.01; done
    kill -USR2 $!
fi
wait $!
""",
    "scontrol": 'touch "$STATE/requeue-$2"',
    "sacct": """
echo 'JobID|State|NodeList'
for job in "$STATE"/ended-*; do echo "${job##*-}|FAILED|node"; done
""",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the state of a pretended Slurm, whose programs are on the path."""
    state = tmp_path / "slurm"
    state.mkdir()
    for name, text in PROGRAMS.items():
        (state / name).write_text(f"#!/bin/bash\n{text}")
        (state / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{state}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(state))
    return state


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the moment is looked up in /proc")
def test_a_job_that_is_preempted_while_it_imports_is_requeued(slurm: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    arguments = [*TINY, "method=baseline", "quant=none", "hydra/launcher=slurm", f"paths.output_dir={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, "-m", "kdq", "-m", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + (slurm / "printed").read_text()
    assert (slurm / "warned").is_dir()
    assert [json.loads(path.read_text())["method"] for path in tmp_path.glob("out/rows/*.json")] == ["baseline"]
    logs = [path.read_text() for path in tmp_path.glob("out/runs/*/*/*.log")]
    assert sum(log.count("this job is preempted") for log in logs) == 1


SLOW_WORKER = """
import sys, time
from pathlib import Path

time.sleep(1)
Path(sys.argv[1]).write_text("done")
"""


def test_a_warning_ends_no_worker_however_early_it_comes(tmp_path: Path) -> None:
    (tmp_path / "slow_worker.py").write_text(SLOW_WORKER)
    worker = start_worker("slow_worker", tmp_path / "job", {"PYTHONPATH": str(tmp_path)})
    os.kill(worker.pid, signal.SIGUSR2)
    assert worker.wait() == 0
    assert (tmp_path / "job").read_text() == "done"
    assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
