"""Stages that train on part of each batch: what is kept, and that the model sees nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from settings import BY_NAME
from toy import toy
from trainers import Rows, arguments
from transformers import Trainer

from fast_prompt_tuning import PartialPLM, ProgressiveCallback, Schedule, soft_prompt_config
from fast_prompt_tuning import recipe as config
from fast_prompt_tuning.cost.flops import schedule_flops, step_flops
from fast_prompt_tuning.cost.shapes import BatchShape, CostModel
from fast_prompt_tuning.data.batches import Collator
from fast_prompt_tuning.data.encoding import IGNORED, encode
from fast_prompt_tuning.data.readers import load_examples
from fast_prompt_tuning.data.trimming import trim
from fast_prompt_tuning.errors import ConfigError, ModelError, ScheduleError
from fast_prompt_tuning.plm.objective import label_loss
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.session import open_session
from fast_prompt_tuning.schedule.stages import Stage

PAD = 1


def stage(**limits: int | None) -> Stage:
    return Stage(1, 1, **limits)  # type: ignore[arg-type]


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows as `encode` makes them: numbered input tokens, then labels."""
    lengths = draw(
        st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=7)
    )
    made = []
    for i, (text, target, tail) in enumerate(lengths):
        inputs = [100 * (i + 1) + t for t in range(text)]
        labels = [5000 + 10 * i + t for t in range(target)]
        made.append({"inputs": inputs, "targets": labels, "n_tail": min(tail, text)})
    return made


def collated(found: list[dict[str, Any]], decoder: bool, left: bool) -> dict[str, torch.Tensor]:
    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, lists))
        fill = [[value] * (width - len(x)) for x in lists]
        return torch.tensor([f + x if left else x + f for f, x in zip(fill, lists, strict=True)])

    ids = [r["inputs"] + (r["targets"] if decoder else []) for r in found]
    labels = [([IGNORED] * len(r["inputs"]) if decoder else []) + r["targets"] for r in found]
    return {
        "input_ids": padded(ids, PAD),
        "attention_mask": padded([[1] * len(x) for x in ids], 0),
        "labels": padded(labels, IGNORED),
        "n_tail": torch.tensor([r["n_tail"] for r in found]),
    }


