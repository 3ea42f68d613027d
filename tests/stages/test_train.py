"""What a cell trains and what it takes from the store; where students start; which of two is published."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

import kdq.stages.train
from kdq.distill import CrossEntropy
from kdq.models import WhitenedNet
from kdq.stages.cell import Cell
from kdq.stages.pipeline import run
from kdq.stages.train import float_model, planned
from kdq.stages.training import TrainingSpec, check_fit
from kdq.train.fit import Best
from kdq.utils.config import compose
from kdq.utils.errors import KdqError

SMALL = [
    "data.train_limit=64",
    "model@teacher=resnet20",
    "teacher.net.width=0.25",
    "teacher.recipe.epochs=1",
    "student.net.depth=8",
    "student.net.width=0.25",
    "student.recipe.epochs=1",
    "trainer=cpu",
    "trainer.precision=32-true",
    "quant=none",
    "logger=none",
]


def cell(output: Path, *overrides: str) -> Cell:
    return Cell(compose([*SMALL, *overrides, f"paths.output_dir={output}"]))


def entries(output: Path) -> list[str]:
    return sorted(path.name[:-17] for path in (output / "store").glob("digits-*"))


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[TrainingSpec]:
    """The trainings that are run, in order."""
    seen: list[TrainingSpec] = []
    real = kdq.stages.train.run_training

    def record(
        cell: Cell, spec: TrainingSpec, work: Path
    ) -> AbstractContextManager[tuple[dict[str, Best], dict[str, Any]]]:
        seen.append(spec)
        return real(cell, spec, work)

    monkeypatch.setattr(kdq.stages.train, "run_training", record)
    return seen


def test_a_teacher_is_trained_once_for_all_methods(tmp_path: Path, specs: list[TrainingSpec]) -> None:
    for method in ("vkd", "mixup", "dkd", "vkd"):
        float_model(cell(tmp_path, f"method={method}"))
    assert [spec.label for spec in specs] == ["teacher", "vkd", "mixup", "dkd"]
    float_model(cell(tmp_path, "method=vkd", "method.standardize=true"))
    float_model(cell(tmp_path, "method=vkd", "student.recipe.ema=0.9"))
    assert [spec.label for spec in specs[4:]] == ["vkd", "vkd"]
    assert len(entries(tmp_path)) == 6


def test_one_model_under_two_names_is_made_once(tmp_path: Path, specs: list[TrainingSpec]) -> None:
    """The folder has the name that was there first; who needs the model finds it all the same."""
    same = ["teacher.net.depth=8", "teacher.net.width=0.25", "teacher.name=big", "student.name=small"]
    float_model(cell(tmp_path, "method=vkd", *same, "student.weights=baseline"))
    assert [spec.slug for spec in specs] == ["digits-baseline-small-s0", "digits-vkd-small-s0"]
    (entry,) = (tmp_path / "store").glob("digits-baseline-*")
    student, teacher = (specs[1].networks[name].weights for name in ("student", "teacher"))
    assert student == teacher == str(entry / "weights.safetensors")
    assert specs[1].inputs == [f"digits-baseline-small-s0:{entry.name[-16:]}"] * 2


def test_function_matching_is_a_preset(tmp_path: Path, specs: list[TrainingSpec]) -> None:
    float_model(cell(tmp_path, "method=mixup_fm", "student.recipe.epochs=1"))
    assert specs[-1].label == "mixup_fm"
    assert specs[-1].method["alpha"] == 1.0
    assert compose(["method=mixup_fm"]).student.recipe.epochs == 300


def test_students_start_where_they_are_told(tmp_path: Path, specs: list[TrainingSpec]) -> None:
    """With a learning rate of zero the trained weights are those of the start."""
    frozen = ["student.recipe.lr=0"]
    random = float_model(cell(tmp_path, "method=baseline", *frozen))
    other = float_model(cell(tmp_path, "method=baseline", "seed=3", *frozen))
    file = other.path / "weights.safetensors"
    from_file = float_model(cell(tmp_path, "method=baseline", f"student.weights={file}", *frozen))
    dml = float_model(cell(tmp_path, "method=dml", "method.weights=baseline", "method.peer.seed=3", *frozen))
    assert [spec.label for spec in specs] == ["baseline", "baseline", "baseline", "dml"]  # the stored one is reused
    starts = {name: network.build().state_dict() for name, network in specs[-1].networks.items()}
    for name, tensor in starts["student"].items():
        assert torch.equal(tensor, random.weights()[name])
        if name.endswith("conv1.weight"):
            assert torch.equal(starts["peer"][name], other.weights()[name])
            assert torch.equal(from_file.weights()[name], other.weights()[name])
    assert dml.metrics["learner"] in ("student", "peer")


def test_a_student_starts_from_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = resnet18().state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / ResNet18_Weights.DEFAULT.url.rpartition("/")[2])
    small = [override for override in SMALL if not override.startswith("student.net")]
    small += ["data.train_limit=8", "student.recipe.batch_size=4", "student.recipe.lr=0"]
    asked = ["model@student=resnet18", "method=baseline", "student.weights=imagenet"]
    cfg = compose([*small, *asked, f"paths.output_dir={tmp_path}"])
    entry = float_model(Cell(cfg))
    torch.testing.assert_close(entry.weights()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


@pytest.mark.parametrize(
    ("student", "peer", "winner"), [(0.9, 0.8, "student"), (0.8, 0.9, "peer"), (0.8, 0.8, "student")]
)
def test_the_better_student_of_dml_is_published(
    student: float, peer: float, winner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whatever architecture it is; the other one lies beside it, and the row names what was published."""

    @contextmanager
    def trained(cell: Cell, spec: TrainingSpec, work: Path) -> Iterator[tuple[dict[str, Best], dict[str, Any]]]:
        states = {name: network.build().state_dict() for name, network in spec.networks.items()}
        scores = {"student": student, "peer": peer, "peer2": 0.85}
        yield {name: Best(scores[name], 0, states[name]) for name in states}, {"train_seconds": 1.0}

    monkeypatch.setattr(kdq.stages.train, "run_training", trained)
    asked = cell(tmp_path, "method=dml", "+model@method.peer=resnet32", "method.peer.net.width=0.25")
    (row,) = run(asked.cfg)
    loser = "peer" if winner == "student" else "student"
    assert entries(tmp_path) == ["digits-dml-resnet20-s0", f"digits-dml-resnet20-s0-{loser}"]
    entry = float_model(asked)
    assert entry.metrics["learner"] == winner
    assert entry.metrics["val_top1"] == 100 * max(student, peer)
    assert entry.metrics[f"val_top1_{loser}"] == 100 * min(student, peer)
    assert row.arch == ("resnet20" if winner == "student" else "resnet32")


