"""From rendered text to batches: tokenizing with exact truncation, padding, batches of similar length.

Sizes: B batch, T tokens. The P virtual tokens of the soft prompt come on top of every length here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from ..errors import ConfigError, DataError
from ..plm.objective import IGNORED
from .tasks import Task

logger = logging.getLogger(__name__)

CACHED_FROM = 1000
"""Examples from which on `encode` keeps what it made: fewer are tokenized in the time that looking for them takes."""

_IDS = datasets.List(datasets.Value("int32"))
_INT = datasets.Value("int32")


def _tokens(tokenizer: Any, texts: list[str], *, target: bool = False) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    kind = {"text_target": texts} if target else {"text": texts}
    # verbose=False: a text longer than the model's maximum is expected here, and cut next
    ids: list[list[int]] = tokenizer(**kind, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _affixes(tokenizer: Any, probe: str, *, target: bool = False) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text (or a target)."""
    for text in (probe, "a"):
        (bare,) = _tokens(tokenizer, [text], target=target)
        full = tokenizer(**({"text_target": text} if target else {"text": text}), verbose=False)["input_ids"]
        for start in range(len(full) - len(bare) + 1) if bare else ():
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    raise ConfigError(
        f"{type(tokenizer).__name__} gives no tokens that special tokens could be told from; use another tokenizer"
    )


def _fit(text: str, start: int, end: int, tokenizer: Any, room: int) -> tuple[int, list[int]]:
    """Cut the end of `text[start:end]` until the whole text fits.

    Args:
        text: rendered input of more than `room` tokens.
        start: first character that may go.
        end: end of the characters that may go.
        tokenizer: any tokenizer; one that gives offsets needs fewer tries.
        room: most tokens, special tokens not counted.

    Returns:
        The character c in [start, end] where the span now ends, and the tokens of `text[:c] + text[end:]`.

    Raises:
        DataError: it does not fit even with nothing left of the span.
    """

    def tokens_at(cut: int) -> list[int]:
        return _tokens(tokenizer, [text[:cut] + text[end:]])[0]

    cut, ids = start, tokens_at(start)
    if len(ids) > room:
        raise DataError(
            f"the parts of the input that are never shortened take {len(ids)} tokens and there is room for {room}; "
            "raise max_input_tokens"
        )
    if tokenizer.is_fast:
        full = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # One place per token, also where several tokens are bytes of one character.
        cuts = sorted([start, *(a for a, _ in full["offset_mapping"] if start < a < end)])
        index, excess = len(cuts), len(full["input_ids"]) - room
        while excess > 0 and index > 0:  # tokens at the seam may merge or split, so count again after each cut
            index = max(0, index - excess)
            cut, ids = cuts[index], tokens_at(cuts[index])
            excess = len(ids) - room
    else:
        low, high = start, end - 1
        while low < high:  # the longest span that fits, by bisection
            middle = (low + high + 1) // 2
            tried = tokens_at(middle)
            if len(tried) <= room:
                low, cut, ids = middle, middle, tried
            else:
                high = middle - 1
    return cut, ids


