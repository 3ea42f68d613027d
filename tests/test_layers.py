"""Which module may know which: read from the import statements, those inside functions too."""

from __future__ import annotations

import ast
import doctest
import importlib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Shells over the pure code: Lightning, Hydra, W&B.
FRAMEWORKS = {"lightning", "hydra", "omegaconf", "wandb", "hydra_plugins"}
#: Tensors in, tensors out.
PURE = (
    "kdq.quant",
    "kdq.distill.losses",
    "kdq.distill.progress",
    "kdq.data.augment",
    "kdq.data.loader",
    "kdq.data.source",
)
SHELLS = {"kdq.quant.callback", "kdq.quant.trainer"}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in (ROOT / "kdq").rglob("*.py") if "_hydra" not in file.parts}


@cache
def imports(module: str, top_level: bool = False) -> frozenset[str]:
    """The modules that a module imports; ``from a import b`` is ``a.b`` where that is a module."""
    tree = ast.parse(MODULES[module].read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.Lambda))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if top_level and id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return frozenset(found)


def reached(module: str) -> set[str]:
    """Everything that importing and using a module can import, through kdq's own modules."""
    seen, waiting = {module}, [module]
    while waiting:
        for name in imports(waiting.pop()):
            if name not in seen:
                seen.add(name)
                if name in MODULES:
                    waiting.append(name)
    return seen


def test_pure_code_knows_no_framework() -> None:
    pure = [
        module for module in MODULES if any(f"{module}.".startswith(f"{p}.") for p in PURE) and module not in SHELLS
    ]
    assert len(pure) > 30
    found = {
        f"{module} -> {name}" for module in pure for name in reached(module) if name.partition(".")[0] in FRAMEWORKS
    }
    assert not found


@pytest.mark.parametrize("name", sorted(name for name, file in MODULES.items() if ">>>" in file.read_text()))
def test_examples_in_docstrings_print_what_they_say(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


def test_imports_make_no_circle() -> None:
    graph = {module: {name for name in imports(module, top_level=True) if name in MODULES} for module in MODULES}
    graph = {module: needs - {module} for module, needs in graph.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_only_the_app_and_the_shells_know_hydra_s_application() -> None:
    """What the library offers works where Hydra's application never ran."""
    knowing = {module for module in MODULES if "hydra.main" in MODULES[module].read_text()}
    assert knowing == {"kdq.cli.app"}


#: What people call from their own code: each thing shows how.
SHOWN = {
    "kdq.distill": (
        "CrossEntropy",
        "VKD",
        "Mixup",
        "DKD",
        "DML",
        "DistillationModule",
        "TeacherStudent",
        "TrainConfig",
    ),
    "kdq.distill.losses": ("kd_loss", "dkd_loss", "mutual_loss", "soft_cross_entropy", "standardized"),
    "kdq.quant.callback": ("PostTrainingQuantization",),
    "kdq.quant.config": ("QuantConfig",),
    "kdq.quant.network": ("quantize",),
    "kdq.quant.solvers.alphabets": ("uniform", "symmetric", "asymmetric", "ternary", "paper"),
    "kdq.quant.solvers.rtn": ("rtn",),
    "kdq.quant.solvers.spfq": ("spfq",),
    "kdq.quant.solvers.qronos": ("qronos",),
    "kdq.quant.solvers.refine": ("refine",),
}


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in SHOWN.items() for name in names])
def test_what_people_call_has_an_example(module: str, name: str) -> None:
    assert ">>>" in (getattr(importlib.import_module(module), name).__doc__ or "")
