"""A ready dashboard: a saved view of the project, from the panels that answer kdq's question to those of a training."""

from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from kdq.tracking.names import BYTES, pareto_curve

#: The loss terms of all methods.
TERMS = ("ce", "kl", "tckd", "nckd")
STEP = "trainer/global_step"


def workspace(entity: str, project: str, data: str, sweep: str | None = None, deployed: bool = True) -> ws.Workspace:
    """The view for one data set, to be saved with ``.save()``, of all runs or those of one sweep: models that another
    one trained are then missing. Where models are ``deployed``, their latency and throughput are drawn."""
    filters = [ws.Tags().isin([data])]
    if sweep is not None:
        filters.append(ws.Metric("Group") == sweep)
    wins = ws.Section(name="Which model wins", panels=answer_panels(data), is_open=True, pinned=True)
    fast = ws.Section(name="Latency of the exported models", panels=deployed_panels(data), is_open=True)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"kdq {data}" + (f" {sweep}" if sweep else ""),
        sections=[wins, *([fast] if deployed else []), _training(), _layers()],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=filters,
            order=[ws.Ordering(ws.Metric("CreatedTimestamp"), ascending=False)],
            pinned_columns=["run:displayName", "run:jobType", "config:method", "config:arch", "config:bits"],
        ),
    )


def answer_panels(data: str) -> list[Any]:
    """Accuracy over bits and over bytes: means and standard deviations over seeds, and what no other model beats."""
    front = "Top-1 over packed bytes, with the Pareto front"
    return [
        _by_model("Top-1 over bits, by method", "quantize/bits", ["quantize/top1"], "bits", "top-1 (%)", log_x=True),
        _by_model(front, BYTES, ["quantize/top1", pareto_curve(data)], "bytes", "top-1 (%)", log_x=True),
        _chart(f"report/frontiers_{data}", "wandb/lineseries/v0", step="size_bytes", lineKey="curve", lineVal="top1"),
        _chart(f"report/accuracy_vs_bytes_{data}", "wandb/scatter/v0", x="size_bytes", y="top1"),
        wr.WeavePanelSummaryTable(table_name="report/rows"),
    ]


def deployed_panels(data: str) -> list[Any]:
    """Accuracy over latency of the exported INT8 models, and how fast float ones are beside them."""
    ms, top1 = "quantize/latency_ms_onnx_int8", ["quantize/top1_onnx_int8"]
    rates = ["quantize/throughput_onnx_fp32", "quantize/throughput_onnx_int8"]
    return [
        _by_model("Top-1 over latency, INT8", ms, top1, "ms an image (ONNX Runtime, CPU)", "top-1 (%)"),
        _chart(f"report/accuracy_vs_latency_{data}", "wandb/scatter/v0", x="latency_ms", y="top1"),
        _by_model("Images per second, float and INT8", "quantize/bits", rates, "bits", "images/s", log_x=True),
    ]


def _training() -> ws.Section:
    curves: dict[str, Any] = {
        "Validation top-1": ["val/top1"],
        "Training top-1": ["train/top1"],
        "Validation loss": ["val/loss"],
        "Training loss": ["train/loss"],
        "Loss terms": [f"train/{term}" for term in TERMS],
        "Learning rate": ["train/lr"],
        "Images per second": ["train/images_per_second"],
        "GPU memory (GiB)": ["train/gpu_memory_gib"],
    }
    panels: Any = [wr.LinePlot(title=title, x=STEP, y=metrics) for title, metrics in curves.items()]
    return ws.Section(name="Training", panels=panels, is_open=True)


def _layers() -> ws.Section:
    panels: Any = [
        _chart("bits/chosen", "wandb/bar/v0", label="layer", value="bits"),
        _chart("bits/frontier", "wandb/scatter/v0", x="avg_bits", y="loss"),
        _chart("quantize/layer_errors", "wandb/lineseries/v0", step="layer", lineKey="curve", lineVal="error"),
        wr.WeavePanelSummaryTable(table_name="quantize/layers"),
        wr.WeavePanelSummaryTable(table_name="bits/points"),
    ]
    return ws.Section(name="Layers: errors and chosen bits", panels=panels, is_open=True)


def _by_model(title: str, x: str, y: Any, title_x: str, title_y: str, log_x: bool = False) -> wr.LinePlot:
    """Curves with one line for each model: means and standard deviations over its seeds."""
    groups: Any = {"groupby": wr.Config("series"), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    return wr.LinePlot(title=title, x=x, y=y, title_x=title_x, title_y=title_y, log_x=log_x, **groups)


def _chart(name: str, preset: str, **fields: str) -> wr.CustomChart:
    """The custom chart ``name`` that runs log, over all visible runs."""
    title = name.partition("/")[2].replace("_", " ")
    return wr.CustomChart(
        query={"summaryTable": {"tableKey": f"{name}_table"}},
        chart_name=preset,
        chart_fields=fields,
        chart_strings={"title": title},
    )
