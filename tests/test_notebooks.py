"""The notebooks run from top to bottom on a small result set, and are kept without outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from kdq.records.rows import write_row
from tests.report.conftest import make_row

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Execute a notebook as if it lay in ``tmp_path/notebooks`` and return its outputs."""
    # A kernel writes below the home folder; the user's is not ours.
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel shows figures itself

    def execute(name: str) -> list[Any]:
        folder = tmp_path / "notebooks"
        folder.mkdir()
        notebook = nbformat.read(shutil.copy(NOTEBOOKS / name, folder), as_version=4)
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
        return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]

    return execute


def _text(outputs: list[Any]) -> str:
    return "".join(output.get("text", "") for output in outputs)


def _figures(outputs: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_analysis(run: Callable[[str], list[Any]], tmp_path: Path) -> None:
    for method, arch, size in (("teacher", "resnet50", 4), ("baseline", "resnet18", 1), ("vkd", "resnet18", 1)):
        for bits in (2, 4):
            for seed in (0, 1):
                top1 = 90.0 + bits - (method == "baseline") + seed / 4
                values = {"method": method, "arch": arch, "bits": bits, "seed": seed, "top1": top1}
                write_row(tmp_path / "outputs" / "rows", make_row(**values, size_bytes=size * bits * 1000))
    outputs = run("analysis.ipynb")
    assert "12 rows" in _text(outputs)
    assert "Does quantizing a distilled student beat quantizing the teacher?" in _text(outputs)
    assert _figures(outputs) == 1


def test_library_tour(run: Callable[[str], list[Any]]) -> None:
    outputs = run("library_tour.ipynb")
    accuracies = [float(line.split(":")[1].split("%")[0]) for line in _text(outputs).splitlines() if "%" in line]
    assert len(accuracies) == 4
    assert min(accuracies[0], accuracies[2]) > 80  # float, and gpfq with 3 bits
    assert _figures(outputs) == 1


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_kept_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    nbformat.validate(nbformat.reads(path.read_text(), as_version=4))
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
