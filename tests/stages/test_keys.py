"""What the names of stored models and rows depend on: everything that their content does, and nothing else."""

from pathlib import Path

import pytest
import torch

from kdq.models.build import build
from kdq.stages.asked import row_keys
from kdq.stages.train import planned
from tests.stages.test_train import cell

#: A distilled student; mean and std are given, so that no other value is told by what is measured.
BASE = ["method=vkd", "quant=gpfq", "quant.bits=2", "data.mean=[0.3]", "data.std=[0.4]"]
MODEL = [
    *("data.mean=[0.31]", "data.std=[0.41]", "data.split_seed=1", "data.val_fraction=0.2", "data.train_limit=65"),
    *("data.augment.pad=2", "data.augment.flip=true", "data.augment.cutout=2"),
    *("student.net.width=0.5", "student.seed=1", "student.recipe.lr=0.02", "student.recipe.momentum=0.8"),
    *("student.recipe.weight_decay=0.1", "student.recipe.batch_size=32", "student.recipe.label_smoothing=0.1"),
    *("student.recipe.ema=0.9", "student.recipe.epochs=2", "teacher.net.width=0.5", "teacher.seed=1"),
    *("teacher.recipe.epochs=2", "method.alpha=0.5", "method.temperature=3", "trainer.precision=bf16-mixed"),
]
ROW = [
    *("data.name=other", "data.test_limit=50", "method.name=other", "quant.bits=3", "quant.seed=1"),
    *("quant.calibration_images=32", "quant.solver=rtn", "quant.alphabet=symmetric", "quant.refine=1"),
    *("quant.order=gram", "quant.scale=gram", "quant.correct=bias", "quant.keep_float=[fc]", "quant.act_bits=8"),
    *("quant.per_channel=false", "quant.first_last_bits=8", "quant.float_dtype=bf16", "trainer.limit_test_batches=1"),
]
NEITHER = [
    *("sweep=other", "kdq.debug=true", "trainer.threads=1", "logger=csv", "paths.data_dir=elsewhere"),
    *("trainer.check_val_every_n_epoch=1", "trainer.limit_train_batches=1.0", "trainer.max_steps=-1"),
]


def keys(output: Path, *overrides: str) -> tuple[str, str]:
    made = cell(output, *BASE, *overrides)
    model = planned(made)
    (row,) = row_keys(made, model).values()
    return model.key, row


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return keys(tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize(("override", "changed"), [(x, 2) for x in MODEL] + [(x, 1) for x in ROW])
def test_what_content_depends_on_is_in_its_key(
    override: str, changed: int, plain: tuple[str, str], tmp_path: Path
) -> None:
    found = keys(tmp_path, override)
    assert (found[0] != plain[0], found[1] != plain[1]) == (changed == 2, True)


@pytest.mark.parametrize("override", NEITHER)
def test_nothing_else_is(override: str, plain: tuple[str, str], tmp_path: Path) -> None:
    assert keys(tmp_path, override) == plain


def test_the_order_of_a_search_s_candidates_is_none(tmp_path: Path) -> None:
    asked = [
        ["quant=greedy", "quant.bits=null", f"quant.search.candidates={bits}"]
        for bits in ("[2,4,8]", "[8,2,4,2]", "[2,3,8]")
    ]
    first, again, other = (keys(tmp_path, *each)[1] for each in asked)
    assert first == again != other


def test_a_trial_s_row_is_another_than_the_real_one(tmp_path: Path) -> None:
    """Also of a teacher from a file, whose weights depend on no flag."""
    start = ["method=teacher", "quant=none", "model@teacher=tiny"]
    torch.save(build(cell(tmp_path, *start).of_role("teacher")["net"]).state_dict(), tmp_path / "teacher.pt")
    start.append(f"teacher.weights={tmp_path / 'teacher.pt'}")
    made = [cell(tmp_path, *start, *more) for more in ([], ["trainer.limit_test_batches=1"])]
    models = [planned(each) for each in made]
    assert models[0].key == models[1].key
    assert len({key for pair in zip(made, models, strict=True) for key in row_keys(*pair).values()}) == 2


def test_an_augmentation_of_one_s_own_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for value in ("images", "255 - images"):
        text = (
            f"class Own:\n    def draw(self, *_): ...\n    def __call__(self, images, draws):\n        return {value}\n"
        )
        (tmp_path / "own_augmentation.py").write_text(text)
        found.append(keys(tmp_path, "~data.augment", "+data.augment={_target_: own_augmentation.Own}")[0])
    assert found[0] != found[1]
