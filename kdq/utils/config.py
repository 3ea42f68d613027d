"""The config as Hydra composes it, outside of its application too, and as plain values."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

_PACKAGE = Path(__file__).resolve().parent.parent
_CHECKOUT = _PACKAGE.parent / "conf"
#: The folder of configs: conf/ of a checkout, the copy inside the package once installed.
CONFIG_PATH = str(_CHECKOUT if (_CHECKOUT / "config.yaml").is_file() else _PACKAGE / "conf")


def choices(group: str) -> list[str]:
    """The names that ``group=NAME`` may give.

    >>> choices("tune")
    ['none', 'qad', 'qat']
    """
    return sorted(path.stem for path in Path(CONFIG_PATH, group).glob("*.yaml"))


def compose(overrides: list[str], *defaults: str) -> Any:
    """The config as ``kdq`` would have it with these overrides, outside of a Hydra application; they may replace the
    ``defaults``."""
    with hydra.initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return hydra.compose("config", [*defaults, *overrides])


def plain(config: Any) -> Any:
    """A config node as dicts, lists and values, with its interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
