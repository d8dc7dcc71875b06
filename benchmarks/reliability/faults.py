"""Faults put into real runs of tiny models: each function causes one and raises where it was not borne as promised.

The harness counts them and `tests/run/test_faults.py` runs each as a test.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scenarios import forked, recipe, same_run
from toy import toy
from transformers import Trainer, TrainerCallback, TrainingArguments

from fast_prompt_tuning import PartialPLM, ProgressiveCallback, Schedule, soft_prompt_config
from fast_prompt_tuning.cli import app as cli
from fast_prompt_tuning.errors import ConfigError, FptError, TrainingStopped
from fast_prompt_tuning.prompt import front
from fast_prompt_tuning.prompt.soft_prompt import load_prompt, prompt_parameter
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.results import load_result
from fast_prompt_tuning.train import checkpoint, loop

FAULTS: dict[str, Callable[[Path], None]] = {}
"""What happens to the run → the function that makes it happen."""


def fault(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a fault."""

    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        FAULTS[name] = function
        return function

    return register


def demand(truth: Any, otherwise: str) -> None:
    """Raise unless `truth`."""
    if not truth:
        raise RuntimeError(otherwise)


class At(TrainerCallback):
    """Does something when a step has ended: `At({3: start, 7: stop})`."""

    def __init__(self, what: dict[int, Callable[[], Any]]):
        self.what = what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.what.get(state.global_step, lambda: None)()


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """What the package warns of."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fast_prompt_tuning")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


# -- the disk ---------------------------------------------------------------------------------------------------------


@fault("disk full while a checkpoint is saved")
def disk_full_at_a_checkpoint(folder: Path) -> None:
    """Writes fail for a while; the run goes on, and its result is that of a run without the fault."""
    settings = {"method": "ld", "train__save_every": 2, "train__log_every": 2}
    whole = run.train(recipe(folder / "whole", **settings))
    config = recipe(folder / "run", **settings)
    with said() as lines, _no_room() as full:
        result = run.train(config, callbacks=[At({3: full.start, 7: full.stop})])
    same_run(result, whole)
    demand(any("checkpoint of step 4 cannot be written" in line for line in lines), f"not said: {lines}")
    steps = checkpoint.steps_of(folder / "run" / "checkpoints")
    demand(steps == [8, 10], f"checkpoints of steps {steps}")


@fault("disk full at the end of a run")
def disk_full_at_the_end(folder: Path) -> None:
    """The prompt cannot be written: one clear error; with room again, --resume ends the run as it would have."""
    whole = run.train(recipe(folder / "whole", method="pt"))
    config = recipe(folder / "run", method="pt")
    with _no_room() as full:
        try:
            run.train(config, callbacks=[At({10: full.start})])
        except ConfigError as error:
            demand("--resume" in str(error), str(error))
        else:
            raise RuntimeError("a run that wrote nothing was called finished")
        full.stop()
    demand(not (folder / "run" / "prompt").exists(), "a part of a prompt was left")
    same_run(run.train(config, resume=True), whole)


class _no_room:
    """Files may grow no more: the system refuses every write, as a full disk does, with its own error."""

    def __enter__(self) -> _no_room:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return self

    def start(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, self.before[1]))

    def stop(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    def __exit__(self, *_: Any) -> None:
        self.stop()
        signal.signal(signal.SIGXFSZ, self.handler)


@fault("read-only output")
def read_only_output(folder: Path) -> None:
    """Refused before any step, naming the folder. `/proc` takes no files, from the administrator either."""
    with mock.patch.object(loop.Loop, "run", side_effect=RuntimeError("a step was made")):
        for place in (Path("/proc/run"), Path("/proc/self/run")):
            try:
                run.train(recipe(place, method="pt"))
            except ConfigError as error:
                demand(str(place) in str(error) and "cannot be written" in str(error), str(error))
            else:
                raise RuntimeError("no error")


@fault("unwritable caches")
def unwritable_caches(folder: Path) -> None:
    """A run needs none of them."""
    nowhere = dict.fromkeys(("HF_HOME", "HF_DATASETS_CACHE", "FPT_CACHE", "XDG_CACHE_HOME"), "/proc/nowhere")
    (folder / "recipe.yaml").write_text(recipe(folder / "run", method="ld").to_yaml())
    done = _fpt(["train", "-c", str(folder / "recipe.yaml")], nowhere)
    demand(done.returncode == 0 and load_result(folder / "run").status == "finished", done.stderr)


def _fpt(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fast_prompt_tuning", *arguments]
    known = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(command, env=known, capture_output=True, text=True, timeout=600)


# -- signals ----------------------------------------------------------------------------------------------------------


def _signalled(folder: Path, number: int, code: int) -> None:
    config = recipe(folder / "run", method="ld", train__steps=5000, train__save_every=2, train__eval_every=1000)
    (folder / "recipe.yaml").write_text(config.to_yaml())
    process = forked().Process(target=_command, args=(["train", "-c", str(folder / "recipe.yaml")], folder / "said"))
    process.start()
    places = folder / "run" / "checkpoints"
    while not checkpoint.steps_of(places) and process.is_alive():
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(300)
    errors = (folder / "said").read_text()
    demand(process.exitcode == code, f"exit code {process.exitcode}: {errors}")
    demand("Traceback" not in errors, errors)
    result, found = load_result(folder / "run"), checkpoint.latest(places)
    demand(found is not None and found.step == result.steps, "the step it stopped at was not saved")
    demand(torch.isfinite(load_prompt(folder / "run" / "prompt")).all(), "no prompt")


def _command(arguments: list[str], said: Path) -> None:
    """`fpt` with these arguments in a process of its own, what it says in a file."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    cli.main(arguments)


