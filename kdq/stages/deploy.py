"""The stage after a row: its packed file as ONNX models, their accuracy on the whole test set and their latency."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdq.deploy.onnx_files import CLOSEST, FORMATS, onnx_models
from kdq.deploy.runtime import RUNTIMES, Runner, needs, openvino, runner, session, top1
from kdq.models.build import build
from kdq.models.table import is_in_table
from kdq.quant.activations import RANGES
from kdq.quant.packing.file import load_packed
from kdq.records.rows import ROW_FORMAT, Row, write_row
from kdq.records.store import key_of
from kdq.stages.cell import Cell
from kdq.train.evaluate import evaluate
from kdq.utils import latency
from kdq.utils.checks import one_of, within
from kdq.utils.config import plain
from kdq.utils.cpu import usable_cores
from kdq.utils.errors import KdqError
from kdq.utils.files import replacing
from kdq.utils.progress import progress

log = logging.getLogger(__name__)

#: Points of accuracy by which an exported model may differ from the evaluated one without a warning.
TOLERANCE = 0.1
#: What ``deploy=best`` says of the format it keeps.
KEPT = ("deployed", "top1_deployed", "latency_ms_deployed")
#: Behind the name of a format: in this runtime, not in ONNX Runtime.
IN_OPENVINO = " in OpenVINO"


def asked_columns(cell: Cell) -> dict[str, Any]:
    """The columns of a row that the ``deploy`` config fills: those it measures, each with None, and ``deploy_hash``,
    with what it will be: cells that were deployed with other settings are deployed again."""
    config = plain(cell.cfg.deploy)
    if not config["formats"]:
        if "runs" in config:
            raise KdqError("deploy.formats is empty: give fp32, int8 or codes, or deploy=none")
        return {}
    if "runs" not in config:
        raise KdqError("deploy.formats needs deploy=onnx or deploy=best")
    needs("onnx", "onnxruntime", "onnxscript")
    runtimes = config.get("runtimes", [])
    for name in runtimes or ([""] if "tolerance" in config else []):
        one_of("deploy.runtimes", name, RUNTIMES)
    needs(*runtimes)
    for name in config["formats"]:
        one_of("deploy.formats", name, FORMATS)
    one_of("deploy.act_range", config["act_range"], (*RANGES, CLOSEST))
    for name in ("calibration_images", "batch", "runs", "threads"):
        if config[name] is not None:
            within(f"deploy.{name}", config[name], 1)
    kept = dict.fromkeys(KEPT) if "tolerance" in config else {}
    return {**_measured(config["formats"]), **kept, "deploy_hash": _settings(cell)}


def _settings(cell: Cell) -> str:
    """Identifies what the columns depend on beyond the row itself, but for the machine. The formats are measured each
    by itself, unless one of them is chosen."""
    config = plain(cell.cfg.deploy)
    formats = sorted(set(config.pop("formats")))
    return key_of(config | {"seed": cell.cfg.quant.seed} | ({"formats": formats} if "tolerance" in config else {}))


def _measured(formats: Sequence[str]) -> dict[str, None]:
    """The columns of these formats, still empty."""
    measured = ("top1_onnx_{}", "onnx_{}_bytes", "latency_ms_onnx_{}", "latency_p95_ms_onnx_{}", "throughput_onnx_{}")
    return {column.format(name): None for name in formats for column in measured}


def deploy(cell: Cell, row: Row) -> Row:
    """``row`` with the asked columns, which are written to its file; the ONNX models, or the one that is kept, lie
    beside the packed file."""
    path = cell.output / row.artifact
    config, network = cell.cfg.deploy, packed_network(cell, path)
    with progress(f"exporting {path.stem}", 4, "step") as bar:
        models = onnx_models(network, cell.shape, list(config.formats), calibration(cell), config.act_range)
        bar.update()
        values: dict[str, Any] = {"row_format": ROW_FORMAT, "deploy_hash": _settings(cell)}
        if row.deploy_hash != values["deploy_hash"]:  # what other settings measured does not stand beside it
            values |= _measured(FORMATS) | dict.fromkeys(KEPT)
        values |= {f"onnx_{name}_bytes": len(model) for name, model in models.items()}
        runners = {name: runner(session(model, config.threads)) for name, model in models.items()}
        if "openvino" in config.get("runtimes", ()):
            others = openvino(models, config.threads)
            runners |= {f"{name}{IN_OPENVINO}": run for name, run in others.items()}
        chosen_from = [name for name in runners if _runtime(name) in config.get("runtimes", RUNTIMES)]
        if not chosen_from:
            raise KdqError(f"OpenVINO reads none of deploy.formats={list(config.formats)}: add int8, or onnxruntime")
        accuracies = {
            name: top1(run, cell.images.evaluation("test", torch.device("cpu"))) for name, run in runners.items()
        }
        for name, accuracy in accuracies.items():
            compare(row, name, accuracy, path)
        bar.update()
        single = latency.of_runners(runners, cell.shape, 1, config.runs)
        bar.update()
        many = latency.of_runners(
            {name: runners[name] for name in models}, cell.shape, config.batch, max(3, config.runs // 5)
        )
        bar.update()
    for name in models:
        values[f"top1_onnx_{name}"] = accuracies[name]
        values[f"latency_ms_onnx_{name}"] = single[name].median_ms
        values[f"latency_p95_ms_onnx_{name}"] = single[name].p95_ms
        values[f"throughput_onnx_{name}"] = many[name].throughput
    if (tolerance := config.get("tolerance")) is not None:
        times = {name: single[name].median_ms for name in chosen_from}
        name = best(cell, network, runners, times, tolerance)
        values |= dict(zip(KEPT, (name, accuracies[name], single[name].median_ms), strict=True))
        name = name.removesuffix(IN_OPENVINO)
        models = {name: models[name]}
    if row.deploy_hash != values["deploy_hash"]:  # nor do the models that were measured with other settings
        for name in set(FORMATS) - set(models):
            path.with_suffix(f".{name}.onnx").unlink(missing_ok=True)
    for name, model in models.items():
        with replacing(path.with_suffix(f".{name}.onnx")) as temporary:
            temporary.write_bytes(model)
    values |= {"throughput_batch": config.batch, "latency_threads": config.threads or usable_cores()}
    deployed = dataclasses.replace(row, **values)
    write_row(cell.output / "rows", deployed)
    return deployed


def best(
    cell: Cell, network: nn.Module, runners: Mapping[str, Runner], times: Mapping[str, float], tolerance: float
) -> str:
    """The fastest, by ``times``, of ``runners`` whose top-1 on validation images is at most ``tolerance`` points below
    that of the packed ``network``, so that no test image chooses; the most accurate one if none is."""
    images = cell.images.evaluation("val", torch.device("cpu"))
    least = evaluate(network, images, cell.cfg.data.num_classes)["top1"] - tolerance
    accuracies = {name: top1(runners[name], images) for name in times}
    able = [name for name in times if accuracies[name] >= least]
    if able:
        return min(able, key=times.__getitem__)
    name = max(accuracies, key=accuracies.__getitem__)
    log.warning("no format has a validation top-1 of %.2f: %s, with %.2f, is kept", least, name, accuracies[name])
    return name


def _runtime(name: str) -> str:
    return "openvino" if name.endswith(IN_OPENVINO) else "onnxruntime"


def packed_network(cell: Cell, path: Path) -> nn.Module:
    """The packed network. One that files may not name (:mod:`kdq.models.table`) is built as the config says."""
    net = cell.net(cell.role)
    return load_packed(path, None if is_in_table(net) else build(net))


def calibration(cell: Cell) -> Iterator[Tensor]:
    """The normalised batches that ``deploy.calibration_images`` asks for, without their labels."""
    batches = cell.images.calibration(cell.cfg.deploy.calibration_images, cell.cfg.quant.seed, torch.device("cpu"))
    return (images for images, _ in batches)


def compare(row: Row, name: str, accuracy: float, path: Path) -> None:
    """Warn if the top-1 ``accuracy`` of the exported model is not the row's."""
    # Graphs of float arithmetic leave activations float, so with rounded ones only INT8 computes what was evaluated.
    if not name.startswith("int8") and row.act_bits < 32:
        return
    if abs(accuracy - row.top1) > TOLERANCE:
        log.warning(
            "THE EXPORTED MODEL DIFFERS: %s has a top-1 of %.2f in ONNX %s, %.2f as evaluated",
            path.stem, accuracy, name, row.top1,
        )  # fmt: skip
