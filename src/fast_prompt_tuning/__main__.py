"""`python -m fast_prompt_tuning` is `fpt`, for launchers that take a module."""

from .cli.app import main

if __name__ == "__main__":
    main()
