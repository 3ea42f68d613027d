"""Every method in a stranger's script: his own loaders, Trainer, callbacks and loggers."""

import copy
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kdq.distill import BYOT, CRD, DKD, DML, VID, VKD, CrossEntropy, DistillationModule, Mixup, SimKD, TrainConfig
from kdq.distill.learner import MovingAverage
from kdq.utils.errors import KdqError
from tests.distill.small import in_two_processes, network

METHODS = (CrossEntropy, VKD, Mixup, DKD, DML, VID)  # the last one looks inside of the networks
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
SILENT: dict[str, Any] = QUIET | {"logger": False, "enable_checkpointing": False}


def foreign(seed: int) -> nn.Module:
    """Built by somebody else: with BatchNorm and dropout, whose modes matter."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * 36, 4))
    )


def make(kind: type[DistillationModule], build: Any = network, **options: Any) -> Any:
    others = {name: build(seed) for name, seed in (("teacher", 2), ("peer", 3)) if name in kind.takes}
    return kind(build(1), **others, num_classes=4, **options)


def loader(seed: int = 0, count: int = 96) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    return DataLoader(TensorDataset(images, labels), 16)


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("kind", METHODS)
def test_the_whole_script(kind: type[DistillationModule], ema: float | None, tmp_path: Path) -> None:
    """Fit, test the best checkpoint, predict, and load it again without another word."""
    module = make(kind, config=TrainConfig(lr=0.05, ema=ema))
    callbacks = [ModelCheckpoint(monitor="val/top1", mode="max"), EarlyStopping("val/loss"), LearningRateMonitor()]
    clipped = {} if kind is DML else {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    logger = CSVLogger(tmp_path)
    trainer = L.Trainer(
        **QUIET,
        max_epochs=2,
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
        **clipped,
    )
    trainer.fit(module, loader(), loader(1))
    (tested,) = trainer.test(module, loader(2), ckpt_path="best", verbose=False)
    logits = torch.cat(trainer.predict(module, loader(2)))  # type: ignore[arg-type]
    labels = loader(2).dataset.tensors[1]  # type: ignore[attr-defined]
    assert tested["test/top1"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert tested["test/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    logged = set(pd.read_csv(Path(logger.log_dir) / "metrics.csv").columns)
    assert {"train/loss", "train/ce", "train/top1", "val/top1", "val/loss", "test/top5", "test/ece"} <= logged
    loaded = kind.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    assert loaded.hparams["num_classes"] == 4
    assert loaded.config == module.config
    assert L.Trainer(**SILENT).test(loaded, loader(2), verbose=False) == [tested]


@pytest.mark.parametrize("kind", METHODS)
def test_forward_is_the_network_that_was_validated(kind: type[DistillationModule]) -> None:
    module = make(kind, config=TrainConfig(lr=0.05, ema=0.5))
    trainer = L.Trainer(**SILENT, max_epochs=2)
    trainer.fit(module, loader(), loader(1))
    module.eval()
    images, labels = loader(1).dataset.tensors  # type: ignore[attr-defined]
    top1 = float((module(images).argmax(1) == labels).float().mean())
    validated = [float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/top1")]
    assert top1 == pytest.approx(max(validated))


@pytest.mark.parametrize("kind", METHODS)
def test_a_module_is_fitted_validated_and_fitted_again(kind: type[DistillationModule]) -> None:
    """Under a Trainer that limits, profiles or overfits, too."""
    module = make(kind, build=foreign, config=TrainConfig(ema=0.5))
    for flags in (
        {"max_epochs": 1},
        {"fast_dev_run": True},
        {"max_epochs": 1, "overfit_batches": 2},
        {"max_epochs": 2, "limit_train_batches": 0.5, "limit_val_batches": 1, "profiler": "simple"},
        {"max_steps": 3},
    ):
        trainer = L.Trainer(**SILENT, **flags)  # type: ignore[arg-type]
        trainer.fit(module, loader(), loader(1))
        trainer.validate(module, loader(1), verbose=False)
        trainer.test(module, loader(1), verbose=False)


@pytest.mark.parametrize("kind", METHODS[:-1])
def test_compiled_networks_keep_the_names_of_their_weights(kind: type[DistillationModule]) -> None:
    module = make(kind, build=lambda seed: torch.compile(foreign(seed), backend="eager"))
    L.Trainer(**SILENT, max_epochs=1).fit(module, loader(), loader(1))
    assert set(module.state_dict()) == set(make(kind, build=foreign).state_dict())


def test_what_dml_cannot_take_from_a_trainer_says_where_it_goes() -> None:
    for flag, option in (("gradient_clip_val", "clip_grad=1.0"), ("accumulate_grad_batches", "accumulate=2")):
        value: Any = float(option.partition("=")[2]) if flag == "gradient_clip_val" else 2
        with pytest.raises(KdqError, match=f"config=TrainConfig\\({option}"):
            L.Trainer(**SILENT, max_epochs=1, **{flag: value}).fit(make(DML), loader(), loader(1))


def test_the_trainers_flags_do_what_the_config_does() -> None:
    """Clipping and accumulation by either are one training."""
    states = []
    for flags, config in (
        ({"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}, TrainConfig()),
        ({}, TrainConfig(clip_grad=0.1, accumulate=2)),
        ({}, TrainConfig()),
    ):
        module = make(VKD, config=config)
        L.Trainer(**SILENT, max_epochs=2, **flags).fit(module, loader(), loader(1))
        states.append(module.student.network.fc.weight.detach().clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    for flags, config in (
        ({"accumulate_grad_batches": 3}, TrainConfig(accumulate=2)),
        ({"gradient_clip_val": 0.2}, TrainConfig(clip_grad=0.1)),
    ):
        trainer = L.Trainer(**SILENT, max_epochs=1, **flags)
        with pytest.raises(KdqError, match="differ: give one of them"):
            trainer.fit(make(VKD, config=config), loader(), loader(1))
    trainer = L.Trainer(**SILENT, max_epochs=1)  # which is as it was afterwards
    for accumulate in (4, 2):
        trainer.fit(make(VKD, config=TrainConfig(accumulate=accumulate)), loader(), loader(1))
        assert trainer.accumulate_grad_batches == 1


def test_a_schedule_needs_an_end() -> None:
    with pytest.raises(KdqError, match="needs an end: give Trainer"):
        L.Trainer(**SILENT, max_epochs=-1).fit(make(CrossEntropy), loader(), loader(1))
    with pytest.raises(KdqError, match="VKD has no teacher"):
        L.Trainer(**SILENT, max_epochs=1).fit(VKD(network(1), num_classes=4), loader(), loader(1))


class Endless(IterableDataset[Any]):
    """The images of :func:`loader`, which does not say how many."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader().dataset)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [CrossEntropy, DML])
