"""Progress bars: lively in a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(title: str, total: int | None, unit: str) -> tqdm[Any]:
    """A bar on stderr that disappears when it is closed."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc=title, total=total, unit=unit, leave=False, mininterval=interval, dynamic_ncols=True)
