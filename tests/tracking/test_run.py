"""Stages that tell what they do to Lightning's loggers, to one of a user's own, or to nobody."""

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from kdq.tracking.open import tracked
from kdq.tracking.run import Artifact, Chart, RunInfo, RunLogger, flat
from kdq.utils.config import compose, plain
from kdq.utils.errors import KdqError

CSV = {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": None, "name": None}}


def _tell_everything(track: RunLogger) -> None:
    track.axis("bits", ["top1"])
    track.metrics({"bits": 4, "top1": 97.0})
    track.summary({"top1": 97.0})
    track.show(Chart("layers", ["layer", "error"], [["conv1", 0.5]]))
    track.show(Chart("curves", ["curve", "x", "y"], [("a", 1, 2)], "lines", "title"))
    track.show(Chart("points", ["x", "y"], [(1, 2)], "points", "title"))
    track.show(Chart("bars", ["layer", "bits"], [("conv1", 2)], "bars", "title"))
    track.made(Artifact("digits", "0123", "float", Path("nowhere"), {}))


@pytest.mark.parametrize(("loggers", "files"), [({}, []), (CSV, ["hparams.yaml", "metrics.csv"])])
def test_csv_keeps_metrics_and_config_and_none_nothing(loggers: Any, files: list[str], tmp_path: Path) -> None:
    with tracked(loggers, tmp_path, RunInfo("quantize", "cell", "sweep", "key", {"data": "digits"})) as track:
        _tell_everything(track)
    found = {path.name: path for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(found) == files
    assert track.folder == ""
    if loggers:
        metrics, layer = csv.DictReader(found["metrics.csv"].open())
        assert (float(metrics["bits"]), float(metrics["top1"])) == (4, 97)
        assert float(layer["layers/error"]) == 0.5
        assert "data: digits" in found["hparams.yaml"].read_text()


class Mine(Logger):
    """A user's logger; ``broken`` ones fail at every call."""

    def __init__(self, save_dir: str, broken: bool = False) -> None:
        super().__init__()
        self.folder, self.broken, self.seen, self.config = Path(save_dir), broken, [], {}  # type: ignore[var-annotated]
        self.ended = ""

    name = version = property(lambda self: "mine")  # type: ignore[assignment]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self.broken:
            raise OSError("no\nspace")
        self.seen.append((step, metrics))

    def log_hyperparams(self, params: Any, *args: Any) -> None:
        self.config = params

    def finalize(self, status: str) -> None:
        self.ended = status


MINE = {"_target_": f"{__name__}.Mine"}


def test_all_loggers_are_told_and_a_broken_one_once_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = {"broken": MINE | {"broken": True}, "mine": MINE, **CSV}
    with tracked(loggers, tmp_path, RunInfo("quantize", "cell", "sweep", "key", {"data": "digits"})) as track:
        _tell_everything(track)
        _, mine, _ = track.loggers
        Trainer(logger=track.loggers, max_epochs=0, enable_progress_bar=False, accelerator="cpu")  # takes them
    assert isinstance(mine, Mine)
    assert mine.seen == [(0, {"bits": 4, "top1": 97}), (0, {"layers/error": 0.5})]
    assert (mine.folder, mine.config, mine.ended) == (tmp_path / "mine", {"data": "digits"}, "success")
    assert list(tmp_path.rglob("metrics.csv"))
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("kdq")]
    assert "logger.broken did not take everything (OSError: no space)" in warning


@pytest.mark.parametrize(
    ("loggers", "words"),
    [
        ({"wandb": {"mode": "sometimes"}}, r"logger\.wandb\.mode='sometimes' is unknown: use one of online, offline"),
        ({"wandb": {"upload": "most"}}, r"logger\.wandb\.upload='most' is unknown: use one of none, quantized"),
        ({"wandb": {"entitty": "me"}}, r"logger\.wandb\.entitty; .*did you mean logger\.wandb\.entity"),
        ({"wandb": {}, "mode": "online"}, r"logger\.mode is no logger: give logger\.wandb\.mode"),
        ({"kind": "csv"}, r"logger=csv"),
        ("wandb", r"logger=wandb"),
        ({"mine": {"save_dir": "x"}}, r"logger\.mine\._target_="),
        ({"mine": {"_target_": "nowhere.Logger"}}, r"logger\.mine: cannot import 'nowhere\.Logger'"),
        ({"mine": MINE | {"brokn": True}}, r"logger\.mine\.brokn; .*did you mean logger\.mine\.broken"),
        ({"mine": {"_target_": "builtins.object"}}, r"logger\.mine"),
        ({"mine": {"_target_": "not.installed.MLFlowLogger"}}, r"logger\.mine .*pip install mlflow"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, loggers: Any, words: str) -> None:
    with (
        pytest.raises(KdqError, match=words),
        tracked(loggers, tmp_path, RunInfo("quantize", "cell", "sweep", "key")),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "key"), [("logger.mode=online", "logger.wandb.mode"), ("logger.kind=csv", "logger=csv")]
)
def test_old_spellings_point_to_the_new_ones(override: str, key: str, cli: Any) -> None:
    code, _, error = cli(override)
    assert code == 1
    assert key in error
    assert len(error.strip().splitlines()) == 1


def test_every_choice_of_the_group_composes() -> None:
    for choice in ("wandb", "csv", "tensorboard", "mlflow"):
        assert list(compose([f"logger={choice}"]).logger) == [choice]
    assert list(compose(["logger=[wandb,csv]", "logger.wandb.mode=online"]).logger) == ["wandb", "csv"]
    assert plain(compose(["logger=none"]).logger) == {}
    mine = compose(["logger=csv", f"+logger.mine._target_={__name__}.Mine"]).logger
    assert set(mine) == {"csv", "mine"}


def test_a_nested_config_becomes_flat() -> None:
    assert flat({"net": {"depth": 8, "stem": {"width": 2}}, "seed": 0}) == {
        "net/depth": 8,
        "net/stem/width": 2,
        "seed": 0,
    }


def test_what_a_failed_stage_told_is_kept(tmp_path: Path) -> None:
    def stage() -> None:
        with tracked(CSV, tmp_path, RunInfo("quantize", "cell", "sweep", "key")) as track:
            track.metrics({"top1": 97.0})
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stage()
    (file,) = tmp_path.rglob("metrics.csv")
    assert "97.0" in file.read_text()
