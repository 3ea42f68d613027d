"""Code of one's own that a config calls: what it does is part of what a model or a row depends on."""

import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdq.utils.calls import called
from kdq.utils.files import file_digest

_INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_INSTALLED.append(Path(__file__).resolve().parent.parent)


def user_code(*configs: Any) -> dict[str, Any]:
    """``{"code": {module: SHA-256 of its file}}`` of every function or class that the configs call by ``_target_`` or
    ``path``, but of kdq and of installed packages, whose versions are their own affair; ``{}`` where there is none.

    What the file imports is not looked at.
    """
    digests: dict[str, str] = {}
    for name in called(configs):
        module, file = _module(name)
        if file is not None and not any(file.is_relative_to(folder) for folder in _INSTALLED):
            digests[module] = file_digest(file)
    return {"code": digests} if digests else {}


def _module(name: str) -> tuple[str, Path | None]:
    """The module that the dotted ``name`` is in, and its file; whoever imports it says what is wrong with it."""
    while name := name.rpartition(".")[0]:
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is not None:
            return name, Path(spec.origin).resolve() if spec.has_location and spec.origin else None
    return "", None
