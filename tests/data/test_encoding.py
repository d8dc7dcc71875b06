from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from fast_prompt_tuning.data import encoding as data
from fast_prompt_tuning.data.batches import Collator, LengthBatchSampler, input_lengths
from fast_prompt_tuning.data.encoding import encode
from fast_prompt_tuning.data.readers import load_examples, render_rows
from fast_prompt_tuning.data.splits import examples_fingerprint, train_calibration
from fast_prompt_tuning.data.task_files import load_task, task_from_templates
from fast_prompt_tuning.errors import ConfigError, DataError

DATA = Path(__file__).parents[1] / "files"
CORPUS = [
    "question: When was the bridge built? context: It was built in 1907.",
    "Topic: no answer sport business\n",
] * 4


def bpe(*, bos: bool = False, eos: bool = False, vocab: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the spot, adding the special tokens asked for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "<s>", "</s>", "<extra_id_0>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    template = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)] if bos or eos else []
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class Characters(PreTrainedTokenizer):
    """A slow tokenizer: one token per character, EOS at the end."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **kwargs):
        self.table = {c: i for i, c in enumerate(["<pad>", "</s>", *map(chr, range(9, 127))])}
        super().__init__(pad_token="<pad>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.table)

    def get_vocab(self):
        return dict(self.table)

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.table.get(token, 2)

    def _convert_id_to_token(self, index):
        return list(self.table)[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [*token_ids_0, 1]


T5_LIKE = bpe(eos=True)
BART_LIKE = bpe(bos=True, eos=True)
LLAMA_LIKE = bpe(bos=True)
GPT_LIKE = bpe()
SLOW = Characters()

TASK = task_from_templates(
    files={},
    input_template="text: {{ text }}\nTopic:",
    target_template=" {{ label }}",
    labels=["sport", "business"],
).model_copy(update={"name": "topics"})


def rows(texts, label="sport", split="train"):
    return render_rows(TASK, [{"text": text, "label": label} for text in texts], decoder=True, split=split)


# --- encode ---


@pytest.mark.parametrize("tokenizer", [T5_LIKE, BART_LIKE, SLOW], ids=["t5", "bart", "slow"])
def test_encoder_decoder_rows(tokenizer):
    (row,) = encode(rows(["It was built."]), tokenizer, decoder=False, max_input_tokens=99, max_target_tokens=20)
    assert row["input_ids"] == tokenizer("text: It was built.\nTopic:")["input_ids"]
    assert row["labels"] == tokenizer(text_target=" sport")["input_ids"]
    assert row["n_target"] == len(row["labels"])
    assert row["references"] == ["sport"]  # what scoring needs stays with the row
    assert row["group"] == row["id"] == "0"


@pytest.mark.parametrize("tokenizer", [LLAMA_LIKE, GPT_LIKE, T5_LIKE, SLOW], ids=["llama", "gpt", "adds-eos", "slow"])
def test_decoder_rows(tokenizer):
    (row,) = encode(rows(["It was built."]), tokenizer, TASK, decoder=True, max_input_tokens=99, max_target_tokens=20)
    source = tokenizer("text: It was built.\nTopic:", add_special_tokens=False)["input_ids"]
    target = [*tokenizer(" sport", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    bos = [tokenizer.bos_token_id] if tokenizer is LLAMA_LIKE else []
    assert row["input_ids"] == bos + source + target
    assert row["labels"] == [-100] * len(bos + source) + target
    assert row["n_target"] == len(target)


def test_a_target_always_ends_in_eos():
    # the tokenizer adds none to labels; and a cut target keeps it
    (row,) = encode(rows(["x"]), GPT_LIKE, decoder=False, max_input_tokens=99, max_target_tokens=3)
    assert len(row["labels"]) == 3
    assert row["labels"][-1] == GPT_LIKE.eos_token_id
    (row,) = encode(rows(["x"]), GPT_LIKE, decoder=True, max_input_tokens=99, max_target_tokens=3)
    assert row["input_ids"][-3:] == row["labels"][-3:]
    assert row["n_target"] == 3


def test_unlabelled_rows_have_no_target():
    examples = render_rows(TASK, [{"text": "x"}], decoder=True)
    for decoder in (True, False):
        (row,) = encode(examples, GPT_LIKE, decoder=decoder, max_input_tokens=99, max_target_tokens=9)
        assert row["n_target"] == 0
        assert row["input_ids"] == GPT_LIKE("text: x\nTopic:")["input_ids"]
        assert row["labels"] == ([-100] * len(row["input_ids"]) if decoder else [])


@pytest.mark.parametrize("tokenizer", [BART_LIKE, SLOW], ids=["fast", "slow"])
@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=400), max_size=200), st.integers(30, 60))
def test_truncation_fits_and_cuts_the_fields_end_only(tokenizer, text, limit):
    examples = rows([text])
    example = examples[0]
    full = tokenizer(example["input"], add_special_tokens=False)["input_ids"]
    (row,) = encode(examples, tokenizer, decoder=False, max_input_tokens=limit, max_target_tokens=9)
    before, after = data._affixes(tokenizer, "a")
    room = limit - len(before) - len(after)
    assert len(row["input_ids"]) <= limit
    if len(full) <= room:
        assert row["input_ids"] == [*before, *full, *after]
        return
    cut, ids = data._fit(example["input"], example["cut_start"], example["cut_end"], tokenizer, room)
    assert example["cut_start"] <= cut < example["cut_end"]
    assert row["input_ids"] == [*before, *ids, *after]
    assert ids == tokenizer("text: " + text[: cut - len("text: ")] + "\nTopic:", add_special_tokens=False)["input_ids"]
    # as long as it can be: a character is at most a few byte tokens, and the seam may cost one more
    assert len(ids) >= room - 4


def test_characters_of_several_tokens_are_not_cut_too_early():
    (row,) = encode(rows(["橋" * 60]), T5_LIKE, decoder=False, max_input_tokens=60, max_target_tokens=9)
    assert 60 - 3 < len(row["input_ids"]) <= 60  # three byte tokens a character


def test_a_field_in_the_middle_loses_its_end_and_the_tail_stays():
    squad = load_task("squad2")
    context = "It was built in 1907. " * 40
    row = {"question": "When was it built?", "context": context, "answers": {"text": ["1907"]}, "id": "q"}
    examples = render_rows(squad, [row], decoder=True, split="train")
    (found,) = encode(examples, LLAMA_LIKE, squad, decoder=True, max_input_tokens=64, max_target_tokens=9)
    source = LLAMA_LIKE.decode(found["input_ids"][: len(found["input_ids"]) - found["n_target"]])
    assert 60 <= len(found["input_ids"]) - found["n_target"] <= 64
    assert source.startswith("<s>Context: It was built in 1907.")
    assert source.endswith("\nQuestion: When was it built?\nAnswer:")


def test_without_a_field_to_cut_the_input_loses_its_end():
    task = TASK.model_copy(update={"truncate": None})
    examples = render_rows(task, [{"text": "built " * 50, "label": "sport"}], decoder=True, split="train")
    (row,) = encode(examples, T5_LIKE, task, decoder=False, max_input_tokens=12, max_target_tokens=9)
    full = T5_LIKE(examples[0]["input"])["input_ids"]
    assert row["input_ids"] == [*full[:11], T5_LIKE.eos_token_id]


@pytest.mark.parametrize("tokenizer", [T5_LIKE, SLOW], ids=["fast", "slow"])
def test_what_cannot_be_shortened_enough_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"task 'topics', example '0': .* there is room for 4; raise max_input_tokens"):
        encode(rows(["text"]), tokenizer, TASK, decoder=False, max_input_tokens=5, max_target_tokens=9)


def test_no_room_or_no_eos_is_an_error():
    with pytest.raises(ConfigError, match="max_input_tokens=1"):
        encode(rows(["text"]), T5_LIKE, decoder=False, max_input_tokens=1, max_target_tokens=9)
    with pytest.raises(ConfigError, match="max_target_tokens=1"):
        encode(rows(["text"]), T5_LIKE, decoder=True, max_input_tokens=9, max_target_tokens=1)
    tokenizer = bpe()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos_token"):
        encode(rows(["text"]), tokenizer, decoder=True, max_input_tokens=99, max_target_tokens=9)


@pytest.mark.parametrize(
    ("task", "file"),
    [("mnli", "mnli_train.tsv"), ("squad2", "squad2.json"), ("record", "record.jsonl"), ("xsum", "xsum.jsonl")],
)
@pytest.mark.parametrize("decoder", [False, True])
def test_official_files_become_batches(task, file, decoder):
    task = load_task(task)
    tokenizer = LLAMA_LIKE if decoder else T5_LIKE
    examples = load_examples(task, "train", decoder=decoder, files={"train": str(DATA / file)})
    encoded = encode(examples, tokenizer, task, decoder=decoder, max_input_tokens=120, max_target_tokens=40)
    batch = Collator(tokenizer, decoder=decoder)(list(encoded))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for ids, target in zip(batch["labels"], examples["target"], strict=True):
        assert tokenizer.decode(ids[ids != -100], skip_special_tokens=False) == target + "</s>"
    assert ("<extra_id_0>" in examples["target"][0]) is not decoder


def test_memory_mapped_examples_encode_the_same(monkeypatch):
    texts = [f"built in {year}" for year in range(25)]
    small = rows(texts)
    monkeypatch.setattr("fast_prompt_tuning.data.readers._SPILL_ROWS", 10)
    large = rows(texts)
    assert large.cache_files
    one, other = (
        encode(d, T5_LIKE, decoder=True, max_input_tokens=30, max_target_tokens=9).to_list() for d in (small, large)
    )
    assert one == other


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Keep what is tokenized, however little, in a folder of its own."""
    monkeypatch.setattr(data, "CACHED_FROM", 4)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "fast_prompt_tuning"


LONG = [f"built in {year}, and rebuilt ever since" for year in range(20)]
WITHIN = {"decoder": True, "max_input_tokens": 30, "max_target_tokens": 9}


def test_tokenized_examples_are_kept_for_later_runs(kept, monkeypatch):
    first = encode(rows(LONG), T5_LIKE, **WITHIN)
    assert len(list(kept.glob("*.arrow"))) == 1
    monkeypatch.setattr(data, "_fit", None)  # cutting would fail
    assert encode(rows(LONG), bpe(eos=True), **WITHIN).to_list() == first.to_list()


@pytest.mark.parametrize(
    "other",
    [
        lambda: encode(rows([*LONG[:-1], "built at last"]), T5_LIKE, **WITHIN),
        lambda: encode(rows(LONG, label="business"), T5_LIKE, **WITHIN),
        lambda: encode(rows(LONG), bpe(vocab=310), **WITHIN),
        lambda: encode(rows(LONG), LLAMA_LIKE, **WITHIN),
        lambda: encode(rows(LONG), T5_LIKE, **{**WITHIN, "decoder": False}),
        lambda: encode(rows(LONG), T5_LIKE, **{**WITHIN, "max_input_tokens": 29}),
        lambda: encode(rows(LONG), T5_LIKE, **{**WITHIN, "max_target_tokens": 3}),
    ],
    ids=["text", "target", "vocabulary", "special tokens", "kind", "input room", "target room"],
)
def test_other_examples_tokenizers_and_settings_are_tokenized_anew(kept, other):
    encode(rows(LONG), T5_LIKE, **WITHIN)
    other()
    assert len(list(kept.glob("*.arrow"))) == 2


@pytest.mark.parametrize("tokenizer", [T5_LIKE, SLOW], ids=["few examples", "slow tokenizer"])
def test_what_is_tokenized_at_once_or_by_unknown_code_is_not_kept(kept, tokenizer):
    encode(rows(LONG[: 3 if tokenizer is T5_LIKE else 20]), tokenizer, **{**WITHIN, "max_input_tokens": 60})
    assert not kept.exists()


@pytest.mark.parametrize("harm", ["cut", "rubbish", "fewer"])
def test_a_damaged_file_of_tokenized_examples_is_made_again(kept, harm, caplog):
    whole = encode(rows(LONG), T5_LIKE, **WITHIN).to_list()
    (file,) = kept.glob("*.arrow")
    if harm == "fewer":
        datasets.Dataset.from_file(str(file)).select(range(3)).map(
            lambda x: x, cache_file_name=str(kept / "other.arrow")
        )
        (kept / "other.arrow").replace(file)
    else:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if harm == "cut" else b"rubbish")
    assert encode(rows(LONG), T5_LIKE, **WITHIN).to_list() == whole
    assert "tokenizing again" in caplog.text
    caplog.clear()
    assert encode(rows(LONG), T5_LIKE, **WITHIN).to_list() == whole
    assert not caplog.text


