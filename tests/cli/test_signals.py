"""Signals and launchers that end a real process: its exit code, and that it says no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import toy

from fast_prompt_tuning.prompt import front
from fast_prompt_tuning.train import launcher
from fast_prompt_tuning.train.guard import Signals

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
WAIT = 60.0


def until(seen, process) -> None:
    limit = time.monotonic() + WAIT
    while not seen():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


def loaded(process, name: str) -> bool:
    """Whether a process has mapped a file of that name: how far its imports are."""
    return name in Path(f"/proc/{process.pid}/maps").read_text()


MOMENTS = [  # what a process has mapped by then
    ("_json", signal.SIGINT),
    ("_json", signal.SIGTERM),
    ("libtorch_python", signal.SIGINT),
    ("pyarrow", signal.SIGTERM),
    ("tokenizers", signal.SIGINT),
]


@pytest.mark.parametrize(("library", "number"), MOMENTS)
def test_a_signal_before_training(tmp_path, library, number):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run", train__steps=100_000)
    command = [sys.executable, "-m", "fast_prompt_tuning", "train", "--config", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        until(lambda: loaded(process, library), process)
        process.send_signal(number)
        _, err = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert "Error" not in err
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("mark", [*launcher.MARKS, None])
def test_a_process_ends_with_its_launcher(mark):
    """Without a launcher it goes on: a shell may go first."""
    child = (
        "import time\nfrom fast_prompt_tuning.train import launcher\nlauncher.SECONDS = 0.05\n"
        "launcher.end_with_launcher()\nprint('watching', flush=True)\ntime.sleep(60)"
    )
    parent = f"import subprocess, sys\nc = subprocess.Popen([sys.executable, '-c', {child!r}])\nprint(c.pid)\nc.wait()"
    own = {k: v for k, v in ENVIRONMENT.items() if k not in launcher.MARKS}
    started = subprocess.Popen(
        [sys.executable, "-uc", parent], stdout=subprocess.PIPE, text=True, env={**own, **({mark: "x"} if mark else {})}
    )
    process = started.stdout.readline().strip()
    try:
        assert started.stdout.readline() == "watching\n"
        started.kill()
        started.wait()
        limit = time.monotonic() + (10 if mark else 0.5)
        while alive(process) and time.monotonic() < limit:
            time.sleep(0.02)
        assert alive(process) == (mark is None)
    finally:
        started.stdout.close()
        if alive(process):
            os.kill(int(process), signal.SIGKILL)


def test_no_run_outlives_torchrun(tmp_path):
    """Killed, a launcher cannot end its processes: they save a checkpoint and end by themselves."""
    settings = {"train__steps": 100_000, "train__eval_every": 50_000, "train__log_every": 1}
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run", method="pt", **settings)
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fast_prompt_tuning"]
    said, log = tmp_path / "said", tmp_path / "run" / "log.jsonl"
    with said.open("w") as file:
        command = [sys.executable, "-m", *start, "-q", "train", "-c", str(recipe)]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=ENVIRONMENT)
    children = []
    try:
        until(lambda: log.is_file() and log.read_text(), process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        process.kill()
        process.wait()
        limit = time.monotonic() + WAIT
        while any(alive(child) for child in children):
            assert time.monotonic() < limit, said.read_text()
            time.sleep(0.1)
    finally:
        process.kill()
        for child in filter(alive, children):
            os.kill(int(child), signal.SIGKILL)
    assert "error" not in said.read_text().lower()
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_two_processes_score_and_speak_as_one(tmp_path):
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run")
    scores, picture = tmp_path / "scores", tmp_path / "signal.png"
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "fast_prompt_tuning"]
    ask = ["--json", "score", "-c", str(recipe), "--output", str(scores), "--signal", "--examples", "8", "--after", "1"]
    command = [sys.executable, "-m", *start, *ask, "--picture", str(picture)]
    ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=WAIT)
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    verdict = json.loads(line)["signal"]["verdict"]
    assert ended.stderr.count(verdict) == 1
    assert scores.exists()
    assert picture.stat().st_size > 1000


def alive(process: str) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


def test_a_signal_that_comes_late_ends_nothing_twice():
    """A launcher's signal may reach a process when another has ended the run already."""
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    try:
        with Signals() as signals:
            signals.number = signal.SIGTERM  # as another process has it
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(fpt, tmp_path, monkeypatch, number):
    def loss(*args, **kwargs):
        for _ in range(2):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(front, "label_loss", loss)
    recipe = toy().write_recipe(tmp_path / "r.yaml", tmp_path / "run")
    _, err = fpt("train", "--config", recipe, code=128 + number)
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "result.json").exists()
