"""Trainings from end to end: reproducible, resumable after kill -9, equal to a loop written by hand.

Run as a script, ``python test_fit.py FOLDER``, this file starts a training of every method that dies by SIGKILL.
"""

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from kdq.data.images import Images
from kdq.data.loader import TrainLoader
from kdq.data.sets import digits
from kdq.distill import CrossEntropy
from kdq.distill.dkd import DKD
from kdq.distill.dml import DML
from kdq.distill.learner import MovingAverage
from kdq.distill.losses import distillation_kl
from kdq.distill.mixup import Mixup
from kdq.distill.module import DistillationModule
from kdq.distill.progress import TrainingProgress
from kdq.distill.vkd import VKD
from kdq.train.fit import Best, KeepBest, _Beside, fit
from kdq.train.recipe import Recipe
from kdq.train.trainer import OWN, REFUSED, resolve_precision
from kdq.utils.errors import KdqError

EPOCHS = 3
TRAINER = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true", "compile": False}
METHODS: dict[str, tuple[type[DistillationModule], dict[str, Any], dict[str, Any]]] = {
    "baseline": (CrossEntropy, {}, {"accumulate": 2}),
    "vkd": (VKD, {"alpha": 0.9, "temperature": 4.0}, {"clip_grad": 1.0}),
    "mixup": (Mixup, {"alpha": 0.9, "temperature": 4.0, "per_sample": True}, {"ema": 0.9}),
    "dkd": (DKD, {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "warmup": 0.5}, {"schedule": "cosine"}),
    "dml": (DML, {"schedule": "kl_first"}, {"ema": 0.9, "clip_grad": 0.5, "accumulate": 2}),
    "dml_of_three": (DML, {}, {"ema": 0.9, "clip_grad": 0.5, "accumulate": 2}),
}


def small_images(train_limit: int | None = 256) -> Images:
    config = {"name": "digits", "num_classes": 10, "in_channels": 1, "mean": None, "std": None, "val_fraction": 0.1}
    config |= {"split_seed": 0, "train_limit": train_limit, "test_limit": None}
    return Images(digits(), config | {"augment": {"pad": 1, "flip": False, "cutout": 0}})


def network(seed: int, norm: bool = True) -> nn.Module:
    """Grey 8x8 images, ten classes, with BatchNorm (or without: then batches may be divided at will) and dropout."""
    torch.manual_seed(seed)
    middle = (nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)) if norm else (nn.Tanh(),)
    return nn.Sequential(nn.Conv2d(1, 8, 3), *middle, nn.Flatten(), nn.Linear(8 * 36, 10))


def module(method: str, **changes: Any) -> DistillationModule:
    kind, options, recipe = METHODS[method]
    others = {name: network(seed) for name, seed in (("teacher", 2), ("peer", 3)) if name in kind.takes}
    if method == "dml_of_three":
        others["peer2"] = network(4)
    values = {"epochs": EPOCHS, "batch_size": 32, "lr": 0.05} | recipe | changes
    trained = kind(network(1), **others, num_classes=10, config=Recipe(**values).of_module(), seed=5, **options)
    RECIPES[id(trained)] = Recipe(**values)
    return trained


#: What :func:`module` made, and the recipe that it is to be trained with.
RECIPES: dict[int, Recipe] = {}


def train(
    trained: DistillationModule, images: Images, trainer: dict[str, Any], work: Path
) -> tuple[dict[str, Best], dict[str, Any]]:
    """:func:`kdq.train.fit.fit` with the module's own recipe."""
    return fit(trained, images, trainer, RECIPES[id(trained)], work)


