"""The stage that quantizes: a float model and some widths -> one packed file and one row for each."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from kdq.data.loader import EvalLoader
from kdq.models.build import build
from kdq.quant.bitsearch.bank import check_average
from kdq.quant.bitsearch.config import SEARCH_OPTIONS, SearchConfig
from kdq.quant.bitsearch.mixed import search_bits
from kdq.quant.config import OPTIONS, QuantConfig, refuse_unknown
from kdq.quant.network import Report, quantizable_layers, quantize_widths
from kdq.quant.packing.file import save_packed
from kdq.quant.packing.weights import with_float_dtype
from kdq.quant.solvers.alphabet import check_bits
from kdq.records.rows import Row, write_row
from kdq.records.store import Entry, key_of
from kdq.records.user_code import user_code
from kdq.stages.cell import Cell
from kdq.stages.quantize_log import log_axes, log_layers, log_row, log_search
from kdq.stages.train import Model, artifact
from kdq.tracking.names import series
from kdq.tracking.run import RunLogger
from kdq.utils.config import plain
from kdq.utils.errors import KdqError
from kdq.utils.latency import of_networks
from kdq.utils.metrics import evaluate
from kdq.utils.operations import bit_operations, multiply_adds
from kdq.utils.progress import progress
from kdq.utils.version import __version__, git_sha

log = logging.getLogger(__name__)


def quant_config(quant: DictConfig) -> QuantConfig:
    """How the ``quant`` config quantizes layers.

    Raises:
        KdqError: it has an unknown key or a choice that cannot be.
    """
    refuse_unknown(quant, (*OPTIONS, "name", "bits", "calibration_images", "seed", "search"))
    values = {name: value for name, value in plain(quant).items() if name in OPTIONS}
    return QuantConfig(**hydra.utils.instantiate(values, _convert_="all"))


def search_config(quant: DictConfig) -> SearchConfig | None:
    """What the ``quant`` config asks a bit search for; None where it asks for widths.

    Raises:
        KdqError: as :func:`quant_config`.
    """
    if not quant.get("search"):
        return None
    refuse_unknown(quant.search, SEARCH_OPTIONS)
    if quant.bits is not None:
        raise KdqError(
            f"quant.bits={quant.bits} but quant={quant.name} chooses the bits: give quant.bits=null, and its choices "
            "as quant.search.candidates"
        )
    return SearchConfig(**plain(quant.search))


def asked_bits(cell: Cell) -> dict[str, int | None]:
    """What rows are named by: each width of ``quant.bits`` once, or the range of a bit search's candidates, ``2-8``,
    which has no width yet.

    Raises:
        KdqError: there is none, or one is not a whole number from 2 to 32.
    """
    if search := search_config(cell.cfg.quant):
        return {f"{min(search.candidates)}-{max(search.candidates)}": None}
    bits = plain(cell.cfg.quant)["bits"]
    asked = bits if isinstance(bits, list) else [bits]
    if not asked:
        raise KdqError("quant.bits is empty: give a width from 2 to 32, or a list of them")
    return {str(width): check_bits(width, "quant.bits") for width in asked}


def row_spec(cell: Cell, model: Model | Entry, bits: int | None) -> dict[str, Any]:
    """Everything that a row of ``model`` depends on; its hash is the row's ``config_hash``."""
    quant = {name: value for name, value in plain(cell.cfg.quant).items() if name != "bits"}
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
    }


def row_keys(cell: Cell, model: Model) -> dict[str, str]:
    """The ``config_hash`` of each row that the cell asks for, by :func:`asked_bits`.

    Raises:
        KdqError: it asks for an impossible width or quantizer.
    """
    asked = asked_bits(cell)
    check_quantizer(cell)
    return {name: key_of(row_spec(cell, model, bits)) for name, bits in asked.items()}


def check_quantizer(cell: Cell) -> None:
    """Refuse, before anything is trained for it, a quantizer that cannot be.

    Raises:
        KdqError: it cannot.
    """
    quant = cell.cfg.quant
    if quant.solver is None:
        return
    images = quant.calibration_images
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise KdqError(f"quant.calibration_images={images} must be at least 1")
    config, search = quant_config(quant), search_config(quant)
    network = _untrained(json.dumps(plain(cell.cfg[cell.role].net)))
    layers = quantizable_layers(network, config.keep_float)
    if search is not None:
        check_average(network, layers, search, config)


