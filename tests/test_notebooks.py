"""The notebooks run from top to bottom, in an empty folder, and are kept without outputs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from kdq.records.rows import Row, read_rows, write_row
from tests.notebooks import NAMES, NOTEBOOKS, files, text
from tests.report.conftest import make_row


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
        NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
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
    assert "digits at equal bytes (gpfq, 2 seeds): " in _text(outputs)
    assert _figures(outputs) == 1


def test_library(run: Callable[[str], list[Any]]) -> None:
    outputs = run("library.ipynb")
    accuracies = [float(line.split(":")[1].split("%")[0]) for line in _text(outputs).splitlines() if "%" in line]
    assert len(accuracies) == 4
    assert min(accuracies[0], accuracies[2]) > 80  # float, and gpfq with 3 bits
    assert _figures(outputs) == 1


def _rows(tmp_path: Path, name: str) -> list[Row]:
    return read_rows(tmp_path / "outputs" / name / "rows")


def test_grid(run: Callable[[str], list[Any]], tmp_path: Path) -> None:
    said = _text(run("grid.ipynb"))
    cells = set(product(("teacher", "baseline", "vkd"), (2, 4, 8)))
    assert {(row.method, row.bits) for row in _rows(tmp_path, "grid")} == cells
    assert "9 asked for, 0 there" in said  # the plan
    assert "12 asked for, 9 there" in said  # of a method more
    assert "exit code 0" in said  # kdq-report


def test_own_network(run: Callable[[str], list[Any]], tmp_path: Path) -> None:
    run("own_network.ipynb")
    rows = _rows(tmp_path, "own_network")
    assert {(row.data, row.method, row.arch, row.bits) for row in rows} == {
        ("numerals", method, arch, bits)
        for (method, arch), bits in product((("teacher", "squeeze"), ("vkd", "squeeze_small")), (2, 4))
    }
    assert all(row.top1_float > 90 for row in rows if row.method == "teacher")  # the weights that were given


def test_own_method(run: Callable[[str], list[Any]], tmp_path: Path) -> None:
    run("own_method.ipynb")
    cells = set(product(("cosine", "vkd"), ("sigma_delta", "gpfq"), (2, 4)))
    assert {(row.method, row.quantizer, row.bits) for row in _rows(tmp_path, "own_method")} == cells
    shown = text("own_method.ipynb").split("<!-- own -->\n```bash\n")[1].split("\n")[0]
    assert shown.removeprefix("PYTHONPATH=. kdq -m ") in (NOTEBOOKS / "own_method.ipynb").read_text().split("own = ")[1]


def test_a_method_that_python_does_not_find_is_said_in_one_line(tmp_path: Path) -> None:
    """As where PYTHONPATH was forgotten."""
    for name, content in files("own_method.ipynb").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    run = [sys.executable, "-c", "from kdq.cli.app import main; main()", "--config-dir", "conf", "method=cosine"]
    lost = subprocess.run(
        [*run, "size=smoke", "logger=none"], cwd=tmp_path, env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "there is no module mine; if it is yours" in lost.stderr.splitlines()[-1]
    assert "Traceback" not in lost.stderr


def test_lightning(run: Callable[[str], list[Any]]) -> None:
    said = _text(run("lightning.ipynb"))
    lines = (line.partition(":") for line in said.splitlines() if line.endswith("%"))
    accuracies = {name: float(value.strip(" %")) for name, _, value in lines}
    assert accuracies["4 bits"] > 80
    assert abs(accuracies["4 bits"] - accuracies["32 bits"]) < 5
    assert "quantized-searched.kdq" in said


def test_deploy(run: Callable[[str], list[Any]], tmp_path: Path) -> None:
    said = _text(run("deploy.ipynb"))
    (row,) = _rows(tmp_path, "deploy")
    assert row.top1_onnx_int8 == pytest.approx(row.top1, abs=2)
    assert said.split("is taken for a:")[1].split() == ["0"]


def test_wandb(run: Callable[[str], list[Any]], tmp_path: Path) -> None:
    said = _text(run("wandb.ipynb"))
    assert len(_rows(tmp_path, "wandb")) == 4
    for job in ("distill", "quantize", "report"):
        assert f"-{job}-" in said
    assert "Top-1 over packed bytes" in said


@pytest.mark.parametrize("name", NAMES)
def test_kept_without_outputs(name: str) -> None:
    source = (NOTEBOOKS / name).read_text()
    nbformat.validate(nbformat.reads(source, as_version=4))
    for cell in json.loads(source)["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
