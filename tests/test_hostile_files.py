"""Every file that kdq reads may be damaged or made to harm: each reader refuses it with one line, or names it in a
warning and goes on, and none runs what it says.

The readers: rows, failures, stored models, weights, checkpoints, packed models, search traces, frontiers, decoded
images. Archives of data sets are checked in tests/data, and images in tests/data/test_folder.py.
"""

import copy
import dataclasses
import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import kdq
from kdq.data.folder import image_folder
from kdq.models.build import build
from kdq.models.weights import read_state_dict
from kdq.quant.bitsearch.trace import Measure, Trace
from kdq.quant.callback import GreedyBitSearch
from kdq.quant.packing.file import checksum
from kdq.records.failures import Failure, read_failures, record
from kdq.records.rows import read_row, read_rows, write_row
from kdq.records.store import Store
from kdq.report.layers import frontiers, mixed_widths
from kdq.report.write import write_report
from kdq.train.fit import finished_epochs
from kdq.utils.errors import KdqError
from kdq.utils.files import file_digest
from tests.rows import ROW

#: What a field of a JSON file may be instead of what it should be.
NASTY: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        0.5,
        10**30,
        float("nan"),
        float("inf"),
        "",
        "../../../etc/passwd",
        "\x00",
        "x" * 10**4,
        "\u202e\n<script>",
        "\ud800",
        "=1+1",
    ),
    *([], {}, [[]], {"": None}, [None] * 3, "os.system", {"_target_": "os.system", "command": "exit"}),
]
MARK = "executed"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field, at every depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def variants(value: Any) -> Iterator[Any]:
    """``value`` with each field removed, and made each of :data:`NASTY`."""
    for path in places(value):
        for nasty in [*NASTY, MARK]:
            changed = copy.deepcopy(value)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if nasty == MARK:
                del inner[path[-1]]
            else:
                inner[path[-1]] = copy.deepcopy(nasty)
            yield changed
    yield from NASTY


def damaged(content: bytes, count: int = 150) -> Iterator[bytes]:
    """Random damage: a cut, a changed byte, a hole."""
    random = np.random.default_rng(0)
    for turn in range(count):
        data = bytearray(content)
        at, to = sorted(random.integers(0, len(data), 2))
        if turn % 3 == 0:
            del data[at:]
        elif turn % 3 == 1:
            data[at] ^= int(random.integers(1, 256))
        else:
            del data[at : to + 1]
        yield bytes(data)
    yield b""
    yield b"[" * 200_000
    yield b"\xff\xfe\x00"


def texts(value: Any) -> Iterator[bytes]:
    yield from (json.dumps(one).encode() for one in variants(value))
    yield from damaged(json.dumps(value).encode())


def refused(read: Callable[[], Any], path: Path) -> bool:
    """Whether ``read`` refuses the file with a line that names it; any other exception fails the test."""
    try:
        read()
    except KdqError as error:
        said = str(error)
    else:
        return False
    assert "\n" not in said
    assert len(said) < 1000
    assert path.name in said or path.parent.name in said
    return True


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / MARK),)


def test_rows(tmp_path: Path) -> None:
    rows, good = tmp_path / "rows", dataclasses.replace(ROW, bits=2, config_hash="feed")
    write_row(rows, good)
    path = write_row(rows, ROW)
    absolute = dataclasses.asdict(ROW) | {"artifact": "/etc/passwd"}
    for text in itertools.chain([json.dumps(absolute).encode()], texts(dataclasses.asdict(ROW))):
        path.write_bytes(text)
        found = read_rows(rows)
        assert good in found
        for row in found:  # where a stage would write and read for it
            assert (rows / row.file_name).resolve().parent == rows.resolve()
            if row != good:
                write_row(tmp_path / "again", row).unlink()
            assert (tmp_path / row.artifact).resolve().is_relative_to(tmp_path.resolve())
    # What is accepted can be shown: a report over the strangest rows that read.
    for index, one in enumerate(variants(dataclasses.asdict(ROW))):
        (rows / f"{index}.json").write_text(json.dumps(one))
    assert write_report(tmp_path).failures == []