def test_where_nothing_can_be_written_examples_are_tokenized_all_the_same(kept, monkeypatch):
    whole = encode(rows(LONG), T5_LIKE, **WITHIN).to_list()
    kept.joinpath("file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", kept / "file")
    assert encode(rows(LONG), T5_LIKE, **WITHIN).to_list() == whole


# --- batches ---

ROWS = [{"input_ids": [5, 6, 7], "labels": [8, 2], "n_target": 2, "id": "a"}, {"input_ids": [5], "labels": [2]}]


def test_collator_pads_on_the_right_and_leaves_rows_alone():
    batch = Collator(T5_LIKE, decoder=False)(ROWS)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 2], [2, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert ROWS[1] == {"input_ids": [5], "labels": [2]}


def test_collator_for_decoders():
    decoder_rows = [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [7, 2], "labels": [-100, 2]}]
    batch = Collator(T5_LIKE, decoder=True)(decoder_rows)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, 2, -100]]
    assert batch["attention_mask"].sum().item() == 5


def test_collator_pad_token_falls_back():
    tokenizer = bpe()
    tokenizer.pad_token = None
    assert Collator(tokenizer, decoder=True).pad_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert Collator(tokenizer, decoder=True).pad_id == 0


def test_collator_takes_unlabelled_rows():
    batch = Collator(T5_LIKE, decoder=False)([{"input_ids": [5], "labels": []}])
    assert batch["labels"].tolist() == [[-100]]


