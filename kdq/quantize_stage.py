"""The stage that quantizes: a float model and some widths -> one packed file and one row for each."""

from __future__ import annotations

import logging
import math
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from torch import nn

import kdq
from kdq.cell import Cell, plain
from kdq.data.loader import EvalLoader
from kdq.errors import KdqError
from kdq.evaluate import evaluate, latency_ms, multiply_adds
from kdq.progress import progress
from kdq.quant.alphabet import check_bits
from kdq.quant.mixed import first_batches, search_bits
from kdq.quant.network import Report, quantizable_layers, quantize_widths
from kdq.quant.packing import save_packed
from kdq.quant.weights import with_float_dtype
from kdq.results import Row, write_row
from kdq.store import Entry, key_of
from kdq.tracking import run_folder
from kdq.train_stage import Model

log = logging.getLogger(__name__)

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


def row_spec(cell: Cell, model: Model | Entry, width: Width) -> dict[str, Any]:
    """Everything that a row of ``model`` depends on; its hash is the row's ``config_hash``."""
    quant = {name: value for name, value in plain(cell.cfg.quant).items() if name != "bits"}
    data = cell.images.spec() | {"test_limit": cell.cfg.data.test_limit}
    method, seed = cell.cfg.method.name, cell.cfg[cell.role].seed
    return {
        "stage": "quantize",
        "model": model.key,
        "method": method,
        "seed": seed,
        "data": data,
        "quant": quant,
        "bits": width if isinstance(width, int) else list(width),
    }


def row_keys(cell: Cell, model: Model) -> dict[Width, str]:
    """The ``config_hash`` of each row that the cell asks for.

    Raises:
        KdqError: it asks for an impossible width.
    """
    return {width: key_of(row_spec(cell, model, width)) for width in asked_widths(cell)}


def quantize(cell: Cell, entry: Entry, keys: Mapping[Width, str]) -> dict[Width, Row]:
    """Quantize the model to the widths of ``keys`` in one pass, measure each on the test set, and write its packed
    file and its row.

    Args:
        keys: width to ``config_hash``.
    """
    cfg, role = cell.cfg, cell.cfg[cell.role]
    network = cell.network(cell.role, entry).to(cell.device).to(memory_format=torch.channels_last)
    name = f"{cfg.method.name}-{role.name}-s{role.seed}-{cfg.quant.name}"
    with cell.tracked("quantize", name, {"method": cfg.method.name, "model_key": entry.key}) as logger:
        versions = _versions(cell, entry, network, list(keys), logger)
        with progress(f"evaluating {name}", len(keys) + 1, "width") as bar:
            test = cell.images.evaluation("test", cell.device)
            reference = evaluate(network, test, cfg.data.num_classes)
            bar.update()
            common = _common(cell, entry, network) | {"wandb_run": run_folder(logger)}
            rows = {}
            for width, key in keys.items():
                version, report = versions[width]
                found = reference if version is network else evaluate(version, test, cfg.data.num_classes)
                bits = width if isinstance(width, int) else math.ceil(report.avg_bits)
                rows[width] = _row(cell, bits, key, version, report, reference, found, common)
                write_row(cell.output / "rows", rows[width])
                if logger is not None:
                    logged = ("bits", "top1", "drop", "nll", "ece", "size_bytes", "avg_bits")
                    logger.log_metrics({f"quantize/{column}": getattr(rows[width], column) for column in logged})
                bar.update()
    return rows


