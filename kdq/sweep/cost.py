"""What a job costs, roughly: multiply-accumulate operations, which need no machine to be counted on."""

import json
from functools import lru_cache

import torch

from kdq.models.build import build
from kdq.quant.operations import multiply_adds
from kdq.stages.cell import Cell
from kdq.stages.train import Model


def model_work(cell: Cell, model: Model) -> float:
    """Work of training ``model``; 0 where it is unknown. A backward pass counts as two forward passes; frozen networks
    have none."""
    if model.training is None:
        return 0.0
    passes = len(cell.images.split.train) * model.training.recipe["epochs"]
    networks = model.training.networks.items()
    return passes * sum(
        (1 if name == "teacher" else 3) * _forward(json.dumps(net.net), cell.shape) for name, net in networks
    )


def row_work(cell: Cell, rows: int) -> float:
    """Work of quantizing one model to ``rows`` widths together and evaluating each; solvers come on top."""
    there, limit = len(cell.images.set.test_images), cell.cfg.data.test_limit
    tested = min(there, limit or there)
    calibrated = 0 if cell.cfg.quant.solver is None else cell.cfg.quant.calibration_images
    return (rows + 1) * (calibrated + tested) * _forward(json.dumps(cell.net(cell.role)), cell.shape)


@lru_cache(maxsize=64)
def _forward(net: str, image: tuple[int, int, int]) -> float:
    """Work of one image in one network, counted on shapes alone; 0 for a network that needs real numbers."""
    try:
        with torch.device("meta"):
            return float(multiply_adds(build(json.loads(net)), torch.zeros(1, *image)))
    except Exception:  # a network of the user's own may do anything; its own job will say what is wrong with it
        return 0.0
