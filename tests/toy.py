"""Tiny saved models with a tokenizer of their own, and toy tasks: a whole run in a second."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from settings import BY_NAME
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainerCallback

from fast_prompt_tuning.recipe import RunConfig, load
from fast_prompt_tuning.run.results import Point, RunResult
from fast_prompt_tuning.schedule.stages import Schedule, Stage

TOPICS = {"sport": ["ball", "goal", "team", "match"], "business": ["bank", "market", "profit", "stock"]}
FILLER = ["the", "a", "of", "news", "today", "and", "big", "small", "new", "old"]
WORDS = ["Topic", "Word", ":", "story", *FILLER, *TOPICS, *(w for words in TOPICS.values() for w in words)]
# Labels of the built-in tasks and the example: those that a tokenizer cannot tell apart are refused.
WORDS += ["positive", "negative", "entailment", "neutral", "contradiction", "not", "is", "duplicate", "yes", "no"]
WORDS += ["billing", "technical", "other"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<extra_id_0>"]  # the ids that the configs of settings.py name


def tokenizer(*, eos: bool) -> PreTrainedTokenizerFast:
    """One token a word. `eos`: the end of sequence is added, as T5's tokenizer does."""
    table = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    made.normalizer = normalizers.Replace("\n", " ")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    if eos:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"],
    )


def articles(number: int, seed: int) -> list[dict[str, str]]:
    generator = random.Random(seed)
    rows = []
    for i in range(number):
        label = generator.choice(sorted(TOPICS))
        words = generator.choices(FILLER, k=generator.randint(2, 9)) + generator.choices(TOPICS[label], k=2)
        generator.shuffle(words)
        rows.append({"id": str(i), "text": " ".join(words), "label": label, "first": words[0]})
    return rows


@dataclass(frozen=True)
class Toy:
    folder: Path
    llama: Path
    t5: Path
    topics: Path
    """a task with labels"""
    words: Path
    """a task that is answered by generating"""

    def model(self, name: str) -> Path:
        return self.llama if name == "llama" else self.t5

    def recipe(self, output: Path, **changes: Any) -> dict[str, Any]:
        """Settings of a run of a second; `section__key=value` sets one of a section."""
        recipe: dict[str, Any] = {
            "model": {"path": str(self.llama), "dtype": "float32", "device": "cpu"},
            "data": {"task": str(self.topics), "max_input_tokens": 16, "train_limit": 40, "validation_limit": 12},
            "method": "cr",
            "prompt": {"tokens": 3},
            "scoring": {"examples": 16},
            "optim": {"lr": 0.05},
            "train": {"steps": 10, "batch_size": 4, "eval_every": 5, "log_every": 1},
            "output": str(output),
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                recipe.setdefault(section, {})[name] = value
            else:
                recipe[key] = value
        return recipe

    def write_recipe(self, path: Path, output: Path, **changes: Any) -> Path:
        path.write_text(yaml.safe_dump(self.recipe(output, **changes)))
        return path


@functools.cache
def toy() -> Toy:
    """Made once a session, in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="toy-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, family, eos in (("llama", "llama", False), ("t5", "t5-gated", True)):
        BY_NAME[family].plm().save_pretrained(folder / name)
        tokenizer(eos=eos).save_pretrained(folder / name)
    files = {}
    for split, number, seed in (("train", 60, 0), ("validation", 16, 1), ("test", 10, 2)):
        files[split] = f"{split}.jsonl"
        lines = [json.dumps(row) for row in articles(number, seed)]
        (folder / files[split]).write_text("\n".join(lines) + "\n")
    common = {"version": 1, "source": {"files": files}, "truncate": "text", "max_target_tokens": 4}
    topics = {
        "name": "topics",
        **common,
        "input_template": "story: {{ text }}",
        "target_template": "<extra_id_0> {{ label }}",
        "decoder": {"input_template": "{{ text }}\nTopic:", "target_template": " {{ label }}"},
        "label_field": "label",
        "labels": {"sport": "sport", "business": "business"},
        "metric": "accuracy",
        "primary": "accuracy",
    }
    words = {
        "name": "words",
        **common,
        "input_template": "story: {{ text }}",
        "target_template": "<extra_id_0> {{ first }}",
        "decoder": {"input_template": "{{ text }}\nWord:", "target_template": " {{ first }}"},
        "metric": "rouge",
        "primary": "rougeL",
    }
    for task in (topics, words):
        (folder / f"{task['name']}.yaml").write_text(yaml.safe_dump(task))
    return Toy(folder, folder / "llama", folder / "t5", folder / "topics.yaml", folder / "words.yaml")


def recipe(output, **changes) -> RunConfig:
    return load(toy().recipe(output, **changes))


class Broken(RuntimeError):
    pass


class At(TrainerCallback):
    """Does something once, when a step has ended."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


def raises(*_):
    raise Broken


FULL = Stage(4, 8, stacks=("decoder",))


def result(name="plain", method="pt", train=2e12, seconds=100.0, *, score=0.0, curve=True, **changes) -> RunResult:
    schedule = Schedule.preset(method, FULL, total_steps=10) if method != "none" else None
    points = [
        Point(step=s, metrics={"accuracy": 40.0 + s}, train_flops=train * s / 10, train_seconds=seconds * s / 10)
        for s in (5, 10)
    ]
    fields = {
        "name": name,
        "method": method,
        "status": "finished" if curve else "evaluated",
        "config": {},
        "schedule": schedule.to_dict() if schedule else [],
        "boundaries": list(schedule.boundaries) if schedule else [],
        "steps": 10,
        "primary": "accuracy",
        "metrics": {"accuracy": 50.0},
        "intervals": {"accuracy": (45.0, 55.0)},
        "examples": 12,
        "best_step": 10,
        "curve": points if curve else [],
        "flops": {"train": train, "score": score, "probe": 0.0, "eval": 5e12, "total": train + score + 5e12},
        "train_seconds": seconds,
        "total_seconds": 2 * seconds,
        "fingerprints": {},
        "environment": {},
    }
    return RunResult(**{**fields, **changes})