def test_collator_refuses():
    with pytest.raises(DataError, match="empty batch"):
        Collator(T5_LIKE, decoder=True)([])


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=80),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_every_index_comes_exactly_once_an_epoch_and_the_order_repeats(lengths, batch, seed, window, epoch):
    sampler, again = (LengthBatchSampler(lengths, batch, seed=seed, window=window) for _ in range(2))
    sampler.set_epoch(epoch)
    again.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert all(0 < len(b) <= batch for b in batches)
    assert batches == list(again) == list(sampler)


def test_batches_are_of_similar_length_and_epochs_differ():
    lengths = np.random.default_rng(0).integers(1, 500, 1000)

    def padding(sampler):
        return sum(len(b) * lengths[b].max() - lengths[b].sum() for b in sampler) / lengths.sum()

    sampler = LengthBatchSampler(lengths, 8, seed=0)
    assert padding(sampler) < 0.1 < 0.5 < padding(LengthBatchSampler(lengths, 8, seed=0, window=1))
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthBatchSampler(lengths, 8, seed=1)) != first
    means = [lengths[b].mean() for b in first]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3  # not in order of length


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=80),
    st.integers(1, 9),
    st.integers(50, 200),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_a_token_budget_is_kept_and_every_epoch_has_the_same_batches(lengths, batch, budget, window, seed):
    sampler = LengthBatchSampler(lengths, batch, seed=seed, window=window, max_tokens=budget)
    first = list(sampler)
    assert sorted(i for b in first for i in b) == list(range(len(lengths)))
    assert len(first) == len(sampler)
    assert all(len(b) <= batch and len(b) * max(lengths[i] for i in b) <= budget for b in first)
    sampler.set_epoch(1)
    assert sorted(map(sorted, sampler)) == sorted(map(sorted, first))
    loose = LengthBatchSampler(lengths, batch, seed=seed, window=window, max_tokens=50 * batch)
    assert len(loose) == -(-len(lengths) // batch)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.sampled_from([None, 100]))
def test_processes_share_the_batches_and_all_make_as_many_steps(n, batch, processes, budget):
    lengths = [1 + 7 * i % 50 for i in range(n)]
    shares = [
        list(BatchSamplerShard(LengthBatchSampler(lengths, batch, seed=0, max_tokens=budget), processes, rank))
        for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    whole = list(LengthBatchSampler(lengths, batch, seed=0, max_tokens=budget))
    dealt = [b for step in zip(*shares, strict=True) for b in step]
    assert dealt[: len(whole)] == whole
    assert len(dealt) - len(whole) < processes


def test_sampler_refuses():
    with pytest.raises(ConfigError, match=r"train\.batch_tokens=9 has no room for the longest example, 12 tokens"):
        LengthBatchSampler([3, 12], 2, seed=0, max_tokens=9)
    with pytest.raises(ConfigError, match="batch_size=0"):
        LengthBatchSampler([1], 0, seed=0)
    with pytest.raises(ConfigError, match="window=0"):
        LengthBatchSampler([1], 1, seed=0, window=0)
    with pytest.raises(DataError, match="no examples to make a batch"):
        LengthBatchSampler([], 2, seed=0)


def test_sampler_drives_a_data_loader():
    encoded = encode(
        rows(["a", "bb", "built in 1907"]), T5_LIKE, decoder=False, max_input_tokens=50, max_target_tokens=9
    )
    sampler = LengthBatchSampler(input_lengths(encoded), 2, seed=0)
    loader = torch.utils.data.DataLoader(encoded, batch_sampler=sampler, collate_fn=Collator(T5_LIKE, decoder=False))
    assert sum(len(batch["input_ids"]) for batch in loader) == 3


# --- records ---


def test_fingerprint_tells_texts_apart():
    one, same, other = rows(["a", "b"]), rows(["a", "b"]), rows(["a", "c"])
    assert examples_fingerprint(one) == examples_fingerprint(same)
    assert len({examples_fingerprint(d) for d in (one, other, rows(["b", "a"]), rows(["a", "b"], "business"))}) == 4
    encoded = encode(one, T5_LIKE, decoder=False, max_input_tokens=50, max_target_tokens=9)
    assert examples_fingerprint(encoded) == examples_fingerprint(one)


def test_calibration_is_a_seeded_sample():
    examples = rows([str(i) for i in range(50)])
    picked = train_calibration(examples, 10, 3)
    assert len(set(picked["input"])) == 10
    assert picked["input"][:] == train_calibration(examples, 10, 3)["input"][:]
    assert picked["input"][:] != train_calibration(examples, 10, 4)["input"][:]
    assert train_calibration(examples, 99, 0)["input"][:] == examples["input"][:]
    with pytest.raises(ConfigError, match="n=0"):
        train_calibration(examples, 0, 0)
    with pytest.raises(DataError, match="no training examples"):
        train_calibration(examples.select([]), 1, 0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=80),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(100, 500),
)
def test_every_share_of_a_batch_keeps_to_the_budget(lengths, batch, shares, budget):
    sampler = LengthBatchSampler(lengths, batch * shares, seed=0, max_tokens=budget, shares=shares)
    batches = list(sampler)
    assert sorted(i for rows in batches for i in rows) == list(range(len(lengths)))
    for rows in batches:
        for rank in range(shares):
            mine = rows[len(rows) * rank // shares : len(rows) * (rank + 1) // shares]
            assert len(mine) * max((lengths[i] for i in mine), default=0) <= budget
