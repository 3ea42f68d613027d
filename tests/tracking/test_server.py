"""Online, and from offline to a server, with a stand-in for W&B's on this machine."""

import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdq.cli.wandb import main
from kdq.records.rows import read_rows
from kdq.tracking import wandb_run as module
from kdq.tracking.open import tracked
from kdq.tracking.run import Artifact, Chart, RunInfo, RunLogger
from tests.conftest import TINY
from tests.offline_runs import OfflineRun, offline_runs
from tests.wandb_server import Fault, WandbServer

ONLINE = {"wandb": {"project": "kdq", "entity": None, "mode": "online", "upload": "quantized"}}
OFFLINE = {"wandb": ONLINE["wandb"] | {"mode": "offline"}}
TEACHER = RunInfo("teacher", "the teacher", "sweep", "key-of-teacher", tags=["digits"])
STUDENT = RunInfo("distill", "the student", "sweep", "key-of-student", inputs=["teacher:key-of-teacher"])
CELL = RunInfo("quantize", "the cell", "sweep", "key-of-cell", {"bits": 4}, inputs=["student:key-of-student"])


def log(output: Path, logger: dict[str, Any], about: RunInfo, *tops: float) -> None:
    """A stage that makes a model of its job type's name."""
    with tracked(logger, output / "runs", about) as track:
        for top1 in tops:
            track.metrics({"val/top1": top1})
        name = {"teacher": "teacher", "distill": "student"}.get(about.job_type)
        if name is not None:
            track.made(Artifact(name, about.key, "float", output / name, {}, lambda: b"weights"))


