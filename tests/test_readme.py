"""Every command, table and code block of README.md, CONTRIBUTING.md and the notebooks' text holds what it promises."""

import itertools
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import kdq
from kdq.models import CifarResNet
from kdq.utils.config import compose
from tests.notebooks import NAMES, text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}
PAGES |= {f"notebooks/{name}": text(name) for name in NAMES}
COMMANDS = [
    line
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.strip().splitlines()
]
SCRIPTS = ("kdq-report", "kdq-export", "kdq-wandb", "kdq-reproduce")
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
    for override, given in zip(parsed, overrides, strict=True):
        sweep = override.is_sweep_override()
        key = given.partition("=")[0]
        choices.append([f"{key}={value}" for value in override.sweep_string_iterator()] if sweep else [given])
    for turn in range(max(map(len, choices), default=1)):
        compose([values[turn % len(values)] for values in choices if "hydra.launcher." not in values[0]])


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.match(r"(\S*/)?kdq$", words(line)[0])])
def test_a_kdq_command_composes(line: str) -> None:
    if "--config-dir" not in line:  # that one is run below
        check([word for word in words(line)[1:] if word != "-m"])


def test_the_commands_of_the_reference_compose() -> None:
    """What made the published rows can be asked for by today's keys."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "outputs/reference/README.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if line.startswith("kdq ")]
    assert len(commands) > 4
    for line in commands:
        check([word for word in words(line)[1:] if word != "-m"])


def test_the_commands_are_all_known() -> None:
    """What other commands the pages name exist, and so do their options."""
    for line in COMMANDS:
        name, *arguments = words(line)
        if name in SCRIPTS:
            for option in (word for word in arguments if word.startswith("--")):
                assert f"{option}" in helped(name, *([arguments[0]] if name == "kdq-wandb" else [])), line
        else:
            assert Path(name).name in ("kdq", "pip", "pytest", "wandb"), line
    assert {words(line)[0] for line in COMMANDS} >= {"kdq", "wandb", *SCRIPTS}


@cache
def helped(name: str, *command: str) -> str:
    module = name.replace("-", ".cli.")
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
    cells = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", text("grid.ipynb"), re.M))))
    for group in ("method", "quant"):
        missing = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} - cells
        assert missing <= {"none", *(f"published_{part}" for part in ("levels", "stride", "share", "images"))}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_it_links_to_exist(page: str) -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target


def test_readme_lists_all_notebooks() -> None:
    assert set(re.findall(r"\(notebooks/([\w.]+)\)", README)) == set(NAMES)


def block(mark: str) -> str:
    """The Python code of README behind a mark, for a training of one epoch on the CPU."""
    code = README.split(f"<!-- {mark} -->\n```python\n")[1].split("```")[0]
    assert "max_epochs=30" in code
    return code.replace("max_epochs=30", "max_epochs=1, accelerator='cpu', enable_progress_bar=False")


class Mine(L.LightningModule):
    """Somebody's module."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.outputs = self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_lightning_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as they stand there: the second one tests the quantized network."""
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(10, (64,)))
    scope: dict[str, Any] = {f"{part}_loader": DataLoader(data, 16) for part in ("train", "val", "test")}
    scope |= {name: CifarResNet(8, num_classes=10, in_channels=1, width=0.25) for name in ("teacher", "student")}
    trained = scope["student"]
    exec(block("lightning"), scope)
    assert torch.equal(scope["module"].student.network.fc.weight, trained.fc.weight)
    scope["my_module"] = Mine()
    exec(block("callback"), scope)
    packed = kdq.load(scope["quantization"].files[4], network=Mine())
    assert scope["quantization"].result.report.avg_bits == 4
    with torch.no_grad():
        assert torch.equal(packed(data.tensors[0][-16:]), scope["my_module"].outputs)


def test_the_version_is_the_same_everywhere() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited is not None
    assert cited[1] == kdq.__version__
    assert f"\n## {kdq.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
