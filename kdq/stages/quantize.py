"""The stage that quantizes: a float model and some widths -> one packed file and one row for each."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdq.data.module import ImageDataModule
from kdq.distill import CrossEntropy
from kdq.quant.callback import GreedyBitSearch, PostTrainingQuantization, QuantizationCallback
from kdq.quant.network import Quantized
from kdq.quant.operations import bit_operations, multiply_adds
from kdq.quant.packing.file import save_packed
from kdq.quant.packing.weights import with_float_dtype
from kdq.quant.report import Report
from kdq.records.rows import Row, write_row
from kdq.records.store import Entry, key_of
from kdq.records.user_code import user_code
from kdq.stages.asked import asked_bits, quant_config, quant_spec, row_axes, row_spec, search_config
from kdq.stages.cell import Cell
from kdq.stages.quantize_log import log_layers, log_row, log_search
from kdq.tracking.run import RunLogger
from kdq.train.evaluate import test, validation_top1
from kdq.train.trainer import evaluation_trainer, limited
from kdq.utils.config import plain
from kdq.utils.cpu import settle_threads
from kdq.utils.files import parse_json, regular, write_text
from kdq.utils.latency import of_networks
from kdq.utils.progress import progress
from kdq.utils.version import __version__, git_sha, versions

log = logging.getLogger(__name__)


def arch_of(cell: Cell, entry: Entry) -> str:
    """The architecture of the stored model; a training of several networks may have published another's."""
    return str(entry.metrics.get("arch", cell.cfg[cell.role].name))


class Tuned(NamedTuple):
    """The network of a row that was trained on after it was quantized."""

    result: Quantized
    seconds: float
    epochs: int


def quantize(
    cell: Cell,
    entry: Entry,
    keys: Mapping[str, str],
    track: RunLogger,
    tuned: Mapping[str, Tuned] = MappingProxyType({}),
) -> dict[str, Row]:
    """Quantize the model for the rows of ``keys`` in one pass, measure each on the test set, and write its packed file
    and its row: evaluations of a Trainer with the quantizer's callback attached.

    Args:
        keys: name, as :func:`asked_bits` has it, to ``config_hash``.
        tuned: the networks of those rows, by the same names, where they were trained on: none is quantized then.
    """
    network = _ready(cell, entry)
    common = _common(cell, entry, network) | {"wandb_run": track.folder}
    rows: dict[str, Row] = {}
    with progress(f"quantizing {cell.name}", None, "step") as bar:

        def on_step(line: str) -> None:
            bar.set_postfix_str(line, refresh=False)
            bar.update()

        callback = None if tuned else _callback(cell, entry, list(keys), on_step)
        measured = _Evaluation(cell, callback)
        reference = _reference(cell, entry, lambda: measured(network))
        for name, key in keys.items():
            more: dict[str, Any] = {}
            if tuned:
                result, more["tune_seconds"], more["tune_epochs"] = tuned[name]
                scores = measured(result.network)
            elif callback is None:
                result = _left_float(network, cell.cfg.quant.float_dtype)
                scores = reference if result.network is network else measured(result.network)
            else:
                width = callback.names[0] if len(callback.names) == 1 else int(name)
                scores = measured(network, width)
                result = callback.results[width]
                if not rows:
                    _log_quantized(cell, callback, keys, track)
            if result.network is not network:
                more["val_top1"] = measured.validation_top1(result.network)
            bits = asked_bits(cell)[name] or math.ceil(result.report.avg_bits)
            rows[name] = _row(cell, bits, key, result, reference, scores, common | more)
            write_row(cell.output / "rows", rows[name])
            log_row(track, rows[name], cell.output / rows[name].artifact)
    return rows


