"""Methods that train parts of their own beside the student, built by a look at the first images."""

from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from kdq.distill.checkpoint import rebuilt
from kdq.distill.learner import Learner
from kdq.distill.module import DistillationModule
from kdq.utils.errors import KdqError


class Connected(DistillationModule):
    """What such methods share; one is a subclass with :meth:`look` and :meth:`parts`.

    The parts are built by :meth:`connect` when ``trainer.fit`` starts, from two images of the first batch. They are
    trained with the student and lie in the module's checkpoints, beside the student: its weights alone are the product.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: What :meth:`look` has seen, such as the shapes of layers' features by name; empty until connected.
        self.layers: dict[str, Any] = {}
        self.projectors = nn.ModuleList()

    def look(self, images: Tensor) -> dict[str, Any]:
        """What the parts are built from, as plain values, of what the networks make of ``images``.

        Raises:
            KdqError: the layers cannot be found or compared; says which names to give.
        """
        raise NotImplementedError

    def parts(self) -> Iterable[nn.Module]:
        """The parts, built from :attr:`layers`."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and not self.layers:
            self.check_not_copied("connect(images)")
            self.connect(self.first_images())

    def check_not_copied(self, call: str) -> None:
        """Refuse a callback that averages weights: it has copied the module, without what ``call`` makes."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if getattr(callback, "_average_model", None) is not None:
                raise KdqError(f"{type(callback).__name__} needs all parts of the module: call its {call} before fit")

    def connect(self, images: Tensor) -> Self:
        """Look at ``images`` and build the parts."""
        self.layers = self.look(images)
        self.projectors = self._built()
        return self

    def _built(self) -> nn.ModuleList:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return nn.ModuleList(self.parts())

    def trained_parameters(self, learner: Learner) -> Iterator[nn.Parameter]:
        yield from super().trained_parameters(learner)
        yield from self.projectors.parameters()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["layers"] = self.layers

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.layers:
            self.layers = checkpoint["layers"]
            self.projectors = rebuilt(checkpoint, "projectors", self._built)
