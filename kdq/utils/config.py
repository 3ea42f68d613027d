"""The config as Hydra composes it, outside of its application too, and as plain values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

_CHECKOUT = Path(__file__).resolve().parent.parent.parent / "conf"
#: The repository's conf/ in a checkout, the copy inside the package once installed.
CONFIG_PATH = str(_CHECKOUT) if (_CHECKOUT / "config.yaml").is_file() else "pkg://kdq.conf"


def compose(overrides: list[str], *defaults: str) -> Any:
    """The config as ``kdq`` would have it with these overrides, outside of a Hydra application.

    Args:
        defaults: overrides that the given ones may replace.
    """
    overrides = [*defaults, *overrides]
    if os.path.isabs(CONFIG_PATH):
        with hydra.initialize_config_dir(CONFIG_PATH, version_base="1.3"):
            return hydra.compose("config", overrides)
    with hydra.initialize_config_module(CONFIG_PATH.removeprefix("pkg://"), version_base="1.3"):
        return hydra.compose("config", overrides)


def plain(config: Any) -> Any:
    """A config node as dicts, lists and values, with its interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