def quantized_once(cell: Cell, entry: Entry, name: str) -> tuple[Quantized, float]:
    """The model quantized for one row, named as :func:`asked_bits` has it, and its accuracy on validation images in
    percent: what tuning begins with."""
    network = _ready(cell, entry)
    with progress(f"quantizing {cell.name}", None, "step") as bar:
        callback = _callback(cell, entry, [name], lambda line: bar.update())
        assert callback is not None
        measured = _Evaluation(cell, callback)
        top1 = measured.validation_top1(network, callback.names[0])
    return callback.result, top1


def _reference(cell: Cell, entry: Entry, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The float model's metrics on these test images, measured once for all quantizers."""
    limits = limited(plain(cell.cfg.trainer))
    spec = {"stage": "evaluate", "model": entry.key, "data": row_spec(cell, entry, None)["data"], "limits": limits}
    file = cell.output / "store" / "evaluated" / f"{entry.path.name}-{key_of(spec)}.json"
    try:
        found = parse_json(regular(file).read_text())
        return {name: float(found[name]) for name in ("top1", "top5", "ece", "nll")}
    except (OSError, ValueError, TypeError, KeyError):  # not there, or damaged
        scores = measure()
        write_text(file, json.dumps(scores))
        return scores


class _Evaluation:
    """Metrics of a network, as it is or quantized by ``callback`` to a width."""

    def __init__(self, cell: Cell, callback: QuantizationCallback | None) -> None:
        quant, config = cell.cfg.quant, plain(cell.cfg.trainer)
        self.callback, self.num_classes = callback, cell.cfg.data.num_classes
        self.data = ImageDataModule(
            cell.images, calibration_images=quant.calibration_images, calibration_seed=quant.seed
        )
        self.trainer = evaluation_trainer(config, callbacks=[] if callback is None else [callback])

    def __call__(self, network: nn.Module, width: int | str | None = None) -> dict[str, float]:
        return test(self.trainer, self._module(network, width), self.data)

    def validation_top1(self, network: nn.Module, width: int | str | None = None) -> float:
        return validation_top1(self.trainer, self._module(network, width), self.data)

    def _module(self, network: nn.Module, width: int | str | None) -> CrossEntropy:
        if self.callback is not None:
            self.callback.use(width)
        return CrossEntropy(network, num_classes=self.num_classes)


def _callback(
    cell: Cell, entry: Entry, names: Sequence[str], on_step: Callable[[str], object]
) -> QuantizationCallback | None:
    """What quantizes as the config says; None with ``quant=none``.

    What a bit search measures depends on everything but the budget, so searches of the same model with other budgets
    share one trace and the layers quantized for it.
    """
    quant = cell.cfg.quant
    if quant.solver is None:
        return None
    images, there = quant.calibration_images, len(cell.images.split.train)
    if images > there:
        log.warning("quant.calibration_images=%d, but there are %d training images: all are used", images, there)
    search = search_config(quant)
    shared: dict[str, Any] = {"calibration_images": images, "path": None, "on_step": on_step}
    if search is None:
        return PostTrainingQuantization([int(name) for name in names], quant_config(quant), **shared)
    values = quant_spec(quant)
    values["search"] = {name: values["search"][name] for name in ("candidates", "validation_images")}
    spec = {"stage": "search", "model": entry.key, "data": cell.images.spec(), "quant": values, **user_code(values)}
    trace = _search_folder(cell) / f"trace-{key_of(spec)}.json"
    return GreedyBitSearch(search, quant_config(quant), trace=trace, key=key_of(spec), **shared)


def _search_folder(cell: Cell) -> Path:
    return cell.output / "store" / "search"


def _log_quantized(cell: Cell, callback: QuantizationCallback, keys: Mapping[str, str], track: RunLogger) -> None:
    """Tell every layer's error, and how a bit search came to its choice."""
    log_layers(track, {name: x.report for name, x in zip(keys, callback.results.values(), strict=True)})
    if isinstance(callback, GreedyBitSearch):
        (result,), (key,) = callback.results.values(), keys.values()
        result.write_frontier(_search_folder(cell) / f"frontier-{key}.json")
        log.info(
            "bit search: %d evaluations, %.1f s, %.1f s of them to quantize every layer at every width",
            result.found.evaluations, result.seconds, result.bank.seconds,
        )  # fmt: skip
        log_search(track, result)


def _left_float(network: nn.Module, float_dtype: str | None) -> Quantized:
    """What ``quant=none`` gives: the network itself, or rounded to 16-bit floats."""
    if float_dtype is None:
        return Quantized(network, Report())
    return Quantized(with_float_dtype(network, float_dtype), Report(float_bits=16))


def _common(cell: Cell, entry: Entry, network: nn.Module) -> dict[str, Any]:
    """The columns that all widths of one model share."""
    cfg, role, read = cell.cfg, cell.of_role(cell.role), cell.role == "teacher" and cell.cfg.teacher.weights
    images = 0 if cfg.quant.solver is None else min(cfg.quant.calibration_images, len(cell.images.split.train))
    recipe = role["recipe"]
    return {
        **row_axes(cell, arch_of(cell, entry)),
        "val_top1": float(entry.metrics["val_top1"]),
        "val_top1_float": float(entry.metrics["val_top1"]),
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "float_bytes": (entry.path / "weights.safetensors").stat().st_size,
        "macs": multiply_adds(network, _image(cell)),
        "calibration_images": images,
        "latency_ms_torch": of_networks({"float": network}, cell.shape, 1, 30)["float"].median_ms,
        "train_seconds": float(entry.metrics["train_seconds"]),
        "device": _device_name(cell.device),
        "threads": entry.metrics.get("threads"),
        "limited": limited(plain(cfg.trainer)),
        "classes": cfg.data.num_classes,
        "epochs": 0 if read else recipe["epochs"],
        "recipe": "" if read else f"{recipe['schedule']}, lr {recipe['lr']:g}, batches of {recipe['batch_size']}",
        "kdq_version": __version__,
        "git_sha": git_sha(),
        "versions": versions(),
    }


def _row(
    cell: Cell,
    bits: int,
    key: str,
    result: Quantized,
    reference: Mapping[str, float],
    scores: Mapping[str, float],
    common: Mapping[str, Any],
) -> Row:
    network, report = result.network, result.report
    values: dict[str, Any] = dict(common) | dict(scores)
    config = cell.recorded()
    unquantized = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim >= 2)
    values |= {
        "bits": bits,
        "config": config | {"quant": config["quant"] | {"bits": None if common["search"] else bits}},
        "avg_bits": report.avg_bits if report.layers else float(report.float_bits),
        "top1_float": reference["top1"],
        "drop": round(reference["top1"] - scores["top1"], 4),
        "weight_bits_total": report.weight_bits_total if report.layers else report.float_bits * unquantized,
        "quantize_seconds": report.seconds,
        "bops": bit_operations(network, _image(cell)),
        "config_hash": key,
    }
    row = Row(**values, size_bytes=0, artifact="")
    artifact = Path("store", "quantized", row.file_name).with_suffix(".kdq")
    size = save_packed(network, cell.output / artifact, cell.images.card(), cell.images.set.classes)
    return replace(row, size_bytes=size, artifact=str(artifact))


def _ready(cell: Cell, entry: Entry) -> nn.Module:
    """The stored network where it is quantized, on the number of CPU threads on which a few images pass fastest."""
    network = cell.network(cell.role, entry).to(cell.device).to(memory_format=torch.channels_last)
    # What its file will say counts in a budget of bytes.
    network.kdq_preprocess, network.kdq_classes = cell.images.card(), cell.images.set.classes  # type: ignore[assignment]
    if cell.device.type == "cpu":
        images = torch.zeros(8, *cell.shape)
        with torch.inference_mode():
            settle_threads(lambda: network(images), cell.cfg.trainer.threads)
    return network


def _image(cell: Cell) -> Tensor:
    return torch.zeros(1, *cell.shape, device=cell.device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} x{torch.get_num_threads()}" if device.type == "cpu" else device.type
