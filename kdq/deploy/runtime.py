"""ONNX models in ONNX Runtime and in OpenVINO, with a fixed number of threads, and what they compute."""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kdq.utils.cpu import usable_cores
from kdq.utils.errors import KdqError

log = logging.getLogger(__name__)

#: Makes the logits ``(batch, classes)`` of images ``(batch, channels, height, width)``, which lie in one piece.
Runner = Callable[[np.ndarray], np.ndarray]
RUNTIMES = ("onnxruntime", "openvino")


def needs(*packages: str) -> None:
    """Refuse to go on without ``packages``, which ``kdq[deploy]`` installs."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise KdqError(f"{', '.join(missing)} not installed: pip install 'kdq[deploy]'")


def session(model: bytes | Path, threads: int | None = None) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU with ``threads`` threads, by default one per core.

    By ONNX Runtime's default, idle threads wait for the next call without giving up their core, so that two sessions
    that take turns slow each other down. Here threads wait like this during calls only."""
    needs("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or usable_cores(), 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # its warnings are about its own optimiser
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def runner(session: Any) -> Runner:
    return lambda images: session.run(None, {"image": images})[0]


def openvino(models: Mapping[str, bytes | Path], threads: int | None = None) -> dict[str, Runner]:
    """What each of ``models`` computes in OpenVINO on the CPU with ``threads`` threads, by default one per core. A file
    that it does not read, such as one of two-bit codes, is left out.

    Float arithmetic is in float32: its own default on many CPUs is bfloat16."""
    needs("openvino")
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": threads or usable_cores(), "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_PRECISION_HINT"] = "f32"
    core, runners = ov.Core(), dict[str, Runner]()
    for name, model in models.items():
        try:
            graph = core.read_model(model)
        except RuntimeError as error:
            log.info("OpenVINO does not read the %s model: %s", name, str(error).strip().splitlines()[-1])
        else:
            runners[name] = partial(_infer, core.compile_model(graph, "CPU", options).create_infer_request())
    return runners


def _infer(request: Any, images: np.ndarray) -> np.ndarray:
    found: np.ndarray = request.infer({0: images}, share_inputs=True, share_outputs=True)[0]
    return found


def logits(session: Any, images: Tensor) -> np.ndarray:
    """The logits ``(batch, classes)`` that ``session`` makes of ``images`` ``(batch, channels, height, width)``."""
    expected = tuple(session.get_inputs()[0].shape[1:])
    if tuple(images.shape[1:]) != expected:
        given, wanted = ("x".join(map(str, shape)) for shape in (images.shape[1:], expected))
        raise KdqError(f"the model takes images of {wanted} (channels, height, width), these have {given}: resize them")
    return runner(session)(np.ascontiguousarray(images.cpu().numpy()))


def top1(run: Runner, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Accuracy in percent over ``(images, labels)`` batches."""
    right = count = 0
    for images, labels in batches:
        right += int((run(np.ascontiguousarray(images.cpu().numpy())).argmax(1) == labels.cpu().numpy()).sum())
        count += len(labels)
    return round(100 * right / count, 4)
