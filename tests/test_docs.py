"""What README and docs say is so: their code runs, their numbers are those of committed results or of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from settings import BY_NAME
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from fast_prompt_tuning import cli, tasks
from fast_prompt_tuning.plan import PAPER_TABLE2, paper_table1_flops, paper_table2_flops

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPRODUCTION = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_the_three_lines_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(README, "python")
    code = code.replace(" ..., ", " args=args, train_dataset=rows, data_collator=collate, ").replace("30_000", "4")
    family = BY_NAME["t5"]
    batch = family.batch()
    names = {
        "get_peft_model": get_peft_model,
        "Seq2SeqTrainer": Seq2SeqTrainer,
        "plm": family.plm(),
        "calibration_batches": [batch],
        "rows": [{k: v[i] for k, v in batch.items()} for i in range(3)] * 4,
        "collate": lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]},
        "args": Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
    }
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "prompt" / "adapter_model.safetensors").is_file()


def test_the_readmes_demo_is_the_committed_one():
    record = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    for run in record["runs"].values():
        low, high = run["interval"]
        cells = [f"{run['value']:.1f}", f"{low:.1f}–{high:.1f}"]
        if run["flops"]:
            cells += [f"{run['flops'] / 1e12:.1f} T", f"{100 * run['relative_flops']:.0f}%"]
            cells += [f"{run['seconds']:.0f} s", f"{100 * run['relative_seconds']:.0f}%"]
        row = next(line for line in README.splitlines() if line.startswith(f"| {run['name']} |"))
        assert all(cell in row for cell in cells), (row, cells)
    assert (ROOT / "docs" / "pictures" / "demo.png").is_file()


def test_the_readmes_step_times_are_the_committed_ones():
    record = json.loads((ROOT / "benchmarks" / "results" / "step_time.json").read_text())
    for result in record["results"]:
        row = next(line for line in README.splitlines() if line.startswith(f"| {result['title']} |"))
        assert f"| {result['plain']['median']:.2f} | {result['fpt_run']['median']:.2f} |" in row


@pytest.mark.parametrize("convention", ["linear", "all"])
def test_the_flops_columns_are_what_the_code_counts(convention):
    found = [f"{100 * part:.1f}" for part in paper_table1_flops("large", convention=convention)]
    for start in (0, 3, 6):
        assert " / ".join(found[start : start + 3]) in REPRODUCTION
    runs = paper_table2_flops("large", convention=convention)
    assert " / ".join(f"{100 * runs[m]:.1f}" for m in PAPER_TABLE2["large"]) in REPRODUCTION
    if convention == "linear":
        for method in PAPER_TABLE2["large"]:
            assert f"| {100 * runs[method]:.1f}% |" in README


def test_the_task_in_the_guide_loads_and_renders(tmp_path):
    (text,) = blocks((ROOT / "docs" / "tasks.md").read_text(encoding="utf-8"), "yaml")
    (tmp_path / "tickets.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "train.jsonl").write_text('{"text": "My bill is wrong", "label": "billing"}\n')
    task = tasks.load_task(str(tmp_path / "tickets.yaml"))
    (row,) = tasks.load_examples(task, "train", decoder=True)
    assert row["input"] == "My bill is wrong\nTeam:"
    assert row["target"] == " billing"


def test_every_command_in_the_readme_exists(capsys):
    commands = {
        line.split()[1] for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("fpt ")
    }
    assert {"plan", "train", "eval", "predict", "ls"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
    capsys.readouterr()


def test_recipes_in_the_readme_exist():
    for name in re.findall(r"fpt show recipe (\w+)", README):
        recipe = ROOT / "src" / "fast_prompt_tuning" / "recipes" / f"{name}.yaml"
        assert yaml.safe_load(recipe.read_text(encoding="utf-8"))
