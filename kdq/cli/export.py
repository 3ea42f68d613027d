"""``kdq-export CELL``: a cell of a grid, or any packed file, as another runtime loads it, or on the hub."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kdq.deploy.formats import SUFFIXES

#: The override with which an error is shown whole.
DEBUG = "kdq.debug=true"


def main(arguments: Sequence[str] | None = None) -> None:
    """``kdq-export CELL [--format F] [--output-dir DIR] [--to PATH | --to hf:owner/name] [OVERRIDE ...]``."""
    parser = argparse.ArgumentParser(prog="kdq-export", description="Write a cell's model for another runtime.")
    parser.add_argument("cell", help="a row's config_hash or its start, a row's .json file, or a packed .kdq file")
    parser.add_argument("--format", choices=SUFFIXES, default="packed", help="default: packed")
    parser.add_argument("--output-dir", type=Path, default="outputs", help="paths.output_dir of the run")
    parser.add_argument(
        "--to",
        default=".",
        help="a file, a folder for one named after the cell, or hf:owner/name: the Hugging Face hub",
    )
    parser.add_argument("--license", help="of a model on the hub, by its name there, such as mit")
    parser.add_argument(
        "overrides", nargs="*", help="of kdq's config: the images of ONNX, such as data=cifar10, or the model"
    )
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="kdq-export: %(message)s")
    import kdq.cli.app  # noqa: F401  the resolvers of configs
    from kdq.stages.export import CHOSEN, export, find, names_model, share
    from kdq.utils.errors import KdqError
    from kdq.utils.hub import HUB
    from kdq.utils.messages import describe

    given = [override for override in options.overrides if override != DEBUG]
    try:
        if given and options.format == "packed":
            raise KdqError(f"{given[0]}: the packed file is copied as it is; overrides are of another --format")
        if given and options.format == "torch" and not names_model(given):
            raise KdqError(f"{given[0]}: the torch format needs no images; its overrides are of the model")
        if options.license and not options.to.startswith(HUB):
            raise KdqError(f"--license {options.license} is of a model on the hub: give --to {HUB}owner/name")
        source = find(options.cell, options.output_dir)
        if options.to.startswith(HUB):
            print(share(source, options.format, options.to, options.license or "unknown", options.overrides))
            return
        target = Path(options.to)
        if target.is_dir() or not target.suffix or options.to.endswith(os.sep):
            target = target / f"{source.packed.stem}{SUFFIXES[options.format]}"
        said = export(source, options.format, target, options.overrides)
    except Exception as error:
        if DEBUG in options.overrides:
            raise
        sys.exit(f"kdq-export: {describe(error, CHOSEN)}")
    print(f"{target}  {target.stat().st_size:,} bytes" + (f"; {said}" if said else ""))


if __name__ == "__main__":
    main()
