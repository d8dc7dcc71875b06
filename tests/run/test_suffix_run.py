"""Whole runs with the prompt after the text: what they save, cost, resume and refuse."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from settings import BY_NAME
from torch.utils.flop_counter import FlopCounterMode
from toy import toy

from fast_prompt_tuning import SuffixPromptModel, activation_scores
from fast_prompt_tuning.errors import CheckpointError, ConfigError, ModelError
from fast_prompt_tuning.prompt.soft_prompt import load_prompt, place_of
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.run import run
from fast_prompt_tuning.run.preparation import calibration_batches, score_flops, trainable
from fast_prompt_tuning.run.session import evaluate, open_session
from fast_prompt_tuning.train import loop
from fast_prompt_tuning.train.batches import make_collator

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def suffix_run(folder, model="llama", placement="suffix", **changes):
    here = toy()
    return load(here.recipe(folder, prompt__placement=placement, model__path=str(here.model(model)), **changes))


STAGES = [{"batch": 2, "length": 6, "steps": 4}, {"layers": 3, "steps": 3}, {"steps": 3}]


@pytest.mark.parametrize(("model", "placement"), [("llama", "suffix"), ("t5", "suffix"), ("llama", "infix")])
@pytest.mark.parametrize(
    ("changes", "task"),
    [
        ({"method": "pt"}, "topics"),
        ({"method": "cr"}, "topics"),
        ({"stages": STAGES}, "topics"),
        ({"method": "pt"}, "words"),
    ],
    ids=["pt", "cr", "stages", "words"],
)
def test_a_run_ends_with_a_prompt_that_scores_what_it_says(tmp_path, model, placement, changes, task):
    config = suffix_run(tmp_path / "run", model, placement, data__task=str(getattr(toy(), task)), **changes)
    result = run.train(config)
    assert result.status == "finished"
    assert place_of(tmp_path / "run" / "prompt") == placement
    session = open_session(config, ("validation",))
    found = evaluate(session, session.prompted(load_prompt(tmp_path / "run" / "prompt")))
    assert found.result.values == pytest.approx(result.metrics)
    again = evaluate(session, session.prompted(load_prompt(tmp_path / "run" / "prompt")))
    assert again.flops < found.flops  # the texts are kept
    assert [a.text for a in again.predictions] == [a.text for a in found.predictions]


def test_the_cache_changes_the_cost_and_nothing_else(tmp_path):
    losses, flops = [], []
    for tier in ("memory", "none"):
        result = run.train(suffix_run(tmp_path / tier, method="pt", cache__tier=tier, train__steps=20))
        losses.append(result.losses)
        flops.append(result.flops["train"])
    assert dict(losses[0]) == pytest.approx(dict(losses[1]), rel=1e-5)
    assert flops[0] < 0.9 * flops[1]
    plain = run.train(load(toy().recipe(tmp_path / "plain", method="pt", train__steps=20)))
    assert flops[0] < flops[1] < plain.flops["train"]


def test_kept_cross_attention_changes_the_cost_and_nothing_else(tmp_path):
    for method, steps in (("cr", 20), ("pt", 60)):
        found = {}
        for cross in (False, True):
            given = {"method": method, "train__steps": steps, "cache__cross_attention": cross}
            config = suffix_run(tmp_path / f"{method}-{cross}", "t5", **given)
            found[cross] = run.train(config)
            assert open_session(config, ()).texts.cross_attention == cross
        assert dict(found[True].losses) == pytest.approx(dict(found[False].losses), rel=1e-4)
        assert found[True].metrics == pytest.approx(found[False].metrics)
    assert found[True].flops["train"] < found[False].flops["train"]  # in a run that reads its texts often
    with pytest.raises(ConfigError, match=r"cache.cross_attention=True is for encoder-decoders"):
        open_session(suffix_run(tmp_path / "llama", cache__cross_attention=True), ())


def test_a_prompt_within_the_text_sees_to_what_the_template_has_behind_it(tmp_path):
    """A step costs prompt, `Topic:` and target; the texts that are kept end before them."""
    costs = {}
    for placement in ("suffix", "infix"):
        result = run.train(suffix_run(tmp_path / placement, placement=placement, method="pt", train__steps=20))
        costs[placement] = result.flops
    assert costs["suffix"]["train"] < costs["infix"]["train"]
    config = suffix_run(tmp_path / "auto", placement="infix", method="auto", train__steps=20, train__batch_size=8)
    assert run.train(config).status == "finished"
    session = open_session(config, ("train",))
    rows = [session.encoded["train"][i] for i in range(4)]
    batch = make_collator(session.tokenizer, session.plm, tails=True)(rows)
    assert batch["n_tail"].tolist() == [2] * 4
    (ran,) = trainable(session).loss(batch).work.prompts
    assert ran.shape.input_tokens == max(len(row["input_ids"]) - row["n_target"] - 2 for row in rows)
    assert ran.shape.target_tokens == max(row["n_target"] for row in rows)
    assert ran.shape.prompt_tokens == config.prompt.tokens + 2
    spec = yaml.safe_load(toy().topics.read_text())
    del spec["truncate"]
    spec["source"]["files"] = {k: str(toy().folder / v) for k, v in spec["source"]["files"].items()}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(spec))
    config = suffix_run(tmp_path / "own", placement="infix", data__task=str(tmp_path / "own.yaml"))
    with pytest.raises(ConfigError, match="the task 'topics' names none; set truncate in its file"):
        open_session(config, ())
    with pytest.raises(ModelError, match="an encoder reads its text as a whole"):
        open_session(suffix_run(tmp_path / "t5", "t5", "infix"), ())


@pytest.mark.parametrize("placement", ["prefix", "suffix", "infix"])
def test_scoring_is_counted_as_it_is_run(tmp_path, placement):
    session = open_session(load(toy().recipe(tmp_path / "run", prompt__placement=placement)), ("train",))
    session.plm.set_attn_implementation("eager")  # PyTorch counts no fused attention on a CPU
    model = trainable(session).module
    batch = calibration_batches(session, 8)[0]
    with FlopCounterMode(display=False) as counter:
        activation_scores(model, [batch])
    assert score_flops(session, batch) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_runs_share_what_is_on_disk(tmp_path):
    shared = {"method": "pt", "cache__tier": "disk", "cache__folder": str(tmp_path / "texts")}
    first, second = (run.train(suffix_run(tmp_path / name, train__seed=i, **shared)) for i, name in enumerate("ab"))
    assert len(list((tmp_path / "texts").glob("fpt-texts-1/*/*.safetensors"))) > 20
    assert second.flops["train"] < 0.8 * first.flops["train"]


@pytest.mark.parametrize("placement", ["suffix", "infix"])
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, placement):
    whole = run.train(suffix_run(tmp_path / "whole", placement=placement))

    class Stop(run.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 7
            control.should_save = control.should_training_stop

    run.train(suffix_run(tmp_path / "parts", placement=placement), callbacks=[Stop()])
    other = {"suffix": "infix", "infix": "suffix"}[placement]
    with pytest.raises(CheckpointError, match="placement"):
        run.train(suffix_run(tmp_path / "parts", placement=other), resume=True, allow_changed=True)
    resumed = run.train(suffix_run(tmp_path / "parts", placement=placement), resume=True)
    assert resumed.steps == whole.steps
    prompts = [load_prompt(tmp_path / name / "prompt") for name in ("whole", "parts")]
    torch.testing.assert_close(*prompts)
    assert resumed.metrics == pytest.approx(whole.metrics)


def test_a_run_begun_before_a_setting_came_goes_on(tmp_path):
    first = suffix_run(tmp_path / "run", method="pt", train__steps=6)
    run.train(first)
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text("".join(line for line in saved.read_text().splitlines(True) if "  dtype: model" not in line))
    longer = suffix_run(tmp_path / "run", method="pt", train__steps=6)
    assert run.train(longer, resume=True).status == "finished"


def test_a_prompt_is_the_start_of_the_next_one(tmp_path):
    run.train(suffix_run(tmp_path / "first", method="pt"))
    start = str(tmp_path / "first" / "prompt")
    second = run.train(suffix_run(tmp_path / "second", method="pt", prompt__init="prompt", prompt__path=start))
    assert second.config["prompt"]["placement"] == "suffix"
    assert json.loads((tmp_path / "second" / "prompt" / "soft_prompt.json").read_text())["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full"}, "has no prompt with method='full'"),
        ({"train__gradient_checkpointing": True}, "gradient_checkpointing cannot be used"),
        ({"prompt__placement": "suffx"}, "prompt.placement='suffx'"),
        ({"cache__tier": "ram"}, "cache.tier='ram'"),
        ({"cache__tier": "none", "cache__cross_attention": True}, "keeps nothing with cache.tier='none'"),
        ({"cache__budget_mib": -1}, "cache.budget_mib=-1"),
        ({"cache__budget": 3}, "did you mean 'budget_mib'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, changes, message):
    recipe = {**{"prompt__placement": "suffix"}, **changes}
    with pytest.raises(ConfigError, match=message):
        load(toy().recipe(tmp_path, **recipe))


@pytest.mark.parametrize("placement", ["suffix", "infix"])
def test_a_step_in_parts_counts_the_texts_of_all_of_them(tmp_path, monkeypatch, placement):
    spent = []
    for parts in (1, 2, 4):
        monkeypatch.setattr(loop.Loop, "parts", parts, raising=False)
        changes = {"method": "pt", "train__batch_size": 8, "data__task": str(toy().words)}
        found = run.train(suffix_run(tmp_path / str(parts), placement=placement, **changes))
        spent.append(found.flops["train"])
    # Parts are padded by themselves in the model, and counted as one batch.
    assert spent == pytest.approx([spent[0]] * 3, rel=0.03)


def test_a_session_serves_runs_with_and_without_gradient_checkpointing(tmp_path):
    settings = load(toy().recipe(tmp_path / "one", method="pt", train__gradient_checkpointing=True))
    session = open_session(settings, ("train", "validation"))
    run.train(settings, session=session)
    assert not session.plm.is_gradient_checkpointing
    run.train(suffix_run(tmp_path / "other", method="pt"), session=session)


def test_a_stock_trainer_is_told_why_it_cannot_checkpoint_gradients():
    model = SuffixPromptModel(BY_NAME["llama"].plm(), 3)
    with pytest.raises(ModelError, match="cannot be trained with gradient checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None)
