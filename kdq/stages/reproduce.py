"""A row made again from the config that it carries, and whether the same comes out: what ``kdq-reproduce`` does."""

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kdq.records.rows import Row, differences
from kdq.records.store import Store
from kdq.stages import pipeline
from kdq.stages.asked import asked_bits
from kdq.stages.cell import UNRECORDED, Cell
from kdq.stages.train import planned
from kdq.stages.tune import tuned_models
from kdq.utils.calls import called, parts
from kdq.utils.config import CONFIG_PATH, compose
from kdq.utils.cpu import keep_freed_memory, use_cores
from kdq.utils.errors import KdqError
from kdq.utils.files import write_text
from kdq.utils.names import STABLE

log = logging.getLogger(__name__)

_MISSING = object()
#: A file that says of which row a folder is, until it is made: the same command goes on in it.
UNFINISHED = ".unfinished"
#: Columns that say why two rows of one cell may differ.
CAUSES = ("config_hash", "kdq_version", "git_sha", "versions", "device", "threads")


def config_of(row: Row, output: Path, overrides: Sequence[str] = (), trust: bool = False) -> DictConfig:
    """The config of the row's cell, to be made below ``output``.

    Args:
        overrides: values that are others here, such as ``data.root=FOLDER``, and with a ``+`` those that kdq has got
            since the row was made.
        trust: call what kdq's own configs do not.
    """
    if row.config is None:
        raise KdqError(
            f"row {row.config_hash} carries no config: it is of kdq {row.kdq_version} ({row.git_sha or 'no commit'}), "
            "before rows did. What its columns do not say is missing: the recipe, and the options of the method, the "
            "quantizer and the data. Its command at that commit makes it again"
        )
    if not trust and (strange := sorted(_strange(row.config))):
        raise KdqError(f"this row runs code that is not kdq's: {', '.join(strange)}; if you trust it, add --trust")
    cfg = compose(["logger=none", "+logger.nowhere._target_=kdq.tracking.lightning_log.Nowhere"])
    OmegaConf.set_struct(cfg, False)
    for name, value in row.config.items():
        if isinstance(cfg.get(name), DictConfig) and not isinstance(value, dict):
            raise KdqError(f"the config of row {row.config_hash} is none of kdq's: {name} is a {type(value).__name__}")
        if name not in UNRECORDED:
            cfg[name] = value
    if row.threads is not None:
        cfg.trainer.threads = row.threads
    cfg.paths.output_dir = str(output)
    for override in overrides:
        key, equals, _ = override.partition("=")
        there = OmegaConf.select(cfg, key.removeprefix("+"), default=_MISSING) is not _MISSING
        if not equals or there == key.startswith("+"):
            raise KdqError(
                f"{override!r} changes no value of this row's config: give KEY=VALUE, such as data.root=FOLDER, or "
                "+KEY=VALUE for one that an older kdq did not have"
            )
        cfg.merge_with(OmegaConf.from_dotlist([override.removeprefix("+")]))
    OmegaConf.set_struct(cfg, True)
    return cfg


def take_models(cell: Cell, store: Path) -> None:
    """Copy the trained models of the cell from another ``store``, so that none of them is trained."""
    model = planned(cell)
    for wanted in (model, *tuned_models(cell, model).values()):
        if (entry := Store(store).get(wanted.spec, wanted.slug)) is None:
            raise KdqError(
                f"{store} has no {wanted.slug}-{wanted.key}: give the store of the run that the row is of, and the "
                "weights that its teacher was read from, or leave --store out to train it"
            )
        shutil.copytree(entry.path, cell.store.root / entry.path.name, dirs_exist_ok=True)


def _strange(config: Any) -> set[str]:
    """What a config calls that kdq's own configs do not, and where its callbacks write to outside of the folder."""
    known = set(STABLE)
    for file in Path(CONFIG_PATH).rglob("*.yaml"):
        known |= set(re.findall(r"_target_: *([\w.]+)", file.read_text("utf-8")))
    strange = {target for target in called(config) if target not in known}
    for node in parts(config):
        if isinstance(node, dict) and "_args_" in node:  # what is called could be one of them
            strange.add(f"{node.get('_target_')} with _args_")
    for place in parts(config.get("callbacks")):
        if isinstance(place, str) and (Path(place).is_absolute() or ".." in Path(place).parts):
            strange.add(f"a callback in {place}")
    return strange


def make(row: Row, folder: Path, store: Path | None, overrides: Sequence[str], trust: bool) -> Row:
    """The row's cell made again below ``folder``, which is new or where this was interrupted.

    Args:
        store: where trained models are taken from; None: they are trained.
    """
    unfinished = folder / UNFINISHED
    if folder.exists() and not (unfinished.is_file() and unfinished.read_text() == row.config_hash):
        raise KdqError(f"{folder} exists: give --to a new folder, so that nothing is taken from it")
    cfg = config_of(row, folder.resolve(), overrides, trust)
    if len(bits := asked_bits(Cell(cfg))) > 1:
        raise KdqError(f"one row is made again: give one width, such as quant.bits={next(iter(bits))}")
    write_text(unfinished, row.config_hash)
    keep_freed_memory()
    use_cores(cfg.trainer.threads)
    if store is not None:
        take_models(Cell(cfg), store)
    elif (minutes := (row.train_seconds + (row.tune_seconds or 0)) / 60) >= 1:
        log.warning(
            "training it took %.0f minutes on its machine; to take the trained models, and only quantize and evaluate "
            "again, give --store, the store/ of its run", minutes
        )  # fmt: skip
    (made,) = pipeline.run(cfg)
    unfinished.unlink()
    return made


def tell(row: Row, made: Row) -> int:
    """Say whether ``made`` is ``row``; the exit code."""
    changed, causes = (differences(row, made, columns) for columns in (pipeline.FOUND, CAUSES))
    print(f"{made.file_name}: top-1 {made.top1:.2f} %, {made.size_bytes:,} bytes")
    print(f"NOT the same: {'; '.join(changed)}." if changed else f"The same: all of {', '.join(pipeline.FOUND)}.")
    if causes:
        print(f"Of another {'cell' if made.config_hash != row.config_hash else 'making'}: {'; '.join(causes)}.")
    return bool(changed)