@lru_cache(maxsize=4)
def _untrained(net: str) -> nn.Module:
    # With real weights: a network of one's own may look at numbers while it is built.
    return build(json.loads(net))


def alphabet_name(quant: Mapping[str, Any]) -> str:
    """The ``quant`` config's alphabet as rows name it; a function's own name, nothing where nothing is quantized."""
    if quant["solver"] is None:
        return ""
    asked = quant["alphabet"]
    return asked if isinstance(asked, str) else str(asked["_target_"]).rpartition(".")[2]


def arch_of(cell: Cell, entry: Entry) -> str:
    """The architecture of the stored model; a training of several networks may have published another's."""
    return str(entry.metrics.get("arch", cell.cfg[cell.role].name))


def tracked_rows(cell: Cell, model: Model, arch: str, asked: Mapping[str, str]) -> AbstractContextManager[RunLogger]:
    """The log of the rows of ``model``.

    Args:
        asked: name to ``config_hash`` of all rows of the job, those that are there already, too: they name the log.
    """
    cfg, role, quant = cell.cfg, plain(cell.cfg[cell.role]), plain(cell.cfg.quant)
    act_bits = quant["act_bits"] or 32
    axes = {
        "role": cell.role,
        "method": cfg.method.name,
        "arch": arch,
        "seed": role["seed"],
        "teacher": cfg.teacher.name,
        "quantizer": quant["name"],
        "alphabet": alphabet_name(quant),
        "act_bits": act_bits,
        "bits": quant["search"]["candidates"] if quant.get("search") else quant["bits"],
        "search": quant["search"]["method"] if quant.get("search") else "",
        "model_key": model.key,
        "series": series(cfg.method.name, arch, quant["name"], act_bits),
    }
    settings = {"net": role["net"], "recipe": role["recipe"], "method": plain(cfg.method), "quant": quant}
    return cell.tracked(
        "quantize",
        f"{cell.name}-b{','.join(asked)}",
        key_of({"rows": sorted(asked.values())}),
        axes,
        settings,
        inputs=[artifact(cell.store, model)],
        tags=[f"{name}bit" for name in asked],
    )


def quantize(cell: Cell, entry: Entry, keys: Mapping[str, str], track: RunLogger) -> dict[str, Row]:
    """Quantize the model for the rows of ``keys`` in one pass, measure each on the test set, and write its packed file
    and its row.

    Args:
        keys: name, as :func:`asked_bits` has it, to ``config_hash``.
    """
    cfg = cell.cfg
    network = cell.network(cell.role, entry).to(cell.device).to(memory_format=torch.channels_last)
    log_axes(track)
    versions = _versions(cell, entry, network, keys, track)
    log_layers(track, {name: report for name, (_, report) in versions.items()})
    with progress(f"evaluating {cell.name}", len(keys) + 1, "width") as bar:
        test = cell.images.evaluation("test", cell.device)
        unquantized = evaluate(network, test, cfg.data.num_classes)
        bar.update()
        common = _common(cell, entry, network) | {"wandb_run": track.folder}
        rows = {}
        for name, key in keys.items():
            version, report = versions[name]
            found = unquantized if version is network else evaluate(version, test, cfg.data.num_classes)
            bits = asked_bits(cell)[name] or math.ceil(report.avg_bits)
            rows[name] = _row(cell, bits, key, version, report, unquantized, found, common)
            write_row(cell.output / "rows", rows[name])
            log_row(track, rows[name], cell.output / rows[name].artifact)
            bar.update()
    return rows


def _versions(
    cell: Cell, entry: Entry, network: nn.Module, keys: Mapping[str, str], track: RunLogger
) -> dict[str, tuple[nn.Module, Report]]:
    """The quantized networks by the names of their rows; with ``quant=none`` the float network itself."""
    quant = cell.cfg.quant
    if quant.solver is None:
        version = network if quant.float_dtype is None else with_float_dtype(network, quant.float_dtype)
        return {name: (version, Report(float_bits=32 if version is network else 16)) for name in keys}
    if quant.calibration_images > (there := len(cell.images.split.train)):
        log.warning(
            "quant.calibration_images=%d, but there are %d training images: all are used",
            quant.calibration_images,
            there,
        )
    calibration = cell.images.calibration(quant.calibration_images, quant.seed, cell.device)
    config, search = quant_config(quant), search_config(quant)
    if search is not None:
        ((name, key),) = keys.items()
        return {name: _searched(cell, entry, network, calibration, config, search, key, track)}
    layers = len(quantizable_layers(network, config.keep_float))
    with progress(f"quantizing with {quant.name}", layers, "layer") as bar:
        widths = [int(name) for name in keys]
        results = quantize_widths(network, calibration, widths, config, on_layer=lambda name: bar.update())
    return dict(zip(keys, results, strict=True))


