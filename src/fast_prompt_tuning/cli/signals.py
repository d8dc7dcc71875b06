"""Ctrl-C and SIGTERM: the documented exit code and no traceback, from the first import to the end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)

_received: list[int] = []  # the signal that the command under way is ending by
_working = False  # a command is under way: it may have something to clean up


def listen() -> None:
    """Have signals end the process from here on: at once, and inside `heard` by an exception."""
    for number in NUMBERS:
        signal.signal(number, _end)


@contextmanager
def heard() -> Iterator[list[int]]:
    """A block that a signal ends by an exception; the list then holds the signal's number.

    Whatever leaves the block, which may be another exception that the first one was turned into, is the signal's doing.
    """
    global _working
    before, hook = {number: signal.getsignal(number) for number in NUMBERS}, sys.unraisablehook
    _received.clear()
    _working = True
    listen()
    try:
        yield _received
    finally:
        _working, sys.unraisablehook = False, hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    # An import turns an exception into one of its own, or swallows it; there is nothing to clean up yet.
    if not _working or _received or _importing(frame):
        _leave(number)
    _received.append(number)
    sys.unraisablehook = lambda _: _leave(number)  # it was raised where Python only reports: in a destructor
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _leave(number: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # the signal may have come while it was being written to
            stream.flush()
    os._exit(128 + number)
