"""``python -m kdq.bench NAME [options]``: run one of the benchmarks."""

import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Hand the arguments to ``main`` of the module that the first one names, or show what it says of itself."""
    files = Path(__file__).parent.glob("*.py")
    names = sorted(file.stem for file in files if "\ndef main(" in file.read_text() and file.stem != "__main__")
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m kdq.bench {{{','.join(names)}}} [--help]")
    benchmark = import_module(f"kdq.bench.{sys.argv[1]}")
    if {"-h", "--help"} & set(sys.argv[2:]):
        print(benchmark.__doc__)
    else:
        benchmark.main(sys.argv[2:])


if __name__ == "__main__":
    main()
