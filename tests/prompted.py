"""Scores and answers of a PLM with a prompt's values, as tests ask for them."""

from __future__ import annotations

from typing import Any

from fast_prompt_tuning.prompt.generation import GenerationOptions
from fast_prompt_tuning.prompt.places import place
from fast_prompt_tuning.prompt.prediction import Prediction
from fast_prompt_tuning.prompt.prompted import Input


def rows_of(inputs: Any, after: list[int] | None = None) -> list[Input]:
    return [Input(ids, n) for ids, n in zip(inputs, after or [0] * len(inputs), strict=True)]


def score_labels(
    plm: Any, prompt: Any, inputs: Any, labels: Any, *, placement="prefix", after=None, cache=None, **options: Any
) -> list[Prediction]:
    return place(plm, prompt, placement, cache).score(rows_of(inputs, after), labels, **options)[0]


def generate(
    plm: Any, tokenizer: Any, prompt: Any, inputs: Any, *, placement="prefix", **options: Any
) -> list[Prediction]:
    return place(plm, prompt, placement).generate(rows_of(inputs), tokenizer, GenerationOptions(**options))[0]
