"""The W&B run of one stage: offline unless asked otherwise, and never the reason that a training dies."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
from wandb.sdk.lib.paths import LogicalPath

from kdq.tracking.names import run_id, valid_name
from kdq.tracking.resume import folder_id, next_step
from kdq.tracking.run import Artifact, RunInfo, RunLogger
from kdq.utils.errors import KdqError

log = logging.getLogger(__name__)
# W&B's own process, inherited from a parent, would keep the run of a killed child open, and the child that goes on
# with it out: every process starts its own.
os.environ.pop("WANDB_SERVICE", None)

#: Seconds to reach the server when a run starts, and to upload what is left when it ends.
START_TIMEOUT, END_TIMEOUT = 30.0, 300.0
#: Job types whose curves are drawn over the trainer's steps.
TRAININGS = ("teacher", "distill")


@contextmanager
def wandb_run(logger: Mapping[str, Any], runs: Path, about: RunInfo) -> Iterator[RunLogger]:
    """A run that is closed when the block ends: as failed if the block raises.

    Everything that it leaves lies below ``runs``, also what W&B would keep in the home folder until it is uploaded.

    Raises:
        KdqError: the config is wrong, or even an offline run cannot start.
    """
    mode, upload = _mode(logger["mode"]), logger["upload"]
    if upload not in ("none", "quantized", "all"):
        raise KdqError(f"logger.upload={upload!r} is unknown: use none, quantized or all")
    runs.mkdir(parents=True, exist_ok=True)
    kept = str((runs / "wandb-data").absolute())
    with _environment({"WANDB_DATA_DIR": kept, "WANDB_CACHE_DIR": kept}):
        run, first_step = _start(logger, mode, runs, about)
        track = WandbRunLogger(run, upload, first_step)
        exit_code = 1
        try:
            track.starts(about)
            yield track
            exit_code = 0
        finally:
            _finish(run, exit_code)


class WandbRunLogger(RunLogger):
    """Everything that a stage tells, in a W&B run. Where W&B fails, it is told once and the stage goes on."""

    def __init__(self, run: wandb.Run, upload: str, first_step: int | None = None) -> None:
        self.run, self.upload, self._lost, self._step = run, upload, False, first_step
        self.folder = "" if run.disabled else str(Path(run.dir).parent)
        super().__init__(_Logger(self))

    def starts(self, about: RunInfo) -> None:
        """Say over what curves are drawn, and which models the stage takes."""
        if about.job_type in TRAININGS:
            # What WandbLogger does for runs of its own making. No other job type gets a pattern: it would clash with
            # the exact names of `axis`.
            self.axis("trainer/global_step", ["*"])
        for name in about.inputs if not self.run.offline and not self.run.disabled else ():
            # Models that were made offline are not there yet: `kdq-wandb link` adds them.
            with suppress(Exception):
                self.run.use_artifact(name)

    def axis(self, x: str, curves: Iterable[str]) -> None:
        self.guarded(lambda: self.run.define_metric(x))
        for curve in curves:
            self.guarded(partial(self.run.define_metric, curve, step_metric=x, step_sync=True))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.guarded(lambda: self.run.summary.update(dict(values)))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self.log({name: _table(columns, rows)})

    def lines(self, name: str, title: str, x: str, y: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
        table = _table(["curve", x, y], [(curve, *point) for curve, values in curves.items() for point in values])
        fields, strings = {"step": x, "lineKey": "curve", "lineVal": y}, {"title": title, "xname": x}
        self.log({name: wandb.plot_table("wandb/lineseries/v0", table, fields, strings)})

    def points(self, name: str, title: str, x: str, y: str, values: Sequence[tuple[float, float]]) -> None:
        self.log({name: wandb.plot.scatter(_table([x, y], values), x, y, title)})

    def bars(self, name: str, title: str, label: str, value: str, values: Sequence[tuple[str, float]]) -> None:
        self.log({name: wandb.plot.bar(_table([label, value], values), label, value, title)})

    def made(self, model: Artifact) -> None:
        """Log ``model`` as an artifact: its file where ``logger.upload`` says so, else a reference to it."""
        self.guarded(lambda: self.run.log_artifact(self._artifact(model), aliases=["latest", model.key]))

    def _artifact(self, model: Artifact) -> wandb.Artifact:
        facts = dict(model.facts) | {"kdq_key": model.key}
        artifact = wandb.Artifact(valid_name(model.name), f"{model.kind}-model", metadata=facts)
        if self.upload not in ("all", model.kind):
            content = model.path.read_bytes() if model.content is None else model.content()
            digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
            entry = ArtifactManifestEntry(
                path=LogicalPath(model.path.name), ref=model.path.absolute().as_uri(), digest=digest, size=len(content)
            )
            artifact.manifest.add_entry(entry)  # add_reference would want the file to be there already
        elif model.content is None:
            # Files in the store never change, so W&B needs no copies of its own.
            artifact.add_file(str(model.path), policy="immutable", skip_cache=True)
        else:
            with artifact.new_file(model.path.name, mode="wb") as file:
                file.write(model.content())
        return artifact

    def log(self, values: Mapping[str, Any]) -> None:
        """One row of the run's history."""
        step, self._step = self._step, None  # from the first one on, W&B counts
        self.guarded(lambda: self.run.log(dict(values), step=step, commit=True))

    def guarded(self, tell: Callable[[], Any]) -> None:
        """W&B's own process may die, or its disk be full; a training of many hours must not end with it."""
        try:
            tell()
        except Exception as error:
            if not self._lost:
                cause = " ".join(str(error).split())
                log.warning("W&B did not take everything (%s: %s); the run goes on", type(error).__name__, cause)
            self._lost = True


