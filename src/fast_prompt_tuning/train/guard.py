"""What keeps a run from ending badly: signals that end it after a step, and the last good values of what it trains."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


class Signals:
    """Within `with Signals() as signals`, Ctrl-C or SIGTERM sets `number`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._reached = False  # the signal reached this process, too
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.number is not None and not self._reached:
            for number in self._before:  # another process has ended the run: the launcher's signal is on its way
                signal.signal(number, self._let_pass)
        else:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _let_pass(self, _number: int, _frame: FrameType | None) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._reached:
            if callable(before := self._before[number]):  # the command's own, which knows the exit code
                before(number, frame)
            raise KeyboardInterrupt
        self._reached, self.number = True, number
        logger.warning("stopping after this step; once more to stop at once")


class LastGood:
    """The values of `parameters` when their loss and gradient were last seen to be finite.

    With a running mean of the prompt it is the mean that belongs to the last good prompt, as it is between two steps.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self.values = [p.detach().clone() for p in parameters]
        self._now = [v.clone() for v in self.values]

    def begin_step(self) -> None:
        """Before a step: what it starts from."""
        for start, parameter in zip(self._now, self.parameters, strict=True):
            start.copy_(parameter.detach())

    def confirm(self) -> None:
        """Loss and gradient of the step are finite: what it started from was good."""
        self.set(self._now)

    def set(self, values: Sequence[torch.Tensor]) -> None:
        """Take these for the last good values."""
        for good, value in zip(self.values, values, strict=True):
            good.copy_(value)

    def go_back(self) -> None:
        """Give the parameters their last good values back."""
        with torch.no_grad():
            for good, parameter in zip(self.values, self.parameters, strict=True):
                parameter.copy_(good)
