"""The saved view, as W&B's own package would send it."""

import dataclasses
from pathlib import Path
from typing import Any

from kdq.records.rows import write_row
from kdq.stages.quantize_log import DEPLOYED
from kdq.tracking.workspace import workspace
from tests.rows import ROW


def write_rows(output: Path, *sets: str) -> None:
    """A row for each of these data sets."""
    for data in sets:
        write_row(output / "rows", dataclasses.replace(ROW, data=data, config_hash=data))


def panels(data: str, deployed: bool = False) -> dict[str, dict[str, Any]]:
    """Every panel's config by its title or, for charts and tables of runs, their key."""
    found = {}
    for section in spec(data, deployed=deployed)["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            config = panel["config"]
            text = str(config)
            key = config.get("chartTitle") or next(k for k in KEYS if f"'{k}" in text)
            found[key] = config
    return found


KEYS = (
    "report/frontiers_digits_table",
    "report/accuracy_vs_bytes_digits_table",
    "report/accuracy_vs_latency_digits_table",
    "report/rows",
    "bits/chosen_table",
    "bits/frontier_table",
    "quantize/layer_errors_table",
    "quantize/layers",
    "bits/points",
)


def spec(data: str, sweep: str | None = None, deployed: bool = False) -> dict[str, Any]:
    view = workspace("me", "kdq", data, sweep, deployed)._model.model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    assert (view["entity"], view["project"]) == ("me", "kdq")
    return view["spec"]["section"]


def test_the_question_comes_first() -> None:
    sections = spec("digits")["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][:3] == [
        "Which model wins",
        "Training",
        "Layers: errors and chosen bits",
    ]
    assert len(panels("digits")) == 18


def test_accuracy_over_bits_and_bytes_are_means_over_seeds_of_each_model() -> None:
    found = panels("digits")
    bits, size = found["Top-1 over bits, by method"], found["Top-1 over packed bytes, with the Pareto front"]
    assert (bits["xAxis"], bits["metrics"]) == ("quantize/bits", ["quantize/top1"])
    assert (size["xAxis"], size["metrics"]) == ("quantize/size_bytes", ["quantize/top1", "pareto/digits"])
    for panel in (bits, size):
        assert (panel["groupBy"], panel["groupAgg"], panel["groupArea"]) == ("series.value", "mean", "stddev")
        assert panel["xLogScale"]


def test_exported_models_have_a_section_of_their_own() -> None:
    added = panels("digits", deployed=True)
    assert set(added) - set(panels("digits")) == {
        "Top-1 over latency, INT8",
        "report/accuracy_vs_latency_digits_table",
        "Images per second, float and INT8",
    }
    line = added["Top-1 over latency, INT8"]
    assert (line["xAxis"], line["metrics"]) == ("quantize/latency_ms_onnx_int8", ["quantize/top1_onnx_int8"])
    assert {line["xAxis"], *line["metrics"]} < {f"quantize/{name}" for name in DEPLOYED}
    scatter = added["report/accuracy_vs_latency_digits_table"]
    assert scatter["fieldSettings"] == {"x": "latency_ms", "y": "top1"}


def test_charts_read_the_columns_of_their_tables() -> None:
    found = panels("digits")
    scatter = found["report/accuracy_vs_bytes_digits_table"]
    assert (scatter["panelDefId"], scatter["fieldSettings"]) == ("wandb/scatter/v0", {"x": "size_bytes", "y": "top1"})
    chosen = found["bits/chosen_table"]
    assert (chosen["panelDefId"], chosen["fieldSettings"]) == ("wandb/bar/v0", {"label": "layer", "value": "bits"})


def test_only_the_runs_of_the_data_set_and_of_the_sweep() -> None:
    assert "paper" not in str(spec("digits")["runSets"])
    run_set = str(spec("digits", "paper")["runSets"])
    assert "'digits'" in run_set
    assert "'paper'" in run_set