@pytest.mark.timeout(60)
def test_a_pipe_is_never_waited_for(tmp_path: Path) -> None:
    """Opening one waits until somebody writes into it."""
    for name in ("rows/a.json", "rows/b.jsonl", "failed/a.json", "model.kdq", "trace.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    frontier = tmp_path / "store" / "search" / f"frontier-{ROW.config_hash}.json"
    frontier.parent.mkdir(parents=True)
    os.mkfifo(frontier)
    assert (read_rows(tmp_path / "rows"), read_failures(tmp_path), frontiers(tmp_path, [ROW])) == ([], {}, {})
    assert refused(lambda: read_row(tmp_path / "rows" / "a.json"), tmp_path / "rows" / "a.json")
    assert refused(lambda: kdq.load(tmp_path / "model.kdq"), tmp_path / "model.kdq")
    trace = tmp_path / "trace.json"
    assert refused(lambda: Trace(lambda bits: Measure(1.0, 50.0), trace, "key"), trace)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["entry.json", "metrics.json", "weights.safetensors"])
def test_a_pipe_in_a_stored_model(store: tuple[Store, dict[str, Any], Path], name: str) -> None:
    store, spec, path = store
    (path / name).unlink()
    os.mkfifo(path / name)
    assert refused(lambda: store.get(spec, "model"), path)


def test_failures(tmp_path: Path) -> None:
    record(tmp_path, Failure("cell", "feed", "cause", "log", ["a=1"]))
    bad = {"name": "cell", "key": "beef", "cause": "cause", "log": "", "overrides": ["a"], "time": "now"}
    for text in texts(bad):
        (tmp_path / "failed" / "cell-beef.json").write_bytes(text)
        found = read_failures(tmp_path)
        assert found["feed"].cause == "cause"
        assert all(isinstance(value, str) for one in found.values() for value in (one.name, one.cause, one.log))


@pytest.fixture
def store(tmp_path: Path) -> tuple[Store, dict[str, Any], Path]:
    store, spec = Store(tmp_path / "store"), {"a": 1}
    made = store.get_or_make(spec, "model", lambda _: nullcontext(({"w": torch.ones(3)}, {"val_top1": 50.0})))
    return store, spec, made.path


@pytest.mark.parametrize("name", ["entry.json", "metrics.json", "config.yaml", "weights.safetensors"])
def test_stored_models(store: tuple[Store, dict[str, Any], Path], name: str) -> None:
    store, spec, path = store
    content = (path / name).read_bytes()
    for text in texts(json.loads(content)) if name == "entry.json" else damaged(content):
        (path / name).write_bytes(text)
        if not refused(lambda: store.get(spec, "model"), path):
            # Only what says the same, or fields that nothing depends on, may differ.
            assert store.get(spec, "model").weights()["w"].tolist() == [1, 1, 1]
            assert name == "entry.json"


def test_a_stored_model_of_someone_who_knows_the_checksum(store: tuple[Store, dict[str, Any], Path]) -> None:
    store, spec, path = store
    entry = json.loads((path / "entry.json").read_text())
    for content in damaged((path / "weights.safetensors").read_bytes(), 30):
        (path / "weights.safetensors").write_bytes(content)
        entry["sha256"]["weights.safetensors"] = file_digest(path / "weights.safetensors")
        (path / "entry.json").write_text(json.dumps(entry))
        if not refused(lambda: store.get(spec, "model").weights(), path):
            assert all(isinstance(value, torch.Tensor) for value in store.get(spec, "model").weights().values())


def test_weights(tmp_path: Path) -> None:
    for name, save in (("w.safetensors", save_file), ("w.pt", torch.save)):
        path = tmp_path / name
        save({"a.weight": torch.randn(20), "b": torch.zeros(2, 2)}, path)
        for content in damaged(path.read_bytes()):
            path.write_bytes(content)
            if not refused(lambda path=path: read_state_dict(path), path):
                assert all(isinstance(value, torch.Tensor) for value in read_state_dict(path).values())
    for name in ("w.pt", "w.ckpt", "w.bin", "w.pth"):
        (tmp_path / name).write_bytes(pickle.dumps({"a": Bomb(tmp_path)}))
        assert refused(lambda name=name: read_state_dict(tmp_path / name), tmp_path / name)
    torch.save({"state_dict": {"a": Bomb(tmp_path)}}, tmp_path / "w.pt")
    assert refused(lambda: read_state_dict(tmp_path / "w.pt"), tmp_path / "w.pt")
    assert not (tmp_path / MARK).exists()


def test_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "work" / "last.ckpt"
    path.parent.mkdir()
    torch.save({"epoch": 3, "state_dict": {"a": torch.ones(100)}}, path)
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        if not refused(lambda: finished_epochs(path), path):
            assert finished_epochs(path) >= 0
    for value in ({"epoch": Bomb(tmp_path)}, {"epoch": None}, {}, [], {"epoch": "x"}):
        torch.save(value, path)
        assert refused(lambda: finished_epochs(path), path)
    assert not (tmp_path / MARK).exists()


