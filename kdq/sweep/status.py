"""Where a sweep is, read from its output folder: the same under any launcher, on this machine or a cluster.

A job runs once Hydra has written its config, and is done once its model or its rows are there. Where jobs have output
of their own elsewhere a live table is shown in a terminal; in a log, and beside jobs that write to this terminal, plain
lines.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from tqdm import tqdm

from kdq.records.failures import read_failures
from kdq.records.rows import read_rows
from kdq.stages.asked import complete
from kdq.sweep.plan import Job, Plan
from kdq.sweep.show import duration

#: Seconds between two looks at the folder.
INTERVAL = 1.0
#: Running jobs that are named at once.
SHOWN = 8
ENDED = ("done", "failed")


@dataclass
class _Watched:
    job: Job
    folder: Path
    state: str = "waiting"  # then running, and at last done or failed
    since: float = field(default_factory=time.monotonic)


class Status:
    """Shows one plan while its waves are launched. ``live``: jobs do not write to this terminal."""

    def __init__(self, console: Console, plan: Plan, live: bool) -> None:
        self.console, self.plan = console, plan
        self.live = live and console.is_terminal
        self._stderr = sys.stderr  # as it is now: a job of this process may silence a noisy library
        self._start, self._wave = time.monotonic(), 0
        self._watched: list[_Watched] = []  # of this wave
        self._before: list[_Watched] = []  # of the waves before

    @contextmanager
    def wave(self, jobs: list[Job], folders: list[Path]) -> Iterator[None]:
        """Follow one wave while the block launches it."""
        self._wave += 1
        self._watched = [_Watched(job, folder) for job, folder in zip(jobs, folders, strict=True)]
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(job.kind for job in jobs).items())
        self._say(f"wave {self._wave} of {len(self.plan.waves)}: {len(jobs)} jobs ({kinds})")
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,), daemon=True)
        screen = Live(get_renderable=self._screen, console=self.console, transient=True) if self.live else nullcontext()
        with screen:
            watcher.start()
            try:
                yield
            finally:
                over.set()
                watcher.join()
                self._look()
                self._before += self._watched
                self._watched = []

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        output, now = self.plan.output, time.monotonic()
        there = {path.stem.rpartition("-")[2] for path in (output / "rows").glob("[!.]*.json")}
        there |= {path.name.rpartition("-")[2] for path in (output / "store").glob("[!.]*-*")}
        failures = read_failures(output)
        for watched in self._watched:
            if watched.state in ENDED:
                continue
            # A launcher may make the folder when it puts the job into a queue.
            if watched.state == "waiting" and (watched.folder / ".hydra").is_dir():
                watched.state, watched.since = "running", now
            took = duration(now - watched.since)
            made = there.issuperset(watched.job.makes)
            if made and watched.job.kind == "rows":  # which may have been there before
                made = present(output, watched.job.makes, watched.job.columns).issuperset(watched.job.makes)
            if made:
                watched.state = "done"
                self._say(f"{self._count()} {watched.job.name}: {watched.job.kind} done in {took}{self._left()}")
            elif causes := [failures[key].cause for key in watched.job.makes if key in failures]:
                watched.state = "failed"
                self._say(f"{self._count()} {watched.job.name}: failed after {took}: {causes[0]}")

    def _ended(self) -> list[_Watched]:
        return [watched for watched in self._before + self._watched if watched.state in ENDED]

    def _count(self) -> str:
        total = len(self.plan.jobs)
        return f"[{len(self._ended()):>{len(str(total))}}/{total}]"

    def _left(self) -> str:
        """The time that is left if the rest goes as what is done went, by its rough work."""
        ended = self._ended()
        done, rest = sum(watched.job.work for watched in ended), len(self.plan.jobs) - len(ended)
        if not done or not rest:
            return ""
        seconds = (time.monotonic() - self._start) * (self.plan.work - done) / done
        return f", about {duration(max(seconds, 0.0))} left"

    def _say(self, line: str) -> None:
        if self.live:
            self.console.print(line, highlight=False, markup=False)
        else:
            tqdm.write(line, file=self._stderr)  # beside the bar of a job of this process

    def _screen(self) -> RenderableType:
        states = [watched.state for watched in self._watched]
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "running", "failed", "waiting"))
        bar = ProgressBar(total=max(1, len(self.plan.jobs)), completed=len(self._ended()), width=30)
        line = Table.grid(padding=(0, 2))
        took = duration(time.monotonic() - self._start)
        line.add_row(f"wave {self._wave} of {len(self.plan.waves)}", bar, counts, f"{took}{self._left()}")
        running = Table.grid(padding=(0, 2))
        for watched in [watched for watched in self._watched if watched.state == "running"][:SHOWN]:
            running.add_row("", watched.job.name, watched.job.what, duration(time.monotonic() - watched.since))
        return Group(line, running)


def present(output: Path, keys: Iterable[str], columns: Mapping[str, Any] = MappingProxyType({})) -> set[str]:
    """Which of ``keys`` have a model, or a readable row with ``columns`` and its packed file, below ``output``."""
    asked = set(keys)
    models = {path.name.rpartition("-")[2] for path in (output / "store").glob("[!.]*-*")}
    rows = {row.config_hash for row in read_rows(output / "rows", asked) if complete(output, row, columns)}
    return rows | (models & asked)
