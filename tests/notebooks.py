"""What the notebooks say: their text, and the files that they write."""

import json
from functools import cache
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


@cache
def _cells(name: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((NOTEBOOKS / name).read_text())["cells"]
    return cells


def text(name: str) -> str:
    """The Markdown of a notebook."""
    return "\n\n".join("".join(cell["source"]) for cell in _cells(name) if cell["cell_type"] == "markdown")


def files(name: str) -> dict[str, str]:
    """The files that a notebook writes with ``%%writefile``."""
    sources = ["".join(cell["source"]) for cell in _cells(name) if cell["cell_type"] == "code"]
    written = (source.partition("\n") for source in sources if source.startswith("%%writefile "))
    return {head.split()[1]: body + "\n" for head, _, body in written}