def test_packed_models_of_someone_who_knows_the_checksum(tmp_path: Path) -> None:
    """Signed again after every change: what is inside must hold by itself."""
    net = {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, "in_channels": 1, "width": 0.1}
    torch.manual_seed(0)
    quantized, _ = kdq.quantize(build(net), [torch.randn(16, 1, 8, 8)], bits=3, act_bits=8)
    path = tmp_path / "model.kdq"
    kdq.save(quantized, path, classes=["a", "b", "c"])
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header, image = json.loads(metadata["kdq"]), torch.randn(2, 1, 8, 8)
    for one in itertools.islice(variants(header), 0, None, 5):
        text = json.dumps(one)
        signed = {"kdq": text, "sha256": checksum(text, tensors), "format": metadata.get("format", "")}
        save_file(tensors, path, signed)
        if refused(lambda: kdq.load(path), path):
            continue
        network = kdq.load(path)
        assert network(image).shape == (2, 3)
        kdq.save(network, tmp_path / "again.kdq")
        # The checksum cannot tell what else may be so: other or no activation quantizers, another preprocessing.
        assert (one["net"], one["layers"]) == (header["net"], header["layers"])
    assert not (tmp_path / MARK).exists()


def test_a_checkpoint_that_a_resumed_one_names_as_its_best(tmp_path: Path) -> None:
    """Lightning restores that name; the callback must not run what lies there."""
    torch.save({"state_dict": Bomb(tmp_path)}, tmp_path / "best.ckpt")
    restored = ModelCheckpoint(monitor="val/acc")
    restored.best_model_path = str(tmp_path / "best.ckpt")
    trainer, module, search = (
        Trainer(logger=False, callbacks=[restored]),
        LightningModule(),
        GreedyBitSearch(avg_bits=3),
    )
    with pytest.raises(KdqError, match="needs images"):
        search.on_train_start(trainer, module)
    with pytest.raises(pickle.UnpicklingError):
        search.on_train_end(trainer, module)
    assert not (tmp_path / MARK).exists()


def test_search_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    Trace(lambda bits: Measure(1.0, 50.0), path, "key")({"conv": 2, "fc": 3})
    for text in texts(json.loads(path.read_text())):
        path.write_bytes(text)
        if not refused(lambda: Trace(lambda bits: Measure(1.0, 50.0), path, "key"), path):
            entries = Trace(lambda bits: Measure(1.0, 50.0), path, "key").entries
            assert all(np.isfinite([one.loss, one.top1]).all() for one in entries.values())
            assert all(2 <= bits <= 32 for name in entries for _, bits in name)


def test_frontiers_and_packed_headers_of_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    point = {"assignment": {"conv": 2}, "measure": {"loss": 1.0, "top1": 5.0}, "avg_bits": 2.0, "size_bytes": 10}
    path = tmp_path / "store" / "search" / f"frontier-{ROW.config_hash}.json"
    path.parent.mkdir(parents=True)
    for text in texts({"points": [point], "chosen": point}):
        path.write_bytes(text)
        frontiers(tmp_path, [ROW])
    packed = tmp_path / "store" / "model.kdq"
    row = dataclasses.replace(ROW, artifact="store/model.kdq")
    layers = {"conv": {"levels": 4, "shape": [2, 3]}, "fc": {"levels": 8, "shape": [3, 3]}}
    for one in variants({"layers": layers}):
        save_file({"a": torch.ones(1)}, packed, {"kdq": json.dumps(one)})
        mixed_widths(tmp_path, [row])
    for name in ("../secret", "/etc/passwd", "store/../../x", "\x00"):
        assert mixed_widths(tmp_path, [dataclasses.replace(ROW, artifact=name)]) == {}


def test_decoded_images(tmp_path: Path) -> None:
    root, cache = tmp_path / "images", tmp_path / "data"
    for part in ("train", "test"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (8, 8), (index, 0, 0)).save(root / part / name / f"{index}.png")

    def read() -> Any:
        return image_folder(str(root), 8, 3, str(cache))

    read()
    path = next(cache.rglob("train_images.npy"))
    for content in [*damaged(path.read_bytes(), 60), pickle.dumps(Bomb(tmp_path))]:
        path.write_bytes(content)
        if not refused(read, path):
            assert read().train_images.shape == (6, 8, 8, 3)
    np.save(path, np.array([Bomb(tmp_path)], dtype=object), allow_pickle=True)
    assert refused(read, path)
    assert not (tmp_path / MARK).exists()
