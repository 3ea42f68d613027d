"""``python -m kdq`` is ``kdq``."""

from kdq.utils.signals import ending_on_signals


def main() -> None:
    """The command, which ends well on signals also while it still imports."""
    with ending_on_signals():
        from kdq.cli.app import main as run

        run()


if __name__ == "__main__":
    main()
