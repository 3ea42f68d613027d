"""Reading weights trained elsewhere: a file, or ``hf:owner/name[:file]`` on the Hugging Face hub."""

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdq.utils.errors import KdqError, one_line
from kdq.utils.hub import HUB, fetch

#: File names tried in a hub repository that names none, the safe format first.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
#: What published files call otherwise than networks do: everything, where kdq wraps a network behind its own
#: normalisation; the classifier of CIFAR's ResNets; layers of torchvision's DenseNets and ViTs.
OLDER = (
    (r"^", "network."),
    (r"^linear\.(weight|bias)$", r"fc.\1"),
    (r"\.(norm|conv)\.([12])\.", r".\1\2."),
    (r"\.mlp\.linear_([12])\.", lambda found: f".mlp.{3 * int(found[1]) - 3}."),
)
log = logging.getLogger(__name__)


def locate(source: str) -> Path:
    """The local file behind ``source``: a path, or ``hf:owner/name[:file]``, fetched into the hub's own cache."""
    if source.startswith(HUB):
        return fetch(source, HUB_FILES)
    path = Path(source).expanduser()
    if not path.is_file():
        raise KdqError(
            f"no weights file at {path}: give teacher.weights= (or student.weights=) an existing "
            ".safetensors/.pt/.pth/.bin file or hf:owner/name"
        )
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a torch checkpoint, which is loaded weights-only: no code in it
    runs. A Lightning-like ``{"state_dict": ...}`` wrapper and a ``module.`` prefix are taken off."""
    try:
        safe = path.suffix == ".safetensors"
        state: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise KdqError(f"cannot read weights from {path}: {one_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError and whatever a corrupt zip makes torch raise
        # What torch says here advises to load the file with all that is in it.
        said = f"cannot read weights from {path}: it is no checkpoint of tensors alone"
        raise KdqError(f"{said}; save a state_dict() and give that") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    if not isinstance(state, dict) or not all(map(_real, state.values())):
        raise KdqError(f"{path} does not hold a state dict (names to dense tensors of real numbers)")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _real(value: Any) -> bool:
    """Whether a network's entry can be ``value``: others copy with an error, or not at all."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and not (value.is_meta or value.is_complex() or value.is_quantized)


def head(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """The tensors of a classifier: those by which ``state`` has another number of classes than ``own``, if that is the
    only difference of their shapes."""
    differ = [name for name in own if name in state and state[name].shape != own[name].shape]
    firsts = {(state[name].shape[:1], own[name].shape[:1]) for name in differ}
    alike = all(
        own[name].ndim == state[name].ndim > 0 and own[name].shape[1:] == state[name].shape[1:] for name in differ
    )
    return differ if alike and len(firsts) == 1 else []


def fitting_state(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors of ``path`` by the names that ``network`` has for them (:data:`OLDER`), without the second classifier
    of one that the network has no use for."""
    own, state = network.state_dict(), read_state_dict(path)
    state = {name: tensor for name, tensor in state.items() if name in own or not name.lower().startswith("aux")}
    for old, new in OLDER:
        renamed = {re.sub(old, new, name): tensor for name, tensor in state.items()}
        if len(renamed.keys() & own.keys()) > len(state.keys() & own.keys()):
            state = renamed
    return state


def load_weights(network: nn.Module, path: Path, new_head: bool = False) -> None:
    """Copy the tensors of ``path`` into ``network``, every name and shape matching; with ``new_head`` a classifier of
    another number of classes keeps its random weights, which is logged. A complaint lists what does not fit."""
    state, own = fitting_state(network, path), network.state_dict()
    if new_head and (replaced := head(state, own)):
        classes = (len(x[replaced[0]]) for x in (state, own))
        log.warning("%s: its classifier of %d classes makes way for a new one of %d", path.name, *classes)
        state |= {name: own[name] for name in replaced}
    # Old checkpoints lack BatchNorm's step counter, which no forward pass in eval mode reads.
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in own]
    mismatched = [
        f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    problems = [
        f"{title}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", mismatched))
        if names
    ]
    if problems:
        hint = " (is the number of classes the same?)" if head(state, own) else ""
        raise KdqError(" ".join(f"{path} does not fit the network: {'; '.join(problems)}{hint}".split()))
    given = OrderedDict(state)
    given._metadata = own._metadata  # type: ignore[attr-defined]  # the versions of modules, which some ask for
    network.load_state_dict(given, strict=False)
