"""The ``trainer`` config as a ``lightning.Trainer``: any of its flags, and the few that kdq decides itself.

A flag that changes the weights is a part of the trained model's key, so that models with and without it are two. A flag
that would break what kdq promises (trainings resume, sweeps run in waves, rows can be repeated) is refused with the
reason.
"""

import inspect
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import hydra.utils
import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from kdq.train.slurm import environment
from kdq.utils.checks import nearest, one_of
from kdq.utils.errors import KdqError

#: Lightning's names of the precisions that a training may have.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
#: Others would shard weights, which are read here as a whole.
STRATEGIES = ("auto", "ddp")
#: Lightning's names of profilers, beside one for devices that kdq does not train on.
PROFILERS = ("simple", "advanced", "pytorch")
#: What ``trainer.devices`` may say beside a number.
ALL_DEVICES = (-1, "-1", "auto")
#: Entries of the config that are kdq's own.
OWN = ("compile", "threads")
#: Flags that are the recipe's, role by role: given here, they hold for every training.
RECIPE = {"max_epochs": "epochs", "gradient_clip_val": "clip_grad", "accumulate_grad_batches": "accumulate"}
#: Flags that try a training out: its rows say so, and are never mixed with real ones.
LIMITS = ("fast_dev_run", "overfit_batches", "limit_train_batches", "limit_val_batches", "limit_test_batches")
#: Flags that the weights depend on.
WEIGHTS = (*LIMITS[:-1], "max_steps", "gradient_clip_algorithm", "check_val_every_n_epoch", "sync_batchnorm")
#: What of these is no other than what a Trainer does by itself.
DEFAULTS = {"max_steps": -1, "check_val_every_n_epoch": 1}
#: Flags of which zero would be a training, an evaluation or a machine that is none.
AT_LEAST_ONE = (*LIMITS[2:], "max_steps", "check_val_every_n_epoch", "num_nodes")
#: Flags that are not taken, and why.
REFUSED = {
    "logger": "loggers are the logger group: logger=csv, logger=[wandb,tensorboard]",
    "callbacks": "callbacks are a group of their own: callbacks=early_stopping, +callbacks.mine._target_=...",
    "default_root_dir": "everything is written below paths.output_dir",
    "plugins": "kdq starts the processes of a training itself, and writes checkpoints that survive a crash",
    "enable_checkpointing": "a training resumes from its checkpoint; callbacks may add others",
    "max_time": "the weights would depend on how fast this machine is: give recipe.epochs",
    "min_epochs": "a training has recipe.epochs; early stopping has min_delta and patience of its own",
    "min_steps": "a training has recipe.epochs; early stopping has min_delta and patience of its own",
    "val_check_interval": "a training resumes from, and keeps, validated epochs: give check_val_every_n_epoch",
    "use_distributed_sampler": "kdq's loaders give every process its own images, each once",
    "reload_dataloaders_every_n_epochs": "kdq's loaders follow the epoch by themselves",
    "limit_predict_batches": "kdq predicts nothing",
    "inference_mode": "evaluation runs in inference mode",
    "deterministic": "trainings are as deterministic as torch makes them without an error: 'warn'",
    "benchmark": "the fastest kernel of one run is not that of the next: rows could not be repeated",
    "barebones": "the best epoch is chosen by validation, and logged",
    "num_sanity_val_steps": "check_fit has run one image through every network before",
    "enable_autolog_hparams": "the config is logged as a whole",
    "model_registry": "models are kept in the store",
}


def check_trainer(config: Mapping[str, Any]) -> None:
    """Refuse a ``trainer`` config that could not train what was asked for."""
    known = [*inspect.signature(L.Trainer).parameters, *OWN]
    for name, value in config.items():
        if name == "_target_":
            continue
        if name not in known:
            raise KdqError(f"trainer.{name} is no flag of lightning.Trainer{nearest(name, known)}")
        if name in REFUSED and value is not None:
            raise KdqError(f"trainer.{name}={value} is refused: {REFUSED[name]}")
    for name in AT_LEAST_ONE:
        if config.get(name) == 0 and config[name] is not False:
            raise KdqError(f"trainer.{name}={config[name]} leaves nothing to do: give at least 1, or null")
    one_of("trainer.gradient_clip_algorithm", config.get("gradient_clip_algorithm"), (None, "norm", "value"))
    one_of("trainer.strategy", config.get("strategy"), STRATEGIES)
    if not isinstance(profiler := config.get("profiler"), Mapping):  # one with a _target_ is its own
        one_of("trainer.profiler", profiler, (None, *PROFILERS))
    one_of("trainer.precision", str(config.get("precision")), ("auto", *PRECISIONS))