class _Logger(WandbLogger):
    """For Lightning: metrics through ``track``."""

    def __init__(self, track: WandbRunLogger) -> None:
        super().__init__(experiment=track.run)
        self._track = track

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._track.log(metrics if step is None else {**metrics, "trainer/global_step": step})


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> wandb.Table:
    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def _start(logger: Mapping[str, Any], mode: str, runs: Path, about: RunInfo) -> tuple[wandb.Run, int | None]:
    """The run, and the step of its first row where W&B would not know it."""
    offline, name = mode == "offline", run_id(about.job_type, about.key, folder_id(runs))
    first_step = next_step(runs, name) if offline else None
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=START_TIMEOUT,
        finish_timeout=0.0 if offline else END_TIMEOUT,
        finish_timeout_raises=True,
        disable_code=True,
        disable_git=True,  # the commit of kdq itself is in the config
        x_disable_stats=about.job_type not in TRAININGS,
        x_save_requirements=False,
        x_transaction_log_flush_interval=1.0,  # what a killed run loses; `wandb leet` shows the rest while it runs
    )
    options: dict[str, Any] = {
        "project": logger["project"],
        "entity": logger["entity"],
        "dir": str(runs),
        "id": name,
        "resume": "allow",
        "job_type": about.job_type,
        "name": about.name,
        "group": about.group,
        "tags": list(dict.fromkeys(tag[:64] for tag in about.tags if tag)),
        "config": {**about.config, "inputs": list(about.inputs)},
        "settings": settings,
    }
    try:
        return wandb.init(mode=mode, **options), first_step or None  # type: ignore[arg-type]
    except Exception as error:
        if mode != "online":
            raise KdqError(f"W&B could not start ({error}): set logger=csv or logger=none") from error
        _unreachable.append(str(error))
        wandb.teardown()  # its process would keep the id for the run that did not start
        log.warning("W&B cannot be reached (%s): logging offline; `wandb sync` uploads it", str(error).split("\n")[0])
        return _start(logger, "offline", runs, about)


def _finish(run: wandb.Run, exit_code: int) -> None:
    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        folder = Path(run.dir).parent
        log.warning("W&B could not upload all of %s (%s): run `wandb sync %s`", run.name, type(error).__name__, folder)


#: Why the server could not be reached: the later runs of this process do not wait for it again.
_unreachable: list[str] = []


def _mode(asked: str) -> str:
    if asked not in ("online", "offline", "disabled"):
        raise KdqError(f"logger.mode={asked!r} is unknown: use offline, online or disabled")
    if asked != "online":
        return asked
    if _unreachable:
        return "offline"
    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        log.warning("logger.mode=online, but nobody is logged in to W&B (run `wandb login`): logging offline")
        return "offline"
    return "online"


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the block, where the user has not set them: W&B has no settings for these."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
