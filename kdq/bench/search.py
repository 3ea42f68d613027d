"""Bit search on real models: greedy, exact and sort-once against uniform widths, in no more bytes.

    python -m kdq.bench search [kdq overrides] [bench.avg_bits=2.5,3] [bench.seeds=0,1,2]
        [bench.how=sensitivity_once,exact,greedy]

Uniform widths of so many bits on average are tried first; the size of their packed file is the budget of the others.
What the searches of a model ask for alike is measured once: all of a search's evaluations are counted, but its seconds
are only those that it took after the earlier ones.
The overrides name the model as ``kdq`` takes them; it is trained if the store does not hold it. With several seeds the
last table has means, and what each way gains over uniform widths of the same model: mean and standard deviation.
"""

import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from kdq.bench.common import show, split_options, timed
from kdq.quant.bitsearch.bank import fill_bank, packed_size
from kdq.quant.bitsearch.config import SearchConfig
from kdq.quant.bitsearch.mixed import search_bits
from kdq.quant.bitsearch.trace import Assignment
from kdq.quant.layers import quantizable_layers, weight_of
from kdq.quant.network import quantize
from kdq.stages.asked import quant_config
from kdq.stages.cell import Cell
from kdq.stages.train import float_model
from kdq.train.evaluate import evaluate
from kdq.utils.config import compose, plain
from kdq.utils.files import write_text

COLUMNS = ("seed", "budget", "how", "avg_bits", "bytes", "val_top1", "test_top1", "evaluations", "seconds")
MEANS = ("avg_bits", "bytes", "val_top1", "test_top1", "evaluations", "seconds")


def main(arguments: list[str]) -> None:
    """Print the tables and write the rows as JSON to ``report/bench_search_<method>.json`` below the output folder."""
    own, overrides = split_options(arguments, avg_bits="2.5,3", seeds="0", how="sensitivity_once,exact,greedy")
    averages = [float(value) for value in own["avg_bits"].split(",")]
    ways = own["how"].split(",")
    rows = []
    for seed in own["seeds"].split(","):
        cell = Cell(compose([*overrides, f"seed={seed}"], "quant=greedy"))
        rows += [{"seed": int(seed), **row} for row in compare(cell, averages, ways)]
        title = f"{cell.cfg.data.name}, {cell.cfg.method.name}, {cell.cfg[cell.role].name}"
        show(title, COLUMNS, rows, ".2f")
        path = cell.output / "report" / f"bench_search_{cell.cfg.method.name}.json"
        write_text(path, json.dumps(rows, indent=1))
    means = _means(rows)
    show(title, tuple(means[0]), means, ".2f")


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every budget and way; a way's gain is over uniform widths of the same seed."""
    found = []
    for budget, how in dict.fromkeys((row["budget"], row["how"]) for row in rows):
        mine = [row for row in rows if (row["budget"], row["how"]) == (budget, how)]
        base = {row["seed"]: row for row in rows if (row["budget"], row["how"]) == (budget, "uniform")}
        mean: dict[str, Any] = {"budget": budget, "how": how}
        mean |= {column: statistics.fmean(row[column] for row in mine) for column in MEANS}
        for part in ("val_top1", "test_top1"):
            gains = [row[part] - base[row["seed"]][part] for row in mine]
            spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
            mean[f"{part}_gain"] = f"{statistics.fmean(gains):+.2f} ± {spread:.2f}"
        found.append(mean)
    return found


def compare(cell: Cell, averages: list[float], ways: list[str]) -> list[dict[str, Any]]:
    """One row for every average and every way to spend its bytes, uniform widths first."""
    cfg, device = cell.cfg, cell.device
    network = cell.network(cell.role, float_model(cell)).to(device)
    calibration = list(cell.images.calibration(cfg.quant.calibration_images, cfg.quant.seed, device))
    config, asked = quant_config(cfg.quant), plain(cfg.quant.search) | {"avg_bits": None, "max_drop": None}
    layers = quantizable_layers(network, config.keep_float)
    bank = fill_bank(network, calibration, sorted(set(asked["candidates"])), config)
    rows = []
    validation, test = (cell.images.evaluation(part, device) for part in ("val", "test"))

    def add(budget: str, how: str, version: Any, report: Any, evaluations: int, seconds: float) -> None:
        top1 = (evaluate(version, batches, cfg.data.num_classes)["top1"] for batches in (validation, test))
        values = (budget, how, report.avg_bits, packed_size(version), *top1, evaluations, seconds)
        rows.append(dict(zip(COLUMNS[1:], values, strict=True)))

    with tempfile.TemporaryDirectory() as folder:
        for average in averages:
            bits, budget = _leading(network, layers, average), f"{average:g} bits"
            (version, report), seconds = timed(partial(quantize, network, calibration, bits, config))
            add(budget, "uniform", version, report, 0, seconds)
            size, trace = rows[-1]["bytes"], Path(folder) / "trace.json"
            for method in ways:
                search = SearchConfig(**(asked | {"size_bytes": size, "method": method}))
                found = search_bits(network, calibration, validation, search, config, bank=bank, trace=trace)
                seconds = bank.seconds + found.seconds
                add(budget, method, found.network, found.report, found.found.evaluations, seconds)
    return rows


def _leading(network: Any, layers: list[str], average: float) -> Assignment:
    """The whole number of bits below ``average`` for every layer, and one more for the first layers as far as the
    average allows: what one writes down without measuring anything."""
    sizes = {name: weight_of(network, name).numel() for name in layers}
    bits = dict.fromkeys(layers, int(average))
    spare = (average - int(average)) * sum(sizes.values())
    for name in layers:
        if sizes[name] > spare:
            break
        bits[name] += 1
        spare -= sizes[name]
    return bits
