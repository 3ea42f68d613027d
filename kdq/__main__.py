"""``python -m kdq`` is ``kdq``."""

from kdq.cli.app import main

if __name__ == "__main__":
    main()
