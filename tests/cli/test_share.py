"""``kdq-export MODEL --to hf:owner/name`` and ``kdq.load("hf:owner/name")``, against a stand-in of the hub."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import kdq
from kdq.models.build import build
from kdq.records.rows import Row, read_row, write_row
from kdq.report.card import card
from kdq.report.material import Material
from tests.hub_server import TOKEN, HubServer, hub_server
from tests.rows import ROW

NET = {"_target_": "kdq.models.CifarResNet", "depth": 8, "num_classes": 3, "in_channels": 1, "width": 0.1}
IMAGES = {"mean": [0.5], "std": [0.25], "size": [8, 8]}
RUN = "import sys; from kdq.cli.export import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, Row]:
    """An output folder with the rows of two roads, and the packed file of one of them."""
    torch.manual_seed(0)
    quantized, _ = kdq.quantize(build(NET), [torch.randn(16, 1, 8, 8)], bits=3)
    packed = tmp_path / "out" / "store" / "digits-vkd" / "quantized" / "gpfq-b3-aa.kdq"
    size = kdq.save(quantized, packed, IMAGES, ["one", "two", "three"])
    row = dataclasses.replace(
        ROW,
        artifact=str(packed.relative_to(tmp_path / "out")),
        size_bytes=size,
        bits=3,
        avg_bits=3.0,
        wandb_run="/home/somebody/runs/run-1",
        config={"data": {"root": "/home/somebody/images"}},
    )
    write_row(tmp_path / "out" / "rows", row)
    teacher = {"method": "teacher", "role": "teacher", "arch": "resnet56", "top1": 96.0, "size_bytes": size + 900}
    write_row(tmp_path / "out" / "rows", dataclasses.replace(row, **teacher, config_hash="bb"))
    return tmp_path / "out", row


def run(hub: str, home: Path, code: str, *arguments: object, token: str | None = TOKEN) -> Any:
    """Python in a process of its own, whose hub is that of ``hub``; it does not wait before it tries again."""
    given = {"HF_ENDPOINT": hub, "HF_HOME": str(home)}
    given |= {"HF_TOKEN": token} if token else {}
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | given
    command = [sys.executable, "-c", f"import time; time.sleep = lambda _: None\n{code}", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)


def test_what_is_shared_is_read_back_bit_for_bit(hub: HubServer, study: tuple[Path, Row], tmp_path: Path) -> None:
    output, row = study
    figure = output / "report" / "accuracy_vs_bytes.png"
    figure.parent.mkdir()
    figure.write_bytes(b"png")
    shared = run(hub.url, tmp_path, RUN, "aa", "--output-dir", output, "--to", "hf:me/small", "--license", "mit")
    assert (shared.returncode, shared.stdout) == (0, f"{hub.url}/me/small\n"), shared.stderr
    files = hub.files["me/small"]
    assert set(files) == {"model.kdq", "row.json", "README.md", figure.name}
    assert files["model.kdq"] == (output / row.artifact).read_bytes()
    (tmp_path / "row.json").write_bytes(files["row.json"])
    back = read_row(tmp_path / "row.json")
    assert back == dataclasses.replace(row, wandb_run="run-1", config={"data": {"root": "images"}})
    text = files["README.md"].decode()
    told = ModelCard(text).data
    assert (told.license, told.pipeline_tag) == ("mit", "image-classification")
    assert told.eval_results is not None
    assert told.eval_results[0].metric_value == row.top1
    assert f"![accuracy vs bytes]({figure.name})" in text
    headline = Material(output).answers[0].headline
    assert headline.partition(":")[0] in text
    assert hub.commits == [f"{Path(row.artifact).stem}, kdq {kdq.__version__}"]

    (line,) = re.findall(r"^network = (.*)$", text, re.M)
    code = "import kdq, sys, torch; from kdq.records.rows import find_row; print(find_row('hf:me/small', None).top1);"
    code += f"torch.save({line}(torch.ones(2, 1, 8, 8)), sys.argv[1])"
    loaded = run(hub.url, tmp_path, code, tmp_path / "logits.pt", token=None)
    assert (loaded.returncode, loaded.stdout) == (0, f"{row.top1}\n"), loaded.stderr
    with torch.no_grad():
        expected = kdq.load(output / row.artifact)(torch.ones(2, 1, 8, 8))
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_what_the_hub_does_not_take_or_have_is_one_line(
    hub: HubServer, study: tuple[Path, Row], tmp_path: Path
) -> None:
    output, row = study
    share = (output / row.artifact, "--to", "hf:me/other")
    for token in ("hf_wrong", None):
        refused = run(hub.url, tmp_path, RUN, *share, token=token)
        assert refused.returncode == 1
        assert re.fullmatch(r"kdq-export: cannot upload to me/other: .*\(401\): log in with .*\n", refused.stderr)
    away = run("http://127.0.0.1:9", tmp_path, RUN, *share)
    assert re.fullmatch(r"kdq-export: .* http://127.0.0.1:9 cannot be reached: give the command .*\n", away.stderr)
    assert "me/other" not in hub.files
    nameless = run(hub.url, tmp_path, RUN, output / row.artifact, "--to", "hf:other")
    assert nameless.stderr == "kdq-export: hf:other is not hf:owner/name\n"

    hub.files["me/damaged"] = {"model.kdq": (output / row.artifact).read_bytes()[:-1], "other.txt": b""}
    hub.files["me/empty"] = {}
    code = """