@fault("Ctrl-C")
def ctrl_c(folder: Path) -> None:
    """The step is finished and saved; exit code 130."""
    _signalled(folder, signal.SIGINT, 130)


@fault("SIGTERM")
def sigterm(folder: Path) -> None:
    """The same with 143."""
    _signalled(folder, signal.SIGTERM, 143)


# -- memory -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _memory_for(examples: int, error: Callable[[], Exception]) -> Iterator[None]:
    """Training forwards of more than so many examples fail as the allocator does."""
    inner = front.label_loss

    def limited(model: Any, batch: Any, **options: Any) -> Any:
        loss = inner(model, batch, **options)  # some work is done before memory ends
        if len(batch["input_ids"]) > examples:
            raise error()
        return loss

    with mock.patch.object(front, "label_loss", limited):
        yield


def _allocator() -> Exception:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: 9 bytes")


@fault("out of memory in a step")
def out_of_memory(folder: Path) -> None:
    """The batch is trained in parts: the same losses up to rounding, also accumulated and resumed."""
    for i, (accumulate, error) in enumerate(
        [(1, _allocator), (2, lambda: torch.OutOfMemoryError("CUDA out of memory."))]
    ):
        settings = {"method": "cr", "train__accumulate": accumulate, "train__batch_size": 6}
        whole = run.train(recipe(folder / f"whole-{i}", **settings))
        config = recipe(folder / f"run-{i}", **settings)
        with said() as lines, _memory_for(2, error):
            with contextlib.suppress(InterruptedError):
                run.train(config, callbacks=[At({7: _interrupt})])
            result = run.train(config, resume=True)
        gap = max(abs(a - b) / a for (_, a), (_, b) in zip(whole.losses, result.losses, strict=True))
        demand(gap < 1e-5, f"losses differ by {gap}")
        told = [line for line in lines if "out of memory" in line]
        demand(len(told) == 2 and "4 parts of at most 2 examples" in told[1], f"said: {told}")  # resumed: no more of it


def _interrupt() -> None:
    raise InterruptedError


@fault("out of memory with a single example")
def out_of_memory_with_one_example(folder: Path) -> None:
    """Nothing is left to cut: the run stops, says what to lower, and its prompt is there."""
    with _memory_for(0, _allocator):
        try:
            run.train(recipe(folder / "run", method="ld"))
        except TrainingStopped as error:
            demand("data.max_input_tokens" in str(error), str(error))
        else:
            raise RuntimeError("no error")
    demand(torch.isfinite(load_prompt(folder / "run" / "prompt")).all(), "no prompt")


# -- numbers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bad(where: str, calls: range) -> Iterator[None]:
    inner, made = front.label_loss, []

    def bad(*args: Any, **options: Any) -> Any:
        loss = inner(*args, **options)
        made.append(1)
        if len(made) - 1 not in calls:
            return loss
        if where == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    with mock.patch.object(front, "label_loss", bad):
        yield


def _left_out(folder: Path, where: str) -> None:
    with said() as lines, _bad(where, range(4, 6)):
        result = run.train(recipe(folder / "run", method="pt"))
    demand((result.status, result.skipped_steps) == ("finished", 2), f"{result.status}, {result.skipped_steps}")
    demand(sum("left out" in line for line in lines) == 2, f"said: {lines}")
    demand(torch.isfinite(load_prompt(folder / "run" / "prompt")).all(), "the prompt is not finite")


@fault("a loss that is no number")
def loss_not_finite(folder: Path) -> None:
    """Such steps are left out and counted."""
    _left_out(folder, "loss")


@fault("an infinite gradient")
def gradient_not_finite(folder: Path) -> None:
    """The same."""
    _left_out(folder, "gradient")


@fault("losses that stay no number")
def losses_stay_not_finite(folder: Path) -> None:
    """Five in a row end the run, with the last good prompt."""
    with _bad("loss", range(4, 99)):
        try:
            run.train(recipe(folder / "run", method="pt"))
        except TrainingStopped as error:
            demand("5 steps in a row" in str(error), str(error))
        else:
            raise RuntimeError("no error")
    demand(load_result(folder / "run").status == "stopped", "not marked as stopped")
    demand(torch.isfinite(load_prompt(folder / "run" / "prompt")).all(), "the prompt is not finite")


