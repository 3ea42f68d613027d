"""The bit search on real networks, by hand and as a callback of a foreign LightningModule."""

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import kdq
from kdq.data.images import Images
from kdq.models import CifarResNet
from kdq.quant.bitsearch.bank import check_average, fill_bank
from kdq.quant.bitsearch.config import SearchConfig
from kdq.quant.bitsearch.mixed import search_bits
from kdq.quant.bitsearch.stitch import Stitched
from kdq.quant.bitsearch.trace import Measure
from kdq.quant.config import QuantConfig
from kdq.quant.layers import left_float, quantizable_layers
from kdq.quant.network import quantize, quantize_widths
from kdq.quant.operations import multiply_adds
from kdq.quant.packing.weights import with_quantized_weights
from kdq.utils.errors import KdqError

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
    assert [(x.name, x.shape) for x in left_float(network, ["2"])] == [("0.weight", (4, 4))]


def test_every_assignments_own_average_is_a_budget_that_it_meets() -> None:
    missed = []
    for width in range(3, 40):
        network = nn.Sequential(nn.Linear(7, width), nn.Linear(width, 3))
        bank = fill_bank(network, [torch.randn(4, 7)], [2, 3, 5], QuantConfig(solver="rtn"))
        for first, last in itertools.product([2, 3, 5], repeat=2):
            own = {"0": first, "1": last}
            budget = bank.budget(SearchConfig(avg_bits=bank.avg_bits(own)), 0, 100.0)
            missed += [] if budget.met(own) else [(width, own)]
    assert not missed


@pytest.mark.parametrize("width", range(3, 20))
def test_the_least_average_that_a_refusal_names_is_enough(width: int) -> None:
    network = nn.Sequential(nn.Linear(7, width), nn.Linear(width, 3))
    with pytest.raises(KdqError, match="the least with these") as refused:
        check_average(network, ["1"], SearchConfig(avg_bits=2.0), QuantConfig())
    (least,) = re.findall(r"candidates is ([\d.]+)", str(refused.value))
    check_average(network, ["1"], SearchConfig(avg_bits=float(least)), QuantConfig())


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


def test_a_bank_of_another_key_is_not_taken(trained: nn.Module, data: Any, tmp_path: Path) -> None:
    """Also once the trace, whose refusal says so, was deleted."""
    calibration, validation = data
    trace, search = tmp_path / "trace.json", SearchConfig(4.0, candidates=(2, 8))
    other = copy.deepcopy(trained)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    search_bits(other, calibration, validation, search, trace=trace, key="other")
    trace.unlink()
    found = search_bits(trained, calibration, validation, search, trace=trace, key="own")
    expected = fill_bank(trained, calibration, [2, 8])
    for name, choices in expected.weights.items():
        assert torch.equal(found.bank.weights[name][8].decode(), choices[8].decode())


def test_a_bank_that_was_kept_is_the_one_that_was_filled(
    trained: nn.Module, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantConfig(keep_float=["fc"], act_bits=8)
    filled = fill_bank(trained, data[0], [2, 8], config, tmp_path)
    monkeypatch.setattr("kdq.quant.bitsearch.bank.quantize_widths", None)
    kept = fill_bank(trained, data[0], [2, 8], config, tmp_path)
    for name, choices in filled.weights.items():
        for bits, weight in choices.items():
            assert torch.equal(kept.weights[name][bits].decode(), weight.decode())
    columns = ("bits", "bytes", "other_bytes", "float_weights", "float_bits")
    assert all(getattr(kept, column) == getattr(filled, column) for column in columns)
    (tmp_path / "8.kdq").write_bytes((tmp_path / "2.kdq").read_bytes()[:-1])
    with pytest.raises(KdqError, match=r"8\.kdq"):
        fill_bank(trained, data[0], [2, 8], config, tmp_path)


class Returning(nn.Module):
    """A network that returns its logits in something."""

    def __init__(self, network: nn.Module, kind: type) -> None:
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, x: Tensor) -> Any:
        logits = self.network(x)
        return {"features": x, "logits": logits} if self.kind is dict else (logits, x)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_logits_are_found_in_what_a_network_returns(trained: nn.Module, data: Any, kind: type) -> None:
    calibration, validation = data[0][:1], data[1][:1]
    config = SearchConfig(candidates=(2, 8), avg_bits=5.0)
    expected = search_bits(trained, calibration, validation, config, QuantConfig(solver="rtn")).found.points
    found = search_bits(
        Returning(trained, kind), calibration, validation, config, QuantConfig(solver="rtn")
    ).found.points
    assert [point.measure for point in found] == [point.measure for point in expected]


def test_a_network_without_logits_is_refused(trained: nn.Module, data: Any) -> None:
    network = nn.Sequential(Returning(trained, dict), nn.Module())
    network[1].forward = lambda output: {"features": output["logits"]}
    with pytest.raises(KdqError, match=r"an output of the network is a dict of features: its logits must be"):
        Stitched(network, {}, data[1])