import kdq, sys
for name in sys.argv[1:]:
    try:
        kdq.load(name)
    except kdq.KdqError as error:
        print(error)
"""
    names = ("hf:me/damaged", "hf:me/empty", "hf:me/nowhere")
    said = run(hub.url, tmp_path, code, *names).stdout.splitlines()
    assert len(said) == 3
    assert "is not a packed kdq network" in said[0]
    assert said[1] == "me/empty holds none of model.kdq: name its file, hf:me/empty:FILE"
    assert "the hub shows no such repository to you" in said[2]
    hurried = "import time; time.sleep = lambda seconds: None\n"  # the client tries for half a minute
    said = run("http://127.0.0.1:9", tmp_path / "new", hurried + code, "hf:me/small").stdout.splitlines()
    assert said == ["cannot fetch model.kdq of me/small (no network?): download it elsewhere and give its path"]


def test_a_card_says_all_of_how_a_tuned_model_was_trained() -> None:
    header = {"net": None, "layers": {"fc": {"shape": [4, 2], "levels": 4}}}
    row = dataclasses.replace(ROW, epochs=30, recipe="multistep, lr 0.05, batches of 128", tune="qad", tune_epochs=8)
    assert "| 30 epochs, multistep, lr 0.05, batches of 128, then qad (8 epochs) |" in card("me/net", header, 600, row)


def test_a_card_is_text_whatever_names_say() -> None:
    evil = "x](http://a) | <b> `\n---\nlicense: mit"
    names = [evil, *(f"class {number}" for number in range(15))]
    header = {"net": None, "preprocess": None, "classes": names, "layers": {"fc": {"shape": [4, 2], "levels": 5}}}
    row = dataclasses.replace(ROW, arch=evil, method=evil, quantizer=evil, recipe=evil)
    text = card("me/net", header, 600, row)
    trial = card("me/net", header, 600, dataclasses.replace(row, limited="fast_dev_run=True"))
    assert "A TRIAL, NO RESULT" in trial
    assert "model-index" not in trial
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "unknown"
    assert "<b>" not in body
    assert "x](http" not in body
    assert "weights of 3 bits" in body
    assert ", ".join(names[1:]) in body
    assert "network=MyNetwork()" in body
    assert all(line.count("|") - line.count(r"\|") == 3 for line in body.splitlines() if line.startswith("|"))