def sync(output: Path) -> None:
    tool = Path(sys.executable).with_name("wandb")
    done = subprocess.run([tool, "sync", "--yes", output / "runs" / "wandb"], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def lineage(server: WandbServer) -> set[tuple[str, str]]:
    """Each run's name with the artifact that it takes."""
    return {(str(server.runs[run].display_name), server.artifacts[id]["name"]) for run, id in server.used}


def test_online_a_run_and_its_lineage_are_on_the_server_when_it_ends(server: WandbServer, tmp_path: Path) -> None:
    for about in (TEACHER, STUDENT, CELL):
        log(tmp_path, ONLINE, about, 50.0, 60.0)
    assert [run.job_type for run in server.runs.values()] == ["teacher", "distill", "quantize"]
    for run in server.runs.values():
        assert (run.group, run.starts, run.exit_codes) == ("sweep", 1, [0])
        assert [row["val/top1"] for row in run.history.values()] == [50, 60]
    assert lineage(server) == {("the student", "teacher"), ("the cell", "student")}
    assert offline_runs(tmp_path)  # W&B keeps what it sends, until it is sent


def test_online_a_stage_that_is_run_again_continues_its_run(server: WandbServer, tmp_path: Path) -> None:
    """Also by another version of kdq, on another machine."""
    log(tmp_path, ONLINE, replace(CELL, config={"bits": 4, "git_sha": "old"}), 50.0, 60.0)
    log(tmp_path, ONLINE, replace(CELL, config={"bits": 4, "git_sha": "new"}, group="again"), 70.0)
    (run,) = server.runs.values()
    assert (run.starts, run.exit_codes, run.config["git_sha"]) == (2, [0, 0], "new")
    assert [(row["_step"], row["val/top1"]) for row in run.history.values()] == [(0, 50), (1, 60), (2, 70)]


@pytest.mark.parametrize("kind", ["lost", "silent"])
def test_a_server_lost_in_the_middle_costs_a_warning_and_is_synced_later(
    kind: str, server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also a model and a table, which W&B's client asks the server about."""
    monkeypatch.setattr(module, "PATIENCE", 6.0)
    monkeypatch.setattr(module, "_server", module._Server())
    start = time.monotonic()
    with caplog.at_level(logging.WARNING), tracked(ONLINE, tmp_path / "runs", CELL) as track:
        server.fault = Fault(kind)
        for bits in (2, 3, 4):
            track.metrics({"quantize/bits": bits, "quantize/top1": 90.0})
        track.made(Artifact("student", "key", "float", tmp_path / "student", {}, lambda: b"weights"))
        track.show(Chart("layers", ["layer"], [["conv1"]]))
    log(tmp_path, ONLINE, TEACHER, 50.0)  # no longer waited for
    module.wandb.teardown()
    assert time.monotonic() - start < 60  # it was minutes
    assert caplog.text.count("could not upload all of the cell") == 1
    assert f"wandb sync --include-online {track.folder}" in caplog.text
    server.fault = None
    command = [Path(sys.executable).with_name("wandb"), "sync", "--yes", "--include-online", track.folder]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (run,) = server.runs.values()
    rows = [row["quantize/bits"] for row in run.history.values() if "quantize/bits" in row]
    assert rows == [2, 3, 4]
    assert [run.exit_code for run in offline_runs(tmp_path, "teacher")] == [0]


FAULTS = {
    "silent": "the server does not answer",
    "401": "the API key is wrong",
    "404": "no W&B server is at that address",
    "garbage": "no W&B server",
    "short key": "the API key is wrong",
    "notaurl": "WANDB_BASE_URL=notaurl is no address",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_training_goes_on_offline_and_one_line_says_why(
    kind: str, server: WandbServer, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "short key":
        monkeypatch.setenv("WANDB_API_KEY", "short")
    elif kind == "notaurl":
        monkeypatch.setenv("WANDB_BASE_URL", kind)
    else:
        server.fault = Fault(kind)
    monkeypatch.setattr(module, "PATIENCE", 6.0)
    monkeypatch.setattr(module, "_server", module._Server())
    start = time.monotonic()
    tiny = [argument for argument in TINY if argument != "logger=none"]
    code, out, error = cli(*tiny, "method=teacher", "logger.wandb.mode=online")
    assert code == 0, error
    assert time.monotonic() - start < 100
    (line,) = [line for line in (out + error).splitlines() if "W&B cannot" in line]
    assert FAULTS[kind] in line
    assert "logging offline" in line
    assert len(read_rows(tmp_path / "rows")) == 1
    assert list((tmp_path / "store").glob("*/weights.safetensors"))
    assert "Traceback" not in out + error
    ended = [OfflineRun(folder).exit_code for folder in (tmp_path / "runs" / "wandb").glob("offline-run-*")]
    assert ended == [0, 0, 0][: len(ended)]
    assert len(ended) >= 2


def test_two_offline_segments_sync_into_one_run(server: WandbServer, tmp_path: Path) -> None:
    """Of a stage that was killed and run again; the script is that of test_wandb_run.py."""
    script = Path(__file__).with_name("test_wandb_run.py")
    killed = subprocess.run([sys.executable, script, tmp_path, "kill"], timeout=240)
    assert killed.returncode == -signal.SIGKILL
    from tests.tracking.test_wandb_run import ABOUT, point

    def again(track: RunLogger) -> None:
        point(track)
        track.metrics({"quantize/bits": 8, "quantize/top1": 98.0})

    with tracked(OFFLINE, tmp_path / "runs", ABOUT) as track:
        again(track)
    first, second = offline_runs(tmp_path)
    assert first.run["run_id"] == second.run["run_id"]
    assert (first.exit_code, second.exit_code) == (None, 0)
    sync(tmp_path)
    (run,) = server.runs.values()
    assert (run.starts, run.exit_codes) == (2, [1, 0])
    rows = [row for row in run.history.values() if "quantize/top1" in row]
    assert [row["quantize/bits"] for row in rows] == [4, 4, 8]
    steps = [row["_step"] for row in run.history.values()]
    assert steps == sorted(set(steps))  # a server takes rows of equal steps for one


def test_lineage_is_added_after_a_sync(server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for about in (TEACHER, STUDENT, CELL):
        log(tmp_path, OFFLINE, about, 50.0)
    log(tmp_path, OFFLINE, replace(CELL, name="of another sweep", group="other", key="2"), 50.0)
    sync(tmp_path)
    assert lineage(server) == set()
    main(["link", "--sweep", "sweep"])
    assert lineage(server) == {("the student", "teacher"), ("the cell", "student")}
    main(["link"])
    found = {("the student", "teacher"), ("the cell", "student"), ("of another sweep", "student")}
    assert lineage(server) == found
    assert len(server.used) == 3
    assert "the cell <- student:key-of-student\n" in capsys.readouterr().out


def test_linking_says_what_was_not_uploaded(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(tmp_path, ONLINE, CELL, 50.0)
    with pytest.raises(SystemExit) as stop:
        main(["link"])
    assert "1 models are missing" in str(stop.value)
    assert "the cell: student:key-of-student is not on the server" in capsys.readouterr().out
    assert lineage(server) == set()


def test_a_workspace_is_saved(server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tracking.test_workspace import write_rows

    write_rows(tmp_path, "digits", "fashion_mnist")
    main(["workspace", str(tmp_path), "--dry-run"])
    printed = capsys.readouterr().out
    main(["workspace", str(tmp_path)])
    assert [view["name"] for view in server.views] == ["kdq digits", "kdq fashion_mnist"]
    assert f"kdq digits: {server.url}/me/kdq?nw=" in capsys.readouterr().out
    titles = [line for line in printed.splitlines() if "chartTitle" in line]
    saved = [line for view in server.views for line in json.dumps(view, indent=1).splitlines() if "chartTitle" in line]
    assert [title.strip() for title in titles] == [title.strip() for title in saved]


def test_a_report_is_made(server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each data set's answer, as kdq's own report says it, over the panels of its runs."""
    from kdq.report.material import Material
    from kdq.report.tables import markdown_text
    from tests.tracking.test_workspace import write_rows

    write_rows(tmp_path, "digits", "fashion_mnist")
    main(["report", str(tmp_path), "--sweep", "paper"])
    assert f"kdq paper: {server.url}/me/kdq/reports/kdq-paper--" in capsys.readouterr().out
    (view,) = server.views
    blocks = [block for block in view["blocks"] if block["type"] in ("markdown-block", "panel-grid")]
    assert [block["type"] for block in blocks] == ["markdown-block", "panel-grid"] * 2
    main(["report", str(tmp_path), "--dry-run"])
    printed = capsys.readouterr().out
    for answer, text, grid in zip(Material(tmp_path).answers, blocks[::2], blocks[1::2], strict=True):
        assert f"**{markdown_text(answer.headline)}**" in text["content"]
        assert text["content"] in printed
        runs, grid = grid["metadata"]["runSets"], grid["metadata"]["panelBankSectionConfig"]["panels"]
        assert f"'{answer.data}'" in str(runs)
        assert "'paper'" in str(runs)
        places = [(panel["layout"]["x"], panel["layout"]["y"]) for panel in grid]
        assert len(set(places)) == len(grid) == 5
        assert f"pareto/{answer.data}" in str(grid)


def test_without_an_account_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tracking.test_workspace import write_rows

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    write_rows(tmp_path, "digits")
    for arguments in (["link"], ["workspace", str(tmp_path)], ["report", str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert str(stop.value).startswith("kdq-wandb: nobody is logged in to W&B: run `wandb login`")
        assert "\n" not in str(stop.value)
    with pytest.raises(SystemExit, match="no rows below"):
        main(["workspace", str(tmp_path / "nowhere")])
