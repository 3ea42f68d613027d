"""What is made with code of one's own is made anew when that code changes."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

from kdq.records.user_code import user_code
from kdq.stages.asked import row_keys
from kdq.stages.cell import Cell
from kdq.stages.train import planned
from kdq.utils.config import compose
from tests.stages.test_train import SMALL

NET = "import kdq.models\ndef net(**options): return kdq.models.CifarResNet(**options)\n"
CALLBACK = "import lightning\nclass Mine(lightning.Callback): pass\n"
SOLVER = "from kdq.quant.solvers.rtn import rtn\nmine = rtn\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules: ``own_net``, ``own_callback``, and ``own_solver`` in a package."""
    folder = tmp_path / "code"
    (folder / "own_package").mkdir(parents=True)
    (folder / "own_net.py").write_text(NET)
    (folder / "own_callback.py").write_text(CALLBACK)
    (folder / "own_package" / "__init__.py").touch()
    (folder / "own_package" / "own_solver.py").write_text(SOLVER)
    monkeypatch.syspath_prepend(folder)
    yield folder  # type: ignore[misc]
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_only_files_of_ones_own_count(own: Path) -> None:
    digest = hashlib.sha256(NET.encode()).hexdigest()
    found = user_code({"net": {"_target_": "own_net.net"}, "more": [{"_target_": "own_net.Class.make"}]})
    assert found == {"code": {"own_net": digest}}
    found = user_code([{"_target_": "hydra.utils.get_method", "path": "own_package.own_solver.mine"}])
    assert list(found["code"]) == ["own_package.own_solver"]
    installed = (
        "torchvision.models.resnet18",
        "kdq.distill.CrossEntropy",
        "json.loads",
        "len",
        "nowhere.at.all",
    )
    assert user_code(*({"_target_": name} for name in installed), None, 3, "own_net.net", os.fspath(own)) == {}


def test_models_and_rows_change_with_the_code_that_they_call(own: Path, tmp_path: Path) -> None:
    solver = "quant.solver={_target_: hydra.utils.get_method, path: own_package.own_solver.mine}"
    asked = [
        "method=baseline",
        "student.net._target_=own_net.net",
        "+callbacks.mine._target_=own_callback.Mine",
        solver,
        "quant.bits=2",
        f"paths.output_dir={tmp_path}",
    ]
    asked += [override for override in SMALL if override != "quant=none"]

    def keys() -> tuple[str, str]:
        made = Cell(compose(asked))
        model = planned(made)
        return model.key, row_keys(made, model)["2"]

    first = keys()
    assert keys() == first
    (own / "own_package" / "own_solver.py").write_text(SOLVER + "# other\n")
    second = keys()
    assert second[0] == first[0]
    assert second[1] != first[1]
    (own / "own_net.py").write_text(NET + "# other\n")
    third = keys()
    assert third[0] != first[0]
    assert third[1] != second[1]
    (own / "own_callback.py").write_text(CALLBACK + "# other\n")
    assert keys()[0] != third[0]
