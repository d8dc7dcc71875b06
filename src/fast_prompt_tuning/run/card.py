"""The card of a run's prompt: what it is, how good it is and what it cost."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from ..cost.units import human_flops, human_seconds
from ..paths import is_path
from ..placements import PLACEMENTS
from ..schedule.stages import size_text
from .results import RunResult


def hub_id(path: str) -> str | None:
    """A model's hub id; None for a local folder, file or packaged model."""
    return path if path.count("/") == 1 and not is_path(path) and not Path(path).exists() else None


def model_card(result: RunResult) -> str:
    """The card (Markdown with YAML front matter) of a run's prompt."""
    config = result.config
    named, task = hub_id(config["model"]["path"]), config["data"]["task"] or "custom"
    base = named or Path(config["model"]["path"]).name  # the path is this machine's own
    place = config["prompt"].get("placement", "prefix")
    data = ModelCardData(
        base_model=named,
        library_name="peft" if place == "prefix" else "fast-prompt-tuning",
        tags=["prompt-tuning", "soft-prompt", "fast-prompt-tuning", f"task:{Path(task).stem}"],
    )
    metrics = "\n".join(
        f"| {name} | {value:.2f} | {result.intervals[name][0]:.2f} – {result.intervals[name][1]:.2f} |"
        for name, value in result.metrics.items()
    )
    stages = "\n".join(
        f"| {i} | {size_text(s['layers'])} | {size_text(s['ffn'])} | {s.get('batch') or 'all'} | {s['steps']} |"
        for i, s in enumerate(result.schedule, 1)
    )
    loading = (
        """from fast_prompt_tuning import load_soft_prompt

model = load_soft_prompt(base_model, "this folder")"""
        if place != "prefix"
        else """from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")"""
    )
    status = "" if result.status == "finished" else f" ({result.status})"
    versions = ", ".join(f"{k} {v}" for k, v in result.environment.items() if k not in ("platform", "threads"))
    return f"""---
{data.to_yaml()}
---

# Soft prompt for {Path(task).stem} on {base.split("/")[-1]}

{config["prompt"]["tokens"]} virtual tokens for `{base}` (revision {config["model"]["revision"] or "default"}), to stand
{PLACEMENTS[place].where}; tuned with the method `{result.method}` of fast-prompt-tuning. The model's
weights are unchanged.

```python
{loading}
```

## Quality on {result.examples} {result.split} examples, full model

| metric | % | 95% interval |
| --- | --- | --- |
{metrics}

## Training

{result.steps} steps{status}, {human_flops(result.flops["train"])} of training and
{human_flops(result.flops["score"] + result.flops["probe"])} of scoring and probing,
{human_seconds(result.train_seconds)} for all of it.

| stage | layers | FFN neurons | examples of a batch | steps |
| --- | --- | --- | --- | --- |
{stages}

Model fingerprint {result.fingerprints.get("model", "?")}. Versions: {versions}.
"""
