"""The store: keys, atomic publication, damage, and processes that die or compete."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdq.records.lock import LEASE_SECONDS, locked
from kdq.records.store import Store, key_of
from kdq.utils.errors import KdqError

SPEC = {"stage": "train", "seed": 0, "recipe": {"lr": 0.1, "epochs": 2}}


MODEL = {"w": torch.arange(4.0)}, {"val_top1": 50.0}
Making = AbstractContextManager[tuple[dict[str, Tensor], dict[str, float]]]


def _make(work: Path) -> Making:
    return nullcontext(MODEL)


def test_a_key_depends_on_content_and_not_on_order() -> None:
    assert key_of(SPEC) == key_of({"recipe": {"epochs": 2, "lr": 0.1}, "seed": 0, "stage": "train"})
    for changed in (SPEC | {"seed": 1}, SPEC | {"recipe": {"lr": 0.1}}, SPEC | {"teacher": None}):
        assert key_of(changed) != key_of(SPEC)
    with pytest.raises(ValueError, match="Out of range"):
        key_of({"lr": float("nan")})


def test_made_once_and_then_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get(SPEC, "net") is None
    made = store.get_or_make(SPEC, "net", _make)
    found = store.get_or_make(SPEC, "net", lambda work: pytest.fail("made twice"))
    assert found == made
    assert torch.equal(found.weights()["w"], torch.arange(4.0))
    assert found.metrics == {"val_top1": 50.0}
    assert "lr: 0.1" in (found.path / "config.yaml").read_text()
    assert not list((tmp_path / ".work").iterdir())


def test_equal_specs_are_one_entry_whatever_they_are_called(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.get_or_make(SPEC, "net", _make)
    assert store.get_or_make(SPEC, "other", lambda work: pytest.fail("made twice")) == made
    assert store.path(SPEC, "other") == made.path
    assert store.get(SPEC | {"seed": 1}, "net") is None


@pytest.mark.parametrize("name", ["weights.safetensors", "metrics.json", "config.yaml", "entry.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_entry_is_an_error_that_names_the_folder(tmp_path: Path, name: str, damage: str) -> None:
    store = Store(tmp_path)
    file = store.get_or_make(SPEC, "net", _make).path / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        # In entry.json only a digest matters; its last characters belong to one.
        position = -10 if damage == "flip" else len(content)
        content[position : position + 1] = b"~" if damage == "flip" else b""
        file.write_bytes(content if damage == "flip" else content[:-5])
    with pytest.raises(KdqError, match=f"{tmp_path}/net-.*delete"):
        store.get(SPEC, "net")


def test_a_failed_making_leaves_no_entry_and_keeps_its_work(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(work: Path) -> Making:
        (work / "last.ckpt").write_text("epoch 3")
        raise KdqError("the loss became nan")

    with pytest.raises(KdqError, match="nan"):
        store.get_or_make(SPEC, "net", fail)
    assert store.get(SPEC, "net") is None

    def resume(work: Path) -> Making:
        assert (work / "last.ckpt").read_text() == "epoch 3"
        return _make(work)

    store.get_or_make(SPEC, "net", resume)


def test_a_model_is_published_and_its_lock_free_before_the_log_is_closed(tmp_path: Path) -> None:
    """The end of the block, which may wait for a server, finds what another process would find."""
    store, found = Store(tmp_path), []

    @contextmanager
    def make(work: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, float]]]:
        yield MODEL
        found.extend([store.get(SPEC, "net"), *(tmp_path / ".locks").iterdir()])

    assert [store.get_or_make(SPEC, "net", make)] == found


_SCRIPT = """
    import os, socket, sys, time
    from contextlib import nullcontext
    from pathlib import Path
    if sys.argv[3]:
        socket.gethostname = lambda: sys.argv[3]
    import torch
    import kdq.records.lock
    from kdq.records.store import Store
    root = Path(sys.argv[1])
    kdq.records.lock.LEASE_SECONDS = float(sys.argv[4])
    def make(work):
        with open(root / "trainings", "a") as log:
            log.write(f"{os.getpid()}\\n")
        time.sleep(float(sys.argv[2]))
        return nullcontext(({"w": torch.arange(4.0)}, {"val_top1": 50.0}))
    Store(root / "store").get_or_make({"seed": 0}, "net", make)
    print("done")
