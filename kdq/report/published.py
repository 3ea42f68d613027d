"""The published study's numbers beside the cells that match them.

Its "b bits" are 2^b + 1 levels, which take b + 1 bits to store; its numbers are of one seed. A data set whose name
starts with the study's (``cifar10_jpeg``) is shown with a warning: other images.
"""

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from kdq.report.cells import float_model, records, series

COLUMNS = ["data", "method", "arch", "quantizer", "width", "top1", "published", "levels", "study_data", "study_arch"]


@cache
def study() -> dict[str, Any]:
    """The study this project starts from: top-1 by data set, method and bits, with its settings and claims."""
    return json.loads((files("kdq.report") / "published.json").read_text("utf-8"))


@cache
def distillation() -> dict[str, Any]:
    """Published float accuracies of CIFAR-100 students by method and pair of architectures."""
    return json.loads((files("kdq.report") / "published_distillation.json").read_text("utf-8"))


def beside(found: pd.DataFrame) -> pd.DataFrame:
    """Each cell (a line of :func:`kdq.report.cells.cells`) that the study has too: our mean ``top1``, the ``published``
    one and the ``levels`` behind it; float models have the width ``inf``."""
    lines = []
    for model, group in series(found[~found["searched"]]):
        known = study()["top1"].get(study_data(model[0]), {}).get(model[1], {})
        whole = float_model(group)
        source = (study_data(model[0]), study()["teacher" if whole["role"] == "teacher" else "student"]["arch"])
        widths = [(f"{cell.width:g}", cell) for cell in records(group)]
        lines += [
            (*model, cell.width, cell.top1, known[width], 2 ** int(width) + 1, *source)
            for width, cell in widths
            if width in known
        ]
        if "float" in known:
            lines.append((*model, math.inf, whole["top1_float"], known["float"], math.inf, *source))
    return pd.DataFrame(lines, columns=COLUMNS).sort_values(COLUMNS[:5])


def distilled_beside(found: pd.DataFrame) -> pd.DataFrame:
    """Float CIFAR-100 students whose architectures and method other repositories published."""
    names, pairs = {"vkd": "KD", "dkd": "DKD", "dist": "DIST"}, distillation()["pairs"]
    teachers = found[found["role"] == "teacher"].groupby("data")["arch"].agg(set)
    lines = []
    known = found[(found["data"] == "cifar100") & found["method"].isin(names)]
    for (data, method, arch), model in known.groupby(["data", "method", "arch"], sort=True):
        for teacher in sorted(teachers.get(data, ())):
            if f"{teacher}->{arch}" in pairs:
                value = distillation()[names[str(method)]][pairs.index(f"{teacher}->{arch}")]
                lines.append((data, method, arch, teacher, float_model(model)["top1_float"], value))
    return pd.DataFrame(lines, columns=["data", "method", "arch", "teacher", "top1_float", "published"])


def study_data(name: str) -> str:
    """The study's data set that ``name`` is or starts with (``cifar10_jpeg``), or nothing."""
    known = sorted(study()["top1"], key=len, reverse=True)
    return next((data for data in known if name == data or name.startswith((f"{data}_", f"{data}-"))), "")


def warnings(published: pd.DataFrame) -> list[str]:
    """What must be said beside the numbers of :func:`beside`."""
    if published.empty:
        return []
    said = [
        "Published: one seed; “b bits” are 2^b + 1 levels there and take b + 1 bits to store; here 2^b, "
        "but for the quantizer “published”, which has theirs."
    ]
    for data, known in records(published[["data", "study_data"]].drop_duplicates()):
        if data != known:
            said.append(f"{data} is not the study's {known}: other images, so the values are not comparable.")
    other = published[published["arch"] != published["study_arch"]][["arch", "study_arch"]].drop_duplicates()
    said += [f"{arch} stands where the study has {theirs}." for arch, theirs in records(other)]
    return said
