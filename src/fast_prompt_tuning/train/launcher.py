"""A process that torchrun or accelerate started does not outlive it."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import cache

MARKS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE")
"""What torchrun and accelerate set in the environment of each process that they start, and nobody else does."""

SECONDS = 1.0
"""Between two looks at whether the launcher is still there."""


@cache
def end_with_launcher() -> None:
    """Send this process SIGTERM when its launcher is gone: training then saves a checkpoint and stops.

    A launcher that is killed takes nobody with it. Without one, nothing is watched: a shell may go first.
    """
    if not any(mark in os.environ for mark in MARKS):
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
