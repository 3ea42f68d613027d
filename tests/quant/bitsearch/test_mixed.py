"""The bit search on real networks, by hand and as a callback of a foreign LightningModule."""

from __future__ import annotations

import copy
import json
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdq
from kdq.data.images import Images
from kdq.models import CifarResNet
from kdq.quant.bitsearch.bank import fill_bank
from kdq.quant.bitsearch.config import SearchConfig
from kdq.quant.bitsearch.mixed import search_bits
from kdq.quant.bitsearch.search import Measure
from kdq.quant.bitsearch.stitch import Stitched
from kdq.quant.callback import GreedyBitSearch
from kdq.quant.config import QuantConfig
from kdq.quant.network import float_weights, quantizable_layers, quantize, quantize_widths, with_quantized_weights
from kdq.utils.errors import KdqError
from kdq.utils.operations import multiply_adds

WIDTHS = (2, 3, 4, 6, 8)


@pytest.fixture(scope="module")
def trained(images: Images) -> nn.Module:
    """A small network that knows the digits a little."""
    torch.manual_seed(0)
    network = CifarResNet(8, 10, in_channels=1, width=0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    pixels, labels = images.set.train_images, images.set.train_labels
    for _ in range(12):
        for chosen in images.split.train[torch.randperm(len(images.split.train))].split(64):
            loss = F.cross_entropy(network(images.preprocess(pixels[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def data(images: Images) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    calibration = [inputs for inputs, _ in images.calibration(256, 0, torch.device("cpu"))]
    return calibration, list(images.evaluation("val", torch.device("cpu")))


def _direct(model: nn.Module, network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Measure:
    with torch.no_grad():
        loss = sum(float(F.kl_div(network(x).log_softmax(1), model(x).softmax(1), reduction="sum")) for x, _ in batches)
        right = sum(float((network(x).argmax(1) == y).sum()) for x, y in batches)
    count = sum(len(y) for _, y in batches)
    return Measure(loss / count, 100 * right / count)


@pytest.mark.parametrize("cache_bytes", [0, 200_000, 2**30])
def test_stitched_losses_are_those_of_networks_built_one_by_one(
    trained: nn.Module, data: Any, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdq.quant.bitsearch.stitch.CACHE_BYTES", cache_bytes)
    calibration, validation = data
    validation = [(x[i : i + 50], y[i : i + 50]) for x, y in validation for i in range(0, len(x), 50)]
    versions = {
        bits: version for bits, (version, _) in zip(WIDTHS, quantize_widths(trained, calibration, WIDTHS), strict=True)
    }
    layers = quantizable_layers(trained)
    bank = {name: {bits: version.quantized_weights[name] for bits, version in versions.items()} for name in layers}
    stitched = Stitched(trained, bank, validation)
    generator = torch.Generator().manual_seed(0)
    assignment = dict.fromkeys(layers, 8)
    for _ in range(8):
        changed = layers[int(torch.randint(len(layers), (1,), generator=generator))]
        assignment = {**assignment, changed: WIDTHS[int(torch.randint(5, (1,), generator=generator))]}
        network = with_quantized_weights(trained, {name: bank[name][bits] for name, bits in assignment.items()})
        expected, found = _direct(trained, network, validation), stitched(assignment)
        assert found.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-6)
        assert found.top1 == expected.top1


def test_bops_are_bits_times_multiply_adds(trained: nn.Module, data: Any) -> None:
    image = torch.zeros(1, 1, 8, 8)
    table = fill_bank(trained, data[0], [2, 8]).prices("bops", trained, image)
    assert sum(row[8] for row in table.values()) == 8 * multiply_adds(trained, image)
    assert all(row[8] == 4 * row[2] for row in table.values())


@pytest.mark.parametrize("budget", [{"avg_bits": 3.0}, {"size_bytes": 17_000}, {"max_drop": 2.0}])
@pytest.mark.parametrize("cost", ["weight_bits", "bytes", "bops"])
def test_budgets_hold_on_the_file_itself(trained: nn.Module, data: Any, tmp_path: Path, budget: Any, cost: str) -> None:
    calibration, validation = data
    found = search_bits(trained, calibration, validation, SearchConfig(candidates=WIDTHS, cost=cost, **budget))
    size = kdq.save(found.network, tmp_path / "model.kdq")
    chosen = found.found.points.index(
        next(p for p in found.found.points if p.assignment == found.found.chosen.assignment)
    )
    assert size == pytest.approx(found.size_bytes[chosen], rel=0.05)  # but for the header's length
    assert found.report.avg_bits == pytest.approx(found.avg_bits[chosen])
    if "avg_bits" in budget:
        assert found.report.avg_bits <= 3.0
    if "size_bytes" in budget:
        assert size <= 17_000
    assert {layer.name: layer.bits for layer in found.report.layers} == found.found.chosen.assignment


def test_any_point_of_the_frontier_becomes_a_network_without_searching(
    trained: nn.Module, data: Any, tmp_path: Path
) -> None:
    calibration, validation = data
    found = search_bits(trained, calibration, validation, SearchConfig(2.5, candidates=WIDTHS))
    found.write_frontier(tmp_path / "frontier.json")
    stored = json.loads((tmp_path / "frontier.json").read_text())
    assert len(stored["points"]) == len(found.found.points)
    averages = [point["avg_bits"] for point in stored["points"]]
    assert averages[:-1] == sorted(averages[:-1], reverse=True)
    assert averages[-2] <= averages[-1] <= 2.5  # what the last step left of the budget was given back
    middle = stored["points"][len(averages) // 2]
    _, report = quantize(trained, calibration, middle["assignment"])
    assert report.avg_bits == pytest.approx(middle["avg_bits"])


def test_a_trace_of_another_search_is_refused(trained: nn.Module, data: Any, tmp_path: Path) -> None:
    calibration, validation = data
    options = {"search": SearchConfig(4.0, candidates=WIDTHS), "trace": tmp_path / "trace.json"}
    first = search_bits(trained, calibration, validation, key="a", **options)
    again = search_bits(trained, calibration, validation, key="a", **options)
    assert again.found == first.found
    with pytest.raises(KdqError, match="belongs to another model"):
        search_bits(trained, calibration, validation, key="b", **options)


def test_a_trace_without_a_key_knows_its_network_and_its_images(trained: nn.Module, data: Any, tmp_path: Path) -> None:
    calibration, validation = data
    options = {"search": SearchConfig(4.0, candidates=WIDTHS), "trace": tmp_path / "trace.json"}
    first = search_bits(trained, calibration, validation, **options)
    assert search_bits(trained, calibration, validation, **options).found == first.found
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.get_parameter("fc.bias")[0] += 1e-3  # no width changes it
    for model, calibrated, measured in (
        (other, calibration, validation),
        (trained, [calibration[0][:200]], validation),
        (trained, calibration, [(images[1:], labels[1:]) for images, labels in validation]),
    ):
        begun = json.loads(options["trace"].read_text())
        expected = search_bits(model, calibrated, measured, **(options | {"trace": None})).found
        assert search_bits(model, calibrated, measured, **options).found == expected
        assert json.loads(options["trace"].read_text())["key"] != begun["key"]


class _Foreign(L.LightningModule):
    """Somebody else's module."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 64, 10)
        )
        self.save_hyperparameters({"data": Path("images")})  # nothing that torch reads weights-only

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.backbone(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        accuracy = (self.backbone(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val/acc", accuracy + (self.current_epoch == 1))  # the second of three epochs is made the best

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def test_the_callback_quantizes_a_copy_of_a_foreign_modules_best_weights(images: Images, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = images.preprocess(images.set.train_images)
    sets = (
        TensorDataset(inputs[:512], images.set.train_labels[:512]),
        TensorDataset(inputs[-200:], images.set.train_labels[-200:]),
    )
    module, kept = _Foreign(), {}

    class Remember(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            kept[trainer.current_epoch] = {k: v.clone() for k, v in pl_module.state_dict().items()}

    search = GreedyBitSearch("backbone", 128, validation_images=200, avg_bits=3.0, candidates=[2, 3, 4, 8])
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[
            search,
            Remember(),
            ModelCheckpoint(tmp_path / "last"),  # monitors nothing
            ModelCheckpoint(tmp_path / "best", monitor="val/acc", mode="max"),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(sets[0], 64), DataLoader(sets[1], 100))
    assert search.result is not None
    assert search.result.report.avg_bits <= 3.0
    bias = search.result.network.state_dict()["0.bias"]
    assert torch.equal(bias, kept[1]["backbone.0.bias"])
    assert all(torch.equal(value, kept[2][name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("validated", [True, False])
def test_the_callback_logs_its_steps_and_says_what_it_lacks(images: Images, tmp_path: Path, validated: bool) -> None:
    pixels, labels = images.preprocess(images.set.train_images[:64]), images.set.train_labels[:64]
    loader = DataLoader(TensorDataset(pixels, labels), 32)
    search = GreedyBitSearch("backbone", 64, validation_images=64, avg_bits=3.0, candidates=[2, 3, 4, 8])
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        callbacks=[search],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if not validated:
        with pytest.raises(KdqError, match="needs a training and a validation loader: pass both"):
            trainer.fit(_Foreign(), loader)
        return
    trainer.fit(_Foreign(), loader, [loader, loader])  # the first of several validates
    (file,) = tmp_path.rglob("metrics.csv")
    logged = pd.read_csv(file)["bits/avg_bits"].dropna().tolist()
    assert search.result is not None
    assert logged == pytest.approx(search.result.avg_bits)
    assert len(logged) > 2


def _rank(rank: int, folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    training, validation = torch.load(f"{folder}/case.pt")
    torch.manual_seed(0)
    search = GreedyBitSearch("backbone", 128, validation_images=200, avg_bits=3.0, candidates=[2, 3, 4, 8])
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=0.5,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        callbacks=[search],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(_Foreign(), DataLoader(TensorDataset(*training), 32), DataLoader(TensorDataset(*validation), 50))
    assert search.result is not None
    found = search.result.found
    torch.save((asdict(found), search.result.network.state_dict()), f"{folder}/{rank}.pt")


def test_the_callback_finds_the_same_on_every_rank(images: Images, tmp_path: Path) -> None:
    """Each rank has half of the images, and what it finds is what one process finds on all of them."""
    pixels, labels = images.preprocess(images.set.train_images), images.set.train_labels
    training, validation = (pixels[:512], labels[:512]), (pixels[-200:], labels[-200:])
    torch.save((training, validation), tmp_path / "case.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (str(tmp_path), port), nprocs=2)
    (one, state), (other, other_state) = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(2))
    assert one == other
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())
    assert len(one["points"]) > 3
    top1 = one["chosen"]["measure"]["top1"]
    assert top1 * 200 / 100 == pytest.approx(round(top1 * 200 / 100))  # counted over 200 images, not 100


def test_stitched_losses_of_two_processes_are_those_of_one(trained: nn.Module, data: Any, tmp_path: Path) -> None:
    calibration, validation = data
    images, labels = (torch.cat(parts) for parts in zip(*validation, strict=True))
    torch.save((trained, calibration, images[:200], labels[:200]), tmp_path / "case.pt")
    mp.spawn(_search_rank, (str(tmp_path),), nprocs=2)
    alone = search_bits(trained, calibration, [(images[:200], labels[:200])], SearchConfig(3.0, candidates=WIDTHS))
    for rank in range(2):
        assignments, losses = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert assignments == [point.assignment for point in alone.found.points]
        expected = [point.measure.loss for point in alone.found.points if point.measure is not None]
        assert losses == pytest.approx(expected, rel=1e-3, abs=1e-6)


def _search_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, calibration, images, labels = torch.load(f"{folder}/case.pt", weights_only=False)
    batches = [batch[rank::2] for batch in calibration]
    validation = [(images[rank::2], labels[rank::2])]
    # A file of its own for each process: the second has none of what the first remembers.
    trace = Path(folder) / f"trace{rank}.json"
    options = {"search": SearchConfig(3.0, candidates=WIDTHS), "trace": trace}
    found = search_bits(model, batches, validation, **options).found
    assert trace.exists() == (rank == 0)
    written = trace.stat().st_mtime_ns if rank == 0 else 0
    assert search_bits(model, batches, validation, **options).found == found
    assert rank > 0 or trace.stat().st_mtime_ns == written  # nothing was measured again
    losses = [point.measure.loss for point in found.points if point.measure is not None]
    torch.save(([point.assignment for point in found.points], losses), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        {"alphabet": "paper"},
        {"first_last_bits": 8},
        {"alphabet": "ternary"},
        {"keep_float": ["conv1"], "float_dtype": "bf16"},
    ],
)
def test_a_budget_of_bits_counts_what_is_stored(trained: nn.Module, data: Any, options: dict[str, Any]) -> None:
    calibration, validation = data
    found = search_bits(
        trained, calibration, validation, SearchConfig(5.0, candidates=(2, 4, 8)), QuantConfig(**options)
    )
    assert found.avg_bits[-1] == pytest.approx(found.report.avg_bits)
    assert found.report.avg_bits <= 5


@pytest.mark.parametrize("budget", [{"avg_bits": 2.2}, {"size_bytes": 15_000}])
def test_budgets_that_exclude_each_other_are_refused(trained: nn.Module, data: Any, budget: dict[str, Any]) -> None:
    calibration, validation = data
    with pytest.raises(KdqError, match="max_drop=0 is reached before the other limits are met"):
        search_bits(trained, calibration, validation, SearchConfig(candidates=(2, 8), max_drop=0.0, **budget))


def test_float_weights_that_layers_share_count_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    network[1].weight = network[0].weight  # type: ignore[assignment]
    assert float_weights(network, ["2"]) == 16


def test_layers_left_float_are_part_of_the_budget(trained: nn.Module, data: Any) -> None:
    calibration, validation = data
    with pytest.raises(KdqError, match=r"budget of 3 bits on average: the least with .* is \d.*left float included"):
        search_bits(
            trained, calibration, validation, SearchConfig(3.0, candidates=(2, 8)), QuantConfig(keep_float=["layer3"])
        )


def test_a_bank_of_other_candidates_is_refused(trained: nn.Module, data: Any) -> None:
    calibration, validation = data
    bank = fill_bank(trained, calibration, [2, 4])
    with pytest.raises(KdqError, match=r"the bank has other candidates than \[4, 8\]"):
        search_bits(trained, calibration, validation, SearchConfig(4.0, candidates=(4, 8)), bank=bank)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "has no budget"),
        ({"avg_bits": 3, "solvr": "rtn"}, r"unknown option solvr \(did you mean solver"),
        ({"avg_bits": 3, "cost": "joules"}, "cost='joules' is unknown"),
    ],
)
def test_the_callback_refuses_mistakes_before_the_training(options: dict[str, Any], says: str) -> None:
    with pytest.raises(KdqError, match=says):
        GreedyBitSearch(**options)
