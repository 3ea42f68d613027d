"""The page without a browser: whole, small enough, and with nothing in it that a row could have put there."""

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from kdq.records.rows import Row, read_rows
from kdq.report import write_report
from kdq.report.html import page
from kdq.report.material import Material
from kdq.report.tables import accuracy_table


class _Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts[len(self.found) - 1] = self.texts.get(len(self.found) - 1, "") + data


def _page(output: Path) -> _Elements:
    return _Elements(page(Material(output)))


def test_it_needs_no_network(tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]) -> None:
    found = _page(folder_of(tmp_path, [row()])).found
    assert [attrs for tag, attrs in found if "src" in attrs] == []
    assert [attrs["href"] for tag, attrs in found if "href" in attrs] == [
        "data:,",
        "../results.csv",
        "../results.parquet",
    ]
    (policy,) = [attrs["content"] for tag, attrs in found if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split(";")[1]


def test_hostile_names_are_text(
    tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path], hostile_folder: Path
) -> None:
    plain = _page(folder_of(tmp_path / "plain", [row()]))
    assert write_report(hostile_folder).failures == []
    found = _page(hostile_folder)
    assert found.found == plain.found
    (data,) = [text for at, text in found.texts.items() if found.found[at][1].get("id") == "payload"]
    payload = json.loads(data)
    methods = {line[payload["cells"]["columns"].index("method")] for line in payload["cells"]["data"]}
    assert "<\\script><script>alert(1)<\\script>" in methods
    assert "</script><script>alert(1)</script>" in json.dumps(payload)
    assert not any(re.search(r"[\x00-\x1f\u2028]", method) for method in methods)
    markdown = (hostile_folder / "report" / "report.md").read_text("utf-8")
    assert not re.search(r"<(script|img|!--)", markdown)
    assert not re.search(r"^#+ z", markdown, re.MULTILINE)
    console = Console(file=io.StringIO(), width=4000)
    console.print(accuracy_table(read_rows(hostile_folder / "rows")))
    assert "<\\script><script>alert(1)<\\script>" in console.file.getvalue()  # type: ignore[attr-defined]


def test_ten_thousand_rows(
    tmp_path: Path, rows_of: Callable[[int], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They make a page that is little larger than its libraries. No figures here: they take longest and show cells."""
    monkeypatch.setattr("kdq.report.material.read_rows", lambda folder, skipped: rows_of(10_000))
    material = Material(tmp_path)
    assert material.summary.startswith("10,000 rows, 600 cells, 4 data sets, 6 methods, 5 quantizers, 17 seeds.")
    assert len(page(material).encode()) - len(get_plotlyjs().encode()) < 1_000_000
