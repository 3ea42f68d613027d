"""A model's accuracy as a function of its bytes: what is measured, and what lies between."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Curve:
    """A model's widths by size, for each of its seeds.

    Accuracies are as measured, also where a larger file is worse: taking the best so far would let the test set select.
    """

    sizes: np.ndarray  # (k,) bytes, increasing; of each width, the mean over seeds (which are a few bytes apart)
    top1: np.ndarray  # (seeds, k) percent
    seeds: tuple[int, ...]

    def at(self, size: float) -> pd.Series:
        """Accuracies by seed, linear in the logarithm of the bytes between measured sizes; NaN outside them: nothing is
        extrapolated."""
        x, knots = np.log(size), np.log(self.sizes)
        return pd.Series([np.interp(x, knots, top1, left=np.nan, right=np.nan) for top1 in self.top1], self.seeds)


def curve(model: pd.DataFrame) -> Curve | None:
    """The curve of one model under one quantizer, from its lines of :func:`kdq.report.cells.by_seed`: its widths, and
    the float model as the largest file. None where no size and accuracy is known.

    Means compare like with like: as many seeds as share two widths count, and the widths that they share. A tuned
    network is measured where it was tuned, and its float model is another's.
    """
    model = model[(model["size_bytes"] > 0) & np.isfinite(model["top1"])]
    if model.empty:
        return None
    widths: dict[Any, set[float]] = model.groupby("seed")["width"].agg(set).to_dict()
    enough = min(2, max(map(len, widths.values())))
    while len(shared := set.intersection(*widths.values())) < enough:
        del widths[min(widths, key=lambda seed: (len(widths[seed]), -seed))]
    chosen = model[model["seed"].isin(widths) & model["width"].isin(shared)]
    top1 = chosen.pivot(index="seed", columns="width", values="top1")
    sizes = chosen.groupby("width")["size_bytes"].mean()
    whole = chosen.groupby("seed")[["float_bytes", "top1_float"]].mean()
    known = (whole["float_bytes"] > 0).all() and np.isfinite(whole["top1_float"]).all()
    if known and (chosen["tune"] == "").all():
        top1[math.inf] = whole["top1_float"]
        sizes = pd.concat([sizes, pd.Series({math.inf: whole["float_bytes"].mean()})])
    order = np.argsort(sizes.to_numpy(), kind="stable")
    increasing, values = sizes.to_numpy()[order], top1[sizes.index].to_numpy()[:, order]
    last = np.append(np.diff(increasing) > 0, True)  # of widths of one size the widest
    return Curve(increasing[last], values[:, last], tuple(sorted(map(int, widths))))


def shared_sizes(a: Curve, b: Curve) -> np.ndarray:
    """The sizes at which two curves are compared: every measured one of both, where both have an accuracy."""
    low, high = max(a.sizes[0], b.sizes[0]), min(a.sizes[-1], b.sizes[-1])
    sizes = np.unique(np.concatenate([a.sizes, b.sizes]))
    return sizes[(sizes >= low) & (sizes <= high)]