def _searched(
    cell: Cell,
    entry: Entry,
    network: nn.Module,
    calibration: EvalLoader,
    config: QuantConfig,
    search: SearchConfig,
    key: str,
    track: RunLogger,
) -> tuple[nn.Module, Report]:
    """The network with the widths that the bit search chooses. What it measures depends on everything but the budget,
    so searches of the same model with other budgets share one trace."""
    shared = ("candidates", "validation_images")
    quant = plain(cell.cfg.quant) | {"search": {name: plain(cell.cfg.quant.search)[name] for name in shared}}
    spec = {"stage": "search", "model": entry.key, "data": cell.images.spec(), "quant": quant, **user_code(quant)}
    measured = key_of(spec)
    folder = cell.output / "store" / "search"
    with progress("searching bits", None, "step") as bar:

        def on_step(line: str) -> None:
            bar.set_postfix_str(line, refresh=False)
            bar.update()

        validation = cell.images.evaluation("val", cell.device)
        trace = folder / f"trace-{measured}.json"
        found = search_bits(
            network, calibration, validation, search, config, trace=trace, key=measured, on_step=on_step
        )
    found.write_frontier(folder / f"frontier-{key}.json")
    log.info(
        "bit search: %d evaluations, %.1f s, %.1f s of them to quantize every layer at every width",
        found.found.evaluations,
        found.seconds,
        found.bank.seconds,
    )
    log_search(track, found)
    return found.network, found.report


def _common(cell: Cell, entry: Entry, network: nn.Module) -> dict[str, Any]:
    """The columns that all widths of one model share."""
    cfg, role = cell.cfg, cell.cfg[cell.role]
    image = _image(cell)
    images = (
        0
        if cfg.quant.solver is None
        else len(cell.images.split.calibration(cfg.quant.calibration_images, cfg.quant.seed))
    )
    return {
        "data": cfg.data.name,
        "method": cfg.method.name,
        "arch": arch_of(cell, entry),
        "role": cell.role,
        "seed": role.seed,
        "quantizer": cfg.quant.name,
        "alphabet": alphabet_name(cfg.quant),
        "search": cfg.quant.search.method if cfg.quant.get("search") else "",
        "val_top1": float(entry.metrics["val_top1"]),
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "float_bytes": (entry.path / "weights.safetensors").stat().st_size,
        "macs": multiply_adds(network, image),
        "calibration_images": images,
        "act_bits": 32 if cfg.quant.act_bits is None else cfg.quant.act_bits,
        "latency_ms_torch": of_networks({"float": network}, cell.shape, 1, 30)["float"].median_ms,
        "train_seconds": float(entry.metrics["train_seconds"]),
        "device": _device_name(cell.device),
        "kdq_version": __version__,
        "git_sha": git_sha(),
    }


def _row(
    cell: Cell,
    bits: int,
    key: str,
    network: nn.Module,
    report: Report,
    reference: Mapping[str, float],
    found: Mapping[str, float],
    common: Mapping[str, Any],
) -> Row:
    label = "-".join(str(common[column]) for column in ("data", "method", "arch", "quantizer"))
    artifact = Path("store") / "quantized" / f"{label}-s{common['seed']}-b{bits}-{key}.kdq"
    size = save_packed(network, cell.output / artifact, cell.images.card(), cell.images.set.classes)
    values: dict[str, Any] = dict(common) | dict(found)
    values |= {
        "bits": bits,
        "avg_bits": report.avg_bits if report.layers else float(report.float_bits),
        "top1_float": reference["top1"],
        "drop": round(reference["top1"] - found["top1"], 4),
        "weight_bits_total": report.weight_bits_total if report.layers else report.float_bits * _weights(network),
        "size_bytes": size,
        "quantize_seconds": report.seconds,
        "bops": bit_operations(network, _image(cell)),
        "config_hash": key,
        "artifact": str(artifact),
    }
    return Row(**values)


def _weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.ndim >= 2)


def _image(cell: Cell) -> Tensor:
    return torch.zeros(1, *cell.shape, device=cell.device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} x{torch.get_num_threads()}" if device.type == "cpu" else device.type
