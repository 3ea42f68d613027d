"""kdq: distil, quantize and compare image classifiers.

Imported names load what they need when first used, so that ``import kdq`` is quick:

    quantize(model, batches, bits=4, ...)   a quantized copy and a per-layer report
    save(network, path) / load(path)        packed files
    KdqError                                an error the user can mend
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdq.utils.errors import KdqError
from kdq.utils.version import __version__

if TYPE_CHECKING:
    from kdq.quant.network import quantize
    from kdq.quant.packing.file import load_packed as load
    from kdq.quant.packing.file import save_packed as save

__all__ = ["KdqError", "__version__", "load", "quantize", "save"]

_LAZY = {
    "quantize": ("kdq.quant.network", "quantize"),
    "save": ("kdq.quant.packing.file", "save_packed"),
    "load": ("kdq.quant.packing.file", "load_packed"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
