"""From rendered text to batches: tokenizing with exact truncation, padding, batches of similar length.

Sizes: B batch, T tokens. The P virtual tokens of the soft prompt come on top of every length here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from ..errors import ConfigError, DataError
from ..plm.objective import IGNORED
from .tasks import Task
from .trimming import AFTER, TAIL

logger = logging.getLogger(__name__)

CACHED_FROM = 1000
"""Examples from which on `encode` keeps what it made: fewer are tokenized in the time that looking for them takes."""

_IDS = datasets.List(datasets.Value("int32"))
_INT = datasets.Value("int32")


# --- tokenizing ---


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
    raise ConfigError(f"{type(tokenizer).__name__} gives no tokens that special tokens could be told from; use another")


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
    """Tokenize the examples that `examples.load_examples` gives.

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

    kept = {name: kind for name, kind in examples.features.items() if name not in ("cut_start", "cut_end")}
    special = (before, after, target_before, target_after)
    file = _cache_file(examples, tokenizer, [decoder, max_input_tokens, max_target_tokens, *special])

    def tokenized(file: Path | None, from_cache: bool) -> datasets.Dataset:
        return examples.map(
            encode_batch,
            batched=True,
            remove_columns=["cut_start", "cut_end"],
            features=datasets.Features(
                {**kept, "input_ids": _IDS, "labels": _IDS, **dict.fromkeys(("n_target", "n_tail"), _INT)}
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
            found = tokenized(file, True)
            if len(found) == len(examples):
                return found
            reason = f"it holds {len(found)} of {len(examples)} examples"
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


# --- batching ---


class Collator:
    """Rows of `encode` -> one padded batch. Other columns are dropped.

    Padding is on the right: the soft prompt sits in front of the text, and padding on the left would come between.

    Args:
        tokenizer: gives the padding token; EOS, then 0, where it has none (padding is masked in any case).
        decoder: the rows are a decoder-only model's.
        pad_to_multiple_of: round lengths up to a multiple, for hardware that likes it.
        tails: also give `n_tail` `(B,)`, for stages that cut inputs (`trimming.trim`); a model does not take it.
        after: also give the same as `n_after`, for a prompt within the input (`placement="infix"`).

    Returns:
        When called on B rows: `input_ids` and `attention_mask` (B, T) and `labels`, (B, T) for a decoder-only model,
        else (B, T_target); -100 where there is no label. All int64.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        decoder: bool,
        pad_to_multiple_of: int | None = None,
        tails: bool = False,
        after: bool = False,
    ):
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of={pad_to_multiple_of} must be at least 1")
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(i for i in ids if i is not None)
        self.decoder = decoder
        self.multiple = pad_to_multiple_of or 1
        self.counts = [name for name, wanted in ((TAIL, tails), (AFTER, after)) if wanted]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not rows:
            raise DataError("an empty batch")
        inputs = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        labels = [torch.as_tensor(row["labels"], dtype=torch.int64) for row in rows]
        length = self._rounded(max(map(len, inputs)))
        target_length = length if self.decoder else self._rounded(max(map(len, labels)))
        tails = [row[TAIL] for row in rows] if self.counts else []
        return {
            **{name: torch.tensor(tails) for name in self.counts},
            "input_ids": _padded(inputs, length, self.pad_id),
            "attention_mask": _padded([torch.ones_like(ids) for ids in inputs], length, 0),
            "labels": _padded(labels, target_length, IGNORED),
        }

    def _rounded(self, length: int) -> int:
        return -(-max(length, 1) // self.multiple) * self.multiple


def _padded(rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
    out = torch.full((len(rows), length), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def input_lengths(dataset: datasets.Dataset) -> list[int]:
    """Number of `input_ids` of each row of `encode`, for `LengthBatchSampler`."""
    return [len(ids) for ids in dataset["input_ids"]]


class LengthBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of similar length, the same for the same seed and epoch; every index once an epoch.

    Indices are shuffled and cut into windows, each window is sorted by length and cut into batches, and the batches
    are shuffled: little padding, and still a random order.

    Every process of a distributed run makes the same batches. Where accelerate deals them out, each gets as many: it is
    not told a batch size, which would make it take a smaller batch for the last one.

    Args:
        lengths: tokens of each example.
        batch_size: B, the most examples of a batch.
        seed: seed of the order, together with the epoch.
        window: batches in a window. 1: no sorting; more: less padding.
        drop_last: leave out a random remainder so that every batch is full.
        max_tokens: the most tokens of a batch's share, padding included. Which examples share a batch then stays the
            same at every epoch, so that all have as many batches and a resumed run finds its place.
        shares: processes that a batch is dealt to, in parts of like size.

    Raises:
        ConfigError: `batch_size` or `window` below 1, a negative seed, an example longer than `max_tokens`, or
            `max_tokens` with `drop_last`.
        DataError: no examples, or with `drop_last` not a single full batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        window: int = 32,
        drop_last: bool = False,
        max_tokens: int | None = None,
        shares: int = 1,
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("window", window, 1), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"{name}={value} must be at least {least}")
        self.lengths = np.asarray(lengths)
        if max_tokens is not None and drop_last:
            raise ConfigError("drop_last=True wants full batches and max_tokens makes none; leave one of them out")
        if max_tokens is not None and len(self.lengths) and self.lengths.max() > max_tokens:
            raise ConfigError(
                f"train.batch_tokens={max_tokens} has no room for the longest example, {self.lengths.max()} tokens; "
                "raise it or lower data.max_input_tokens"
            )
        self.size, self.seed, self.window, self.drop_last = batch_size, seed, window, drop_last
        self.max_tokens, self.shares, self.epoch = max_tokens, shares, 0
        full, rest = divmod(len(self.lengths), batch_size)
        self._count = full + bool(rest and not drop_last)
        if max_tokens is not None:
            self._count = len(self._cut(np.random.default_rng(seed).permutation(len(self.lengths))))
        if self._count == 0:
            raise DataError(f"{len(lengths)} examples make no batch of {batch_size} (drop_last={drop_last})")

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from the next iteration on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count

    def _cut(self, order: np.ndarray) -> list[list[int]]:
        """Examples in this order -> batches, in windows sorted by length."""
        batches: list[list[int]] = []
        size = self.window * self.size
        for start in range(0, len(order), size):
            window = order[start : start + size]
            if self.window > 1:
                window = window[np.argsort(self.lengths[window], kind="stable")]
            batch: list[int] = []
            longest = 0
            for i, length in zip(window.tolist(), self.lengths[window].tolist(), strict=True):
                longest = max(longest, length)
                largest = -(-(len(batch) + 1) // self.shares)  # rows of the largest share with this one
                over = self.max_tokens is not None and largest * longest > self.max_tokens
                if batch and (over or len(batch) == self.size):
                    batches.append(batch)
                    batch, longest = [], length
                batch.append(i)
            batches.append(batch)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        fixed = self.max_tokens is not None
        order = (np.random.default_rng(self.seed) if fixed else rng).permutation(len(self.lengths))
        if self.drop_last:  # before sorting: dropping the last batch would always drop long examples
            order = order[: len(order) - len(order) % self.size]
        batches = self._cut(order)
        for i in rng.permutation(len(batches)):
            yield batches[i]


# --- for records and scores ---


def examples_fingerprint(dataset: datasets.Dataset) -> str:
    """SHA-256 (hex) of the rows' rendered inputs, targets and references, in order: tells data sets apart."""
    digest = hashlib.sha256()
    columns = [name for name in ("id", "input", "target", "references") if name in dataset.column_names]
    for row in dataset.select_columns(columns or dataset.column_names):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def train_split(dataset: datasets.Dataset, n: int, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """n random rows of the *training* data, and all others: what training is watched with, it must not see.

    Raises:
        ConfigError: n below 1, or not below the number of rows.
    """
    if not 1 <= n < len(dataset):
        raise ConfigError(f"n={n} held-out examples of {len(dataset)} must leave some to train on")
    order = np.random.default_rng((seed, 1)).permutation(len(dataset))
    return dataset.select(np.sort(order[:n])), dataset.select(np.sort(order[n:]))


def tokens_fingerprint(dataset: datasets.Dataset) -> str:
    """SHA-256 (hex) of the token ids and labels of the rows of `encode`, in order: another tokenizer, another hash."""
    digest = hashlib.sha256()
    for row in dataset.select_columns(["input_ids", "labels"]).with_format("numpy"):
        for ids in row.values():
            digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def train_calibration(dataset: datasets.Dataset, n: int, seed: int) -> datasets.Dataset:
    """n random rows of the *training* data to compute scores on; all of them, in order, where there are fewer.

    Never pass a validation or test split: what is chosen with these rows would then have seen it.

    Raises:
        ConfigError: `n` below 1.
        DataError: no rows.
    """
    if n < 1:
        raise ConfigError(f"n={n} calibration examples must be at least 1")
    if len(dataset) == 0:
        raise DataError("no training examples to calibrate on")
    picked = np.random.default_rng(seed).permutation(len(dataset))[:n]
    return dataset.select(np.sort(picked))
