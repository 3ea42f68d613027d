"""What a config may hold, and what is said of everything else; nothing is trained."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import OmegaConf

import kdq.cli.app  # noqa: F401  the resolvers of conf/
from kdq.stages.cell import Cell
from kdq.stages.check import check_config
from kdq.sweep.plan import make_plan
from kdq.utils.config import CONFIG_PATH, compose
from kdq.utils.errors import KdqError
from kdq.utils.messages import MOVED, describe


class Rates(LearningRateMonitor):
    """Somebody's own."""


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (Path(CONFIG_PATH) / group).glob("*.yaml"))


GROUPS = ("method", "quant", "tune", "deploy", "trainer", "callbacks", "logger", "experiment", "size", "data")
FOLDERS = ("image_folder", "photographs")  # whose classes are counted
NAMELESS = ("custom", "torchvision", "timm")  # which network is for the user to say
CHOICES = [f"{group}={name}" for group in GROUPS for name in choices(group) if name not in FOLDERS]
CHOICES += [
    f"model@{role}={name}" for role in ("teacher", "student") for name in choices("model") if name not in NAMELESS
]
CHOICES += [
    "model@teacher=torchvision teacher.name=swin_t teacher.weights=imagenet",
    "model@student=timm student.name=x",
]
CHOICES += ["recipe@student.recipe=multistep", "callbacks=[early_stopping,lr_monitor]"]


@pytest.mark.parametrize("choice", CHOICES)
def test_everything_that_conf_holds_has_a_reader(choice: str) -> None:
    # The number of classes of an image folder is read from the folder, that of shards is for the user to say.
    asked = any(name in choice for name in ("study", "jpeg", "webdataset"))
    check_config(compose([*choice.split(), *(["data.num_classes=10"] if asked else [])]))


UNREAD = [
    (["+trainer.max_epoch=2"], r"trainer.max_epoch is no flag .*did you mean max_epochs"),
    (["+callbacks.x=3"], r"callbacks.x=3 is no callback: give callbacks.x._target_="),
    (["+callbacks.x.patience=3"], r"callbacks.x=.* is no callback"),
    (["callbacks=early_stopping", "+callbacks.early_stopping.patienc=3"], r"did you mean callbacks.*.patience\?"),
    (["+teacher.foo=1"], r"unknown option teacher.foo; valid here: name, net, recipe, weights, seed"),
    (["+data.crop=3"], r"unknown option data.crop; valid here: name, source"),
    (
        ["data=photographs", "data.num_classes=2", "data.root=x", "+data.augment.flipp=true"],
        r"unknown option data.augment.flipp",
    ),
    (["+data.augment.flipp=true"], r"did you mean data.augment.flip\?"),
    (["+data.source.folder=3"], r"unknown option data.source.folder"),
    (["++quant.refne=3"], r"did you mean quant.refine\?"),
    (["quant=none", "++quant.refne=3"], r"did you mean quant.refine\?"),
    (["quant=greedy", "+quant.search.avg_bit=3"], r"did you mean quant.search.avg_bits\?"),
    (["quant=spfq", "+quant.solver.sed=3"], r"did you mean quant.solver.seed\?"),
    (["+method.alhpa=1"], r"did you mean method.alpha\?"),
    (["tune=qad", "+tune.alhpa=1"], r"did you mean tune.alpha\?"),
    (["tune=qat", "+tune.teacher=self"], r"unknown option tune.teacher"),
    (["+tune.alhpa=1"], r"did you mean tune.alpha\?"),
    (["tune=qad", "tune.images=few"], r"tune.images"),
    (["+method.peer.seed=1"], r"unknown option method.peer"),
    (["~method._target_"], r"method._target_ is missing in this config: give \+method._target_="),
    (["~quant.seed"], r"quant.seed is missing in this config"),
    (["~quant.bits"], r"quant.bits is missing in this config"),
    (["~tune.name"], r"tune.name is missing in this config"),
    (["+method.seed=3"], r"unknown option method.seed; valid here: _target_, alpha, temperature, standardize$"),
    (["+method.num_classes=3"], r"there is no option method.num_classes: give data.num_classes or"),
    (["method=teacher", "tune=qad", "+tune.config.lr=1"], r"unknown option tune.config; valid here: _target_, alpha"),
    (["method=dml", "+method.peer.sed=1"], r"did you mean method.peer.seed\?"),
    (["method=dml", "+method.peer2={name: x, net: ${student.net}, sed: 1}"], r"did you mean method.peer2.seed\?"),
    (["method=teacher", "+method.alpha=1"], r"unknown option method.alpha"),
    (["method=teacher", "+student.net.dept=1"], r"did you mean student.net.depth\?"),
    (["+student.recipe.warm_up=1"], r"did you mean student.recipe.warmup\?"),
    (["+kdq.debgu=1"], r"did you mean kdq.debug\?"),
    (["+paths.out=x"], r"unknown option paths.out"),
    (["+deploy.runs=3"], r"deploy.runs: give deploy=onnx first"),
    (["+deploy.runs=3", "+deploy.batch=4"], r"deploy.runs: give deploy=onnx first"),
    (["deploy=onnx", "~deploy.runs"], r"deploy.runs is missing in this config: give \+deploy.runs="),
    (["deploy=onnx", "+deploy.tolerance=1"], r"deploy.runtimes is missing in this config"),
    (["+mehtod=vkd"], r"did you mean method\?"),
    (["~data.val_fraction"], r"data.val_fraction is missing in this config: give \+data.val_fraction="),
]
WRONG = [
    (["seed=9223372036854775807"], r"seed=9223372036854775807 must be a whole number from 0 to 2147483647"),
    (["student.seed=2147483648"], r"^student.seed=2147483648 must be"),
    (["quant.seed=true"], r"quant.seed=True must be"),
    (["data.split_seed=-1"], r"data.split_seed=-1 must be"),
    (["method=dml", "method.peer.seed=-4"], r"method.peer.seed=-4 must be"),
    (["trainer.profiler=nonsense"], r"trainer.profiler='nonsense' is unknown: use one of null, simple, advanced"),
    (["trainer.profiler=true"], r"trainer.profiler=True is unknown"),
    (["callbacks=lr_monitor", "logger=none"], r"callbacks.lr_monitor logs, and logger=none takes nothing"),
    (["+callbacks.mine._target_=tests.stages.test_check.Rates", "logger=none"], r"callbacks.mine logs, and"),
    (["data.augment.flip=off"], r"data.augment.flip='off' must be true or false"),
    (["data.mean=0.5"], r"data.mean=0.5 must be a list or null"),
    (["data.mean=[a]"], r"data.mean\[0\]='a' must be a number"),
    (["data.augment.pad=99999999999"], r"pad=99999999999 is too large"),
    (["student.recipe.lr=inf"], r"student.recipe.lr=inf must be a finite number"),
    (["teacher.recipe.lr=nan"], r"teacher.recipe.lr=nan must be a finite number"),
    (["teacher.recipe.epochs=2.5"], r"teacher.recipe.epochs=2.5 must be a whole number"),
    (["kdq.debug=yes_please"], r"kdq.debug='yes_please' must be true or false"),
    (["student.recipe=multistep"], r"recipe is chosen with recipe@student.recipe=multistep"),
    (["data.augment=none"], r"data.augment=none has options of its own: data.augment.pad"),
]