def _versions(
    cell: Cell, entry: Entry, network: nn.Module, widths: list[Width], logger: Logger | None
) -> dict[Width, tuple[nn.Module, Report]]:
    """The quantized networks by width; with ``quant=none`` the float network itself."""
    quant = cell.cfg.quant
    if quant.solver is None:
        version = network if quant.float_dtype is None else with_float_dtype(network, quant.float_dtype)
        return {width: (version, Report(float_bits=32 if version is network else 16)) for width in widths}
    calibration = cell.images.calibration(quant.images, quant.seed, cell.device)
    if quant.get("search"):
        return {width: _searched(cell, entry, network, calibration, width, logger) for width in widths}
    layers = len(quantizable_layers(network, list(quant.keep_float)))
    with progress(f"quantizing with {quant.name}", layers, "layer") as bar:

        def on_layer(name: str) -> None:
            bar.update()

        results = quantize_widths(network, calibration, widths, **quantize_options(cell), on_layer=on_layer)  # type: ignore[arg-type]
    return dict(zip(widths, results, strict=True))


def _searched(
    cell: Cell, entry: Entry, network: nn.Module, calibration: EvalLoader, width: Width, logger: Logger | None
) -> tuple[nn.Module, Report]:
    """The network with the widths that the bit search chooses. What it measures depends on everything but the budget,
    so searches of the same model with other budgets share one trace."""
    assert isinstance(width, tuple)
    search = plain(cell.cfg.quant.search)
    images, budgets = search.pop("images"), ("avg_bits", "size_bytes", "max_drop", "cost", "method")
    spec = row_spec(cell, entry, width)
    spec["quant"]["search"] = {name: value for name, value in search.items() if name not in budgets}
    measured = key_of(spec | {"images": images})
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
        found.bank_seconds,
    )
    for metrics in found.metrics() if logger is not None else []:
        logger.log_metrics(metrics)  # type: ignore[union-attr]
    return found.network, found.report


def quantize_options(cell: Cell) -> dict[str, Any]:
    """How layers are quantized, whatever their widths: the arguments of :func:`quantize_widths`."""
    quant = cell.cfg.quant
    options = {name: quant[name] for name in OPTIONS} | {"exclude": list(quant.keep_float)}
    options["solver"] = quant.solver if isinstance(quant.solver, str) else hydra.utils.instantiate(quant.solver)
    if quant.moments is not None:
        options["moments"] = hydra.utils.instantiate(quant.moments)
    return options


def _common(cell: Cell, entry: Entry, network: nn.Module) -> dict[str, Any]:
    """The columns that all widths of one model share."""
    cfg, role = cell.cfg, cell.cfg[cell.role]
    image = torch.zeros(1, cfg.data.in_channels, cell.images.height, cell.images.width, device=cell.device)
    images = 0 if cfg.quant.solver is None else len(cell.images.split.calibration(cfg.quant.images, cfg.quant.seed))
    return {
        "data": cfg.data.name,
        "method": cfg.method.name,
        "arch": entry.metrics.get("arch", role.name),
        "role": cell.role,
        "seed": role.seed,
        "quantizer": cfg.quant.name,
        "alphabet": "" if cfg.quant.solver is None else cfg.quant.alphabet,
        "search": cfg.quant.search.method if cfg.quant.get("search") else "",
        "val_top1": float(entry.metrics["val_top1"]),
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "float_bytes": (entry.path / "weights.safetensors").stat().st_size,
        "macs": multiply_adds(network, image),
        "calibration_images": images,
        "act_bits": 32 if cfg.quant.act_bits is None else cfg.quant.act_bits,
        "latency_ms_torch": latency_ms(network, image),
        "train_seconds": float(entry.metrics["train_seconds"]),
        "device": _device_name(cell.device),
        "kdq_version": kdq.__version__,
        "git_sha": _git_sha(),
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
        "weight_bits_total": report.weight_bits_total if report.layers else report.float_bits * common["params"],
        "size_bytes": size,
        "quantize_seconds": report.seconds,
        "config_hash": key,
        "artifact": str(artifact),
    }
    return Row(**values)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} x{torch.get_num_threads()}" if device.type == "cpu" else device.type


@cache
def _git_sha() -> str:
    """The commit of kdq's own checkout, with ``+`` when it has local changes; empty for an installed package."""
    folder = Path(kdq.__file__).parent.parent
    if not (folder / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
