"""`fpt`, and `python -m fast_prompt_tuning` for launchers that take a module."""

from .cli import signals


def main() -> None:
    """The command; signals are heard before anything else is imported, which takes seconds."""
    signals.listen()
    from .cli.app import main as run

    run()


if __name__ == "__main__":
    main()
