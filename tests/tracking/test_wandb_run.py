"""W&B runs as they lie on disk; no account, no server.

Run as a script, ``python test_run.py FOLDER [kill | kill-service]``, this file makes one run, in which it kills itself
or W&B's own process.
"""

import base64
import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdq.tracking import wandb_run as module
from kdq.tracking.open import tracked
from kdq.tracking.run import Artifact, Chart, RunInfo, RunLogger
from kdq.utils.errors import KdqError

WANDB = {"project": "kdq", "entity": None, "mode": "offline", "upload": "quantized"}
ABOUT = RunInfo(
    "quantize",
    "digits-vkd",
    group="sweep",
    key="0123",
    config={"data": "digits", "quant/bits": [2, 4]},
    tags=["digits", "4bit", "4bit", "", "x" * 70],
    inputs=["digits-teacher:abcd"],
)


def track(
    output: Path, tell: Callable[[RunLogger], None], logger: dict[str, Any] = WANDB, about: RunInfo = ABOUT
) -> str:
    with tracked({"wandb": logger}, output / "runs", about) as found:
        tell(found)
    return found.folder


def offline(output: Path) -> Any:
    """The runs below ``output``; imported late, for this file as a script is no part of the tests' package."""
    from tests.offline_runs import offline_runs

    return offline_runs(output)


def point(found: RunLogger) -> None:
    found.axis("quantize/bits", ["quantize/top1"])
    found.metrics({"quantize/top1": 97.0, "quantize/bits": 4})


def test_an_offline_run_holds_what_it_is_found_by(tmp_path: Path) -> None:
    folder = track(tmp_path, point)
    (run,) = offline(tmp_path)
    assert run.folder == Path(folder).resolve()
    assert (run.run["project"], run.run["run_group"], run.run["job_type"]) == ("kdq", "sweep", "quantize")
    assert run.run["display_name"] == "digits-vkd"
    assert sorted(run.run["tags"]) == ["4bit", "digits", "x" * 64]  # W&B takes 64 characters
    assert run.config == {"data": "digits", "quant/bits": [2, 4], "inputs": ["digits-teacher:abcd"]}
    assert run.axes == {"quantize/top1": "quantize/bits"}
    assert [(row["quantize/bits"], row["quantize/top1"]) for row in run.history("quantize/top1")] == [(4, 97)]
    assert run.exit_code == 0


def test_trainings_are_drawn_over_the_trainers_steps(tmp_path: Path) -> None:
    def tell(found: RunLogger) -> None:
        found.loggers[0].log_metrics({"train/loss": 2.0}, step=20)

    track(tmp_path, tell, about=replace(ABOUT, job_type="distill"))
    (run,) = offline(tmp_path)
    assert run.axes == {"*": "trainer/global_step"}
    assert [row["trainer/global_step"] for row in run.history("train/loss")] == [20]


def test_a_failed_stage_is_a_failed_run_and_the_next_starts_its_own(tmp_path: Path) -> None:
    def fail(found: RunLogger) -> None:
        raise KdqError("bad cell")

    with pytest.raises(KdqError, match="bad cell"):
        track(tmp_path, fail)
    track(tmp_path, point, about=replace(ABOUT, key="4567"))
    first, second = offline(tmp_path)
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.run["run_id"] != second.run["run_id"]


def test_ids_depend_on_what_is_made_and_on_the_output_folder(tmp_path: Path) -> None:
    cases = {"a": ABOUT, "b": ABOUT, "c": replace(ABOUT, key="4567"), "d": replace(ABOUT, job_type="report")}
    for case, about in cases.items():
        track(tmp_path / ("other" if case == "b" else "one"), point, about=about)
    ids = [run.run["run_id"] for folder in ("one", "other") for run in offline(tmp_path / folder)]
    assert len(set(ids)) == 4


def test_a_stage_outlives_the_process_that_wandb_runs_beside_it_and_leaves_the_home_folder_alone(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    names = ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"HOME": str(home)}
    command = [sys.executable, __file__, str(tmp_path), "kill-service"]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("made\n")
    assert done.stderr.count("W&B did not take everything") == 1
    (run,) = offline(tmp_path)
    assert [row["quantize/bits"] for row in run.history("quantize/top1")][:1] == [4]
    assert [path for path in home.rglob("*wandb*") if path.is_file()] == []


def test_online_without_an_account_warns_and_stays_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where a login would be stored
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(module, "_server", module._Server())
    before = dict(os.environ)
    with caplog.at_level(logging.WARNING):
        track(tmp_path, point, WANDB | {"mode": "online"})
    assert "nobody is logged in" in caplog.text
    assert [run.exit_code for run in offline(tmp_path)] == [0]
    assert {name for name in os.environ if name not in before} <= {"WANDB_SERVICE"}


def test_an_unreachable_server_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    module.wandb.teardown()  # else this process keeps the address it began with
    monkeypatch.setattr(module, "PATIENCE", 2.0)
    monkeypatch.setattr(module, "_server", module._Server())
    starts = []
    start = module.wandb.init
    monkeypatch.setattr(module.wandb, "init", lambda **options: (starts.append(options["mode"]), start(**options))[1])
    with caplog.at_level(logging.WARNING):
        for key in "01":
            track(tmp_path, point, WANDB | {"mode": "online"}, replace(ABOUT, key=key))
    assert starts == ["online", "offline", "offline"]
    assert caplog.text.count("W&B cannot be reached") == 1
    found = [run for run in offline(tmp_path) if run.folder.name.startswith("offline")]
    assert [(len(run.history("quantize/top1")), run.exit_code) for run in found] == [(1, 0), (1, 0)]