@pytest.mark.parametrize("epochs", [None, 3])
def test_data_without_a_length_are_as_good_where_steps_end_the_training(
    kind: Any, accumulate: int, epochs: int | None
) -> None:
    found = []
    for data in (loader(), DataLoader(Endless(), 16)):
        module, shares = make(kind, config=TrainConfig(accumulate=accumulate)), list[float]()
        ask = LambdaCallback(on_train_batch_end=lambda _, pl, out, batch, i, s=shares: s.append(pl.progress(i).share))
        steps = 8 // accumulate * len(module.learners)
        L.Trainer(**SILENT, callbacks=[ask], max_steps=steps, max_epochs=epochs).fit(module, data, loader(1))
        found.append((shares, module.student.network.fc.weight))
    assert found[0][0] == pytest.approx(found[1][0])
    assert len(found[1][0]) == 8
    assert torch.equal(found[0][1], found[1][1])


def test_data_without_a_length_tell_no_schedule_its_end() -> None:
    data = DataLoader(Endless(), 16)
    for kind in (CrossEntropy, DML):
        with pytest.raises(KdqError, match=r"needs an end: give Trainer.* max_steps for data without a length"):
            L.Trainer(**SILENT, max_epochs=1).fit(make(kind), data, loader(1))
        shares = list[float]()
        ask = LambdaCallback(on_train_batch_end=lambda _, pl, out, batch, i, s=shares: s.append(pl.progress(i).share))
        module = make(kind, config=TrainConfig(schedule="constant"))
        L.Trainer(**SILENT, max_epochs=2, callbacks=[ask]).fit(module, data, loader(1))
        assert shares == [0.0] * 6 + [0.5] * 6


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("kind", [VKD, VID])
def test_the_teacher_keeps_its_values_in_whatever_precision_the_student_is(kind: Any, precision: Any) -> None:
    module = make(kind)
    teacher = module.teacher.network
    before = copy.deepcopy(teacher.state_dict())
    L.Trainer(**SILENT, max_epochs=1, precision=precision).fit(module, loader())
    after = teacher.state_dict()
    assert all(value.dtype == after[name].dtype and value.equal(after[name]) for name, value in before.items())
    images = loader().dataset.tensors[0].to(module.dtype)  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(module.teacher(images), copy.deepcopy(teacher).to(module.dtype)(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_is_one_of_tied_weights_and_of_16_bits_too(dtype: torch.dtype) -> None:
    """Moved once an update, by steps as small as they are, also after it was saved and loaded in between."""
    one, other = (nn.Linear(3, 3, dtype=dtype) for _ in range(2))
    other.weight = one.weight
    network = nn.Sequential(one, other)
    average, expected = MovingAverage(network, 0.999), one.weight.detach().double()
    with torch.no_grad():
        one.weight += 1
    for update in range(9000, 9100):
        average.updates = update
        average.update(network)
        expected = expected.lerp(one.weight.detach().double(), 1e-3)
        if update == 9050:
            stored, average = average.state_dict(), MovingAverage(network, 0.999)
            average.load_state_dict(stored)
    found: Any = average.network
    torch.testing.assert_close((average.exact or [found[0].weight])[0], expected.float())
    torch.testing.assert_close(found[0].weight, expected.to(dtype))
    assert found[1].weight is found[0].weight


def test_a_module_that_lightning_s_command_line_made_is_loaded_without_it(tmp_path: Path) -> None:
    given = {"num_classes": 4, "alpha": 0.7, "_class_path": "kdq.distill.VKD"}
    with _given_hyperparameters_context(given, "lightning.pytorch.cli.instantiate_module"):
        module = make(VKD, alpha=0.7)
    trainer = L.Trainer(**SILENT, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert dict(VKD.load_from_checkpoint(tmp_path / "a.ckpt").hparams) == dict(make(VKD, alpha=0.7).hparams)


@pytest.mark.parametrize("kind", [VID, BYOT, SimKD, CRD])
def test_callbacks_that_copy_the_module_want_its_parts_first(kind: Any) -> None:
    images, labels = loader().dataset.tensors  # type: ignore[attr-defined]
    data = DataLoader(TensorDataset(images, labels, torch.arange(96)), 16)
    module = make(kind)
    calls = {"connect(images)": lambda: module.connect(images)}
    for call, run in (calls | ({"remember(96)": lambda: module.remember(96)} if kind is CRD else {})).items():
        with pytest.raises(KdqError, match=re.escape(f"call its {call} before fit")):
            L.Trainer(**SILENT, max_epochs=1, callbacks=[EMAWeightAveraging()]).fit(module, data)
        run()
    L.Trainer(**SILENT, max_epochs=1, callbacks=[EMAWeightAveraging()]).fit(module, data)


@pytest.mark.parametrize("kind", METHODS)
def test_labels_that_are_probabilities_are_refused(kind: Any) -> None:
    images, labels = loader().dataset.tensors  # type: ignore[attr-defined]
    data = DataLoader(TensorDataset(images, nn.functional.one_hot(labels, 4).float()), 16)
    with pytest.raises(KdqError, match="labels must be class indices, not probabilities"):
        L.Trainer(**SILENT, max_epochs=1).fit(make(kind), data)


def test_ones_own_optimizers_without_schedules() -> None:
    class Mine(DML):
        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(learner.network.parameters(), lr=1e-3) for learner in self.learners.values()]

    module = make(Mine)
    before = copy.deepcopy(module.peer.network.state_dict())
    L.Trainer(**SILENT, max_epochs=1).fit(module, loader())
    assert not torch.equal(before["fc.weight"], module.peer.network.fc.weight)


@pytest.mark.parametrize("count", [0, 1])
def test_two_networks_want_two_optimizers(count: int) -> None:
    class Mine(DML):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3) if count else None

    with pytest.raises(KdqError, match="an optimizer for each of the 2 networks"):
        L.Trainer(**SILENT, max_epochs=1).fit(make(Mine), loader())


def test_ones_own_optimizer() -> None:
    class Mine(VKD):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.student.network.parameters(), lr=1e-3)

    module = make(Mine)
    before = copy.deepcopy(module.student.network.state_dict())
    trainer = L.Trainer(**SILENT, max_epochs=1)
    trainer.fit(module, loader(), loader(1))
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert not torch.equal(before["fc.weight"], module.student.network.fc.weight)


