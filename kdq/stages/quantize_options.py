"""The ``quant`` config as widths and arguments, checked before anything is trained for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import hydra.utils
from omegaconf import DictConfig, OmegaConf
from torch import nn

from kdq.models.build import build
from kdq.quant.bitsearch.bank import check_average
from kdq.quant.bitsearch.mixed import check_search
from kdq.quant.network import check_options
from kdq.quant.solvers.alphabet import check_bits
from kdq.stages.cell import Cell
from kdq.utils.config import plain
from kdq.utils.errors import KdqError

#: Entries of the ``quant`` config that are options of :func:`kdq.quant.network.quantize_widths`.
OPTIONS = (
    "alphabet",
    "per_channel",
    "scale",
    "order",
    "refine",
    "first_last_bits",
    "act_bits",
    "act_range",
    "correct",
    "float_dtype",
)


#: What makes one row: a width for every layer, or the candidate widths of a bit search.
Width = int | tuple[int, ...]


def asked_widths(cell: Cell) -> list[Width]:
    """The widths in ``quant.bits``, each once; with a bit search they are the candidates of one row.

    Raises:
        KdqError: there is none, or one is not a whole number from 2 to 32.
    """
    bits = cell.cfg.quant.bits
    asked = OmegaConf.to_container(bits) if OmegaConf.is_list(bits) else [bits]
    if not asked:
        raise KdqError("quant.bits is empty: give a width from 2 to 32, or a list of them")
    assert isinstance(asked, list)
    widths = [check_bits(width) for width in dict.fromkeys(asked)]
    return [tuple(widths)] if cell.cfg.quant.get("search") else list(widths)


def quantize_options(cell: Cell) -> dict[str, Any]:
    """How layers are quantized, whatever their widths: the arguments of :func:`quantize_widths`."""
    return _options(cell.cfg.quant)


def _options(quant: DictConfig) -> dict[str, Any]:
    if isinstance(quant.keep_float, str):
        raise KdqError(f"quant.keep_float={quant.keep_float}: give a list of names, [{quant.keep_float}]")
    options = {name: quant[name] for name in OPTIONS} | {"exclude": list(quant.keep_float)}
    for name in ("solver", "alphabet", "moments"):
        if quant[name] is not None:
            options[name] = quant[name] if isinstance(quant[name], str) else hydra.utils.instantiate(quant[name])
    return options


def alphabet_name(quant: Mapping[str, Any]) -> str:
    """Of the ``quant`` config: what rows say; a function's own name, and nothing where nothing is quantized."""
    if quant["solver"] is None:
        return ""
    asked = quant["alphabet"]
    return asked if isinstance(asked, str) else str(asked["_target_"]).rpartition(".")[2]


def check_quantizer(cell: Cell) -> None:
    """Refuse a quantizer that cannot be.

    Raises:
        KdqError: as :func:`kdq.quant.network.check_options` and :func:`kdq.quant.bitsearch.mixed.check_search`.
    """
    _check(json.dumps(plain(cell.cfg[cell.role].net)), json.dumps(plain(cell.cfg.quant)))


@lru_cache(maxsize=256)
def _check(net: str, quant: str) -> None:
    asked = OmegaConf.create(json.loads(quant))
    if asked.solver is None:
        return
    if asked.images < 1:
        raise KdqError(f"quant.images={asked.images} must be at least 1")
    options = _options(asked)
    options.pop("moments", None)
    network = _untrained(net)
    layers, _ = check_options(network, **options)
    if asked.get("search"):
        search = {name: value for name, value in asked.search.items() if name != "images"}
        check_search(list(asked.bits), **search)
        if search["avg_bits"] is not None:
            narrowest = min(*asked.bits, asked.first_last_bits or 32)
            check_average(network, layers, narrowest, search["avg_bits"], asked.float_dtype)


@lru_cache(maxsize=4)
def _untrained(net: str) -> nn.Module:
    # With real weights: a network of one's own may look at numbers while it is built.
    return build(json.loads(net))
