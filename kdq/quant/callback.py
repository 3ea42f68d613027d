"""Quantization as Lightning callbacks, for any LightningModule: thin shells over :mod:`kdq.quant.network` and
:mod:`kdq.quant.bitsearch`. kdq's own pipeline quantizes with them, too."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kdq.quant.bitsearch.bank import check_average
from kdq.quant.bitsearch.config import SEARCH_OPTIONS, SearchConfig
from kdq.quant.bitsearch.mixed import MixedPrecision, search_bits
from kdq.quant.config import QuantConfig, configured
from kdq.quant.layers import quantizable_layers, unwrapped
from kdq.quant.network import Quantized, check_network, quantize_widths
from kdq.quant.packing.file import save_packed
from kdq.quant.packing.weights import same_state, standing_in, state_kept
from kdq.quant.solvers.alphabet import check_bits
from kdq.quant.trainer import Loaders, checkpoints, load_best
from kdq.utils.errors import KdqError

#: What the one result of a search is called.
SEARCHED = "searched"
#: What both callbacks take beside their own options.
SHARED = ("network", "calibration", "calibration_images", "path", "on_step")


class QuantizationCallback(Callback, ABC):
    """What the callbacks share: when they quantize, which network, on which images.

    **When.** In ``fit``, when training ends: a copy of the best weights of the first ModelCheckpoint that monitors
    something, if there is one. In ``validate``, ``test`` and ``predict``, before the loop: the module's network has the
    quantized one's values until the loop is over. What is quantized is not quantized again while the weights are the
    same.

    **Which network.** ``network`` names the module's attribute. Empty: what the module calls its ``eval_network``, as
    kdq's modules do (with EMA, the averaged one; of DML's two, the better one), else the module itself, called on
    images.

    **Images.** Calibration images come from ``calibration``, else from the datamodule's ``calibration_dataloader()``,
    else from the first validation loader, without labels; never from the training loader, whose images are augmented. A
    batch is a tensor, tuple, list or dictionary (:mod:`kdq.quant.batches`); a module with other ones has methods
    ``images_of(batch)`` and, for a search, ``labels_of(batch)``.

    All this is checked when a fit starts. Several processes bring their shares of the images, and all get the same
    result.

    Args:
        calibration, calibration_images: batches for the quantizer, and how many of their images, of all processes
            together.
        path: the packed file, ``{bits}`` standing for its width, below ``trainer.default_root_dir``; None: no file.
        on_step: called with a line of text for every layer or step that is done.

    Attributes:
        results: what was made, by its width (of a search: by ``"searched"``); empty before.
        files: the packed files, by the same names.
    """

    def __init__(
        self,
        names: Sequence[int | str],
        config: QuantConfig,
        network: str = "",
        calibration: Iterable[Any] | None = None,
        calibration_images: int = 1024,
        path: str | Path | None = "quantized-{bits}.kdq",
        on_step: Callable[[str], object] = str,  # does nothing
    ) -> None:
        if isinstance(calibration_images, bool) or not isinstance(calibration_images, int) or calibration_images < 1:
            raise KdqError(f"calibration_images={calibration_images!r} must be at least 1")
        if isinstance(calibration, Iterator):
            raise KdqError("calibration is an iterator, good for one pass: give a DataLoader or a list of batches")
        if path is not None and len(names) > 1 and "{bits}" not in str(path):
            raise KdqError(f"path={str(path)!r} is one file for several widths: write {{bits}} where the width goes")
        self.names, self.config, self.network, self.path, self.on_step = tuple(names), config, network, path, on_step
        self.calibration, self.calibration_images = calibration, calibration_images
        self.results: dict[Any, Any] = {}
        self.files: dict[Any, Path] = {}
        self._measured: Any = self.names[0] if len(self.names) == 1 else ...
        self._float: dict[str, Tensor] = {}  # the state that the results were made of
        self._standing_in, self._within_the_epoch = ExitStack(), ExitStack()
        self._restored: set[str] = set()
        self._said = False

    @property
    def result(self) -> Any:
        """The one result, of a single width or of a search; None before."""
        if len(self.names) > 1:
            raise KdqError("there are several widths: take results[bits]")
        return self.results.get(self.names[0])

    def use(self, name: int | str | None) -> None:
        """Let the next loops of ``validate``, ``test`` and ``predict`` run the network of one width; None: the float
        one."""
        if name is not None and name not in self.names:
            raise KdqError(f"use({name!r}): there is {', '.join(map(str, self.names))}, and None for the float network")
        self._measured = name

    @abstractmethod
    def quantized(self, network: nn.Module, loaders: Loaders) -> Mapping[Any, Any]:
        """The results of ``network``, by name."""

    def check(self, network: nn.Module, loaders: Loaders) -> None:
        """Refuse, before anything is trained, what :meth:`quantized` could not do; ``loaders`` give one image."""
        check_network(network, next(loaders.calibration()), self.config)

    def logged(self) -> list[dict[str, float]]:
        """What loggers are told: every layer's error, and for a search its steps."""
        reports = {name: result.report for name, result in self.results.items()}
        layers = range(len(next(iter(reports.values())).layers))
        errors = {f"quantize/error_{name}": [x.error for x in report.layers] for name, report in reports.items()}
        return [{"quantize/layer": i} | {name: values[i] for name, values in errors.items()} for i in layers]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # What averages weights moves them when training ends: this one comes behind it, before the checkpoints.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks = sorted(callbacks, key=lambda each: (isinstance(each, Checkpoint), each is self))
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        folder = str(trainer.default_root_dir)
        if "://" in folder and self.path is not None and not Path(self.path).is_absolute():
            raise KdqError(f"packed files are written to this machine, not to {folder}: give path=/FOLDER/{{bits}}.kdq")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._find(pl_module)  # once the module's own setup and configure_model have run

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restored = {checkpoint.best_model_path for checkpoint in checkpoints(trainer)}
        with torch.random.fork_rng(devices=[]):  # a loader draws from it
            self.check(self._find(pl_module), self._loaders(trainer, pl_module, 1))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with state_kept(pl_module):
            load_best(pl_module, trainer, self._restored)
            self._make(self._find(pl_module), trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # not within a fit
            self._stand_in(trainer, pl_module)

    def _find(self, module: L.LightningModule) -> nn.Module:
        if self.network:
            try:
                found: Any = module.get_submodule(self.network)
            except AttributeError as error:
                names = ", ".join(name for name, _ in module.named_children())
                raise KdqError(
                    f"{type(self).__name__}(network={self.network!r}): the module has no such network; it has {names}"
                ) from error
        else:
            found = getattr(module, "eval_network", module)
        return unwrapped(found)

    def _loaders(self, trainer: L.Trainer, module: L.LightningModule, count: int) -> Loaders:
        loaders = Loaders(type(self).__name__, trainer, module, self.calibration, count)
        if loaders.calibrates_with_validation and not self._said:
            self._said = True
            rank_zero_info(f"{loaders.user} calibrates with images of the validation loader, without their labels")
        return loaders

    def _make(self, network: nn.Module, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._float = copy.deepcopy(network.state_dict())
        self.results = dict(self.quantized(network, self._loaders(trainer, module, self.calibration_images)))
        if not trainer.is_global_zero:
            return
        for name, result in self.results.items() if self.path is not None else ():
            label = f"{name}bit" if isinstance(name, int) else name
            self.files[name] = Path(trainer.default_root_dir) / str(self.path).replace("{bits}", label)
            save_packed(result.network, self.files[name])
        for logger in trainer.loggers:
            for metrics in self.logged():
                logger.log_metrics(metrics)

    def _stand_in(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._measured is ...:
            raise KdqError(f"several widths were asked for: say which one to measure, use({self.names[0]})")
        if self._measured is None:
            return
        network = self._find(pl_module)
        with torch.inference_mode(False), torch.no_grad():  # what the loop's own mode makes cannot be trained
            if not self.results or not same_state(self._float, network.state_dict()):
                self._make(network, trainer, pl_module)
            self._standing_in.enter_context(standing_in(network, self.results[self._measured].network))

    def _stand_in_again(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Weights that others, behind whom this one comes, have swapped in are theirs again before they swap them back.
        if trainer.state.fn == TrainerFn.FITTING or self._measured is None:
            return
        network, quantized = self._find(pl_module), self.results[self._measured].network
        with torch.inference_mode(False), torch.no_grad():
            self._within_the_epoch.enter_context(state_kept(network))
            network.load_state_dict(quantized.state_dict())
        order: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._standing_in.callback(setattr, trainer, "callbacks", order)
        trainer.callbacks = sorted(order, key=lambda each: each is not self)  # type: ignore[attr-defined]

    def _step_back_once(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.inference_mode(False):
            self._within_the_epoch.close()

    def _step_back(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException | None = None
    ) -> None:
        with torch.inference_mode(False):
            self._within_the_epoch.close()
            self._standing_in.close()

    on_test_start = on_predict_start = _stand_in
    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _stand_in_again
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _step_back_once
    on_validation_end = on_test_end = on_predict_end = on_exception = _step_back


class PostTrainingQuantization(QuantizationCallback):
    """Quantizes when a fit ends, and measures the quantized network in ``validate``, ``test`` and ``predict``.

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> quantization = PostTrainingQuantization(bits=[2, 4], solver="gptq", path=None)
        >>> trainer = L.Trainer(
        ...     max_epochs=1, callbacks=[quantization], logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False
        ... )
        >>> module = BoringModel()
        >>> trainer.fit(module)
        >>> {bits: result.report.avg_bits for bits, result in quantization.results.items()}
        {2: 2.0, 4: 4.0}
        >>> quantization.use(4)
        >>> _ = trainer.test(module, verbose=False)  # of the network with 4 bits

    See :class:`QuantizationCallback` for the network, the images and the checks.

    Args:
        bits: a width from 2 to 32, or several, quantized in one pass; :meth:`use` says which of them a loop measures.
        config: how, a :class:`~kdq.quant.config.QuantConfig`.
        options: its fields, and what :class:`QuantizationCallback` takes.
    """

    results: dict[int, Quantized]

    def __init__(self, bits: int | Sequence[int] = 4, config: QuantConfig | None = None, **options: Any) -> None:
        shared = {name: options.pop(name) for name in SHARED if name in options}
        widths = [check_bits(width) for width in (bits if isinstance(bits, Sequence) else [bits])]
        if not widths:
            raise KdqError("bits is empty: give a width from 2 to 32, or a list of them")
        super().__init__(list(dict.fromkeys(widths)), configured(config, options, ("bits", *SHARED)), **shared)

    def quantized(self, network: nn.Module, loaders: Loaders) -> Mapping[int, Quantized]:
        widths = [int(name) for name in self.names]
        found = quantize_widths(network, loaders.calibration(), widths, self.config, on_layer=self.on_step)
        return dict(zip(widths, found, strict=True))


class GreedyBitSearch(QuantizationCallback):
    """Searches each layer's width within a budget and quantizes with them, when a fit ends and before evaluations.

        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from kdq.distill import CrossEntropy
        >>> module = CrossEntropy(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), num_classes=3)
        >>> loader = DataLoader(TensorDataset(torch.randn(64, 8), torch.arange(64) % 3), 16)
        >>> search = GreedyBitSearch(avg_bits=3, solver="gptq", path=None)
        >>> trainer = L.Trainer(
        ...     max_epochs=1, callbacks=[search], logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False
        ... )
        >>> trainer.fit(module, loader, loader)
        >>> search.result.report.avg_bits <= 3 and len(search.result.found.points) > 2
        True

    See :class:`QuantizationCallback` for the network, the images and the checks. The images that choose are the first
    ones of the first validation loader. If calibration images come from there too, they are its images 0, 2, 4
    ..., and those that choose 1, 3, 5 ...: no image does both.

    Args:
        search: budget, candidates and method, a :class:`~kdq.quant.bitsearch.config.SearchConfig`.
        config: how layers are quantized, a :class:`~kdq.quant.config.QuantConfig`.
        trace, key: see :func:`kdq.quant.bitsearch.mixed.search_bits`: a killed search goes on from its trace.
        options: fields of both configs, and what :class:`QuantizationCallback` takes.
    """

    results: dict[str, MixedPrecision]

    def __init__(
        self,
        search: SearchConfig | None = None,
        config: QuantConfig | None = None,
        *,
        trace: Path | None = None,
        key: str = "",
        **options: Any,
    ) -> None:
        shared = {name: options.pop(name) for name in SHARED if name in options}
        asked = {name: options.pop(name) for name in SEARCH_OPTIONS if name in options}
        how = configured(config, options, (*SEARCH_OPTIONS, "trace", "key", *SHARED))
        self.search = SearchConfig(**(({} if search is None else vars(search)) | asked))
        self.trace, self.key = trace, key
        shared.setdefault("on_step", rank_zero_info)
        super().__init__([SEARCHED], how, **shared)

    def check(self, network: nn.Module, loaders: Loaders) -> None:
        super().check(network, loaders)
        loaders.disjoint(1)
        check_average(network, quantizable_layers(network, self.config.keep_float), self.search, self.config)

    def quantized(self, network: nn.Module, loaders: Loaders) -> Mapping[str, MixedPrecision]:
        calibration, validation = loaders.disjoint(self.search.validation_images)
        options: dict[str, Any] = {"trace": self.trace, "key": self.key, "on_step": self.on_step}
        return {SEARCHED: search_bits(network, calibration, validation, self.search, self.config, **options)}

    def logged(self) -> list[dict[str, float]]:
        return [*self.results[SEARCHED].metrics(), *super().logged()]