def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    def tell(found: RunLogger) -> None:
        point(found)
        found.show(Chart("layers", ["layer"], [["conv1"]]))
        found.summary({"top1": 97.0})

    assert track(tmp_path, tell, WANDB | {"mode": "disabled"}) == ""
    assert not offline(tmp_path)


def test_tables_and_charts_hold_what_was_told(tmp_path: Path) -> None:
    def tell(found: RunLogger) -> None:
        found.show(Chart("layers", ["layer", "bits", "loss"], [("conv1", 2, None), ("fc", 8, 0.5)]))
        curves = [("a", 2, 90.0), ("a", 4, 95.0), ("b", 2, 91.0)]
        found.show(Chart("curves", ["curve", "bits", "top1"], curves, "lines", "Two curves"))
        found.show(Chart("points", ["bytes", "top1"], [(100.0, 90.0)], "points", "Points"))
        found.show(Chart("bars", ["layer", "bits"], [("conv1", 2)], "bars", "Bars"))
        found.summary({"top1_4bit": 95.0})

    track(tmp_path, tell)
    (run,) = offline(tmp_path)
    assert run.table("layers") == [
        {"layer": "conv1", "bits": 2, "loss": None},
        {"layer": "fc", "bits": 8, "loss": 0.5},
    ]
    assert [tuple(row.values()) for row in run.table("curves_table")] == [("a", 2, 90), ("a", 4, 95), ("b", 2, 91)]
    assert run.table("points_table") == [{"bytes": 100, "top1": 90}]
    assert run.table("bars_table") == [{"layer": "conv1", "bits": 2}]
    presets = {name: chart["panelDefId"] for name, chart in run.charts.items()}
    assert presets == {"curves": "wandb/lineseries/v0", "points": "wandb/scatter/v0", "bars": "wandb/bar/v0"}
    assert run.charts["curves"]["fieldSettings"] == {"step": "bits", "lineKey": "curve", "lineVal": "top1"}
    assert run.summary["top1_4bit"] == 95


@pytest.mark.parametrize(
    ("upload", "referred"), [("none", {"float", "quantized"}), ("quantized", {"float"}), ("all", set())]
)
def test_artifacts_carry_files_or_refer_to_them(upload: str, referred: set[str], tmp_path: Path) -> None:
    contents = {"float": b"weights", "quantized": b"codes"}
    paths = {kind: tmp_path / "store" / f"{kind}.bin" for kind in contents}
    paths["quantized"].parent.mkdir()
    paths["quantized"].write_bytes(contents["quantized"])  # the float model is not published yet

    def tell(found: RunLogger) -> None:
        found.made(Artifact("my data/vkd", "0123", "float", paths["float"], {"top1": 97.0}, lambda: contents["float"]))
        found.made(Artifact("my data/vkd-b2", "4567", "quantized", paths["quantized"], {}))

    track(tmp_path, tell, WANDB | {"upload": upload})
    ((run,), found) = (offline(tmp_path), {})
    for artifact in run.artifacts:
        (entry,) = artifact["manifest"]["contents"]
        kind = artifact["type"].removesuffix("-model")
        found[kind] = entry
        assert entry["digest"] == base64.b64encode(hashlib.md5(contents[kind]).digest()).decode()
        assert int(entry["size"]) == len(contents[kind])
        assert (entry.get("ref") == paths[kind].as_uri()) == (kind in referred)
    assert found.keys() == contents.keys()
    first = run.artifacts[0]
    assert (first["name"], sorted(first["aliases"])) == ("my-data-vkd", ["0123", "latest"])
    assert json.loads(first["metadata"]) == {"top1": 97.0, "kdq_key": "0123"}
    if upload != "none":  # no copy of what the store has
        assert found["quantized"]["local_path"] == str(paths["quantized"])
    if upload == "all":
        assert Path(found["float"]["local_path"]).is_relative_to(tmp_path / "runs" / "wandb-data")


def _main(output: str, what: str = "") -> None:
    def tell(found: RunLogger) -> None:
        point(found)
        found.show(Chart("layers", ["layer"], [["conv1"]]))
        (written,) = Path(found.folder).glob("*.wandb")
        while what and b"layers" not in written.read_bytes():  # until W&B has written what it was told
            time.sleep(0.05)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "kill-service":  # "version-parent-unix-/tmp/wandb-parent-service-.../socket"
            service = int(os.environ["WANDB_SERVICE"].split("/")[-2].split("-")[2])
            os.kill(service, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(service, 0)
            for bits in (5, 6, 7):
                found.metrics({"quantize/bits": bits, "quantize/top1": 98.0})
            found.show(Chart("late", ["layer"], [["conv1"]]))
            print("made")

    track(Path(output), tell)


if __name__ == "__main__":
    _main(*sys.argv[1:])
