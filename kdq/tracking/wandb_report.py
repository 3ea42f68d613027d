"""A W&B Report: the answer, the tables and the panels of a study, to be read and commented on in the browser."""

from collections.abc import Mapping

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from kdq.tracking.workspace import answer_panels, deployed_panels

#: Columns and rows of W&B's grid, of which a panel takes half a line.
_WIDE, _HIGH = 12, 8


def report(
    entity: str,
    project: str,
    texts: Mapping[str, str],
    sweep: str | None = None,
    deployed: frozenset[str] = frozenset(),
) -> wr.Report:
    """The report, to be saved with ``.save()``: for each data set its answer in Markdown and the panels of its runs, or
    of those of one sweep; where models are ``deployed``, their latency is drawn."""
    blocks: list[object] = []
    for data, text in texts.items():
        filters = [ws.Tags().isin([data]), *([ws.Metric("Group") == sweep] if sweep else [])]
        runs = wr.Runset(entity=entity, project=project, name=data, filters=filters)
        panels = [*answer_panels(data), *(deployed_panels(data) if data in deployed else [])]
        for number, panel in enumerate(panels):
            line, half = divmod(number, 2)
            panel.layout = wr.Layout(x=half * _WIDE, y=line * _HIGH, w=_WIDE, h=_HIGH)
        blocks += [wr.MarkdownBlock(text=text), wr.PanelGrid(runsets=[runs], panels=panels)]
    title = "kdq" + (f" {sweep}" if sweep else "")
    return wr.Report(entity=entity, project=project, title=title, blocks=blocks, width="fluid")  # type: ignore[arg-type]
