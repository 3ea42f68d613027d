"""Bytes of packed networks against float ones and against bits x weights / 8, and how long packing takes.

    python -m kdq.bench pack [kdq overrides]

With ``paths.output_dir`` the JSON goes to its ``report/bench_pack.json``. The networks are untrained and rounded to the
nearest levels: neither sizes nor times depend on the values.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kdq.bench.common import NETS, show, timed
from kdq.models.build import build
from kdq.quant.config import QuantConfig
from kdq.quant.layers import quantizable_layers
from kdq.quant.network import quantize_widths
from kdq.quant.packing.file import load_packed, save_packed
from kdq.utils.config import compose
from kdq.utils.files import write_text

COLUMNS = ("network", "bits", "avg_bits", "bytes", "of_float", "ideal_bytes", "overhead", "save_s", "load_s")


def main(arguments: list[str]) -> None:
    folder = Path(compose(arguments).paths.output_dir)
    rows = [row for name in NETS for row in measure(name)]
    show("packed bytes; overhead over avg_bits x weights / 8 in %; seconds to save and to load", COLUMNS, rows, ".3f")
    write_text(folder / "report" / "bench_pack.json", json.dumps(rows, indent=1))


def measure(name: str, repeats: int = 3) -> list[dict[str, Any]]:
    """One row for every width, and for every third layer at 2, 4 and 8 bits; times are the least of ``repeats``."""
    torch.manual_seed(0)
    network = build(NETS[name]).eval()
    mixed = {layer: (2, 4, 8)[index % 3] for index, layer in enumerate(quantizable_layers(network))}
    widths: dict[str, Any] = {"2": 2, "3": 3, "4": 4, "8": 8, "2/4/8": mixed}
    images = [torch.randn(4, 3, 16, 16)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.kdq"
        save_file(network.state_dict(), path)
        float_bytes = path.stat().st_size
        for dtype in (None, "bf16"):
            config = QuantConfig(solver="rtn", float_dtype=dtype)
            versions = quantize_widths(network, images, list(widths.values()), config)
            for width, (version, report) in zip(widths, versions, strict=True):
                save_s = min(timed(partial(save_packed, version, path))[1] for _ in range(repeats))
                load_s = min(timed(partial(load_packed, path))[1] for _ in range(repeats))
                size, ideal = path.stat().st_size, report.weight_bits_total / 8
                label = width if dtype is None else f"{width} + {dtype}"
                overhead = 100 * (size / ideal - 1)
                values = (name, label, report.avg_bits, size, size / float_bytes, round(ideal), overhead)
                rows.append(dict(zip(COLUMNS, (*values, save_s, load_s), strict=True)))
    return rows
