"""``python -m kdq`` is ``kdq``."""

from kdq.app import main

if __name__ == "__main__":
    main()
