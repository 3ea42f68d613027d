"""``kdq-reproduce ROW``: make a row again from the config that it carries, and say whether the same comes out."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import kdq.cli.app  # noqa: F401  the resolvers of configs
from kdq.records.rows import Row, differences, find_row
from kdq.stages import pipeline
from kdq.stages.cell import UNRECORDED
from kdq.utils.calls import called, parts
from kdq.utils.config import CONFIG_PATH, compose
from kdq.utils.cpu import keep_freed_memory, use_cores
from kdq.utils.errors import KdqError
from kdq.utils.messages import describe
from kdq.utils.names import STABLE

_MISSING = object()
#: Columns that say why two rows of one cell may differ.
CAUSES = ("config_hash", "kdq_version", "git_sha", "versions", "device", "threads")


def config_of(row: Row, output: Path, overrides: Sequence[str] = (), trust: bool = False) -> DictConfig:
    """The config of the row's cell, to be made below ``output``.

    Args:
        overrides: values that are others here, such as ``data.root=FOLDER``.
        trust: call what kdq's own configs do not.

    Raises:
        KdqError: the row carries no config, or one that calls a stranger's code, or an override names no key of it.
    """
    if row.config is None:
        raise KdqError(
            f"row {row.config_hash} carries no config: it is of kdq {row.kdq_version} ({row.git_sha or 'no commit'}), "
            "before rows did. What its columns do not say is missing: the recipe, and the options of the method, the "
            "quantizer and the data. Its command at that commit makes it again"
        )
    if not trust and (strange := sorted(_strange(row.config))):
        raise KdqError(f"this row runs code that is not kdq's: {', '.join(strange)}; if you trust it, add --trust")
    cfg = compose(["logger=none"])
    OmegaConf.set_struct(cfg, False)
    for name, value in row.config.items():
        if name not in UNRECORDED:
            cfg[name] = value
    if row.threads is not None:
        cfg.trainer.threads = row.threads
    cfg.paths.output_dir = str(output)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or OmegaConf.select(cfg, key, default=_MISSING) is _MISSING:
            raise KdqError(
                f"{override!r} changes no value of this row's config: give KEY=VALUE, such as data.root=FOLDER"
            )
        cfg.merge_with(OmegaConf.from_dotlist([override]))
    OmegaConf.set_struct(cfg, True)
    return cfg


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


def main(arguments: Sequence[str] | None = None) -> None:
    """``kdq-reproduce ROW [--to FOLDER] [OVERRIDE ...]``; exit codes are in ``--help``."""
    parser = argparse.ArgumentParser(
        prog="kdq-reproduce",
        description="Make a row's cell again, trainings included, in a fresh folder, and compare top-1 and bytes.",
        epilog="Exit codes: 0: the same. 1: another result. 2: it could not be made.",
    )
    parser.add_argument("row", help="a row's config_hash or its start, a row's .json file, or hf:owner/name")
    parser.add_argument(
        "--output-dir", type=Path, default="outputs", help="where the row is: paths.output_dir of its run"
    )
    parser.add_argument("--to", type=Path, help="a new folder; default: reproduced/HASH")
    parser.add_argument("--trust", action="store_true", help="run code that the row names and kdq does not have")
    parser.add_argument("overrides", nargs="*", help="what is elsewhere here, such as data.root=FOLDER")
    asked = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="kdq-reproduce: %(message)s")
    try:
        row = find_row(asked.row, asked.output_dir)
        folder = asked.to or Path("reproduced") / row.config_hash
        if folder.exists():
            raise KdqError(f"{folder} exists: give --to a new folder, so that nothing is taken from it")
        cfg = config_of(row, folder.resolve(), asked.overrides, asked.trust)
        keep_freed_memory()
        use_cores(cfg.trainer.threads)
        (made,) = pipeline.run(cfg)
    except Exception as error:
        print(f"kdq-reproduce: {describe(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(tell(row, made))


def tell(row: Row, made: Row) -> int:
    """Say whether ``made`` is ``row``; the exit code."""
    changed, causes = (differences(row, made, columns) for columns in (pipeline.FOUND, CAUSES))
    print(f"{made.file_name}: top-1 {made.top1:.2f} %, {made.size_bytes:,} bytes")
    print(f"NOT the same: {'; '.join(changed)}." if changed else f"The same: all of {', '.join(pipeline.FOUND)}.")
    if causes:
        print(f"Of another {'cell' if made.config_hash != row.config_hash else 'making'}: {'; '.join(causes)}.")
    return bool(changed)


if __name__ == "__main__":
    main()
