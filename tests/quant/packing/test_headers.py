"""Headers of packed files made by someone who knows the structure and the checksum: what they name is not called.

Every callable that can be reached by a dotted name from the modules that a header might hope for, nested targets, and
numbers of every size and kind. Python's own audit events tell whether a command, an import or a connection was made,
and its profiler whether the function that the header names was called. With STEP = 1 there are 64 000 headers.
"""

import copy
import importlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import kdq
from kdq.models.build import build
from kdq.models.table import table
from kdq.quant.packing.file import checksum

NET = {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, "in_channels": 1, "width": 0.1}
ROOTS = [
    *("kdq", "kdq.models", "kdq.models.build", "kdq.models.networks", "kdq.models.table", "kdq.models.pretrained"),
    *(
        "kdq.models.weights",
        "torch.nn",
        "torch.nn.init",
        "torch.hub",
        "torchvision.models",
        "torchvision.models.resnet",
    ),
    *("torchvision.models.detection", "torchvision.models.segmentation", "torchvision.models._api", "builtins"),
    *("os", "subprocess", "importlib", "hydra.utils", "shutil", "pathlib"),
]
#: Of the headers, every so many are tried: a few seconds.
STEP = 25
HARM = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "import"}
HARM |= {"urllib.Request", "shutil.rmtree", "os.remove", "os.mkdir", "ctypes.dlopen", "pickle.find_class", "exec"}

events: list[str] = []
watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and (event in HARM or (event == "open" and arguments[1] not in (None, "r", "rb"))):
        events.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_audit)


def _callables() -> dict[str, Callable[..., Any]]:
    """What the roots reach by name, and one module further."""
    found: dict[str, Callable[..., Any]] = {}
    for root in ROOTS:
        module = importlib.import_module(root)
        for name in dir(module):
            value = getattr(module, name, None)
            if isinstance(value, ModuleType):
                found |= {f"{root}.{name}.{k}": v for k, v in vars(value).items() if callable(v) and k[0] != "_"}
            elif callable(value):
                found[f"{root}.{name}"] = value
    return found


def _codes(function: Any) -> set[CodeType]:
    of = [function, getattr(function, "__init__", None), getattr(type(function), "__call__", None)]  # noqa: B004
    return {code for one in of if isinstance(code := getattr(one, "__code__", None), CodeType)}


def _numbers() -> Iterator[dict[str, Any]]:
    """The network with other arguments."""
    odd: list[Any] = [-1, 0, 1, 2, 7, 9, 60000002, 10**9, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**30), 0.1, 1e9]
    odd += [
        1e300,
        math.nan,
        math.inf,
        -math.inf,
        True,
        None,
        "",
        "8",
        "os.system",
        [],
        [8],
        {},
        {"_target_": "os.abort"},
    ]
    odd += [[1e308] * 5, ["a"], [[1]], "\x00", "x" * 10**5]
    names = [
        *NET,
        "stem",
        "mean",
        "std",
        "data_mean",
        "data_std",
        "shortcut",
        "weights",
        "progress",
        "norm_layer",
        "block",
    ]
    targets = [entry.target for entry in list(table().values())[::9]] + [entry.target for entry in table().values()][:6]
    for target in targets:
        yield from ({**NET, "_target_": target, name: copy.deepcopy(value)} for name in names for value in odd)
        more = [name for entry in table().values() if entry.target == target for name in entry.takes]
        yield from ({"_target_": target, "num_classes": 3, name: copy.deepcopy(v)} for name in more for v in odd)
        yield from ({"_target_": target, one: v, other: v} for one in more for other in more for v in (10**5, 1e8))


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Any], tuple[bool, set[CodeType], float]]:
    torch.manual_seed(0)
    quantized, _ = kdq.quantize(build(NET), [torch.randn(16, 1, 8, 8)], bits=3)
    path = tmp_path / "model.kdq"
    kdq.save(quantized, path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["kdq"])

    def load(net: Any) -> tuple[bool, set[CodeType], float]:
        """Whether the file with this ``net`` loads; what was called, and for how long."""
        global watching
        text = json.dumps({**header, "net": net})
        save_file(tensors, path, {"kdq": text, "sha256": checksum(text, tensors)})
        called: set[CodeType] = set()
        events.clear()
        start, watching = time.perf_counter(), True
        sys.setprofile(lambda frame, event, argument: called.add(frame.f_code) if event == "call" else None)
        try:
            kdq.load(path)
            said = ""
        except kdq.KdqError as error:
            said = str(error)
        finally:
            sys.setprofile(None)
            watching = False
        assert events == [], (net, events)
        assert "\n" not in said
        assert len(said) < 600
        return not said, called, time.perf_counter() - start

    return load


def test_no_callable_that_a_header_names_is_called(load: Any) -> None:
    assert load(NET)[0]
    ordinary = load({"_target_": "no.such.thing"})[1] | load({"_target_": "kdq.models.resnet18", "num_classes": 3})[1]
    entries, reachable, count = {entry.target for entry in table().values()}, _callables(), 0
    arguments: list[dict[str, Any]] = [{}, {"net": {"_target_": "os.system", "command": "exit"}}]
    for name, function in itertools.islice(reachable.items(), 0, None, STEP):
        for more in [*arguments, {"command": "exit", "name": "os", "args": [], "path": "os.system"}]:
            if name in entries and not more:
                continue
            loaded, called, _ = load({"_target_": name, **more})
            count += 1
            assert not loaded, name
            if name not in entries:
                assert not (_codes(function) - ordinary) & called, name
    assert count > 20_000 / STEP
    print(f"{count} headers that name {len(reachable)} callables")


def test_no_number_takes_long(load: Any) -> None:
    count, slowest = 0, 0.0
    for net in itertools.islice(_numbers(), 0, None, STEP):
        loaded, _, seconds = load(net)
        count, slowest = count + 1, max(slowest, seconds)
        if loaded:
            assert {name: net[name] for name in NET if name in net} == NET or net["width"] == NET["width"], net
    assert count > 20_000 / STEP
    assert slowest < 10  # a minute and more before
    print(f"{count} headers, the slowest in {slowest:.2f} s")
