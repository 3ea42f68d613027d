"""Which rows a cell asks for, and the quantizer that makes them, checked before anything is trained for them."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hydra.utils
from omegaconf import DictConfig

from kdq.quant.bitsearch.bank import check_average
from kdq.quant.bitsearch.config import SearchConfig
from kdq.quant.config import OPTIONS, SOLVERS, Preset, QuantConfig
from kdq.quant.layers import quantizable_layers
from kdq.quant.solvers.alphabet import check_bits
from kdq.records.rows import Row, has, whole
from kdq.records.store import Entry, key_of
from kdq.records.user_code import user_code
from kdq.stages.cell import Cell
from kdq.stages.train import Model, checked_network
from kdq.train.trainer import limited
from kdq.utils.config import plain
from kdq.utils.errors import KdqError


def quant_config(quant: DictConfig) -> QuantConfig:
    """How the ``quant`` config quantizes layers."""
    values = {name: value for name, value in plain(quant).items() if name in OPTIONS}
    return QuantConfig(**hydra.utils.instantiate(values, _convert_="all"))


def quant_spec(quant: DictConfig) -> dict[str, Any]:
    """The ``quant`` config as keys have it: with the options that its preset stands for; younger ones only where they
    do something, so that older keys stay."""
    preset = Preset(SOLVERS["rtn"]) if quant.solver is None else quant_config(quant).preset
    values = plain(quant) | {"order": preset.order, "scale": preset.scale, "refine": preset.refine}
    if values.get("search"):
        values["search"] |= {"candidates": sorted(set(values["search"]["candidates"]))}
    younger = {"ridge": preset.ridge, "held_out": preset.held_out}
    return {k: v for k, v in values.items() if k not in younger} | {k: v for k, v in younger.items() if v}


def search_config(quant: DictConfig) -> SearchConfig | None:
    """What the ``quant`` config asks a bit search for; None where it asks for widths."""
    if not quant.get("search"):
        return None
    if quant.bits is not None:
        raise KdqError(
            f"quant.bits={quant.bits} but quant={quant.name} chooses the bits: give quant.bits=null, and its choices "
            "as quant.search.candidates"
        )
    return SearchConfig(**plain(quant.search))


def asked_bits(cell: Cell) -> dict[str, int | None]:
    """What rows are named by: each width of ``quant.bits`` once, or the range of a bit search's candidates, ``2-8``,
    which has no width yet. The float network has 32 bits, whatever is asked for beside it."""
    if search := search_config(cell.cfg.quant):
        return {f"{min(search.candidates)}-{max(search.candidates)}": None}
    bits = 32 if cell.cfg.quant.solver is None else plain(cell.cfg.quant)["bits"]
    asked = bits if isinstance(bits, list) else [bits]
    if not asked:
        raise KdqError("quant.bits is empty: give a width from 2 to 32, or a list of them")
    return {str(width): check_bits(width, "quant.bits") for width in asked}


def row_spec(cell: Cell, model: Model | Entry, bits: int | None, tuned: Model | None = None) -> dict[str, Any]:
    """Everything that a row of ``model`` depends on; its hash is the row's ``config_hash``."""
    quant = {name: value for name, value in quant_spec(cell.cfg.quant).items() if name != "bits"}
    images, config = cell.images, cell.cfg.data
    test = {"test": images.set.test_digest, "test_limit": config.test_limit, "classes": list(images.set.classes)}
    method, seed = cell.cfg.method.name, cell.cfg[cell.role].seed
    return {
        "stage": "quantize",
        "model": model.key,
        "method": method,
        "seed": seed,
        "data": images.spec() | test | {"name": config.name},
        "quant": quant,
        "bits": bits,
        **user_code(quant),
        **({"limits": limits} if (limits := limited(plain(cell.cfg.trainer))) else {}),
        **({} if tuned is None else {"tune": {"name": cell.cfg.tune.name, "model": tuned.key}}),
    }


def row_keys(cell: Cell, model: Model, tuned: Mapping[str, Model] = MappingProxyType({})) -> dict[str, str]:
    """The ``config_hash`` of each row that the cell asks for, by the names of :func:`asked_bits`, as ``tuned`` has."""
    asked = asked_bits(cell)
    check_quantizer(cell)
    return {name: key_of(row_spec(cell, model, bits, tuned.get(name))) for name, bits in asked.items()}


def complete(output: Path, row: Row, columns: Mapping[str, Any]) -> bool:
    """Whether nothing of ``row`` is to be made: its packed file is whole, its deployment has these ``columns``.

    Rows are published (``*.jsonl``) without their packed files, and are none the worse for it.
    """
    published = not (output / "rows" / row.file_name).is_file()
    return has(row, columns) and (published or whole(output, row))


def check_quantizer(cell: Cell) -> None:
    """Refuse, before anything is trained for it, a quantizer that cannot be."""
    quant = cell.cfg.quant
    if quant.solver is None:
        return
    images = quant.calibration_images
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise KdqError(f"quant.calibration_images={images} must be at least 1")
    config, search = quant_config(quant), search_config(quant)
    network = checked_network(json.dumps(cell.net(cell.role)), None)
    layers = quantizable_layers(network, config.keep_float)
    if search is not None:
        check_average(network, layers, search, config)


def row_axes(cell: Cell, arch: str) -> dict[str, Any]:
    """The columns that tell the cell's rows from others, but for their bits; ``arch`` is the stored model's."""
    cfg, quant, tune = cell.cfg, cell.cfg.quant, cell.cfg.tune
    alphabet, images = "", ""
    if quant.solver is not None:  # a function is known by its own name
        alphabet = quant.alphabet if isinstance(quant.alphabet, str) else quant.alphabet._target_.rpartition(".")[2]
    if tune._target_ is not None:
        images = "" if tune.images is None else f" {tune.images} images"
    return {
        "data": cfg.data.name,
        "method": cfg.method.name,
        "arch": arch,
        "role": cell.role,
        "seed": cfg[cell.role].seed,
        "quantizer": quant.name,
        "alphabet": alphabet,
        "search": quant.search.method if quant.get("search") else "",
        "act_bits": quant.act_bits or 32,
        "tune": "" if tune._target_ is None else f"{tune.name}{images}",
    }
