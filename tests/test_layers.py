"""Which module may know which: read from the import statements, those inside functions too."""

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
    "kdq.distill.feature_losses",
    "kdq.distill.logit_losses",
    "kdq.distill.layers",
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
def imports(module: str) -> frozenset[str]:
    """The modules that a module imports; ``from a import b`` is ``a.b`` where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
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


#: The floors of the house, from the top; a room imports from those below its own.
FLOORS = (
    {"cli"},
    {"sweep"},
    {"stages"},
    {"deploy", "train", "report", "tracking"},
    {"distill"},
    {"quant", "data", "records"},
    {"models"},
    {"utils"},
)
#: The rooms that may import a framework.
MAY_IMPORT = {
    "hydra": {"cli", "sweep", "stages", "train", "tracking", "utils"},
    "omegaconf": {"cli", "sweep", "stages", "records", "utils"},
    "lightning": {"stages", "train", "tracking", "quant", "distill", "data"},
    "wandb": {"cli", "tracking"},
}


def room_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else "kdq"


def test_every_import_of_another_room_points_down() -> None:
    """Those for types only count; benches are no part of the house, and ``kdq`` itself names what a library offers."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert {room_of(module) for module in MODULES} == {*floor, "kdq", "__main__", "bench"}
    found = {
        f"{module} -> {name}"
        for module in MODULES
        for name in imports(module)
        if room_of(module) in floor and name.partition(".")[0] == "kdq" and room_of(name) != room_of(module)
        if floor.get(room_of(name), -1) <= floor[room_of(module)]
    }
    assert not found


def test_few_modules_stand_in_the_root() -> None:
    assert len(list((ROOT / "kdq").glob("*.py"))) <= 4


@pytest.mark.parametrize("framework", MAY_IMPORT)
def test_frameworks_stay_in_their_rooms(framework: str) -> None:
    rooms = {
        room_of(module)
        for module in MODULES
        if any(name.partition(".")[0] == framework for name in imports(module)) and room_of(module) != "bench"
    }
    assert rooms <= MAY_IMPORT[framework]


def test_imports_make_no_circle() -> None:
    """Neither at the top of a module, nor inside its functions, nor for types only."""
    graph = {module: {name for name in imports(module) if name in MODULES} - {module} for module in MODULES}
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
        *(
            "FitNets",
            "AT",
            "SP",
            "RKD",
            "PKT",
            "NST",
            "VID",
            "ReviewKD",
            "OFD",
            "SimKD",
            "BYOT",
            "CTKD",
            "DIST",
            "NKD",
            "TTM",
            "RLD",
            "TfKD",
        ),
        *("QAD", "QAT", "Terms", "CRD", "MLKD"),
        "DistillationModule",
        "TeacherStudent",
        "FeatureMethod",
        "TrainConfig",
    ),
    "kdq.distill.losses": ("soft_cross_entropy", "distillation_kl", "decoupled_kl", "standardized"),
    "kdq.distill.logit_losses": (
        *("correlation_losses", "level_losses", "normalized_losses", "transformed_kl", "refined_losses", "designed_kl"),
    ),
    "kdq.distill.feature_losses": (
        *("hint_loss", "attention_loss", "similarity_loss", "relation_losses", "pkt_loss"),
        *("gaussian_loss", "selectivity_loss", "hierarchical_loss", "margin_loss"),
    ),
    "kdq.quant.callback": ("PostTrainingQuantization",),
    "kdq.quant.config": ("QuantConfig",),
    "kdq.quant.fake": ("fake_quantized", "FakeQuantize"),
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