def weights_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flags, beside precision, that a model's weights depend on: a part of its key where they are given."""
    return {name: config[name] for name in WEIGHTS if _given(name, config.get(name))}


def limited(config: Mapping[str, Any]) -> str:
    """What of ``config`` makes its results a trial, such as ``limit_train_batches=2``; empty for real ones."""
    return " ".join(f"{name}={config[name]}" for name in LIMITS if _given(name, config.get(name)))


def _given(name: str, value: Any) -> bool:
    """Whether a flag's ``value`` is another than its default, of which a limit of 1.0 is one, and of 1 none."""
    limit = name.startswith("limit_") and isinstance(value, float)
    return value not in (None, False, 1.0 if limit else DEFAULTS.get(name))


def with_trainer_flags(recipe: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``recipe`` config with what the ``trainer`` config says for all trainings."""
    return {**recipe, **{field: config[flag] for flag, field in RECIPE.items() if config.get(flag) is not None}}


def training_trainer(config: Mapping[str, Any], epochs: int, **ours: Any) -> L.Trainer:
    """A Trainer for one training of ``epochs``, with what kdq gives it: ``callbacks``, ``logger`` and the like."""
    check_trainer(config)
    strategy: Any = config["strategy"]
    if strategy == "ddp" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each process keeps the BatchNorm statistics of its own images: the default overwrites them at every step with
        # those of the first process, whose images are a part only.
        strategy = DDPStrategy(broadcast_buffers=False)
    ours |= {
        "strategy": strategy,
        "precision": resolve_precision(config["precision"], config["accelerator"]),
        # kdq starts the processes of a training itself; in any Slurm job Lightning would look for Slurm's.
        "plugins": [environment(), *ours.get("plugins", ())],
        "max_epochs": epochs,
    }
    # Part of torch's deterministic mode, for finding reads of memory that nothing wrote; it costs 3 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return _trainer(config, ours)


def evaluation_trainer(config: Mapping[str, Any], callbacks: Iterable[L.Callback] = ()) -> L.Trainer:
    """A Trainer that measures in float32, on one device: for ``trainer.test`` and ``trainer.validate``."""
    ours = {
        "strategy": "auto",
        "devices": 1,
        "num_nodes": 1,
        "precision": "32-true",
        "logger": False,
        "callbacks": list(callbacks),
        "plugins": [environment()],
        "enable_checkpointing": False,
    }
    return _trainer(config, ours)


@contextmanager
def interruptible(trainer: L.Trainer, where: Callable[[], str] = str) -> Iterator[None]:
    """Run ``trainer.fit`` or ``trainer.test`` so that Ctrl-C stays a KeyboardInterrupt.

    Lightning answers it by leaving Python with exit code 1, deaf to further ones from then on, or by a quiet end of the
    fit. The KeyboardInterrupt says ``where`` the same command goes on."""
    heeds = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, heeds)
    if trainer.interrupted:
        raise KeyboardInterrupt(where())


def _trainer(config: Mapping[str, Any], ours: Mapping[str, Any]) -> L.Trainer:
    """The Trainer of the config's flags, of kdq's own choices where they say nothing, and of ``ours``."""
    _quiet_lightning()
    given = {k: v for k, v in config.items() if k not in OWN and k not in RECIPE and v is not None}
    common = {
        "deterministic": "warn",
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "enable_autolog_hparams": False,
    }
    # kdq shows one bar for a whole training.
    flags = {"_target_": "lightning.Trainer", **common, **given, "enable_progress_bar": False}
    return hydra.utils.instantiate({k: v for k, v in flags.items() if k not in ours}, **ours)


def _quiet_lightning() -> None:
    """Keep what is useful of Lightning's messages: errors. The rest describes choices kdq made on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # DDP's buckets have one of the two equal layouts of a 1x1 convolution, channels-last gradients the other.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


def resolve_precision(requested: str, accelerator: str) -> Any:
    """Lightning's precision for ``requested``; ``auto`` is bf16 autocast where the hardware multiplies bf16 (CUDA
    from Ampere, CPUs with AMX or AVX-512-BF16), else float32."""
    if requested != "auto":
        return requested
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if fast else "32-true"