@given(rows(), st.one_of(st.none(), st.integers(1, 9)), st.one_of(st.none(), st.integers(1, 14)), st.booleans())
def test_keeps_some_rows_the_start_of_each_text_its_tail_and_every_target(found, batch, length, left):
    for decoder in (True, False):
        given_batch = collated(found, decoder, left and decoder)
        cut = trim(given_batch, stage(batch=batch, length=length), decoder=decoder)
        n = len(found) if batch is None else min(batch, len(found))
        picked = [found[i * len(found) // n] for i in range(n)]
        expected = []
        for r in picked:
            inputs, tail = r["inputs"], r["n_tail"]
            if length is not None and len(inputs) > length:
                inputs = inputs[: max(length - tail, 0)] + (inputs[len(inputs) - tail :] if tail else [])
            expected.append({**r, "inputs": inputs})
        assert "n_tail" not in cut
        for i, row in enumerate(expected):
            real = cut["attention_mask"][i].bool()
            ids = row["inputs"] + (row["targets"] if decoder else [])
            assert cut["input_ids"][i][real].tolist() == ids
            labels = cut["labels"][i]
            assert labels[labels != IGNORED].tolist() == row["targets"]
            if decoder:
                assert (labels[real] != IGNORED).tolist() == [False] * len(row["inputs"]) + [True] * len(row["targets"])
        if batch is not None and batch < len(found):  # not wider than it has to be
            assert cut["input_ids"].shape[1] == max(int(cut["attention_mask"].sum(1).max()), 1)


def test_nothing_to_cut_copies_nothing():
    batch = {"input_ids": torch.ones(4, 3, dtype=torch.long), "labels": torch.ones(4, 3, dtype=torch.long)}
    for limits in ({}, {"batch": 4}, {"batch": 9}):
        cut = trim(batch, stage(**limits), decoder=True)
        assert all(cut[name] is batch[name] for name in batch)


@given(st.integers(2, 40), st.integers(1, 40))
def test_every_row_of_a_batch_has_its_turn(rows, batch):
    ids = torch.arange(rows)[:, None]
    turns = range(-(-rows // min(batch, rows)) + 1)
    parts = [trim({"input_ids": ids}, stage(batch=batch), decoder=True, turn=t)["input_ids"].flatten() for t in turns]
    assert all(len(set(part.tolist())) == min(batch, rows) for part in parts)
    assert set(torch.cat(parts).tolist()) == set(range(rows))


def test_batches_that_no_stage_cuts_are_the_users_own():
    batch = {"inputs_embeds": torch.ones(4, 3, 2)}
    assert trim(batch, stage(), decoder=True) is batch
    with pytest.raises(ModelError, match=r"cuts input_ids, and the batch has only inputs_embeds"):
        trim(batch, stage(length=2), decoder=True)


def test_a_small_stage_takes_other_examples_in_every_epoch(tmp_path):
    """Eight rows in batches of four, always the same two: half of each batch must not be left out for good."""
    model = get_peft_model(BY_NAME["llama"].plm(), soft_prompt_config(BY_NAME["llama"].plm(), num_virtual_tokens=3))
    partial = PartialPLM(model)
    full = partial.full_stage
    schedule = Schedule((dataclasses.replace(full, batch=1, steps=8), dataclasses.replace(full, steps=1)))
    seen: list[list[int]] = []

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model, inputs, **kwargs):
            seen.append(inputs["input_ids"][:, 0].tolist())
            return super().compute_loss(model, inputs, **kwargs)

    rows = BY_NAME["llama"].batch(size=8)
    rows["input_ids"][:, 0] = torch.arange(8)
    callback = ProgressiveCallback(partial, schedule)
    trainer = InOrder(
        model=model,
        args=arguments(tmp_path, max_steps=9, per_device_train_batch_size=4),
        train_dataset=Rows(rows),
        callbacks=[callback],
    )
    callback.attach(trainer)
    trainer.train()
    assert sorted(row for step in seen[:8] for row in step) == list(range(8))


def test_a_classifiers_labels_are_one_a_row():
    batch = {"input_ids": torch.arange(12).view(4, 3), "attention_mask": torch.ones(4, 3), "labels": torch.arange(4)}
    cut = trim(batch, stage(batch=2, length=2), decoder=True)
    assert cut["labels"].tolist() == [0, 2]
    assert cut["input_ids"].tolist() == [[0, 1], [6, 7]]


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_cutting_gives_what_encoding_shorter_gives(kind):
    """The tokens that go are those `encode` would cut: the end of the task's long field, never the template's end."""
    made = toy()
    folder, decoder = (made.llama, True) if kind == "decoder" else (made.t5, False)
    recipe = config.load(
        {"model": {"path": str(folder)}, "data": {"task": str(made.topics), "max_input_tokens": 40},
         "train": {"steps": 1}, "output": "unused"}
    )  # fmt: skip
    session = open_session(recipe, ("train",))
    short = encode(
        load_examples(session.task, "train", decoder=decoder),
        session.tokenizer, decoder=decoder, max_input_tokens=7, max_target_tokens=8,
    )  # fmt: skip
    batch = Collator(session.tokenizer, decoder=decoder, tails=True)(list(session.encoded["train"]))
    cut = trim(batch, stage(length=7), decoder=decoder)
    for i, row in enumerate(short):
        assert cut["input_ids"][i][cut["attention_mask"][i].bool()].tolist() == row["input_ids"]


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_small_batch_stage_takes_the_step_of_a_small_batch(name, accumulate, tmp_path):
    """Loss and update are those of the kept rows alone: the labels of the others are not in the divisor."""
    batch = {k: torch.cat([v] * 2) for k, v in BY_NAME[name].batch(size=4).items()}
    data = Rows(batch)
    seen: list[dict[str, torch.Tensor]] = []

    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append({k: v.clone() for k, v in inputs.items()})
            loss = label_loss(model, inputs, num_items=num_items_in_batch)
            return (loss, None) if return_outputs else loss

    torch.manual_seed(0)
    model = get_peft_model(BY_NAME[name].plm(), soft_prompt_config(BY_NAME[name].plm(), num_virtual_tokens=3))
    partial = PartialPLM(model, keep_neurons="first")
    full = partial.full_stage
    schedule = Schedule([dataclasses.replace(full, steps=1, batch=1), dataclasses.replace(full, steps=1)])
    before = prompt_parameter(model).detach().clone()
    callback = ProgressiveCallback(partial, schedule)
    trainer = OwnLoss(
        model=model,
        args=arguments(tmp_path, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=accumulate,
                       max_grad_norm=0.0, optim="sgd", learning_rate=0.5),
        train_dataset=data,
        callbacks=[callback],
    )  # fmt: skip
    callback.attach(trainer)
    trainer.model_accepts_loss_kwargs = True
    trainer.train()
    assert [len(b["input_ids"]) for b in seen] == [1] * accumulate + [4] * accumulate
    first = next(e["loss"] for e in trainer.state.log_history if "loss" in e)
    with torch.no_grad():
        now = prompt_parameter(model).clone()
        prompt_parameter(model).copy_(before)
        labels = sum(int((b["labels"] != IGNORED).sum()) for b in seen[:accumulate])
        expected = sum(float(label_loss(model, b, num_items=labels)) for b in seen[:accumulate])
        prompt_parameter(model).copy_(now)
    assert first == pytest.approx(expected, rel=1e-4)


def test_flops_follow_the_part_that_is_trained_on():
    cost = CostModel.from_config(BY_NAME["llama"].config())
    shape = BatchShape(batch=8, input_tokens=30, prompt_tokens=4, target_tokens=2)
    full = cost.full_stage
    small = dataclasses.replace(full, steps=3, batch=2, length=10)
    assert step_flops(cost, small, shape) == step_flops(
        cost, None, BatchShape(batch=2, input_tokens=10, prompt_tokens=4, target_tokens=2)
    )
    assert step_flops(cost, dataclasses.replace(full, batch=99, length=99), shape) == step_flops(cost, None, shape)
    both = Schedule([small, dataclasses.replace(full, steps=2)])
    assert schedule_flops(cost, both, shape) == 3 * step_flops(cost, small, shape) + 2 * step_flops(cost, None, shape)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_run_whose_stages_cut_batches_and_texts(kind, tmp_path):
    made = toy()
    recipe = config.load(
        {
            "model": {"path": str(getattr(made, kind)), "dtype": "float32"},
            "data": {"task": str(made.topics), "validation_limit": 8, "max_input_tokens": 20},
            "prompt": {"tokens": 3},
            "stages": [{"steps": 2, "batch": 2, "length": 6}, {"steps": 2, "batch": 4}, {"steps": 2}],
            "train": {"steps": 6, "batch_size": 8, "log_every": 1},
            "output": str(tmp_path / "run"),
        }
    )
    found = run.train(recipe)
    plain = run.train(config.load(recipe.model_dump(mode="json"), [
        "stages=null", "method=pt", f"output={tmp_path / 'plain'}"]))  # fmt: skip
    assert [s.get("batch") for s in found.schedule] == [2, 4, None]
    assert 0 < found.flops["train"] < 0.75 * plain.flops["train"]
    by_step = {p.step: p.train_flops for p in found.curve}
    assert by_step[6] == found.flops["train"]
    whole = run.train(recipe, resume=True)
    assert whole.flops["train"] == found.flops["train"]


def test_stages_that_do_not_fit_are_refused():
    for name, value in (("batch", 0), ("length", -1), ("batch", True), ("length", 1.5)):
        with pytest.raises(ScheduleError, match=name):
            stage(**{name: value})
    base = {"model": {"path": "x"}, "data": {"task": "bbc_topics", "max_input_tokens": 64},
            "train": {"steps": 2, "batch_size": 8}, "output": "y"}  # fmt: skip
    for limit, setting in (({"batch": 9}, "train.batch_size=8"), ({"length": 65}, "data.max_input_tokens=64")):
        with pytest.raises(ConfigError, match=setting):
            config.load({**base, "stages": [{"steps": 2, **limit}]})
