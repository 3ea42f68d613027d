"""The ``bench.*`` options of benchmarks whose other arguments are overrides of kdq's config."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def own_options(arguments: Sequence[str], **defaults: str) -> dict[str, str]:
    """The values of ``bench.NAME=VALUE``, by name; a name that is not among ``defaults`` ends the process."""
    given = dict(a.removeprefix("bench.").split("=", 1) for a in arguments if a.startswith("bench.") and "=" in a)
    if unknown := given.keys() - defaults:
        sys.exit(f"unknown: bench.{', bench.'.join(unknown)}; there are bench.{', bench.'.join(defaults)}")
    return defaults | given
