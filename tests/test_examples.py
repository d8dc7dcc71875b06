"""The examples run offline as they stand, only shorter."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from toy import recipe, toy

from fast_prompt_tuning.cli import app as cli
from fast_prompt_tuning.cli import console
from fast_prompt_tuning.plm.loading import load_plm, load_tokenizer
from fast_prompt_tuning.run import run

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


@pytest.mark.parametrize("placement", ["prefix", "suffix", "infix"])
def test_what_a_vllm_server_is_sent_answers_as_fpt_does(placement, tmp_path, monkeypatch, capsys):
    """The server is played by the model itself, on the embeddings of the request."""
    sent: list[dict] = []
    changes = {"data__task": str(toy().words), "prompt__placement": placement, "method": "pt"}
    run.train(recipe(tmp_path / "run", **changes))
    texts = ["goal match team", "profit market bank shares"]
    for text in texts:
        with pytest.raises(SystemExit):
            cli.main(["predict", str(tmp_path / "run"), text])
    expected = capsys.readouterr().out.splitlines()[-len(texts) :]
    plm, tokenizer = load_plm(str(toy().llama), dtype="float32"), load_tokenizer(str(toy().llama))

    def served(asked):
        body = json.loads(asked.data)
        sent.append(body)
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        made = plm.generate(
            inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds), dtype=torch.long), do_sample=False,
            max_new_tokens=body["max_tokens"], eos_token_id=tokenizer.eos_token_id, pad_token_id=1,
        )  # fmt: skip
        text = tokenizer.decode(made[0], skip_special_tokens=True).split(body["stop"])[0]
        return contextlib.closing(io.BytesIO(json.dumps({"choices": [{"text": text}]}).encode()))

    monkeypatch.setattr("urllib.request.urlopen", served)
    monkeypatch.setattr(sys, "argv", ["vllm_client.py", str(tmp_path / "run"), *texts])
    runpy.run_path(str(EXAMPLES / "vllm_client.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-len(texts) :] == expected
    assert {body["temperature"] for body in sent} == {0}