def encode(
    examples: datasets.Dataset,
    tokenizer: Any,
    task: Task | None = None,
    *,
    decoder: bool,
    max_input_tokens: int,
    max_target_tokens: int,
) -> datasets.Dataset:
    """Tokenize the examples that `readers.load_examples` gives.

    An input of more than `max_input_tokens` loses the end of the task's `truncate` field and nothing else; with no
    such field it loses its own end. Special tokens count and are never cut.

    From `CACHED_FROM` examples on the result is kept in the cache folder of `datasets`, for later runs on the same
    examples with the same tokenizer and settings.

    Args:
        examples: columns `id`, `input`, `target`, `cut_start`, `cut_end`.
        tokenizer: any `transformers` tokenizer, fast or slow.
        task: named in messages; what may be cut is written in the examples.
        decoder: for a decoder-only model.
        max_input_tokens: most tokens of an input, special tokens included.
        max_target_tokens: most tokens of a target, its EOS included.

    Returns:
        The examples (less `cut_start` and `cut_end`) with `n_target`, the number of labels that carry loss (0:
        unlabelled), `n_tail`, the tokens of the input behind what may be cut, and

        - encoder-decoder: `input_ids` (T,), the input with the tokenizer's special tokens; `labels` (n_target,), the
          target with its EOS;
        - decoder-only: `input_ids` (T,), the input (BOS where the tokenizer adds one, no EOS), then the target and
          EOS; `labels` (T,), -100 over the input. `input_ids[: T - n_target]` is the input alone.

    Raises:
        DataError: an input cannot be shortened enough; names the example.
        ConfigError: no room for a single token, or the tokenizer has no EOS.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no eos_token: the model could not learn where to stop; set one"
        )
    if len(examples) == 0:
        raise DataError("no examples to encode")
    before, after = _affixes(tokenizer, examples[0]["input"])
    if decoder:
        after = []  # generation goes on where the input ends
        target_before: list[int] = []
        target_after: list[int] = [eos]
    else:
        target_before, target_after = _affixes(tokenizer, examples[0]["target"], target=True)
        target_after = target_after if eos in target_after else [*target_after, eos]
    room = max_input_tokens - len(before) - len(after)
    target_room = max_target_tokens - len(target_before) - len(target_after)
    if room < 1 or target_room < 1:
        raise ConfigError(
            f"max_input_tokens={max_input_tokens} and max_target_tokens={max_target_tokens} must leave room for a "
            f"token beside {len(before) + len(after)} and {len(target_before) + len(target_after)} special tokens"
        )

    def encode_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        inputs = _tokens(tokenizer, batch["input"])
        targets = _tokens(tokenizer, batch["target"], target=True)
        # What follows the cut in a text is mostly the template's and the same for every row.
        tails = [text[end:] if end >= 0 else "" for text, end in zip(batch["input"], batch["cut_end"], strict=True)]
        distinct = list(dict.fromkeys(tails))
        n_tail = dict(zip(distinct, map(len, _tokens(tokenizer, distinct)), strict=True))
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "n_target": [], "n_tail": []}
        for i, (ids, target) in enumerate(zip(inputs, targets, strict=True)):
            if len(ids) > room and batch["cut_start"][i] >= 0:
                try:
                    _, ids = _fit(batch["input"][i], batch["cut_start"][i], batch["cut_end"][i], tokenizer, room)
                except DataError as error:
                    who = f"task {task.name!r}, example" if task else "example"
                    raise DataError(f"{who} {batch['id'][i]!r}: {error.reason}") from None
            ids = [*before, *ids[:room], *after]
            labels = [*target_before, *target[:target_room], *target_after] if batch["target"][i] else []
            columns["n_target"].append(len(labels))
            columns["n_tail"].append(n_tail[tails[i]] + len(after))
            columns["labels"].append([IGNORED] * len(ids) + labels if decoder else labels)
            columns["input_ids"].append(ids + labels if decoder else ids)
        return columns

    columns_kept = {name: kind for name, kind in examples.features.items() if name not in ("cut_start", "cut_end")}
    special = (before, after, target_before, target_after)
    file = _cache_file(examples, tokenizer, [decoder, max_input_tokens, max_target_tokens, *special])

    def tokenized(file: Path | None, from_cache: bool) -> datasets.Dataset:
        return examples.map(
            encode_batch,
            batched=True,
            remove_columns=["cut_start", "cut_end"],
            features=datasets.Features(
                {**columns_kept, "input_ids": _IDS, "labels": _IDS, **dict.fromkeys(("n_target", "n_tail"), _INT)}
            ),
            load_from_cache_file=from_cache,
            cache_file_name=file and str(file),
            new_fingerprint=file and file.stem,
            desc="Tokenizing",
        )

    if file is None:
        return tokenized(None, False)
    if file.exists():
        try:
            cached = tokenized(file, True)
            if len(cached) == len(examples):
                return cached
            reason = f"it holds {len(cached)} of {len(examples)} examples"
        except (OSError, pa.ArrowException) as error:
            reason = str(error)
        logger.warning("the tokenized examples in %s cannot be read (%s): tokenizing again", file, reason)
    try:
        return tokenized(file, False)
    except OSError as error:
        logger.warning("the tokenized examples cannot be kept in %s (%s)", file, error)
        return tokenized(None, False)


def _cache_file(examples: datasets.Dataset, tokenizer: Any, settings: list[Any]) -> Path | None:
    """Where `datasets` keeps these examples tokenized: a file named by everything that the tokens follow from.

    None for few examples, for a tokenizer that cannot be written down (a slow one), and where no file can be made.
    Our own key, because that of `datasets` changes with every object that the mapped function happens to hold.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if len(examples) < CACHED_FROM or backend is None or not hasattr(backend, "to_str"):
        return None
    digest = hashlib.sha256(json.dumps([1, *settings, type(tokenizer).__name__, tokenizer.eos_token_id]).encode())
    digest.update(backend.to_str().encode())
    for table in examples.with_format("arrow").iter(1000):
        rows = pa.BufferOutputStream()
        with pa.ipc.new_stream(rows, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        digest.update(rows.getvalue())
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "fast_prompt_tuning"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"{digest.hexdigest()[:32]}.arrow"


def label_ids(
    texts: Mapping[str, str], tokenizer: Any, *, decoder: bool, max_target_tokens: int
) -> dict[str, list[int]]:
    """Token ids by which each label word is scored: those that `encode` makes of its target.

    For a decoder-only model without the EOS, unless one label's tokens begin another's: the shorter would always be the
    likelier.

    Args:
        texts: label word -> its target text (`Task.choices`).

    Raises:
        ConfigError: a label takes more than `max_target_tokens` with its EOS, so training would never see its end; or
            two become the same tokens.
    """
    words, targets = list(texts), _tokens(tokenizer, list(texts.values()), target=True)
    before, after = ([], []) if decoder else _affixes(tokenizer, texts[words[0]], target=True)
    eos = [tokenizer.eos_token_id]
    whole = [[*before, *ids, *(after if set(eos) & set(after) else [*after, *eos])] for ids in targets]
    first: dict[tuple[int, ...], str] = {}
    for word, ids in zip(words, whole, strict=True):
        if first.setdefault(tuple(ids), word) != word:
            raise ConfigError(
                f"the labels {first[tuple(ids)]!r} and {word!r} become the same tokens and cannot be told apart: the "
                "tokenizer lacks their characters, or the target's template leaves their difference out; choose other "
                "label words (data.labels), or another template or model"
            )
    for word, ids in zip(words, whole, strict=True):
        if len(ids) > max_target_tokens:
            raise ConfigError(
                f"the label {word!r} takes {len(ids)} tokens with its end, more than max_target_tokens="
                f"{max_target_tokens}: its end would never be trained; raise max_target_tokens"
            )
    begun = any(a != b and b[: len(a)] == a for a in targets for b in targets)
    return dict(zip(words, targets if decoder and not begun else whole, strict=True))