@pytest.mark.parametrize(("overrides", "answer"), [*UNREAD, *WRONG])
def test_a_key_that_nobody_reads_and_a_wrong_value_are_refused(overrides: list[str], answer: str) -> None:
    with pytest.raises(KdqError, match=answer) as caught:
        Cell(compose(overrides))
    assert "\n" not in str(caught.value)


VALUES = [
    (["method=at", "trainer.compile=true"], r"AT looks inside of its networks.* trainer.compile=false"),
    (["method=byot", "trainer.compile=true"], r"BYOT looks inside"),
    (["method=terms", "+method@method.terms.at=at", "trainer.compile=true"], r"Terms looks inside"),
    (["method=vkd", "method.alpha=5"], r"method.alpha=5 must be a number from 0 to 1"),
    (["method=dkd", "method.alpha=x"], r"method.alpha='x' must be a number"),
    (["method=published_vkd", "method.mended=typo"], r"'typo' is unknown: use one of"),
    (["method=vkd", "method.standardize=maybe"], r"method.standardize='maybe' must be true or false"),
    (["method=dml", "method.standardize=1"], r"method.standardize=1 must be true or false"),
    (["method=at", "method.standardize=null"], r"method.standardize=None must be true or false"),
    (["method=mixup", "method.per_sample=some"], r"method.per_sample='some' must be true or false"),
    (["method=ttm", "method.weighted=3"], r"method.weighted=3 must be true or false"),
    (["method=teacher", "tune=qad", "tune.learn_scales=all"], r"tune.learn_scales='all' must be true or false"),
    (["method=fitnets", "method.student_layers=[layr2]"], r"no layer 'layr2' \(did you mean layer2"),
    (["method=fitnets", "method.teacher_layers=layer2"], r"method.teacher_layers=layer2 must be a list: \[layer2\]"),
    (["method=dml", "method.schedule=slow"], r"method.schedule='slow' is unknown"),
    (["method=terms", "+method@method.terms.vkd=vkd", "method.terms.vkd.alpha=-1"], r"method.alpha=-1 must be"),
    (["method=teacher", "tune=qad", "tune.alpha=2"], r"tune.alpha=2 must be"),
    (["method=teacher", "tune=qat", "tune.batchnorm=off"], r"tune.batchnorm='off' is unknown"),
]