"""


def _start(root: Path, seconds: float, host: str = "", lease: float = LEASE_SECONDS) -> subprocess.Popen[str]:
    """A process that makes the entry in so many ``seconds``, on ``host`` (empty: this one)."""
    root.mkdir(exist_ok=True)
    arguments = [str(root), str(seconds), host, str(lease)]
    command = [sys.executable, "-c", textwrap.dedent(_SCRIPT), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.timeout(150)
def test_eight_processes_make_it_once(tmp_path: Path) -> None:
    processes = [_start(tmp_path, 1) for _ in range(8)]
    assert [process.communicate(timeout=140)[0] for process in processes] == ["done\n"] * 8
    assert len((tmp_path / "trainings").read_text().split()) == 1


@pytest.mark.timeout(120)
def test_the_lock_of_a_killed_holder_is_taken_over(tmp_path: Path) -> None:
    holder = _start(tmp_path, 1000)
    _wait_for(tmp_path / "trainings")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert _start(tmp_path, 0).communicate(timeout=100)[0] == "done\n"
    assert len((tmp_path / "trainings").read_text().split()) == 2
    assert [p.name.startswith("net-") for p in (tmp_path / "store").iterdir() if not p.name.startswith(".")] == [True]


@pytest.mark.timeout(150)
def test_the_lock_of_another_host_is_taken_over_when_its_heartbeat_stops_and_not_before(tmp_path: Path) -> None:
    """Of a holder elsewhere nothing is known but whether it refreshes its lock; here it does so every two seconds."""
    dead, alive = tmp_path / "dead", tmp_path / "alive"
    killed = _start(dead, 1000, "elsewhere", lease=6)
    working = _start(alive, 20, "elsewhere", lease=6)
    for root in (dead, alive):
        _wait_for(root / "trainings")
        assert "host=elsewhere" in next((root / "store/.locks").iterdir()).read_text()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    heir, second = _start(dead, 0, "here", lease=6), _start(alive, 0, "here", lease=6)
    assert [process.communicate(timeout=100)[0] for process in (heir, working, second)] == ["done\n"] * 3
    assert len((dead / "trainings").read_text().split()) == 2
    assert (alive / "trainings").read_text().split() == [str(working.pid)]


@pytest.mark.parametrize("content", [b"", b"filelock/2\npid=12", b"\xff\x00garbage", b"0\n0\n"])
def test_a_lock_without_a_holder_is_taken_over_by_one(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Power was lost between the creation of the file and its content, or in the middle of it."""
    lock, inside, most = tmp_path / "net.lock", list[int](), list[int]()
    lock.write_bytes(content)

    def take() -> None:
        with locked(lock, "net"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.2)
            inside.pop()

    takers = [threading.Thread(target=take) for _ in range(2)]
    with caplog.at_level("INFO"):
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join(timeout=30)
    assert most == [1, 1]
    assert not lock.exists()
    assert f"a process that left no name, which is making net (lock: {lock})" in caplog.text


def test_waiting_names_the_lock_and_its_living_holder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = _start(tmp_path, 5)
    _wait_for(tmp_path / "trainings")
    with caplog.at_level("INFO"):
        Store(tmp_path / "store").get_or_make({"seed": 0}, "net", lambda work: pytest.fail("made twice"))
    holder.communicate(timeout=60)
    (lock,) = re.findall(r"lock: (.*)\)", caplog.text)
    assert Path(lock).parent == tmp_path / "store/.locks"
    assert f"waiting for process {holder.pid} on {socket.gethostname()}, which is making net" in caplog.text


@pytest.mark.timeout(120)
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The kernel's file size limit stands in for a full disk: the write fails in the middle of the weights."""
    script = textwrap.dedent("""
        import resource, signal, sys
        from contextlib import nullcontext
        from pathlib import Path
        import torch
        from kdq.records.store import Store
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        def make(work):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            return nullcontext(({"w": torch.zeros(1_000_000)}, {}))
        try:
            Store(Path(sys.argv[1])).get_or_make({"seed": 0}, "net", make)
        except Exception as error:
            from kdq.utils.messages import describe
            print(describe(error))
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert "large" in done.stdout.lower(), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", ".work"]


def test_entries_say_what_they_are_for_other_programs(tmp_path: Path) -> None:
    entry = Store(tmp_path).get_or_make(SPEC, "net", _make)
    described = json.loads((entry.path / "entry.json").read_text())
    assert described["key"] == entry.key == key_of(SPEC)
    assert set(described["sha256"]) == {"weights.safetensors", "config.yaml", "metrics.json"}