def result(trained: DistillationModule, work: Path, images: Images | None = None) -> dict[str, Tensor]:
    """Train, and return the best and the last weights of every learner."""
    best, _ = train(trained, images or small_images(), TRAINER, work)
    weights = {f"best.{learner}.{name}": w for learner, one in best.items() for name, w in one.weights.items()}
    return weights | {f"last.{name}": tensor.clone() for name, tensor in trained.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def batches(images: Images, recipe: Recipe, epoch: int) -> TrainLoader:
    return TrainLoader(
        images.source("train", torch.device("cpu")),
        images.split.train,
        recipe.batch_size,
        preprocess=images.preprocess,
        augment=images.augment,
        seed=5,
        epoch=lambda: epoch,
        portions=recipe.accumulate,
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folders, by method, of trainings killed in the middle of their second epoch."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_weights_and_kill_resumes_exactly(method: str, killed: Path, tmp_path: Path) -> None:
    """A second process goes on, and ends bit for bit where an undisturbed training ends."""
    undisturbed = result(module(method), tmp_path)
    assert torch.load(killed / method / "last.ckpt", weights_only=True)["epoch"] == 0
    resumed = module(method)
    epochs: list[int] = []
    resumed.on_train_epoch_start = lambda: epochs.append(resumed.current_epoch)  # type: ignore[method-assign]
    assert equal(result(resumed, killed / method), undisturbed)
    assert epochs == [1, 2]


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    other = module("baseline")
    other.seed = 6
    assert not equal(result(module("baseline"), tmp_path / "a"), result(other, tmp_path / "b"))


def test_a_finished_training_is_returned_as_it_ended(tmp_path: Path) -> None:
    """A crash between the last epoch and the store costs nothing."""
    first, _ = train(module("dml"), small_images(), TRAINER, tmp_path)
    again, metrics = train(module("dml"), small_images(), TRAINER, tmp_path)
    assert [vars(best)["top1"] for best in first.values()] == [vars(best)["top1"] for best in again.values()]
    assert all(equal(first[name].weights, again[name].weights) for name in ("student", "peer"))
    assert metrics["train_seconds"] > 0


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    """Under a learning rate that destroys the network after the first epochs."""
    trained = module("baseline", epochs=5, schedule="constant", lr=0.02)
    history: list[tuple[float, dict[str, Tensor]]] = []

    def record() -> None:
        state = trained.student.network.state_dict()
        history.append(
            (trained.last_validated("top1", "student"), {name: tensor.clone() for name, tensor in state.items()})
        )
        if len(history) == 3:
            trained.optimizers().param_groups[0]["lr"] = 50.0  # type: ignore[union-attr]

    trained.on_train_epoch_end = record  # type: ignore[method-assign]
    trained.lr_scheduler_step = lambda *_: None  # type: ignore[method-assign]
    best, metrics = train(trained, small_images(), TRAINER, tmp_path)
    scores = [score for score, _ in history]
    kept = best["student"]
    assert kept.top1 == max(scores) > scores[-1]
    assert kept.epoch == max(epoch for epoch, score in enumerate(scores) if score == max(scores))
    assert equal(kept.weights, history[kept.epoch][1])
    assert metrics["epochs"] == 5


@pytest.mark.parametrize(("flag", "value", "epoch"), [("check_val_every_n_epoch", 4, 2), ("max_steps", 9, 0)])
def test_only_validated_epochs_are_kept(flag: str, value: int, epoch: int, tmp_path: Path) -> None:
    """Of three epochs of seven steps: the last one, which is always validated, and the first one where the second is
    cut short."""
    trained = module("vkd")
    best, _ = train(trained, small_images(), TRAINER | {flag: value}, tmp_path)
    assert best["student"].epoch == epoch
    with pytest.raises(KdqError, match="ended without a validated epoch"):
        train(module("vkd"), small_images(), TRAINER | {"max_steps": 3}, tmp_path / "none")


def test_overfitted_batches_are_the_same_in_every_epoch(tmp_path: Path) -> None:
    trained, seen = module("vkd"), list[list[int]]()
    step = trained.training_step
    trained.training_step = lambda batch, batch_idx: seen.append(batch[1].tolist()) or step(batch, batch_idx)  # type: ignore
    train(trained, small_images(), TRAINER | {"overfit_batches": 1}, tmp_path)
    assert len(seen) == EPOCHS
    assert seen[0] == seen[1] == seen[2]


def test_a_training_that_was_ended_early_stays_ended(tmp_path: Path) -> None:
    """A crash between its end and the store changes nothing."""
    stops = [EarlyStopping("val/top1", mode="max", min_delta=1.0, patience=1) for _ in range(2)]
    first, again = (
        fit(
            module("baseline", epochs=6), small_images(), TRAINER, Recipe(epochs=6, batch_size=32), tmp_path, (), [stop]
        )
        for stop in stops
    )
    assert first[1]["epochs"] == again[1]["epochs"] == 2
    assert equal(first[0]["student"].weights, again[0]["student"].weights)


def test_of_equal_epochs_the_last_is_kept() -> None:
    trained, keep = module("baseline"), KeepBest()
    for epoch, top1 in enumerate([0.5, 0.7, 0.7, 0.6]):
        trained.last_validated = lambda name, learner, value=top1: value  # type: ignore[method-assign, misc]
        trainer: Any = SimpleNamespace(current_epoch=epoch)
        keep.on_validation_end(trainer, trained)
        keep.on_train_epoch_end(trainer, trained)
    assert (keep.best["student"].epoch, keep.best["student"].top1) == (2, 0.7)


@pytest.mark.parametrize("method", ["vkd", "mixup", "dkd"])
def test_the_teacher_neither_changes_nor_is_saved(method: str, tmp_path: Path) -> None:
    trained: Any = module(method)
    teacher = trained.teacher.network
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    train(trained, small_images(), TRAINER, tmp_path)
    assert equal(dict(teacher.state_dict()), before)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    assert not any(
        saved.shape == tensor.shape and torch.equal(saved, tensor)
        for saved in _tensors(checkpoint)
        for tensor in before.values()
        if tensor.numel() > 100
    )
    (optimizer,) = checkpoint["optimizer_states"]
    assert len(optimizer["state"]) == len(list(trained.student.network.parameters()))


def test_a_nan_loss_stops_before_it_is_kept(tmp_path: Path) -> None:
    trained = module("baseline")
    steps: list[int] = []

    def poisoned(images: Tensor, labels: Tensor, moment: Any) -> Any:
        steps.append(moment.step)
        logits = trained.student(images)
        poison = float("nan") if (moment.epoch, moment.step) == (1, 2) else 1.0
        return {"ce": poison * F.cross_entropy(logits, labels)}, logits

    trained.losses = poisoned  # type: ignore[method-assign]
    with pytest.raises(KdqError, match=r"nan at epoch 1, by step 15: lower the learning rate \(recipe.lr=0.05\)"):
        train(trained, small_images(), TRAINER, tmp_path)
    assert steps[-1] == 15  # the last of the epoch: checked there, and every so many steps
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a device: values that leave a tensor, and shapes that depend on them."""

    WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "equal", "is_nonzero", "masked_select", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_steps_between_two_logged_ones_never_wait_for_the_device(method: str, tmp_path: Path) -> None:
    """The values read in an epoch of twice as many steps are as many."""
    counts = []
    for number, images in enumerate((128, 256)):  # 4 and 8 steps of 32 images, logged at their ends
        trained = module(method, epochs=1, ema=0.9, clip_grad=None, accumulate=1)
        with Reads() as reads:
            train(trained, small_images(images), TRAINER, tmp_path / str(number))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    train(module("baseline", epochs=1), small_images(), TRAINER, tmp_path)
    file = tmp_path / "last.ckpt"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not a checkpoint")
    with pytest.raises(KdqError, match=r"last\.ckpt is damaged: delete"):
        train(module("baseline", epochs=2), small_images(), TRAINER, tmp_path)


def test_fit_equals_a_loop_by_hand(tmp_path: Path) -> None:
    """SGD with clipping and a moving average, in bare PyTorch."""
    images = small_images()
    recipe = Recipe(epochs=2, batch_size=32, lr=0.05, clip_grad=0.3, ema=0.9)
    trained = CrossEntropy(network(1), num_classes=10, config=recipe.of_module(), seed=5)
    found, _ = fit(trained, images, TRAINER, recipe, tmp_path)
    net = network(1)
    average = MovingAverage(net, 0.9)
    optimizer = recipe.optimizer(net.parameters(), fused=False)
    scheduler = recipe.scheduler(optimizer, 2 * len(batches(images, recipe, 0)))
    for epoch in range(2):
        torch.manual_seed(5 * 1_000_003 + epoch)
        for inputs, labels in batches(images, recipe, epoch):
            optimizer.zero_grad()
            F.cross_entropy(net.train()(inputs), labels).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.3)
            optimizer.step()
            scheduler.step()
            average.update(net)
    assert found["student"].epoch == 1
    torch.testing.assert_close(found["student"].weights, dict(average.network.state_dict()))


@pytest.mark.parametrize("method", ["baseline", "vkd", "mixup", "dkd"])  # dml's terms are baseline's and vkd's
def test_bf16_has_the_losses_and_gradients_of_float32(method: str) -> None:
    """To 1 % of the loss, and 5 % of the gradient's length: bf16 has 8 binary digits."""
    torch.manual_seed(0)
    images, labels = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    found = []
    for enabled in (False, True):
        trained = module(method).eval()  # without dropout
        torch.manual_seed(1)  # of Mixup
        with torch.autocast("cpu", torch.bfloat16, enabled):
            loss = torch.stack(
                list(trained.losses(images, labels, TrainingProgress(step=1, steps=2))[0].values())
            ).sum()
        loss.backward()
        gradients = [p.grad.flatten() for p in trained.student.network.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(gradients)))
    (loss, gradient), (other_loss, other_gradient) = found
    assert loss != other_loss
    torch.testing.assert_close(other_loss, loss, rtol=0.01, atol=0)
    assert (other_gradient - gradient).norm() < 0.05 * gradient.norm()


def test_dml_equals_a_loop_by_hand(tmp_path: Path) -> None:
    """Two students, each with its own clipping, schedule and accumulation over two portions."""
    images = small_images()
    recipe = Recipe(epochs=2, batch_size=32, lr=0.05, clip_grad=0.3, accumulate=2)
    config = recipe.of_module()
    trained = DML(network(1), network(3), num_classes=10, config=config, seed=5, weight=0.5, schedule="kl_first")
    fit(trained, images, TRAINER, recipe, tmp_path)
    nets = [network(1), network(3)]
    optimizers = [recipe.optimizer(net.parameters(), fused=False) for net in nets]
    portions = len(batches(images, recipe, 0))
    schedulers = [recipe.scheduler(optimizer, 2 * portions // 2) for optimizer in optimizers]
    for epoch in range(2):
        torch.manual_seed(5 * 1_000_003 + epoch)
        for index, (inputs, labels) in enumerate(batches(images, recipe, epoch)):
            weight = 1.0 - (epoch + index / portions) / 2
            logits = [net.train()(inputs) for net in nets]
            for mine, theirs in ((0, 1), (1, 0)):
                kl = distillation_kl(logits[mine], logits[theirs], 1.0)
                ((F.cross_entropy(logits[mine], labels) + weight * kl) / 2).backward()
            if index % 2 == 1:
                for net, optimizer, scheduler in zip(nets, optimizers, schedulers, strict=True):
                    nn.utils.clip_grad_norm_(net.parameters(), 0.3)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
    for net, learner in zip(nets, trained.learners.values(), strict=True):
        torch.testing.assert_close(dict(learner.network.state_dict()), dict(net.state_dict()))


@pytest.mark.parametrize("method", ["baseline", "dml"])
def test_portions_do_not_change_the_step(method: str, tmp_path: Path) -> None:
    """Four portions of eight images are one batch of 32, to rounding."""
    kind, options, _ = METHODS[method]
    states = []
    for accumulate in (1, 4):
        others = {"peer": network(3, norm=False)} if "peer" in kind.takes else {}
        recipe = Recipe(epochs=2, batch_size=32, lr=0.05, clip_grad=1.0, accumulate=accumulate)
        shared = {"num_classes": 10, "config": recipe.of_module(), "seed": 5}
        constant = options | ({"schedule": "constant"} if options else {})
        trained = kind(network(1, norm=False), **others, **shared, **constant)
        fit(trained, small_images(), TRAINER, recipe, tmp_path / str(accumulate))
        states.append({k: v for k, v in trained.state_dict().items() if "network" in k})
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_bf16_and_compile_reach_every_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    trained: Any = module("vkd", epochs=1)
    dtypes: list[torch.dtype] = []
    for net in (trained.student.network, trained.teacher.network):
        net.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    best, metrics = train(trained, small_images(), TRAINER | {"precision": "bf16-mixed", "compile": True}, tmp_path)
    assert compiled == [trained.student.network, trained.teacher.network]
    assert set(dtypes) == {torch.bfloat16}
    assert metrics["precision"] == "bf16-mixed"
    assert best["student"].weights["0.weight"].dtype == torch.float32


def test_precision_as_asked() -> None:
    assert resolve_precision("32-true", "cpu") == "32-true"
    assert resolve_precision("auto", "cpu") in ("32-true", "bf16-mixed")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for one in inner for tensor in _tensors(one)]


def _die_in_the_second_epoch(trained: DistillationModule) -> None:
    step: Callable[..., Any] = trained.training_step

    def training_step(batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        if (trained.current_epoch, batch_idx) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(batch, batch_idx)

    trained.training_step = training_step  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in tests/conftest.py
    for name in METHODS:
        child = os.fork()  # torch is imported once, and has not started its threads yet
        if child == 0:
            doomed = module(name)
            _die_in_the_second_epoch(doomed)
            result(doomed, Path(sys.argv[1]) / name)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"{name} was not killed: status {status}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_whole_trainings_in_another_precision(tmp_path: Path, method: str, precision: str) -> None:
    best, metrics = train(module(method, epochs=1), small_images(), {**TRAINER, "precision": precision}, tmp_path)
    assert metrics["precision"] == precision
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {w.dtype for w in best["student"].weights.values() if w.is_floating_point()} == {dtype}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy": "fsdp"}, "auto, ddp"),
        ({"precision": "8-mixed"}, "auto, 32-true"),
        ({"max_time": "00:01:00:00"}, "how fast this machine is"),
        ({"limit_train_batches": 0}, "limit_train_batches=0 leaves nothing to do"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0 leaves nothing"),
        ({"num_nodes": 0}, "num_nodes=0 leaves nothing"),
        ({"gradient_clip_algorithm": "vlue"}, "use one of null, norm, value .did you mean value"),
        ({"max_epoch": 3}, r"no flag of lightning.Trainer \(did you mean max_epochs"),
    ],
)
def test_trainers_that_would_train_wrongly_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(KdqError, match=says):
        train(module("dml"), small_images(), {**TRAINER, **changes}, tmp_path)


def test_every_flag_of_lightnings_trainer_is_taken_or_refused_with_a_reason() -> None:
    flags = set(inspect.signature(L.Trainer).parameters)
    taken = set(OmegaConf.load(Path(__file__).parents[2] / "conf/trainer/auto.yaml"))
    assert flags <= taken | REFUSED.keys()
    assert not taken & REFUSED.keys()
    assert taken - flags <= {"_target_", *OWN}


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written in its place, nor in another folder, which may lie on another disk."""
    path, written = tmp_path / "work" / "last.ckpt", list[Path]()
    path.parent.mkdir()
    path.write_bytes(b"the one before")

    def die(checkpoint: Any, file: Path) -> None:
        written.append(file)
        file.write_bytes(b"half")
        raise OSError("killed")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(OSError, match="killed"):
        _Beside().save_checkpoint({}, str(path))
    assert written[0].parent == path.parent
    assert path.read_bytes() == b"the one before"


def test_more_processes_and_portions_than_images_are_refused() -> None:
    with pytest.raises(KdqError, match="3 training images are too few for 1 devices x 4 portions"):
        train(module("baseline", accumulate=4), small_images(3), TRAINER, Path())
    assert not any(name.startswith("__old") for name in vars(DataLoader))  # Lightning's, of users' other trainings
