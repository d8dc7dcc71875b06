"""The examples run offline as they stand, only shorter."""

from __future__ import annotations

import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
from peft import PeftConfig
from toy import toy

from fast_prompt_tuning.cli import app as cli
from fast_prompt_tuning.cli import console

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["trainer_three_lines", "seq2seq_t5"])
def test_scripts(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", "8", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "2 layers × 16 neurons (2 steps)" in said
    assert "saved" in said
    assert PeftConfig.from_pretrained(tmp_path / "prompt").num_virtual_tokens == 8


def test_own_task(tmp_path, monkeypatch, capsys):
    """Every line of the script, with a tiny model and few steps."""
    handler = signal.getsignal(signal.SIGTERM)
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    lines = [line for line in (EXAMPLES / "own_task" / "run.sh").read_text().splitlines() if line.startswith("fpt ")]
    assert [line.split()[1] for line in lines] == ["show", "train", "train", "compare", "report", "predict"]
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "train":
            for setting in (f"model.path={toy().llama}", "train.steps=4", "train.eval_every=2", "scoring.examples=8"):
                words += ["--set", setting]
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0, line
    signal.signal(signal.SIGTERM, handler)
    console.state.update(debug=False, quiet=False)
    said = capsys.readouterr().out
    assert "Improve" in said
    assert said.splitlines()[-1] in ("billing", "tech", "other", "technical")
    assert (tmp_path / "runs" / "tickets" / "report.html").stat().st_size > 50_000


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # Jupyter's
def test_notebook():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "partial_plm.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without output
    nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