def test_a_foreign_network_is_given_or_its_file_trusted(tmp_path: Path) -> None:
    module = make(VKD, build=foreign)
    trainer = L.Trainer(**QUIET, logger=False, max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(module, loader(), loader(1))
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    trainer.test(module, loader(1), ckpt_path=path, verbose=False)  # weights-only, Lightning's default
    with pytest.raises(KdqError, match=r"student=network\), or weights_only=False"):
        VKD.load_from_checkpoint(path)
    for loaded in (
        VKD.load_from_checkpoint(path, student=foreign(7)),
        VKD.load_from_checkpoint(path, weights_only=False),
    ):
        images = torch.randn(4, 1, 8, 8)
        assert torch.equal(loaded.eval()(images), module.eval()(images))
    for given in ({"student": foreign(7)}, {"weights_only": False}):
        again = VKD.load_from_checkpoint(path, **given, teacher=foreign(2))
        L.Trainer(**SILENT, max_epochs=1).fit(again, loader(), loader(1))


def _trained(rank: int, folder: str) -> None:
    for kind in METHODS:
        module = make(kind, config=TrainConfig(ema=0.5))
        trainer = L.Trainer(**SILENT, max_epochs=2, devices=2, strategy="ddp")
        trainer.fit(module, loader(), loader(1))
        (tested,) = trainer.test(module, loader(2), verbose=False)
        torch.save((dict(module.eval_network.state_dict()), tested), f"{folder}/{kind.__name__}{rank}.pt")


def test_two_processes_end_with_one_network(tmp_path: Path) -> None:
    in_two_processes(_trained, str(tmp_path))
    for kind in METHODS:
        left = (torch.load(tmp_path / f"{kind.__name__}{rank}.pt") for rank in range(2))
        (state, tested), (other, other_tested) = left
        assert tested == other_tested, kind
        assert state.keys() == other.keys()
        for name, tensor in other.items():
            assert not isinstance(tensor, Tensor) or torch.equal(state[name], tensor), (kind, name)


@pytest.mark.parametrize("kind", METHODS)
def test_options_are_arguments_of_what_makes_the_module(kind: Any) -> None:
    """jsonargparse, which LightningCLI parses with, asks for the signature of ``__new__``, and sees no other."""
    taken = list(inspect.signature(kind.__new__).parameters)[1:]
    assert taken == list(inspect.signature(kind).parameters)
    module = make(kind)
    assert set(taken) >= module.hparams.keys() - {"config"}
    assert type(copy.deepcopy(module)) is kind
    with pytest.raises(TypeError, match="unexpected keyword argument 'alhpa'"):
        make(kind, alhpa=1)


def test_lightning_s_command_line_sets_options(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    net = '{"class_path": "kdq.models.CifarResNet", "init_args": {"depth": 8, "num_classes": 4}}'
    asked = [f"--model.student={net}", f"--model.teacher={net}", "--model.num_classes=4", "--model.alpha=0.5"]
    module = LightningCLI(VKD, run=False, save_config_callback=None, args=[*asked, "--model.config.lr=0.2"]).model
    assert (module.alpha, module.temperature, module.config.lr) == (0.5, 4.0, 0.2)
