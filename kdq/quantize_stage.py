"""The stage that quantizes: a float model and some widths -> one packed file and one row for each."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from omegaconf import OmegaConf
from torch import nn

import kdq
from kdq.cell import Cell, plain
from kdq.errors import KdqError
from kdq.evaluate import evaluate, latency_ms, multiply_adds
from kdq.progress import progress
from kdq.quant.alphabet import check_bits
from kdq.quant.network import Report, quantizable_layers, quantize_widths
from kdq.quant.packing import save_packed
from kdq.results import Row, write_row
from kdq.store import Entry
from kdq.tracking import run_folder

#: Entries of the ``quant`` config that are options of :func:`kdq.quant.network.quantize_widths`.
OPTIONS = ("alphabet", "per_channel", "scale", "order", "refine", "first_last_bits", "act_bits", "act_range")


def asked_bits(cell: Cell) -> list[int]:
    """The widths in ``quant.bits``, each once.

    Raises:
        KdqError: there is none, or one is not a whole number from 2 to 32.
    """
    bits = cell.cfg.quant.bits
    asked = OmegaConf.to_container(bits) if OmegaConf.is_list(bits) else [bits]
    if not asked:
        raise KdqError("quant.bits is empty: give a width from 2 to 32, or a list of them")
    assert isinstance(asked, list)
    return [check_bits(width) for width in dict.fromkeys(asked)]


def row_spec(cell: Cell, entry: Entry, bits: int) -> dict[str, Any]:
    """Everything that a row of the model ``entry`` depends on; its hash is the row's ``config_hash``."""
    quant = {name: value for name, value in plain(cell.cfg.quant).items() if name != "bits"}
    data = cell.images.spec() | {"test_limit": cell.cfg.data.test_limit}
    method, seed = cell.cfg.method.name, cell.cfg[cell.role].seed
    return {
        "stage": "quantize",
        "model": entry.key,
        "method": method,
        "seed": seed,
        "data": data,
        "quant": quant,
        "bits": bits,
    }


def quantize(cell: Cell, entry: Entry, keys: Mapping[int, str]) -> dict[int, Row]:
    """Quantize the model to the widths of ``keys`` in one pass, measure each on the test set, and write its packed
    file and its row.

    Args:
        keys: width to ``config_hash``.
    """
    cfg, role = cell.cfg, cell.cfg[cell.role]
    network = cell.network(cell.role, entry).to(cell.device).to(memory_format=torch.channels_last)
    name = f"{cfg.method.name}-{role.name}-s{role.seed}-{cfg.quant.name}"
    with cell.tracked("quantize", name, {"method": cfg.method.name, "model_key": entry.key}) as logger:
        versions = _versions(cell, network, list(keys))
        with progress(f"evaluating {name}", len(keys) + 1, "width") as bar:
            test = cell.images.evaluation("test", cell.device)
            reference = evaluate(network, test, cfg.data.num_classes)
            bar.update()
            common = _common(cell, entry, network) | {"wandb_run": run_folder(logger)}
            rows = {}
            for bits, key in keys.items():
                version, report = versions[bits]
                found = reference if version is network else evaluate(version, test, cfg.data.num_classes)
                rows[bits] = _row(cell, bits, key, version, report, reference, found, common)
                write_row(cell.output / "rows", rows[bits])
                if logger is not None:
                    logged = ("bits", "top1", "drop", "nll", "ece", "size_bytes", "avg_bits")
                    logger.log_metrics({f"quantize/{column}": getattr(rows[bits], column) for column in logged})
                bar.update()
    return rows


def _versions(cell: Cell, network: nn.Module, widths: list[int]) -> dict[int, tuple[nn.Module, Report]]:
    """The quantized networks by width; with ``quant=none`` the float network itself."""
    quant = cell.cfg.quant
    if quant.solver is None:
        return {bits: (network, Report()) for bits in widths}
    solver = quant.solver if isinstance(quant.solver, str) else hydra.utils.instantiate(quant.solver)
    layers = len(quantizable_layers(network, list(quant.keep_float)))
    with progress(f"quantizing with {quant.name}", layers, "layer") as bar:

        def on_layer(name: str) -> None:
            bar.update()

        results = quantize_widths(
            network,
            cell.images.calibration(quant.images, quant.seed, cell.device),
            widths,
            solver,
            exclude=list(quant.keep_float),
            on_layer=on_layer,
            **({} if quant.moments is None else {"moments": hydra.utils.instantiate(quant.moments)}),
            **{name: quant[name] for name in OPTIONS},
        )
    return dict(zip(widths, results, strict=True))


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
        "search": "",
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
    preprocess = {"mean": list(cell.images.preprocess.mean), "std": list(cell.images.preprocess.std)}
    size = save_packed(network, cell.output / artifact, preprocess)
    values: dict[str, Any] = dict(common) | dict(found)
    values |= {
        "bits": bits,
        "avg_bits": report.avg_bits if report.layers else 32.0,
        "top1_float": reference["top1"],
        "drop": round(reference["top1"] - found["top1"], 4),
        "weight_bits_total": report.weight_bits_total if report.layers else 32 * common["params"],
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
