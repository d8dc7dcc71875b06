"""Several prompts of one PLM score the same texts in the same passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .prediction import Prediction, likeliest
from .prompted import Input, PromptedPLM


def score_together(
    prompted: Sequence[PromptedPLM],
    inputs: Sequence[Sequence[Input]],
    choices: Sequence[Mapping[str, Sequence[int]]],
    *,
    batch_size: int = 16,
) -> list[list[Prediction]]:
    """The likeliest label of every prompt for its own input of each text, as `PromptedPLM.score` would say it.

    All labels compete for the next token of every row, and each prompt looks at its own. A batch holds rows of several
    prompts, so that the weights are read once for all of them.

    Args:
        prompted: of one PLM, one cache, one placement and prompts `(P, H)` of one length; the PLM is decoder-only.
        inputs: of each prompt, one for each text.
        choices: of each prompt, label word -> its one token.
        batch_size: rows of a pass.
    """
    tokens = {str(ids[0]): list(ids) for each in choices for ids in each.values()}
    stacked = torch.stack([each.prompt for each in prompted if each.prompt is not None])
    rows = [each for of_text in zip(*inputs, strict=True) for each in of_text]  # row i has prompt i mod K
    scored, _ = replace(prompted[0], prompt=stacked).score(rows, tokens, batch_size=batch_size)
    tables = [each.label_scores or {} for each in scored]
    return [
        [likeliest(list(words), torch.tensor([table[str(ids[0])] for ids in words.values()]))
         for table in tables[n :: len(prompted)]]
        for n, words in enumerate(choices)
    ]  # fmt: skip
