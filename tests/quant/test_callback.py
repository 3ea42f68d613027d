"""Quantization as callbacks of a Trainer: kdq's modules and foreign ones, in fit and in evaluations."""

import os
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import kdq
from kdq import KdqError
from kdq.data.images import Images
from kdq.data.module import ImageDataModule
from kdq.distill import DML, CrossEntropy, TrainConfig
from kdq.quant.callback import GreedyBitSearch, PostTrainingQuantization, QuantizationCallback
from kdq.quant.trainer import Loaders

CANDIDATES = [2, 3, 4, 8]


def backbone(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 64, 10))


class Foreign(L.LightningModule):
    """Somebody else's module."""

    def __init__(self, pick: Callable[[Any], tuple[Tensor, Tensor]] = lambda batch: (batch[0], batch[1])) -> None:
        super().__init__()
        self.backbone, self.pick, self.steps, self.seen = backbone(), pick, 0, list[Tensor]()
        self.save_hyperparameters({"data": Path("images")})  # nothing that torch reads weights-only

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        images, labels = self.pick(batch)
        return F.cross_entropy(self.backbone(images), labels)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = self.pick(batch)
        accuracy = (self.backbone(images).argmax(1) == labels).float().mean()
        self.log("val/acc", accuracy + (self.current_epoch == 1))  # the second of three epochs is made the best

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.backbone(self.pick(batch)[0]).clone())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.backbone(self.pick(batch)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def trainer_with(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    keep = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return L.Trainer(callbacks=list(callbacks), **({"enable_checkpointing": keep} | quiet | options))


@pytest.fixture(scope="module")
def data(images: Images) -> tuple[TensorDataset, TensorDataset]:
    inputs, labels = images.preprocess(images.set.train_images), images.set.train_labels
    return TensorDataset(inputs[:512], labels[:512]), TensorDataset(inputs[-200:], labels[-200:])


@pytest.fixture
def loaders(data: Any) -> tuple[DataLoader, DataLoader]:
    return DataLoader(data[0], 64, shuffle=True), DataLoader(data[1], 90)


def codes(network: nn.Module) -> dict[str, Tensor]:
    return {name: weight.codes for name, weight in network.quantized_weights.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_fit_ends_with_a_quantized_copy_of_the_best_weights(loaders: Any, data: Any, tmp_path: Path) -> None:
    module, kept = Foreign(), dict[int, dict[str, Tensor]]()

    class Remember(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            kept[trainer.current_epoch] = state(pl_module)

    quantization = PostTrainingQuantization([2, 4], network="backbone", solver="rtn")
    search = GreedyBitSearch(avg_bits=3.0, candidates=CANDIDATES, network="backbone", path=None)
    trainer = trainer_with(
        quantization,
        search,
        Remember(),
        ModelCheckpoint(tmp_path / "last"),  # monitors nothing
        ModelCheckpoint("memory://best", monitor="val/acc", mode="max"),  # of no folder of this machine
        max_epochs=3,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, *loaders)
    best = backbone()
    best.load_state_dict({name.removeprefix("backbone."): value for name, value in kept[1].items()})
    for bits in (2, 4):
        expected, _ = kdq.quantize(best, [data[1].tensors[0]], bits, solver="rtn")
        assert_equal(codes(quantization.results[bits].network), codes(expected))
        stored = kdq.load(quantization.files[bits], backbone())
        assert torch.equal(stored(data[1].tensors[0]), expected(data[1].tensors[0]))
    assert [path.name for path in quantization.files.values()] == ["quantized-2bit.kdq", "quantized-4bit.kdq"]
    assert search.result.report.avg_bits <= 3.0
    assert torch.equal(search.result.network.state_dict()["0.bias"], kept[1]["backbone.0.bias"])
    assert_equal(state(module), kept[2])


def test_the_module_itself_is_not_copied_when_a_fit_ends(loaders: Any, tmp_path: Path) -> None:
    """It may hold what cannot be, and leave a network out of its checkpoints."""

    class Holding(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.unlabelled, self.losses = backbone(1), (x for x in range(3)), dict[str, Tensor]()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.losses["ce"] = super().training_step(batch, batch_idx)
            return self.losses["ce"]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            kept = {name: x for name, x in checkpoint["state_dict"].items() if not name.startswith("teacher.")}
            checkpoint["state_dict"] = kept

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] |= {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}

    module, best = Holding(), ModelCheckpoint(tmp_path, monitor="val/acc", mode="max")
    quantization, kept = PostTrainingQuantization(4, network="backbone", path=None), list[dict[str, Tensor]]()
    keep = LambdaCallback(on_train_epoch_end=lambda _, module: kept.append(state(module)))
    trainer_with(quantization, keep, best, max_epochs=3).fit(module, *loaders)
    assert torch.equal(quantization.result.network.state_dict()["0.bias"], kept[1]["backbone.0.bias"])
    assert_equal(state(module), kept[2])


def test_a_quantization_that_fails_leaves_the_last_weights(loaders: Any, tmp_path: Path) -> None:
    class Failing(PostTrainingQuantization):
        def quantized(self, network: nn.Module, loaders: Loaders) -> Any:
            assert torch.equal(network[0].bias, kept[1]["backbone.0.bias"])
            raise RuntimeError("no")

    module, best, kept = Foreign(), ModelCheckpoint(tmp_path, monitor="val/acc", mode="max"), list[dict[str, Tensor]]()
    keep = LambdaCallback(on_train_epoch_end=lambda _, module: kept.append(state(module)))
    with pytest.raises(RuntimeError, match="no"):
        trainer_with(Failing(4, network="backbone"), keep, best, max_epochs=3).fit(module, *loaders)
    assert_equal(state(module), kept[2])


@pytest.mark.parametrize("first", [True, False])
def test_what_averages_weights_has_done_so_before_they_are_quantized(loaders: Any, first: bool) -> None:
    module, quantization = Foreign(), PostTrainingQuantization(4, network="backbone", path=None)
    callbacks = [quantization, EMAWeightAveraging(decay=0.9)]
    trainer_with(*callbacks[:: 1 if first else -1], max_epochs=1).fit(module, *loaders)
    assert torch.equal(quantization.result.network.state_dict()["0.bias"], module.backbone[0].bias)


def test_files_are_for_folders_of_this_machine(loaders: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"network": "backbone", "calibration": loaders[1]}
    module, folder = Foreign(), {"default_root_dir": "memory://bucket"}
    with pytest.raises(KdqError, match="not to memory://bucket: give path="):
        trainer_with(PostTrainingQuantization(4, **options), max_epochs=1, **folder).fit(module, *loaders)
    assert module.steps == 0
    for path in (None, tmp_path / "{bits}.kdq"):
        quantization = PostTrainingQuantization(4, path=path, **options)
        trainer_with(quantization, **folder).predict(Foreign(), loaders[1])
    assert quantization.files[4].is_file()


def test_a_training_is_the_same_with_and_without_callbacks(data: Any) -> None:
    """Checks at its start and searches at its end draw no number of the training's, and change no weight."""
    trained = []
    for callbacks in ([], [GreedyBitSearch(avg_bits=3, network="backbone", path=None)]):
        module = Foreign()
        loaders = DataLoader(data[0], 64, shuffle=True), DataLoader(data[1], 90, shuffle=True)
        L.seed_everything(3)
        trainer_with(*callbacks, max_epochs=2, num_sanity_val_steps=0).fit(module, *loaders)
        trained.append(state(module))
    assert_equal(*trained)


def test_a_pruned_network_is_quantized_after_its_training(loaders: Any) -> None:
    module = Foreign()
    prune.l1_unstructured(module.backbone[0], "weight", 0.5)
    quantization = PostTrainingQuantization(3, network="backbone", path=None, keep_float=["0"], calibration=loaders[1])
    trainer_with(quantization, max_epochs=1, limit_train_batches=2).fit(module, loaders[0])
    assert list(quantization.result.network.quantized_weights) == ["3"]


@pytest.mark.parametrize("act_bits", [None, 6])
def test_evaluations_run_the_quantized_network_and_leave_the_module_as_it_was(
    loaders: Any, data: Any, act_bits: int | None
) -> None:
    images, asked = data[1].tensors[0], list[str]()
    module = Foreign()
    before = state(module)
    quantization = PostTrainingQuantization(
        [2, 4], network="backbone", path=None, calibration=loaders[0], act_bits=act_bits, on_step=asked.append
    )
    trainer = trainer_with(quantization)
    with torch.no_grad():
        plain = module.backbone(images)
    for width in (4, None, 2):
        quantization.use(width)
        module.seen.clear()
        trainer.test(module, loaders[1], verbose=False)
        found = torch.cat([*module.seen])
        predicted = torch.cat(trainer.predict(module, loaders[1]))  # type: ignore[arg-type]
        assert torch.equal(found, predicted)
        with torch.no_grad():
            expected = plain if width is None else quantization.results[width].network(images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert width is None or not torch.allclose(found, plain, atol=1e-3)
        assert_equal(state(module), before)
        assert not any(layer._forward_pre_hooks for layer in module.backbone)
    made = [*quantization.results[2].network.state_dict().values(), *module.state_dict().values()]
    assert not any(value.is_inference() for value in made)
    assert asked == ["0", "3"]  # both widths in one pass, once
    trainer_with(max_epochs=1).fit(module, *loaders)  # no tensor of the loop's inference mode is left behind
    quantization.use(2)
    trainer.test(module, loaders[1], verbose=False)
    assert asked == ["0", "3"] * 2  # other weights


def test_a_compiled_network_rounds_its_activations_though_it_ran_without(loaders: Any, data: Any) -> None:
    module = Foreign()
    module.backbone.compile(backend="eager")
    quantization = PostTrainingQuantization(8, network="backbone", path=None, calibration=loaders[0], act_bits=2)
    trainer, loader = trainer_with(quantization), DataLoader(data[1], 100)
    for width in (None, 8, None, 8):
        quantization.use(width)
        predicted = torch.cat(trainer.predict(module, loader))  # type: ignore[arg-type]
        with torch.no_grad():
            expected = (module.backbone if width is None else quantization.result.network)._call_impl(
                data[1].tensors[0]
            )
        torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-5)


def test_validate_measures_the_quantized_network_and_a_fit_s_validation_the_float_one(loaders: Any) -> None:
    module, quantization = Foreign(), PostTrainingQuantization(2, network="backbone", path=None)
    seen: list[bool] = []
    module.backbone[0].register_forward_hook(lambda layer, *_: seen.append(len(layer.weight.unique()) <= 4 * 8))
    trainer = trainer_with(quantization, max_epochs=1)
    trainer.fit(module, *loaders)
    trained, seen[:] = state(module), seen[len(seen) :]
    assert not any(seen)
    trainer.validate(module, loaders[1], verbose=False)
    assert seen[-1]
    assert_equal(state(module), trained)


class Swapping(L.Callback):
    """Has weights of its own for evaluations, as callbacks that average weights do."""

    def __init__(self, value: float) -> None:
        self.weights = torch.full((8,), value)

    def swap(self, trainer: L.Trainer, module: Any) -> None:
        bias = module.backbone[0].bias.data
        self.weights, _ = bias.clone(), bias.copy_(self.weights)

    on_test_start = on_test_end = on_predict_epoch_start = on_predict_epoch_end = swap


@pytest.mark.parametrize("first", [True, False])
def test_what_swaps_weights_in_gets_them_back_and_the_quantized_network_is_measured(
    loaders: Any, data: Any, first: bool
) -> None:
    options: dict[str, Any] = {"network": "backbone", "calibration": loaders[1], "path": None, "act_bits": 4}
    module, quantization = Foreign(), PostTrainingQuantization(2, **options)
    average, swapping = EMAWeightAveraging(decay=0.9), Swapping(0.5)
    seen = list[int]()

    def see(*_: Any) -> None:
        seen.append(len(module.backbone[0].weight.unique()))

    seeing = LambdaCallback(on_test_batch_start=see, on_predict_batch_start=see)
    trainer = trainer_with(*[quantization, average, swapping][:: 1 if first else -1], seeing, max_epochs=1)
    trainer.fit(module, *loaders)
    seeing.on_validation_batch_start = see  # type: ignore[method-assign]  # not of the fit
    of_average: Any = average._average_model
    before, order = (state(module), state(of_average)), [*trainer.callbacks]
    for loop in (trainer.validate, trainer.test):
        loop(module, loaders[1], verbose=False)
    trainer.predict(module, loaders[1])
    assert len(seen) == 9
    assert max(seen) <= 4 * 8
    for found, expected in zip((state(module), state(of_average)), before, strict=True):
        assert_equal(found, expected)
    assert torch.equal(swapping.weights, torch.full((8,), 0.5))
    assert trainer.callbacks == order


def test_an_evaluation_that_fails_leaves_the_module_as_it_was(loaders: Any) -> None:
    class Failing(Foreign):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            assert len(self.backbone[0].weight.unique()) <= 4 * 8
            raise RuntimeError("no")

    module = Failing()
    before = state(module)
    quantization = PostTrainingQuantization(2, network="backbone", path=None, calibration=loaders[1], act_bits=4)
    with pytest.raises(RuntimeError, match="no"):
        trainer_with(quantization).test(module, loaders[1], verbose=False)
    assert_equal(state(module), before)
    assert not any(layer._forward_pre_hooks for layer in module.backbone)


@pytest.mark.parametrize("method", [CrossEntropy, DML])
def test_kdq_s_modules_say_which_network_it_is(method: Any, loaders: Any, data: Any, tmp_path: Path) -> None:
    """With EMA the averaged one, of DML's two students the better one; at the best epoch."""
    others = {"peer": backbone(1)} if method is DML else {}
    module = method(backbone(), num_classes=10, config=TrainConfig(lr=0.02, ema=0.9), **others)
    quantization = PostTrainingQuantization(4, path=None)
    best = ModelCheckpoint(tmp_path, monitor="val/top1", mode="max")
    trainer = trainer_with(quantization, best, max_epochs=2)
    trainer.fit(module, *loaders)
    module.load_state_dict(torch.load(best.best_model_path)["state_dict"])
    expected, _ = kdq.quantize(module.eval_network, [data[1].tensors[0]], 4)
    assert_equal(codes(quantization.result.network), codes(expected))
    assert not torch.equal(module.eval_network[0].weight, module.student.network[0].weight)
    float_top1, quantized_top1 = [], []
    for use, found in ((None, float_top1), (4, quantized_top1)):
        quantization.use(use)
        found += trainer.test(module, loaders[1], verbose=False)
    with torch.no_grad():
        right = (quantization.result.network(data[1].tensors[0]).argmax(1) == data[1].tensors[1]).float().mean()
    assert quantized_top1[0]["test/top1"] == pytest.approx(float(right))
    assert float_top1[0].keys() == quantized_top1[0].keys()


class Dictionaries(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, data: TensorDataset, names: tuple[str, str]) -> None:
        self.data, self.names = data, names

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip(self.names, self.data[index], strict=True))


def test_batches_are_dictionaries_or_what_the_module_s_own_hooks_say(data: Any) -> None:
    class Own(Foreign):
        def images_of(self, batch: Any) -> Tensor:
            return batch["picture"]

        def labels_of(self, batch: Any) -> Tensor:
            return batch["class"]

    expected, _ = kdq.quantize(backbone(), [data[1].tensors[0]], 3)
    for kind, names in ((Foreign, ("pixel_values", "labels")), (Own, ("picture", "class"))):
        module = kind(lambda batch, names=names: (batch[names[0]], batch[names[1]]))
        loader = DataLoader(Dictionaries(data[1], names), 64)
        quantization = PostTrainingQuantization(3, network="backbone", path=None)
        search = GreedyBitSearch(avg_bits=3, candidates=CANDIDATES, network="backbone", path=None)
        trainer_with(quantization, search, max_epochs=1, limit_train_batches=0).fit(module, loader, loader)
        assert quantization.result is None  # there was no training
        trainer_with(quantization, search).validate(module, loader, verbose=False)
        assert_equal(codes(quantization.result.network), codes(expected))
        assert search.result.report.avg_bits <= 3


def test_batches_pass_the_hooks_that_a_validation_step_s_pass(data: Any) -> None:
    """Images that the module normalises on the device; in float64, too."""

    class OnDevice(Foreign):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert not self.trainer.training  # no augmentation
            return batch[0] * 2 - 1, batch[1]

    loader = DataLoader(data[1], 64)
    expected, _ = kdq.quantize(backbone(), [data[1].tensors[0] * 2 - 1], 3)
    for precision in ("32-true", "64-true"):
        quantization = PostTrainingQuantization(3, network="backbone", path=None)
        search = GreedyBitSearch(avg_bits=3, candidates=CANDIDATES, network="backbone", path=None)
        trainer_with(quantization, search, precision=precision).validate(OnDevice(), loader, verbose=False)
        if precision == "32-true":
            assert_equal(codes(quantization.result.network), codes(expected))


def test_a_network_that_the_module_s_setup_makes_is_found(loaders: Any) -> None:
    class Late(Foreign):
        def __init__(self) -> None:
            super().__init__()
            del self.backbone

        def configure_model(self) -> None:
            self.backbone = backbone()

    quantization = PostTrainingQuantization(3, network="backbone", path=None)
    trainer_with(quantization, max_epochs=1).fit(Late(), *loaders)
    assert quantization.result.report.avg_bits == 3


SEARCH = {"avg_bits": 3.0, "candidates": CANDIDATES, "network": "backbone"}
EARLY: list[tuple[Any, Callable[[], QuantizationCallback], str]] = [
    (Foreign, lambda: PostTrainingQuantization(network="net"), r"network='net'\): the module has no such.* backbone"),
    (Foreign, lambda: PostTrainingQuantization(), r"cannot be called on inputs \(1, 1, 8, 8\) alone"),
    (Foreign, lambda: PostTrainingQuantization(network="backbone", keep_float=["9"]), "no 9 to leave float"),
    (Foreign, lambda: GreedyBitSearch(**SEARCH, keep_float=["3"]), "budget of 3 bits on average.*left float"),
    (Foreign, lambda: PostTrainingQuantization(network="backbone", calibration=[]), "no calibration image"),
    (Foreign, lambda: PostTrainingQuantization(network="backbone", calibration=[{"a": 1}]), "a batch is a dict of a"),
]


@pytest.mark.parametrize(("module", "callback", "says"), EARLY)
def test_mistakes_are_answered_before_the_training(loaders: Any, module: Any, callback: Any, says: str) -> None:
    module = module()
    with pytest.raises(KdqError, match=says):
        trainer_with(callback(), max_epochs=1).fit(module, *loaders)
    assert module.steps == 0


def test_a_fit_without_images_that_are_not_augmented_is_refused_before_it(loaders: Any, data: Any) -> None:
    module = Foreign()
    with pytest.raises(KdqError, match=r"needs images that are not augmented.*calibration=loader"):
        trainer_with(PostTrainingQuantization(network="backbone"), max_epochs=1).fit(module, loaders[0])
    with pytest.raises(KdqError, match=r"needs images that are not augmented"):  # test images calibrate nothing
        trainer_with(PostTrainingQuantization(network="backbone")).test(module, loaders[1])
    one = DataLoader(TensorDataset(*(tensor[:1] for tensor in data[1].tensors)))
    with pytest.raises(KdqError, match="too few validation images"):
        trainer_with(GreedyBitSearch(**SEARCH), max_epochs=1).fit(module, loaders[0], one)
    assert module.steps == 0


@pytest.mark.parametrize(
    ("callback", "options", "says"),
    [
        (PostTrainingQuantization, {"bit": 4}, r"unknown option bit \(did you mean bits"),
        (PostTrainingQuantization, {"bits": [4, 99]}, "bits=99 must be"),
        (PostTrainingQuantization, {"bits": []}, "bits is empty"),
        (PostTrainingQuantization, {"calibration_images": 0}, "calibration_images=0 must be at least 1"),
        (PostTrainingQuantization, {"calibration": iter(())}, "is an iterator, good for one pass"),
        (PostTrainingQuantization, {"bits": [2, 4], "path": "a.kdq"}, r"one file for several widths: write \{bits\}"),
        (GreedyBitSearch, {}, "has no budget"),
        (GreedyBitSearch, {"avg_bits": float("nan")}, "avg_bits=nan must be a finite number"),
        (GreedyBitSearch, {"avg_bits": 3, "solvr": "rtn"}, r"unknown option solvr \(did you mean solver\?"),
        (GreedyBitSearch, {"avg_bits": 3, "cost": "joules"}, "cost='joules' is unknown"),
    ],
)
def test_options_are_refused_at_once(callback: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(KdqError, match=says):
        callback(**options)


def test_several_widths_are_measured_one_at_a_time(loaders: Any) -> None:
    quantization = PostTrainingQuantization([2, 4], network="backbone", calibration=loaders[0])
    with pytest.raises(KdqError, match=r"say which one to measure, use\(2\)"):
        trainer_with(quantization).test(Foreign(), loaders[1], verbose=False)
    with pytest.raises(KdqError, match=r"use\(3\): there is 2, 4, and None"):
        quantization.use(3)
    with pytest.raises(KdqError, match=r"take results\[bits\]"):
        _ = quantization.result


def test_callbacks_travel_to_spawned_processes() -> None:
    for callback in (PostTrainingQuantization([2, 4], solver="rtn"), GreedyBitSearch(avg_bits=3)):
        assert pickle.loads(pickle.dumps(callback)).names == callback.names


def test_a_datamodule_s_own_images_calibrate(images: Images) -> None:
    data = ImageDataModule(images, 64, calibration_images=100, calibration_seed=5)
    module = CrossEntropy(backbone(), num_classes=10)
    quantization = PostTrainingQuantization(3, path=None)
    trainer_with(quantization).test(module, datamodule=data, verbose=False)
    drawn = torch.cat([x for x, _ in images.calibration(100, 5, torch.device("cpu"))])
    assert len(drawn) == 100
    assert_equal(codes(quantization.result.network), codes(kdq.quantize(backbone(), [drawn], 3)[0]))


class Shuffled:
    """Another order in every pass."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(103).split(self.batch_size):
            yield batch.float(), batch


@pytest.mark.parametrize("batch_size", [10, 3, 1])
@pytest.mark.parametrize(("calibration", "choosing"), [(30, 20), (5, 100), (1000, 1000)])
def test_no_image_of_the_validation_loader_both_calibrates_and_chooses(
    calibration: int, choosing: int, batch_size: int
) -> None:
    trainer: Any = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.validate_loop._combined_loader = SimpleNamespace(iterables=(Shuffled(batch_size), []))
    found, pairs = Loaders("x", trainer, L.LightningModule(), None, calibration).disjoint(choosing)
    one, other = torch.cat(found).long().tolist(), torch.cat([labels for _, labels in pairs]).tolist()
    assert not set(one) & set(other)
    assert (len(one), len(other)) == (min(calibration, 52), min(choosing, 51))
    assert all(torch.equal(images.long(), labels) for images, labels in pairs)


def test_loggers_are_told_every_step_and_every_layer_s_error(loaders: Any, tmp_path: Path) -> None:
    search = GreedyBitSearch(**SEARCH, path="found/{bits}.kdq")
    trainer = trainer_with(search, max_epochs=1, logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    trainer.fit(Foreign(), loaders[0], [loaders[1], loaders[0]])  # the first of several validates
    (file,) = tmp_path.rglob("metrics.csv")
    logged = pd.read_csv(file)
    assert logged["bits/avg_bits"].dropna().tolist() == pytest.approx(search.result.avg_bits)
    assert len(search.result.avg_bits) > 2
    errors = [layer.error for layer in search.result.report.layers]
    assert logged["quantize/error_searched"].dropna().tolist() == pytest.approx(errors)
    assert search.files["searched"] == tmp_path / "found" / "searched.kdq"
    assert search.files["searched"].is_file()


def _rank(rank: int, folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    training, validation = torch.load(f"{folder}/case.pt")
    search = GreedyBitSearch(**SEARCH, calibration_images=100, validation_images=100)
    quantization = PostTrainingQuantization([3, 4], network="backbone", calibration_images=200)
    ddp = {"devices": 2, "strategy": "ddp", "default_root_dir": folder}
    trainer = trainer_with(search, quantization, max_epochs=1, limit_train_batches=0.5, **ddp)
    loader = DataLoader(TensorDataset(*validation), 50)
    module = Foreign()
    trainer.fit(module, DataLoader(TensorDataset(*training), 32), loader)
    trained = module.backbone.state_dict()
    search.use(None)
    quantization.use(4)
    trainer.predict(module, DataLoader(TensorDataset(*validation), 50))
    found = (asdict(search.result.found), search.result.network.state_dict())
    torch.save((found, {b: codes(r.network) for b, r in quantization.results.items()}, trained), f"{folder}/{rank}.pt")


def test_all_ranks_find_the_same_and_it_is_what_one_finds_on_all_images(data: Any, tmp_path: Path) -> None:
    torch.save([part.tensors for part in data], tmp_path / "case.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (str(tmp_path), port), nprocs=2)
    (one, its_codes, trained), (other, other_codes, _) = (
        torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(2)
    )
    assert one[0] == other[0]
    assert_equal(one[1], other[1])
    top1 = one[0]["chosen"]["measure"]["top1"]
    assert top1 == pytest.approx(round(top1))  # counted over 100 images, not 50
    network = backbone()
    network.load_state_dict(trained)
    for bits in (3, 4):
        assert_equal(its_codes[bits], other_codes[bits])
        expected, _ = kdq.quantize(network, [data[1].tensors[0]], bits)
        same = [torch.isclose(a, codes(expected)[name]).float().mean() for name, a in its_codes[bits].items()]
        assert min(same) > 0.99  # sums in another order
    assert sorted(path.name for path in tmp_path.glob("*.kdq")) == [
        "quantized-3bit.kdq",
        "quantized-4bit.kdq",
        "quantized-searched.kdq",
    ]
