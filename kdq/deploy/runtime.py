"""ONNX Runtime: sessions with a fixed number of threads, and what they compute."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kdq.utils.cpu import usable_cores
from kdq.utils.errors import KdqError


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


def logits(runner: Any, images: Tensor) -> np.ndarray:
    """The network's outputs ``(batch, classes)`` for ``images`` ``(batch, channels, height, width)``."""
    expected = tuple(runner.get_inputs()[0].shape[1:])
    if tuple(images.shape[1:]) != expected:
        given, wanted = ("x".join(map(str, shape)) for shape in (images.shape[1:], expected))
        raise KdqError(f"the model takes images of {wanted} (channels, height, width), these have {given}: resize them")
    found: np.ndarray = runner.run(None, {"image": np.ascontiguousarray(images.cpu().numpy())})[0]
    return found


def top1(runner: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Accuracy in percent over ``(images, labels)`` batches."""
    right = count = 0
    for images, labels in batches:
        right += int((logits(runner, images).argmax(1) == labels.cpu().numpy()).sum())
        count += len(labels)
    return round(100 * right / count, 4)
