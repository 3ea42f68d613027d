"""The published numbers: which cells they stand beside, and what is said of them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from kdq.records.rows import Row
from kdq.report.cells import cells, named
from kdq.report.figures import write_figures
from kdq.report.material import Material
from kdq.report.published import beside, distillation, distilled_beside, study, study_data, warnings
from kdq.utils.config import choices


def test_they_stand_beside_equal_cells_with_their_levels(row: Callable[..., Row]) -> None:
    rows = [row(data="cifar10", method="vkd", arch="resnet18", bits=bits) for bits in (2, 3, 32)]
    found = beside(cells(named(rows))).set_index("width")
    # From the study's tables: 2 "bits" are 5 levels; it has no 32 bits, but a float model.
    assert found["published"].to_dict() == {2: 71.87, 3: 82.4, math.inf: 90.77}
    assert found["levels"].to_dict() == {2: 5, 3: 9, math.inf: math.inf}
    said = warnings(found.reset_index())
    assert len(said) == 1
    assert "2^b + 1 levels" in said[0]


def test_other_data_is_said_to_be_other(row: Callable[..., Row]) -> None:
    rows = [row(data="cifar10_jpeg", method="teacher", arch="resnet20", bits=4)]
    said = " ".join(warnings(beside(cells(named(rows)))))
    assert "cifar10_jpeg is not the study's cifar10" in said
    assert "resnet20 stands where the study has resnet50" in said


@pytest.mark.parametrize(("data", "drawn"), [("cifar10", True), ("cifar10_jpeg", False)])
def test_figures_show_them_on_the_study_s_own_images_only(
    data: str, drawn: bool, row: Callable[..., Row], folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [row(data=data, method="vkd", arch="resnet18", bits=bits, top1=70.0 + bits) for bits in (2, 3, 8)]
    write_figures(Material(folder_of(tmp_path, rows)), tmp_path)
    for figure in ("accuracy_vs_bits", "accuracy_vs_total_bits"):
        assert ("<!-- published: " in (tmp_path / f"{figure}.svg").read_text()) == drawn


def test_only_its_data_and_methods_match(row: Callable[..., Row]) -> None:
    rows = [row(data="digits"), row(data="cifar10", method="baseline"), row(data="cifar1000")]
    assert beside(cells(named(rows))).empty
    rows = [row(data="cifar10", method="vkd", search="greedy", avg_bits=3.0, bits=3)]
    assert beside(cells(named(rows))).empty
    assert warnings(beside(cells(named(rows)))) == []


def test_cifar100_is_not_cifar10() -> None:
    assert [study_data(name) for name in ("cifar10", "cifar100", "cifar100_jpeg", "cifar10-mine", "cifar101")] == [
        "cifar10",
        "cifar100",
        "cifar100",
        "cifar10",
        "",
    ]


def test_distillation_needs_the_same_pair(row: Callable[..., Row]) -> None:
    rows = [
        row(data="cifar100", method="teacher", arch="resnet56"),
        row(data="cifar100", method="dkd", arch="resnet20"),
        row(data="cifar100", method="dml", arch="resnet20"),
    ]
    assert distilled_beside(cells(named(rows)))["published"].tolist() == [71.97]
    assert distilled_beside(cells(named(rows[1:]))).empty


def test_every_published_pair_has_the_names_of_the_models() -> None:
    assert {name for pair in distillation()["pairs"] for name in pair.split("->")} <= {*choices("model")}


@pytest.mark.parametrize(("method", "published"), [("vkd", 74.92), ("dkd", 76.23), ("dist", 75.51)])
def test_float_models_beside_the_published_count_each_seed_once(
    method: str, published: float, row: Callable[..., Row]
) -> None:
    """Two bits have one seed of three: the float model's mean is over all of them."""
    seeds = [(2, 0, 90.0), (3, 0, 90.0), (3, 1, 91.0), (3, 2, 95.0)]
    made = {"data": "cifar100", "method": method, "arch": "wrn_16_2"}
    rows = [row(**made, bits=bits, seed=seed, top1_float=top1) for bits, seed, top1 in seeds]
    found = cells(named([*rows, row(data="cifar100", method="teacher", arch="wrn_40_2")]))
    assert distilled_beside(found)[["top1_float", "published"]].to_numpy().tolist() == [[92.0, published]]
    study_s = beside(found[found["method"] == method]).set_index("width")["top1"].to_dict()
    assert study_s.get(math.inf, 92.0) == 92.0


def test_the_file_is_whole() -> None:
    for data, methods in study()["top1"].items():
        assert set(methods) == {"teacher", "vkd", "mixup", "dml", "dkd"}, data
        assert all(known.keys() >= {"2", "8", "float"} for known in methods.values())
