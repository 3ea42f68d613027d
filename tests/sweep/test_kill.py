"""kill -9 at any moment: what is left is whole, nothing is trained twice, a rerun ends as if nothing had happened."""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

import kdq.cli.app
from kdq.records.store import Store
from kdq.utils.files import file_digest
from tests.cli.test_app import CIRCUMSTANCES
from tests.conftest import TINY

#: A hundred are for people: KDQ_KILLS=100 pytest -s tests/sweep/test_kill.py
KILLS = int(os.environ.get("KDQ_KILLS", "9"))
ARGUMENTS = [
    *(a for a in TINY if "epochs" not in a and "train_limit" not in a),
    "data.train_limit=128",
    "teacher.recipe.epochs=3",
    "student.recipe.epochs=3",
    "teacher.recipe.batch_size=32",
    "student.recipe.batch_size=32",
    "quant.bits=[2,8]",
]


def _command(output: Path) -> None:
    """``kdq -m`` in a process of its own, which notes every model that it publishes."""
    publish = Store._publish

    def noted(self: Store, spec: Any, slug: str, *rest: Any) -> None:
        publish(self, spec, slug, *rest)
        with (output / "published").open("a") as log:
            log.write(f"{self.path(spec, slug).name}\n")

    Store._publish = noted  # type: ignore[method-assign]
    kdq.cli.app.finish = lambda *_: None  # the report, which is made from the rows

    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    sys.argv = ["kdq", "-m", "method=vkd", *ARGUMENTS, f"paths.output_dir={output}"]
    kdq.cli.app.main()


def _context() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(["kdq.cli.app", "kdq.stages.pipeline", "kdq.sweep.run", "tests.sweep.test_kill"])
    return context


def _spare_process() -> Any:
    process = _context().Process(target=int)
    process.start()
    return process


def _run(output: Path, kill_after: float | None = None) -> int | None:
    """The command's exit code; it is killed when it takes longer than ``kill_after`` seconds."""
    output.mkdir(exist_ok=True)
    process = _context().Process(target=_command, args=(output,))
    process.start()
    process.join(kill_after if kill_after is not None else 300)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def _found(output: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Rows, without what they took, and the digests of all models."""
    rows = {path.name: json.loads(path.read_text()) for path in (output / "rows").glob("[!.]*.json")}
    weights = {path.parent.name: file_digest(path) for path in (output / "store").glob("[!.]*/weights.safetensors")}
    return {name: {k: v for k, v in row.items() if k not in CIRCUMSTANCES} for name, row in rows.items()}, weights


@pytest.mark.timeout(600 + 40 * KILLS)
def test_kills_change_nothing(tmp_path: Path) -> None:
    _spare_process().join()  # starts the server that the others are forked from
    start = time.monotonic()
    assert _run(tmp_path / "undisturbed") == 0
    seconds = time.monotonic() - start
    expected = _found(tmp_path / "undisturbed")
    assert len(expected[0]) == 2
    assert len(expected[1]) == 2
    draw, kills, sweeps = random.Random(0), 0, 0
    while kills < KILLS:
        output = tmp_path / f"disturbed{sweeps}"
        sweeps += 1
        code: int | None = -1
        for _ in range(min(8, KILLS - kills)):
            # Most die, in all places, for every run gets a little further.
            code = _run(output, kill_after=draw.uniform(0.05, 0.5) * seconds)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
            rows, _ = _found(output)  # every file is whole at any moment
            assert all(rows[name] == expected[0][name] for name in rows)
        if code != 0:
            code = _run(output)
        assert code == 0
        assert _found(output) == expected
        published = Counter((output / "published").read_text().split())
        assert set(published.values()) <= {1}
        assert not list((output / "store/.work").iterdir())
        assert not list((output / "store").glob(".publish-*"))
        assert not (output / "failed").exists()
    print(f"{kills} kills in {sweeps} sweeps")