# -- files and processes ----------------------------------------------------------------------------------------------


def _damaged(folder: Path, damage: Callable[[Path], None]) -> None:
    settings = {"method": "cr", "train__save_every": 2}
    whole = run.train(recipe(folder / "whole", **settings))
    config = recipe(folder / "run", **settings)
    with contextlib.suppress(InterruptedError):
        run.train(config, callbacks=[At({7: _interrupt})])
    damage(folder / "run" / "checkpoints" / "checkpoint-6")
    with said() as lines:
        same_run(run.train(config, resume=True), whole)
    demand(any("the one before it is used" in line for line in lines), f"said: {lines}")


@fault("a truncated checkpoint")
def truncated_checkpoint(folder: Path) -> None:
    """The one before it is used, with a message; the run ends as it would have."""
    _damaged(folder, lambda place: os.truncate(place / "optimizer.safetensors", 100))


@fault("an altered checkpoint")
def altered_checkpoint(folder: Path) -> None:
    """The same."""

    def flip(place: Path) -> None:
        file = place / "adapter_model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    _damaged(folder, flip)


@fault("a symbolic link in a checkpoint")
def linked_checkpoint(folder: Path) -> None:
    """Not followed."""

    def link(place: Path) -> None:
        outside = shutil.move(place / "loop.json", folder / "elsewhere.json")
        (place / "loop.json").symlink_to(outside)

    _damaged(folder, link)


@fault("two runs on one output folder")
def two_runs(folder: Path) -> None:
    """The second is refused and the first not disturbed."""
    config, refused = recipe(folder / "run", method="pt"), []

    def second() -> None:
        for options in ({"resume": True}, {"overwrite": True}):
            try:
                run.train(config, **options)  # type: ignore[arg-type]
            except ConfigError as error:
                refused.append("in use" in str(error))

    result = run.train(config, callbacks=[At({4: second})])
    demand(refused == [True, True] and result.status == "finished", f"{refused}, {result.status}")


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Twelve rows; the worker that reads them dies at the fifth read after `mortal` is set."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if i == 7 and (self.folder / "mortal").exists() and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        ids = torch.arange(5) + i
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@fault("a data worker killed, in a script of one's own")
def worker_killed(folder: Path) -> None:
    """The Trainer's error; the model is the full one again, and the script resumes to the same prompt."""
    from peft import get_peft_model
    from settings import BY_NAME

    def made(name: str) -> Any:
        plm = BY_NAME["llama"].plm()
        torch.manual_seed(0)
        model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
        partial = PartialPLM(model)
        schedule = Schedule.preset("ld", partial.full_stage, total_steps=20)
        arguments = TrainingArguments(
            output_dir=str(folder / name),
            max_steps=20,
            per_device_train_batch_size=2,
            save_steps=3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_num_workers=1,
            dataloader_pin_memory=False,
        )
        callbacks = [ProgressiveCallback(partial, schedule)]
        return Trainer(model=model, args=arguments, train_dataset=_Rows(folder), callbacks=callbacks), partial

    whole, _ = made("whole")
    whole.train()
    broken, partial = made("broken")
    broken.add_callback(At({7: (folder / "mortal").touch}))
    try:
        broken.train()
    except (RuntimeError, OSError, EOFError):  # torch says that a worker was killed, or meets its broken connection
        pass
    else:
        raise RuntimeError("no error")
    demand(partial.stage.is_full(partial.full_stage), "the model was left partial")
    (folder / "mortal").unlink()
    again, _ = made("broken")
    again.train(resume_from_checkpoint=True)
    one, two = prompt_parameter(whole.model), prompt_parameter(again.model)
    demand(torch.equal(one, two), "the resumed script ends with another prompt")


@fault("weights, data or recipe changed since the checkpoint")
def changed(folder: Path) -> None:
    """Refused, naming what; taken on request."""
    shutil.copytree(toy().folder, folder / "toy")
    settings = {"model__path": str(folder / "toy" / "llama"), "data__task": str(folder / "toy" / "topics.yaml")}
    config = recipe(folder / "run", method="ld", train__save_every=2, **settings)
    with contextlib.suppress(InterruptedError):
        run.train(config, callbacks=[At({7: _interrupt})])
    data = folder / "toy" / "train.jsonl"
    data.write_text("\n".join(reversed(data.read_text().splitlines())) + "\n")
    other = recipe(folder / "run", method="ld", train__save_every=2, optim__lr=0.01, **settings)
    for asked, name in ((config, "fingerprints.train"), (other, "optim.lr")):
        try:
            run.train(asked, resume=True)
        except FptError as error:
            demand(name in str(error) and "--allow-changed" in str(error), str(error))
        else:
            raise RuntimeError("no error")
    demand(run.train(other, resume=True, allow_changed=True).status == "finished", "not finished")
