"""``kdq-reproduce ROW``: make a row again from the config that it carries, and say whether the same comes out."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from kdq.utils.signals import ending_on_signals


def main(arguments: Sequence[str] | None = None) -> None:
    """``kdq-reproduce ROW [--to FOLDER] [--store FOLDER] [OVERRIDE ...]``; exit codes are in ``--help``."""
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
    parser.add_argument(
        "--store", type=Path, help="take trained models from this store, of a run, and train none: trainings are long"
    )
    parser.add_argument("--trust", action="store_true", help="run code that the row names and kdq does not have")
    parser.add_argument("overrides", nargs="*", help="what is elsewhere here, such as data.root=FOLDER")
    asked = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="kdq-reproduce: %(message)s")
    import kdq.cli.app  # noqa: F401  the resolvers of configs
    from kdq.records.rows import find_row
    from kdq.stages.reproduce import make, tell
    from kdq.utils.messages import describe

    try:
        row = find_row(asked.row, asked.output_dir)
        folder = asked.to or Path("reproduced") / row.config_hash
        made = make(row, folder, asked.store, asked.overrides, asked.trust)
    except Exception as error:
        print(f"kdq-reproduce: {describe(error)}", file=sys.stderr)
        sys.exit(2)
    if asked.store is not None:
        print(f"Trained models are those of {asked.store}: only what came after training was made again.")
    sys.exit(tell(row, made))


def command() -> None:
    """The command, which ends well on signals."""
    with ending_on_signals():
        main()


if __name__ == "__main__":
    command()