@pytest.mark.parametrize(("overrides", "answer"), VALUES)
def test_a_value_that_a_method_refuses_stops_the_plan(overrides: list[str], answer: str, tmp_path: Path) -> None:
    small = ["data=digits", f"paths.output_dir={tmp_path}", "quant=rtn", "quant.bits=4", *overrides]
    plan = make_plan([tuple(small)], lambda overrides: compose(list(overrides)), tmp_path)
    assert re.search(answer, plan.impossible[0][1])
    assert (plan.jobs, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize("method", [name for name in choices("method") if name not in ("teacher", "terms")])
def test_what_conf_says_of_a_method_makes_its_module(method: str, tmp_path: Path) -> None:
    for tune in ("none", "qad"):
        overrides = ("data=digits", f"method={method}", f"tune={tune}", "quant=rtn", f"paths.output_dir={tmp_path}")
        plan = make_plan([overrides], lambda overrides: compose(list(overrides)), tmp_path)
        assert plan.jobs, plan.impossible


def test_a_network_of_one_s_own_need_not_take_the_classes() -> None:
    own = ["model@student=custom", "student.name=own", "student.net._target_=torch.nn.Identity"]
    check_config(compose(own))
    check_config(compose([*own, "student.net._target_=torch.nn.ReLU"]))
    with pytest.raises(KdqError, match=r"did you mean student.net.inplace\?"):
        check_config(compose([*own, "student.net._target_=torch.nn.ReLU", "+student.net.inplaec=true"]))


def test_a_sweep_launches_nothing_for_them(tmp_path: Path) -> None:
    cells = [("method=baseline", "+data.crop=3"), ("method=teacher", "+callbacks.x=1")]
    plan = make_plan(cells, lambda overrides: compose(list(overrides)), tmp_path)
    assert plan.impossible[0][1].startswith("unknown option data.crop")
    assert (plan.jobs, len(plan.impossible)) == ([], 2)


def test_a_key_of_one_s_own_is_read_where_a_value_refers_to_it() -> None:
    check_config(compose(["+mine=4", "student.recipe.epochs=${mine}"]))
    check_config(compose(["+student.half=8", "student.net.depth=${..half}"]))
    with pytest.raises(KdqError, match="unknown option mine"):
        check_config(compose(["+mine=4", "student.recipe.epochs=${seed}"]))


#: What people write, with ``+`` or without, and the option that it should name.
POINTERS = {
    "lr=0.1": "teacher.recipe.lr or student.recipe.lr",
    "student.lr=0.1": "give student.recipe.lr$",
    "optimizer.lr=0.1": "teacher.recipe.lr or student.recipe.lr",
    "epochs=2": "teacher.recipe.epochs or student.recipe.epochs",
    "recipe.epochs=2": "teacher.recipe",
    "max_epochs=2": "trainer.max_epochs",
    "batch_size=2": "student.recipe.batch_size",
    "ckpt_path=x": "resumes by itself; it starts from student.weights",
    "debug=true": "kdq.debug",
    "seed_everything=1": "give seed",
    "exclude=[fc]": "quant.keep_float",
    "quant.exclude=[fc]": "quant.keep_float",
    "quant.images=1": "quant.calibration_images",
    "bits=3": "quant.bits",
    "scheduler.name=cosine": "student.recipe.schedule",
    "output_dir=x": "paths.output_dir",
}


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("word", POINTERS)
def test_habits_are_told_where_their_option_is(word: str, plus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kdq", plus + word])
    with pytest.raises(Exception) as caught:  # noqa: PT011  Hydra's, or kdq's own
        Cell(compose([plus + word]))
    assert re.search(POINTERS[word], describe(caught.value))


def test_every_pointer_leads_to_an_option_that_exists() -> None:
    config: Any = compose(["quant=greedy", "deploy=onnx"])
    for text in MOVED.values():
        for path in re.findall(r"(?:teacher|student|quant|trainer|deploy)\.[\w.]+\w", text):
            assert OmegaConf.select(config, path, default="none") != "none", path


def kdq_says(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "kdq", *arguments], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_a_folder_of_one_s_own_configs_composes(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir(parents=True)
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /method: baseline\nteacher: {recipe: {epochs: 7}}\n"
    )
    mine = (f"--config-dir={tmp_path}", "experiment=mine")
    assert "epochs: 7" in kdq_says(*mine, "--cfg", "job", "--package", "teacher.recipe")
    assert re.search(r"experiment: .*\bmine\b.*\bquickstart\b", kdq_says(*mine, "--help"))


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--help"], r"method: .*baseline.*dkd.*vkd"),
        (["--info", "defaults"], r"recipe/one_cycle +\| teacher.recipe"),
        (["--version"], r"^kdq \d+\.\d+"),
    ],
)
def test_the_config_is_browsed_without_torch(arguments: list[str], answer: str) -> None:
    program = "import atexit, sys, kdq.cli.app as app; "
    program += "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); app.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    assert re.search(answer, done.stdout)
    assert done.stderr == "False\n"
