"""The page in a real browser: Debian's chromium, headless, driven by its own chromedriver."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kdq
from kdq.records.rows import Row
from kdq.report import html, write_report
from kdq.report.cells import cells, named, pareto
from kdq.report.material import Material
from kdq.utils.files import write_text

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
]

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(CHROMEDRIVER))
    yield chrome
    chrome.quit()


class Page:
    """The page of an output folder, opened. Every look at it asserts that the console stayed silent."""

    def __init__(self, browser: Any, output: Path) -> None:
        self.browser = browser
        path = output / "report" / "report.html"
        write_text(path, html.page(Material(output)))
        browser.get(path.as_uri())
        assert self.run("return document.body.dataset.ready") == "yes"

    def run(self, script: str, *arguments: Any) -> Any:
        found = self.browser.execute_script(script, *arguments)
        assert self.browser.get_log("browser") == []
        return found

    def toggle(self, name: str, value: str) -> None:
        """Click a chip as a user would."""
        chips = self.browser.find_elements("css selector", ".chip")
        (chip,) = [chip for chip in chips if chip.text.split()[-1:] == [value]]
        assert chip.find_element("tag name", "input").get_attribute("name") == name
        chip.click()

    def choose(self, field: str, text: str) -> None:
        from selenium.webdriver.support.select import Select

        Select(self.browser.find_element("id", field)).select_by_visible_text(text)

    def column(self, number: int, table: str = "cells") -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((cell) => cell.textContent)"
        return self.run(script, f"#{table} tbody td:nth-child({number})")

    def traces(self, chart: str) -> list[dict[str, Any]]:
        return self.run(
            "return document.getElementById(arguments[0]).data.map((t) => ({x: [...t.x], y: [...t.y], name: t.name}))",
            chart,
        )


def _grid(row: Callable[..., Row]) -> list[Row]:
    rows = []
    for data in ("digits", "cifar10"):
        for quantizer in ("gpfq", "rtn"):
            for number, method in enumerate(("teacher", "baseline", "vkd")):
                for bits in (2, 4, 8):
                    for seed in (0, 1):
                        teacher = method == "teacher"
                        rows.append(
                            row(
                                data=data,
                                method=method,
                                quantizer=quantizer,
                                bits=bits,
                                seed=seed,
                                arch="resnet50" if teacher else "resnet18",
                                top1=92.0 - 20 / bits - number + seed / 4 - (quantizer == "rtn") * 8 / bits,
                                size_bytes=bits * (40_000 if teacher else 10_000) + seed,
                                latency_ms_torch=0.9 if teacher else 0.3,
                            )
                        )
    return rows


@pytest.fixture
def page(browser: Any, tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]) -> Page:
    rows = _grid(row)
    folder_of(tmp_path, [r for r in rows if (r.data, r.quantizer, r.method, r.bits) != ("digits", "gpfq", "vkd", 4)])
    return Page(browser, tmp_path)


def test_filters(page: Page) -> None:
    assert len(page.column(1)) == 18  # the first data set: 3 methods, 2 quantizers, 3 widths
    assert set(page.column(1, "grid")) == {"teacher", "baseline", "vkd"}
    page.toggle("method", "teacher")
    assert set(page.column(1)) == {"baseline", "vkd"}
    assert len(page.column(1)) == 12
    assert len(page.column(1, "grid")) == 4
    page.toggle("quantizer", "rtn")
    assert set(page.column(3)) == {"gpfq"}
    assert len(page.traces("drop")) == 2
    headlines = "return [...document.querySelectorAll('.headline')].map((x) => x.textContent.split(' ')[0])"
    assert page.run(headlines) == ["cifar10", "digits"]  # whatever is chosen
    compared = "return [...document.querySelectorAll('#comparisons td:first-child')].map((x) => x.textContent)"
    assert set(page.run(compared)) == {"vkd vs baseline, gpfq"}
    page.choose("data", "digits")
    assert len(page.column(1)) == 5
    assert "missing" in page.run("return document.getElementById('grid').textContent")
    assert page.run("return document.getElementById('published').hidden") is True
    page.toggle("method", "teacher")
    assert set(page.column(1)) == {"baseline", "vkd", "teacher"}
    for method in ("teacher", "baseline", "vkd"):
        page.toggle("method", method)
    assert page.column(1) == []
    assert "nothing measured here" in page.run("return document.getElementById('bits').textContent")


def test_sorting(page: Page) -> None:
    heads = page.browser.find_elements("css selector", "#cells th button")
    names = [head.text.strip(" ▲▼") for head in heads]
    at = names.index("bytes")
    sizes = [int(text.replace(",", "")) for text in page.column(at + 1)]
    assert sizes == sorted(sizes)
    heads[at].click()
    assert [int(text.replace(",", "")) for text in page.column(at + 1)] == sorted(sizes, reverse=True)
    at = names.index("top-1 (%)")
    page.browser.find_elements("css selector", "#cells th button")[at].click()
    accuracies = [float(text.split(" ")[0]) for text in page.column(at + 1)]
    assert accuracies == sorted(accuracies)
    assert page.run("return document.querySelector('#cells th[aria-sort]').textContent") == "top-1 (%)"


def test_numbers_are_those_of_the_cells(page: Page, row: Callable[..., Row]) -> None:
    found = cells(named([r for r in _grid(row) if r.data == "cifar10"]))
    (ring,) = [trace for trace in page.traces("bytes") if trace["name"] == "Pareto front"]
    sizes, top1 = found["size_bytes"].round().tolist(), found["top1"].round(3).tolist()
    front = pareto(sizes, top1)
    assert list(zip(ring["x"], ring["y"], strict=True)) == [(sizes[i], top1[i]) for i in front]
    published = [trace["y"] for trace in page.traces("bits") if trace["y"] == [71.87, 86.47, 89.69]]
    assert len(published) == 1  # the study's vkd at its 2, 4 and 8 "bits", once for both quantizers
    assert page.run("return document.getElementById('published').hidden") is False
    assert {"90.90", "71.87"} <= set(page.column(6, "published-table"))


def test_latency_is_the_exported_networks_where_there_is_one(
    browser: Any, tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]
) -> None:
    exported = {"latency_ms_onnx_int8": 0.1, "top1_onnx_int8": 96.5}
    page = Page(browser, folder_of(tmp_path, [row(bits=8, top1=97.0, **exported), row(bits=4), row(bits=2)]))
    points, ring = page.traces("latency")
    assert [points[axis] for axis in "xy"] == [ring[axis] for axis in "xy"] == [[0.1], [96.5]]
    assert "INT8" in page.run("return document.getElementById('latency').textContent")
    assert "INT8" in page.run("return document.getElementById('latency-note').textContent")


def test_float_models_are_those_of_most_seeds_and_of_no_tuned_network(
    browser: Any, tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]
) -> None:
    seeds = [(2, 0, 90.0), (4, 0, 90.0), (4, 1, 92.0), (8, 0, 90.0)]
    rows = [row(bits=bits, seed=seed, top1_float=top1) for bits, seed, top1 in seeds]
    page = Page(browser, folder_of(tmp_path, [*rows, row(bits=4, tune="qad", top1_float=90.0)]))
    for chart in ("bits", "bytes"):
        assert [trace["y"][-1] for trace in page.traces(chart) if len(trace["x"]) == 2] == [91.0]
    assert page.column(4, "grid")[0].startswith("91.00 ± 1.41")
    assert "missing" not in page.run("return document.getElementById('grid').textContent")


def test_dark_windows_have_light_ink(page: Page) -> None:
    color = (
        "return [getComputedStyle(document.body).backgroundColor, document.getElementById('bits').layout.font.color]"
    )
    assert page.run(color) == ["rgb(255, 255, 255)", "#1c2024"]
    try:
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
        for _ in range(50):  # the page hears of it with its next frame
            if page.run(color) == ["rgb(22, 24, 27)", "#e6e8eb"]:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{page.run(color)}")
        lines = page.run("return document.getElementById('bits').data.map((trace) => trace.line.color)")
        assert "#e6e8eb" in lines  # the teacher, which is black on white
        assert "#000000" not in lines
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_narrow_windows_do_not_overflow(page: Page) -> None:
    try:
        page.browser.set_window_size(500, 900)
        page.run("window.dispatchEvent(new Event('resize'))")
        assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        page.browser.set_window_size(1280, 900)


def test_long_names_do_not_overflow_a_telephone(
    browser: Any, tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]
) -> None:
    names = {name: f"{name}_" + "long_" * 8 for name in ("data", "method", "arch", "quantizer")}
    folder_of(tmp_path, [row(**names), row(data=names["data"], quantizer=names["quantizer"], method="teacher")])
    metrics = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert Page(browser, tmp_path).run("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_search_shows_its_layers_and_its_way(
    browser: Any, tmp_path: Path, row: Callable[..., Row], folder_of: Callable[..., Path]
) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    mixed, _ = kdq.quantize(network, [torch.randn(8, 1, 8, 8)], bits={"0": 5, "3": 2})
    kdq.save(mixed, tmp_path / "mixed.kdq")
    points = [
        {"assignment": {"0": bits, "3": 2}, "avg_bits": 2.0 + bits / 10, "size_bytes": 100 * bits, "measure": measure}
        for bits, measure in ((8, {"loss": 0.1, "top1": 90.0}), (6, None), (5, {"loss": 0.2, "top1": 89.0}))
    ]
    path = tmp_path / "store" / "search" / "frontier-abc.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"points": points, "chosen": points[2]}))
    folder_of(tmp_path, [row(artifact="mixed.kdq", search="greedy", bits=3, avg_bits=2.2, config_hash="abc")])
    written = write_report(tmp_path)
    assert written.failures == []
    assert "bit_search.svg" in {file.name for file in written.files}
    page = Page(browser, tmp_path)
    (bars,) = page.traces("layers")
    assert bars["y"] == [5, 2]
    (way,) = page.traces("frontier")
    assert (way["x"], way["y"]) == ([500, 800][::-1], [0.1, 0.2])


def test_hostile_names_are_shown_as_they_are(browser: Any, hostile_folder: Path) -> None:
    page = Page(browser, hostile_folder)
    options = page.run("return [...document.querySelectorAll('#data option')].map((option) => option.textContent)")
    assert "<img src=x onerror=alert(1)>" in options
    shown: set[str] = set()
    for option in options:
        page.choose("data", option)
        shown |= set(page.column(1))
    assert "<img src=x onerror=alert(1)>" in shown
    assert len(shown) == 8
    assert page.run("return document.querySelectorAll('img').length") == 0
    assert page.run("return document.scripts.length") == 3


def test_no_row_and_ten_thousand(
    browser: Any, tmp_path: Path, rows_of: Callable[[int], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (0, 1, 10_000):
        rows = rows_of(count)
        output = tmp_path / str(count)
        monkeypatch.setattr("kdq.report.material.read_rows", lambda folder, skipped, rows=rows: rows)
        page = Page(browser, output)
        assert f"{count:,} row" in page.run("return document.getElementById('summary').textContent")
        if count == 0:
            assert "No rows yet" in page.run("return document.querySelector('main').textContent")
        else:
            assert len(page.column(1)) == min(count, 150)  # the first data set's cells
