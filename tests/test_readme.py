"""Every command, table and code block of README.md and CONTRIBUTING.md holds what it promises."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn

import kdq
from kdq.models.build import build
from kdq.quant.solvers.alphabets import uniform
from kdq.records.rows import read_rows
from kdq.utils.config import compose

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text())
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.strip().splitlines()
]
#: The table of config groups: name of the group, its choices, an example.
GROUPS = re.findall(r"^\| (`[\w@./`, ]+`) \| (`[^|]+`[^|]*) \| `(\w[^`]+)`", README, re.M)


def words(line: str) -> list[str]:
    """A shell line's words without its comment, what follows ``&&`` only, and without variables set before."""
    found = shlex.split(line, comments=True)
    if "&&" in found:
        found = found[len(found) - found[::-1].index("&&") :]
    return list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), found))


def check(overrides: list[str]) -> None:
    """Compose the config of every value of each override (of all at once, the shortest list repeated)."""
    overrides = [override for override in overrides if override != "..."]
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = []
    for override, text in zip(parsed, overrides, strict=True):
        sweep = override.is_sweep_override()
        key = text.partition("=")[0]
        choices.append([f"{key}={value}" for value in override.sweep_string_iterator()] if sweep else [text])
    for turn in range(max(map(len, choices), default=1)):
        compose([values[turn % len(values)] for values in choices if "hydra.launcher." not in values[0]])


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.match(r"(\S*/)?kdq$", words(line)[0])])
def test_a_kdq_command_composes(line: str) -> None:
    if "--config-dir" not in line:  # that one is run below
        check([word for word in words(line)[1:] if word != "-m"])


def test_the_commands_are_all_known() -> None:
    """What other commands the pages name exist, and so do their options."""
    for line in COMMANDS:
        name, *arguments = words(line)
        if name in ("kdq-report", "kdq-export", "kdq-wandb"):
            for option in (word for word in arguments if word.startswith("--")):
                assert f"{option}" in helped(name, *([arguments[0]] if name == "kdq-wandb" else [])), line
        else:
            assert Path(name).name in ("kdq", "pip", "pytest", "wandb"), line
    assert {words(line)[0] for line in COMMANDS} >= {"kdq", "kdq-report", "kdq-export", "kdq-wandb", "wandb"}


@cache
def helped(name: str, *command: str) -> str:
    module = {"kdq-report": "kdq.cli.report", "kdq-export": "kdq.cli.export", "kdq-wandb": "kdq.cli.wandb"}[name]
    code = f"import sys; from {module} import main; sys.argv[0] = {name!r}; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_the_table_of_groups_names_all_choices() -> None:
    seen = set()
    for names, choices, example in GROUPS:
        group = re.findall(r"`(\w+)", names)[0]
        if not (ROOT / "conf" / group).is_dir() or group == "hydra":
            continue
        seen.add(group)
        files = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert set(re.findall(r"`(\w+)`", choices)) == files, group
        check(shlex.split(example))
    assert seen == {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra", "__pycache__"}


def test_the_tables_of_methods_and_quantizers_are_complete() -> None:
    cells = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", README, re.M))))
    for group in ("method", "quant"):
        missing = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} - cells
        assert missing <= {"none", *(f"published_{part}" for part in ("levels", "stride", "share", "images"))}


def test_files_that_it_links_to_exist() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_library_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = README.split("## As a library")[1].split("```python\n")[1].split("```")[0]
    model = build({"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 4, "width": 0.25})
    batch = torch.randn(8, 3, 8, 8)
    scope = {"model": model.eval(), "calibration_batches": [batch]}
    exec(code, scope)
    wanted = scope["quantized"](batch)
    assert torch.equal(scope["same"](batch), wanted)
    assert torch.equal(scope["small"](batch), wanted)


def own_files(folder: Path) -> None:
    found = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", README, re.S)
    assert [name for name, _ in found] == ["mine.py", "conf/method/cosine.yaml", "conf/quant/sigma_delta.yaml"]
    for name, text in found:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_ones_own_method_and_solver(tmp_path: Path) -> None:
    """As README shows them, by its command, small."""
    own_files(tmp_path)
    line = README.split("<!-- own -->\n```bash\n")[1].split("\n")[0]
    arguments = [*words(line)[1:], "size=smoke", "logger=none"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])}
    run = [sys.executable, "-c", "from kdq.cli.app import main; main()", *arguments]
    subprocess.run(run, cwd=tmp_path, env=environ, check=True, timeout=280, capture_output=True)
    rows = read_rows(tmp_path / "outputs" / "rows")
    cells = set(itertools.product(("cosine", "vkd"), ("sigma_delta", "gpfq"), (2, 4)))
    assert {(row.method, row.quantizer, row.bits) for row in rows} == cells
    del environ["PYTHONPATH"]
    run[-len(arguments) :] = ["--config-dir", "conf", "method=cosine", "size=smoke", "logger=none"]
    lost = subprocess.run(
        run, cwd=tmp_path, env={**environ, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "PYTHONSAFEPATH": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert lost.stderr.splitlines()[-1].startswith("kdq: there is no module mine; if it is yours")


def test_ones_own_solver_does_what_it_says(tmp_path: Path) -> None:
    """First-order sigma-delta keeps every running sum of errors within half a step."""
    own_files(tmp_path)
    scope: dict = {}
    exec((tmp_path / "mine.py").read_text(), scope)
    layer = nn.Linear(40, 3)
    alphabet = uniform(2 * layer.weight.detach(), 6)  # room beyond the largest weight
    chosen = scope["sigma_delta"](layer.weight.detach(), None, None, alphabet)
    lost = (layer.weight.detach() - chosen).cumsum(-1).abs()
    assert (lost <= alphabet.scale / 2 + 1e-6).all()
    assert (lost > 0).any()


def test_the_version_is_the_same_everywhere() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited is not None
    assert cited[1] == kdq.__version__
    assert f"\n## {kdq.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
