"""A network of one's own, outside of the modules that stored files may name."""

from __future__ import annotations

from torch import nn


def small(num_classes: int) -> nn.Module:
    """For gray images of any size."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(32, num_classes),
    )