def test_the_best_of_three_students_of_dml_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its place: trained, quantized, packed and loaded by its own name."""
    nets = ["+model@method.peer=resnet32", "method.peer.net.width=0.25", "+model@method.peer2=wrn_16_1"]
    seeds = ["method.peer.seed=7", "+method.peer2.seed=9"]
    monkeypatch.setattr(kdq.stages.train, "ranked", lambda best: ["peer2", "student", "peer"])
    asked = cell(tmp_path, "method=dml", *nets, *seeds)
    (row,) = run(asked.cfg)
    entry = float_model(asked)
    assert (row.arch, entry.metrics["learner"]) == ("wrn_16_1", "peer2")
    assert {"val_top1_student", "val_top1_peer", "key_student", "key_peer"} <= set(entry.metrics)
    assert len(entries(tmp_path)) == 3
    assert type(kdq.load(tmp_path / row.artifact)).__name__ == "WideResNet"
    spec = planned(asked).training
    assert spec is not None
    assert {name: network.seed for name, network in spec.networks.items()} == {"student": 0, "peer": 7, "peer2": 9}
    again = cell(tmp_path, "method=dml", *nets)
    others = planned(again).training.networks  # type: ignore[union-attr]
    assert [others[name].seed for name in ("peer", "peer2")] == [1, 2]


def test_dml_trains_two_architectures_together(tmp_path: Path) -> None:
    entry = float_model(cell(tmp_path, "method=dml", "+model@method.peer=resnet20", "method.peer.net.width=0.5"))
    assert {"val_top1_peer", "val_top1_student"} & set(entry.metrics)


def test_two_equal_students_are_refused(tmp_path: Path) -> None:
    both = ["method.weights=baseline", "method.peer.weights=baseline"]
    float_model(cell(tmp_path, "method=dml", *both))  # the peer's baseline has the next seed
    with pytest.raises(KdqError, match="start from equal weights"):
        float_model(cell(tmp_path, "method=dml", *both, "method.peer.seed=0"))


def test_a_method_of_ones_own_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(KdqError, match="is not a kdq"):
        float_model(cell(tmp_path, "method=baseline", "method._target_=torch.nn.Linear"))
    with pytest.raises(KdqError, match=r"unknown option method.gamma"):
        float_model(cell(tmp_path, "method=baseline", "+method.gamma=1"))


@pytest.mark.parametrize(
    ("network", "what"),
    [(nn.Conv2d(1, 10, 3), r"values of shape \(1, 10, 6, 6\)"), (nn.LSTM(8, 10), "a tuple")],
)
def test_what_gives_no_logits_is_told_so(network: nn.Module, what: str) -> None:
    cell = SimpleNamespace(cfg=compose(["data=digits"]), shape=(1, 8, 8) if what[0] == "v" else (8, 8))
    with pytest.raises(KdqError, match=f"mine gives {what} for one image: it must give logits"):
        check_fit(cell, network, "mine")  # type: ignore[arg-type]


def test_a_network_that_begins_with_a_look_at_the_data_gets_one(tmp_path: Path) -> None:
    """Its first layer comes from the training images alone, and training leaves it as it is."""
    overrides = [f"paths.output_dir={tmp_path}", "trainer=cpu", "quant=none", "logger=none", "method=baseline"]
    overrides += [
        "data=cifar10",
        "data.source._target_=kdq.bench.loops.random_images",
        "~data.source.root",
        "~data.source.cache",
        "~data.source.split",
    ]
    overrides += ["+data.source.count=128", "model@student=whitened", "student.recipe.epochs=1"]
    made = Cell(compose(overrides))
    weights = float_model(made).weights()
    expected = WhitenedNet(10)
    expected.see(made.images.preprocess(made.images.set.train_images[made.images.split.train]))
    torch.testing.assert_close(weights["whiten.weight"], expected.whiten.weight.data)


def test_the_trainers_epochs_are_the_recipes(tmp_path: Path, specs: list[TrainingSpec]) -> None:
    """One thing under two names: the same model."""
    two = float_model(cell(tmp_path, "method=baseline", "student.recipe.epochs=2"))
    assert float_model(cell(tmp_path, "method=baseline", "trainer.max_epochs=2")).key == two.key
    clipped = float_model(cell(tmp_path, "method=baseline", "student.recipe.clip_grad=0.5"))
    assert float_model(cell(tmp_path, "method=baseline", "trainer.gradient_clip_val=0.5")).key == clipped.key
    assert len(specs) == 2
    assert two.metrics["epochs"] == 2


@pytest.mark.parametrize(
    ("override", "another"),
    [
        ("trainer.limit_train_batches=1", True),
        ("trainer.fast_dev_run=true", True),
        ("trainer.gradient_clip_algorithm=value", True),
        ("callbacks=early_stopping", True),
        ("trainer.profiler=simple", False),
        ("trainer.log_every_n_steps=1", False),
        ("trainer.enable_progress_bar=false", False),
    ],
)
def test_flags_that_change_the_weights_make_another_model(override: str, another: bool, tmp_path: Path) -> None:
    plain_key = planned(cell(tmp_path, "method=baseline")).key
    found = float_model(cell(tmp_path, "method=baseline", override))
    assert (found.key != plain_key) == another


def test_callbacks_of_ones_own(tmp_path: Path) -> None:
    """They are called, may end the training, and keep Lightning's checkpoints, which load without kdq's pipeline."""
    choice = "callbacks=[early_stopping,model_checkpoint,lr_monitor]"
    frozen = ["student.recipe.lr=0", "student.recipe.epochs=9", "callbacks.early_stopping.patience=2"]
    stopped = float_model(cell(tmp_path, "method=baseline", "logger=csv", choice, *frozen))
    assert stopped.metrics["epochs"] == 3
    (checkpoint,) = (tmp_path / "checkpoints").rglob("*.ckpt")
    assert checkpoint.parent.name == stopped.path.name
    loaded = CrossEntropy.load_from_checkpoint(checkpoint)
    assert torch.equal(loaded.eval_network.state_dict()["conv1.weight"].cpu(), stopped.weights()["conv1.weight"])
    with pytest.raises(KdqError, match=r"callbacks.mine is no Lightning callback"):
        float_model(cell(tmp_path, "method=baseline", "+callbacks.mine._target_=builtins.dict"))
    with pytest.raises(KdqError, match=r"callbacks.early_stopping.patence"):
        float_model(
            cell(tmp_path, "method=baseline", "callbacks=early_stopping", "+callbacks.early_stopping.patence=2")
        )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("student.net._target_=nowhere.net", "cannot import 'nowhere.net'"),
        ("teacher.weights=WRONG", "does not fit the network"),
        ("student.net.depth=9", "depth=9 is not a CIFAR ResNet"),
    ],
)
def test_networks_and_weights_are_checked_before_an_image_is_decoded(
    override: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "wrong.pt")
    monkeypatch.setattr(Cell, "images", property(lambda self: pytest.fail("images were read")))
    with pytest.raises(KdqError, match=says):
        planned(cell(tmp_path, "method=vkd", *override.replace("WRONG", str(tmp_path / "wrong.pt")).split()))
