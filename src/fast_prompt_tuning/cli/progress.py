"""Live progress of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback

from ..cost.flops import step_flops
from ..cost.shapes import BatchShape
from ..cost.units import human_seconds
from ..run.session import Session
from ..schedule.auto import AutoSchedule
from ..schedule.stages import Schedule, Stage


class ProgressReporter(TrainerCallback):
    """Shows stage, step, loss, steps per second and the time left, which knows that later stages are slower.

    Args:
        title: what is being trained.
        relative: cost of a step of a stage relative to the full model's, for the estimate of the time left.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        schedule: Schedule | AutoSchedule,
        full: Stage,
        relative: Callable[[Stage], float],
    ):
        self.console, self.title, self.schedule, self.full = console, title, schedule, full
        self.relative = relative
        self.bar: Progress | None = None
        self.loss: float | None = None
        self.metric = ""
        self._seconds, self._work, self._start = 0.0, 0.0, 0.0
        self._stage: int | None = None

    def _work_left(self, step: int) -> float:
        ends = [*self.schedule.now.boundaries[1:], self.schedule.total_steps]
        starts = self.schedule.now.boundaries
        return sum(
            max(0, end - max(start, step)) * self.relative(stage)
            for start, end, stage in zip(starts, ends, self.schedule.now.stages, strict=True)
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[numbers]}"),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task(escape(self.title), total=state.max_steps, numbers="")
            self.bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self.schedule.now.index_at(state.global_step)
        if stage != self._stage:
            now = self.schedule.now.stages[stage]
            whole = now.is_full(self.full) and not now.cuts_batch
            part = "the full model" if whole else f"{now} of {self.full}"
            verb = "tuning on" if self._stage is None else "growing to"
            self.console.print(f"  step {state.global_step}: {verb} {part}", highlight=False)
            self._stage = stage
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._start
        self._work += self.relative(self.schedule.now.stage_at(state.global_step - 1))
        if self.bar is not None:
            numbers = "  ".join(filter(None, (self._numbers(state), self.metric)))
            self.bar.update(self.task, completed=state.global_step, total=self._end(state), numbers=numbers)

    def _end(self, state: Any) -> int:
        return min(self.schedule.total_steps, state.max_steps)

    def _numbers(self, state: Any) -> str:
        last = self.schedule.now.index_at(max(state.global_step - 1, 0))
        per_work = self._seconds / self._work if self._work else 0.0
        left = per_work * self._work_left(state.global_step)
        rate = 1 / (per_work * self.relative(self.schedule.now.stages[last])) if per_work else 0.0
        parts = [f"stage {last + 1}/{len(self.schedule.now.stages)}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        parts += [f"{rate:.2f} step/s", f"{human_seconds(left)} left"]
        return "  ".join(parts)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.loss = logs["loss"]
            if self.bar is None and state.is_world_process_zero:
                line = f"  step {state.global_step}/{self._end(state)}  {self._numbers(state)}"
                self.console.print(line, highlight=False, soft_wrap=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name, value = next(iter(kwargs["metrics"].items()))
        self.metric = f"{name.removeprefix('eval_')} {value:.1f}%"
        self.console.print(f"  step {state.global_step}: {self.metric} on the full model", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


@contextmanager
def reporting(
    console: Console, title: str, session: Session
) -> Iterator[tuple[list[TrainerCallback], Callable[[Schedule | AutoSchedule, Any], None]]]:
    """Callbacks and a hook for `run.train`: the hook puts a progress reporter for the run's schedule among them.

    However the run ends, the terminal is as it was.
    """
    callbacks: list[TrainerCallback] = []

    def hook(schedule: Schedule | AutoSchedule, full: Any) -> None:
        data = session.config.data
        shape = BatchShape(
            batch=session.config.train.batch_size,
            input_tokens=data.max_input_tokens,
            prompt_tokens=session.config.prompt.tokens,
            target_tokens=min(session.max_target_tokens, 16),
        )
        whole = step_flops(session.cost, None, shape)

        def relative(stage: Stage) -> float:
            return step_flops(session.cost, stage, shape) / whole

        callbacks.append(reporter := ProgressReporter(console, title, schedule, full, relative))
        at_end.callback(reporter.close)

    with ExitStack() as at_end:
        yield callbacks, hook
