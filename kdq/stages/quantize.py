"""The stage that quantizes: a float model and some widths -> one packed file and one row for each."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdq.data.loader import EvalLoader
from kdq.quant.bitsearch.mixed import first_batches, search_bits
from kdq.quant.network import Report, quantizable_layers, quantize_widths
from kdq.quant.packing.file import save_packed
from kdq.quant.packing.weights import with_float_dtype
from kdq.records.rows import Row, write_row
from kdq.records.store import Entry, key_of
from kdq.records.user_code import user_code
from kdq.stages.cell import Cell
from kdq.stages.quantize_log import log_axes, log_layers, log_row, log_search, spell
from kdq.stages.quantize_options import Width, alphabet_name, asked_widths, check_quantizer, quantize_options
from kdq.stages.train import Model, artifact
from kdq.tracking.names import series
from kdq.tracking.run import RunLogger
from kdq.utils.config import plain
from kdq.utils.latency import of_networks
from kdq.utils.metrics import bit_operations, evaluate, multiply_adds
from kdq.utils.progress import progress
from kdq.utils.version import __version__, git_sha

log = logging.getLogger(__name__)


def row_spec(cell: Cell, model: Model | Entry, width: Width) -> dict[str, Any]:
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
        "bits": width if isinstance(width, int) else list(width),
        **user_code(quant),
    }


def row_keys(cell: Cell, model: Model) -> dict[Width, str]:
    """The ``config_hash`` of each row that the cell asks for.

    Raises:
        KdqError: it asks for an impossible width or quantizer.
    """
    check_quantizer(cell)
    return {width: key_of(row_spec(cell, model, width)) for width in asked_widths(cell)}


def arch_of(cell: Cell, entry: Entry) -> str:
    """The architecture of the stored model; a training of several networks may have published another's."""
    return str(entry.metrics.get("arch", cell.cfg[cell.role].name))


def tracked_rows(cell: Cell, model: Model, arch: str, asked: Mapping[Width, str]) -> AbstractContextManager[RunLogger]:
    """The log of the rows of ``model``.

    Args:
        asked: width to ``config_hash`` of all rows of the job, those that are there already, too: they name the log.
    """
    cfg, role, quant = cell.cfg, plain(cell.cfg[cell.role]), plain(cell.cfg.quant)
    widths = [spell(width) for width in asked]
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
        "bits": quant["bits"],
        "search": quant["search"]["method"] if quant.get("search") else "",
        "model_key": model.key,
        "series": series(cfg.method.name, arch, quant["name"], act_bits),
    }
    settings = {"net": role["net"], "recipe": role["recipe"], "method": plain(cfg.method), "quant": quant}
    return cell.tracked(
        "quantize",
        f"{cell.name}-b{','.join(widths)}",
        key_of({"rows": sorted(asked.values())}),
        axes,
        settings,
        inputs=[artifact(cell.store, model)],
        tags=[f"{width}bit" for width in widths],
    )


def quantize(cell: Cell, entry: Entry, keys: Mapping[Width, str], track: RunLogger) -> dict[Width, Row]:
    """Quantize the model to the widths of ``keys`` in one pass, measure each on the test set, and write its packed
    file and its row.

    Args:
        keys: width to ``config_hash``.
    """
    cfg = cell.cfg
    network = cell.network(cell.role, entry).to(cell.device).to(memory_format=torch.channels_last)
    log_axes(track)
    versions = _versions(cell, entry, network, list(keys), track)
    log_layers(track, {spell(width): report for width, (_, report) in versions.items()})
    with progress(f"evaluating {cell.name}", len(keys) + 1, "width") as bar:
        test = cell.images.evaluation("test", cell.device)
        unquantized = evaluate(network, test, cfg.data.num_classes)
        bar.update()
        common = _common(cell, entry, network) | {"wandb_run": track.folder}
        rows = {}
        for width, key in keys.items():
            version, report = versions[width]
            found = unquantized if version is network else evaluate(version, test, cfg.data.num_classes)
            bits = width if isinstance(width, int) else math.ceil(report.avg_bits)
            rows[width] = _row(cell, bits, key, version, report, unquantized, found, common)
            write_row(cell.output / "rows", rows[width])
            log_row(track, rows[width], cell.output / rows[width].artifact)
            bar.update()
    return rows


def _versions(
    cell: Cell, entry: Entry, network: nn.Module, widths: list[Width], track: RunLogger
) -> dict[Width, tuple[nn.Module, Report]]:
    """The quantized networks by width; with ``quant=none`` the float network itself."""
    quant = cell.cfg.quant
    if quant.solver is None:
        version = network if quant.float_dtype is None else with_float_dtype(network, quant.float_dtype)
        return {width: (version, Report(float_bits=32 if version is network else 16)) for width in widths}
    if quant.images > (there := len(cell.images.split.train)):
        log.warning("quant.images=%d, but there are %d training images: all are used", quant.images, there)
    calibration = cell.images.calibration(quant.images, quant.seed, cell.device)
    if quant.get("search"):
        return {width: _searched(cell, entry, network, calibration, width, track) for width in widths}
    layers = len(quantizable_layers(network, list(quant.keep_float)))
    with progress(f"quantizing with {quant.name}", layers, "layer") as bar:

        def on_layer(name: str) -> None:
            bar.update()

        results = quantize_widths(network, calibration, widths, **quantize_options(cell), on_layer=on_layer)  # type: ignore[arg-type]
    return dict(zip(widths, results, strict=True))


def _searched(
    cell: Cell, entry: Entry, network: nn.Module, calibration: EvalLoader, width: Width, track: RunLogger
) -> tuple[nn.Module, Report]:
    """The network with the widths that the bit search chooses. What it measures depends on everything but the budget,
    so searches of the same model with other budgets share one trace."""
    assert isinstance(width, tuple)
    search = plain(cell.cfg.quant.search)
    images, budgets = search.pop("images"), ("avg_bits", "size_bytes", "max_drop", "cost", "method", "context")
    quant = {**plain(cell.cfg.quant), "search": {name: v for name, v in search.items() if name not in budgets}}
    spec = {"model": entry.key, "data": cell.images.spec(), "quant": quant, "images": images}
    measured = key_of({"stage": "search", **spec, **user_code(quant)})
    folder = cell.output / "store" / "search"
    with progress("searching bits", None, "step") as bar:

        def on_step(line: str) -> None:
            bar.set_postfix_str(line, refresh=False)
            bar.update()

        found = search_bits(
            network,
            calibration,
            first_batches(cell.images.evaluation("val", cell.device), images),
            candidates=width,
            trace=folder / f"trace-{measured}.json",
            key=measured,
            on_step=on_step,
            **search,
            **quantize_options(cell),
        )
    found.write_frontier(folder / f"frontier-{key_of(row_spec(cell, entry, width))}.json")
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
    images = 0 if cfg.quant.solver is None else len(cell.images.split.calibration(cfg.quant.images, cfg.quant.seed))
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
