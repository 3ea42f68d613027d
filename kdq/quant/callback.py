"""The bit search as a Lightning callback, for any LightningModule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from kdq.quant.batches import first_pairs
from kdq.quant.bitsearch.config import SEARCH_OPTIONS, SearchConfig
from kdq.quant.bitsearch.mixed import MixedPrecision, search_bits
from kdq.quant.config import OPTIONS, QuantConfig, refuse_unknown
from kdq.quant.distributed import share
from kdq.utils.errors import KdqError


class GreedyBitSearch(Callback):
    """When training ends, searches each layer's width on a copy of the best weights and quantizes that copy.

        search = GreedyBitSearch(avg_bits=3)
        trainer = L.Trainer(callbacks=[search, ModelCheckpoint(monitor="val/acc", mode="max")])
        trainer.fit(module, train_loader, val_loader)
        kdq.save(search.result.network, "model.kdq")

    It runs in ``on_train_end``, while the model is still on its device and the process group still stands, on every
    rank alike: a rank that skipped it would leave the others waiting. Each brings its own share of the images, sums
    and losses are those of all, and so all ranks hold the same result. The model in training is left as it is. Each
    step is logged as ``bits/...``.

    Args:
        network: name of the module's attribute that holds the network; empty: the module itself, called on images.
        calibration_images: taken from the training loader, by all ranks together.
        trace: every evaluation is written to this file at once, and a later search of the same weights takes what it
            finds there if it gets the same images: a training loader that shuffles gives others.
        options: fields of :class:`~kdq.quant.bitsearch.config.SearchConfig` and of
            :class:`~kdq.quant.config.QuantConfig`.

    Attributes:
        result: the :class:`~kdq.quant.bitsearch.mixed.MixedPrecision` found; None before.
    """

    def __init__(
        self, network: str = "", calibration_images: int = 1024, trace: Path | None = None, **options: Any
    ) -> None:
        self.network, self.calibration_images, self.trace = network, calibration_images, trace
        self.result: MixedPrecision | None = None
        self._restored: set[str] = set()
        refuse_unknown(options, (*SEARCH_OPTIONS, *OPTIONS))
        self.search = SearchConfig(**{name: value for name, value in options.items() if name in SEARCH_OPTIONS})
        self.config = QuantConfig(**{name: value for name, value in options.items() if name in OPTIONS})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        try:
            pl_module.get_submodule(self.network)
        except AttributeError as error:
            raise KdqError(f"GreedyBitSearch(network={self.network!r}): the module has no such network") from error

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        checkpoints = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
        self._restored = {checkpoint.best_model_path for checkpoint in checkpoints}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = self._best_copy(trainer, pl_module)
        training, validation = trainer.train_dataloader, trainer.val_dataloaders
        if isinstance(validation, (list, tuple)):
            validation = validation[0]
        if training is None or validation is None:
            raise KdqError("GreedyBitSearch needs a training and a validation loader: pass both to trainer.fit")
        device = pl_module.device
        self.result = search_bits(
            model.to(device),
            [images.to(device) for images, _ in first_pairs(training, share(self.calibration_images))],
            validation,
            self.search,
            self.config,
            trace=self.trace,
            on_step=lambda line: rank_zero_info(f"bit search: {line}"),
        )
        for logger in trainer.loggers if trainer.is_global_zero else []:
            for metrics in self.result.metrics():
                logger.log_metrics(metrics)

    def _best_copy(self, trainer: L.Trainer, module: L.LightningModule) -> nn.Module:
        """The network with the best weights of the first ModelCheckpoint that monitors something, if there is one."""
        module = copy.deepcopy(module)
        monitors = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
        best = next((c.best_model_path for c in monitors if Path(c.best_model_path).is_file()), None)
        if best is not None:
            # What this run has written holds whatever hyperparameters the module saves; a file that only a resumed
            # checkpoint names may be anybody's, and no code in it runs.
            stored = torch.load(best, map_location="cpu", weights_only=best in self._restored)
            module.load_state_dict(stored["state_dict"])
        network = module.get_submodule(self.network)
        return network.eval()
