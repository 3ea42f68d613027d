"""Networks stitched together from layers that were quantized once, at every width, and their loss."""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq.quant.batches import logits_of
from kdq.quant.bitsearch.trace import Assignment, Measure
from kdq.quant.calibrate.layer import EachLayer
from kdq.quant.calibrate.order import eager
from kdq.quant.distributed import gathered, summed
from kdq.quant.layers import weight_of
from kdq.quant.packing.packed import QuantizedWeight
from kdq.quant.packing.weights import copied

#: Bytes of layer outputs kept between evaluations.
CACHE_BYTES = 2 * 2**30


class Stitched:
    """``stitched(assignment)`` measures the network whose layers have the assignment's widths.

    The loss is the mean KL divergence from the float network's predictions, in nats: smooth in every weight, unlike
    the accuracy, and free of labels. Two assignments in a row mostly agree on the first layers: the outputs of those
    are kept from the last evaluation, and only what follows the first difference is computed again.

    Where torch.distributed runs, every process brings batches of its own and all get the measures of all batches.

    Args:
        model: the float network; it is not modified.
        bank: ``bank[layer][bits]``, the layers in any order.
        batches: ``(images, labels)``, kept on the model's device; they choose between networks, so they must be
            neither calibration nor test images.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Mapping[str, Mapping[int, QuantizedWeight]],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        self.bank = bank
        self.network = copied(model).eval()
        device = next(model.parameters()).device
        self.batches = [(images.to(device), labels.to(device)) for images, labels in batches]
        self._names = {id(weight_of(self.network, name)): name for name in bank}
        self._assigned: Assignment = {}
        self._calls: list[str] = []
        self._outputs: list[dict[int, Tensor]] = [{} for _ in self.batches]
        self._free = self._valid = 0
        self.reference = self._answers()
        self._free = CACHE_BYTES

    @torch.no_grad()
    def __call__(self, assignment: Assignment) -> Measure:
        changed = {name for name, bits in assignment.items() if self._assigned.get(name) != bits}
        for name in changed:
            weight_of(self.network, name).copy_(self.bank[name][assignment[name]].decode())
        self._assigned = dict(assignment)
        # Outputs are valid up to the first call of a changed layer.
        self._valid = next((i for i, name in enumerate(self._calls) if name in changed), len(self._calls))
        return self._measured(self._answers())

    def _measured(self, answers: list[Tensor]) -> Measure:
        # Process groups of GPUs add up nothing that is elsewhere.
        sums = torch.zeros(3, dtype=torch.float64, device=self.batches[0][0].device)
        for log_p, reference, (_, labels) in zip(answers, self.reference, self.batches, strict=True):
            sums[0] += F.kl_div(log_p, reference, reduction="sum", log_target=True)
            sums[1] += (log_p.argmax(1) == labels).sum()
            sums[2] += len(labels)
        loss, right, count = summed(sums).tolist()
        return Measure(loss / count, 100 * right / count)

    def forget(self) -> None:
        """Give the kept outputs back, gigabytes that would otherwise live until the garbage collector comes by."""
        for kept in self._outputs:
            kept.clear()
        self._free = 0

    def accuracy(self) -> float:
        """Top-1 of the float network on the same images, in percent."""
        return self._measured(self.reference).top1

    def digest(self) -> str:
        """SHA-256 of everything that the measures depend on; the same in every process."""
        sha = hashlib.sha256()
        for name, choices in self.bank.items():
            for bits, weight in choices.items():
                sha.update(f"{name} {bits} {tuple(weight.shape)}".encode())
                sha.update(_bytes(weight.decode()))
        # The float network's answers stand for what is not quantized of it.
        for (images, labels), log_p in zip(self.batches, self.reference, strict=True):
            sha.update(f"{tuple(images.shape)}".encode())
            for tensor in (images, labels, log_p):
                sha.update(_bytes(tensor))
        return hashlib.sha256(repr(gathered(sha.hexdigest())).encode()).hexdigest()

    @torch.no_grad()
    def _answers(self) -> list[Tensor]:
        """Log-probabilities of every batch, by the network as it is now."""
        found = []
        for index, (images, _) in enumerate(self.batches):
            self._batch, self._next = index, 0
            with eager(), EachLayer(self.layer):
                found.append(logits_of(self.network(images)).float().log_softmax(1))
        return found

    def layer(self, weight: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """The output of a layer that is about to ``run``, kept from before where nothing changed."""
        if (name := self._names.get(id(weight))) is None:
            return run()
        call, self._next = self._next, self._next + 1
        if call == len(self._calls):
            self._calls.append(name)
        kept = self._outputs[self._batch]
        if call < self._valid and call in kept:
            return kept[call].clone()  # what follows may write in place
        output = run()
        if call in kept:
            kept[call].copy_(output)
        elif self._free >= output.nbytes:
            self._free -= output.nbytes
            kept[call] = output.clone()
        return output


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
