"""A run's prompt in lm-evaluation-harness: the model `fpt`.

    python -m fast_prompt_tuning.engines.lm_eval run --model fpt --model_args path=runs/mine --tasks my_task

The harness finds models in its own package only; so its command line starts here, with ours registered.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ..data.encoding import encode
from ..errors import ConfigError
from ..plm.objective import IGNORED
from ..prompt.generation import GenerationOptions
from ..prompt.prompted import Input
from ..prompt.soft_prompt import context_length, load_prompt, place_of
from ..recipe import override, settings_of
from ..run.session import open_session

logger = logging.getLogger(__name__)

NO_LIMIT = 1_000_000
"""Tokens up to which a text is encoded; the model's positions cut it after that."""
LONGEST = 256
"""Tokens of an answer, where a task sets no `max_gen_toks`: the harness's own default."""


@register_model("fpt")
class PromptedLM(LM):  # type: ignore[misc]
    """A frozen PLM with a run's soft prompt where it was tuned to stand: in front of the context, within or after it.

    Contexts and continuations are tokenized as in training, apart from each other. A context that is too long loses its
    beginning, as the harness has it.

    Args:
        path: folder of the run.
        batch_size: requests at a time.
        device: as `model.device` in a recipe; default what the run says.
        tail: where the prompt stands within a text, the words with which that begins what is asked about it: the
            prompt goes before their last occurrence.
    """

    def __init__(
        self, path: str, batch_size: int | str = 16, device: str | None = None, tail: str | None = None, **_: Any
    ):
        super().__init__()
        folder = Path(path)
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness's default, on every machine
        settings = settings_of(folder, [] if device is None else [override("model.device", device)])
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r} must be a whole number of at least 1; auto is not known here")
        self.batch_size, self.tail = int(batch_size), tail
        self.session = open_session(settings, ())
        prompt, where = (None, None) if settings.method == "full" else (load_prompt(folder), place_of(folder))
        self.prompted = self.session.prompted(prompt, where)
        if self.prompted.spec().needs_tail and not tail:
            raise ConfigError(
                f"{path!r} has its prompt within the text; say with tail=WORDS how the question about it begins"
            )
        positions = context_length(self.session.plm)
        self.room = NO_LIMIT if positions is None else positions - self.prompted.prompt_tokens

    @property
    def tokenizer_name(self) -> str:
        """What the harness names a chat template's cache by."""
        return str(self.session.config.model.path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's own template."""
        text: str = self.session.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each `(context, continuation)` the continuation's log-probability, and whether it is the greedy one."""
        pairs = [_moved_spaces(*request.args) for request in requests]
        encoded = self._encoded(pairs)
        inputs, targets = [], []
        for row in encoded:
            split = len(row["input_ids"]) - row["n_target"] if self.session.decoder else len(row["input_ids"])
            target = [i for i in row["labels"] if i != IGNORED]
            targets.append(target[:-1] if self.session.decoder else target)  # a decoder's text may go on
            inputs.append(self._shortened(row["input_ids"][:split], row["n_tail"], len(targets[-1])))
        found = self.prompted.likelihoods(inputs, targets, batch_size=self.batch_size)
        return [(each.value, each.greedy) for each in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused: a prompt that was tuned for a task makes no language model of all text.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "perplexity of whole texts (loglikelihood_rolling) is not what a prompt was tuned for; score the base model"
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers to `(context, options)`, each cut where the first of its `until` begins.

        Raises:
            ConfigError: sampling is asked for.
        """
        answers: dict[int, str] = {}
        by_options: dict[tuple[int, bool], list[int]] = {}
        for i, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample") or options.get("temperature"):
                raise ConfigError("a sampled answer is asked for; set do_sample: false and temperature: 0 in the task")
            one_line = "\n" in _until(options)
            by_options.setdefault((int(options.get("max_gen_toks", LONGEST)), one_line), []).append(i)
        for (tokens, one_line), picked in by_options.items():
            encoded = self._encoded([(requests[i].args[0], "") for i in picked])
            inputs = [self._shortened(row["input_ids"], row["n_tail"], tokens) for row in encoded]
            options = GenerationOptions(
                max_new_tokens=tokens, batch_size=self.batch_size, stop_at_newline=one_line and self.session.decoder
            )
            found, _ = self.prompted.generate(inputs, self.session.tokenizer, options)
            for i, prediction in zip(picked, found, strict=True):
                answers[i] = _cut(prediction.text, _until(requests[i].args[1]))
        return [answers[i] for i in range(len(requests))]

    def _encoded(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Rows of `data.encoding.encode`, uncut."""
        tails = [context.rfind(self.tail) if self.tail else -1 for context, _ in pairs]
        if self.prompted.spec().needs_tail and -1 in tails:
            raise ConfigError(
                f"tail={self.tail!r} is not in the context {pairs[tails.index(-1)][0][-80:]!r}; change it"
            )
        rows = datasets.Dataset.from_dict({
            "id": [str(i) for i in range(len(pairs))],
            "input": [context for context, _ in pairs],
            "target": [continuation for _, continuation in pairs],
            "cut_start": [-1] * len(pairs),
            "cut_end": tails,
        })  # fmt: skip
        session = self.session
        longest = {"max_input_tokens": NO_LIMIT, "max_target_tokens": NO_LIMIT}
        return list(encode(rows, session.tokenizer, session.task, decoder=session.decoder, **longest))

    def _shortened(self, ids: Sequence[int], tail: int, target_tokens: int) -> Input:
        """An input that fits in front of so many tokens; an empty one begins with the text's first special token."""
        tokenizer = self.session.tokenizer
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        room = self.room - (target_tokens if self.session.decoder else 0)
        if room < 1:
            raise ConfigError(
                f"{target_tokens} target tokens and the prompt leave no room for a context; ask for fewer"
            )
        if len(ids) > room:
            logger.warning("a context of %d tokens is cut to its last %d", len(ids), room)
        return Input(list(ids)[-room:] or [first], min(tail, room))


def _moved_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the word that follows, as tokenizers have it."""
    bare = context.rstrip(" ")
    return bare, context[len(bare) :] + continuation


def _until(options: dict[str, Any]) -> list[str]:
    given = options.get("until") or []
    return [given] if isinstance(given, str) else list(given)


def _cut(text: str, ends: Sequence[str]) -> str:
    for end in filter(None, ends):
        text = text.split(end)[0]
    return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
