"""The three lines in a Trainer of the user's own: what they do to each step, and what they leave behind."""

from __future__ import annotations

import dataclasses
import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from settings import BY_NAME, FFN, LAYERS, VOCAB, Settings
from trainers import Rows, arguments
from transformers import (
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
)

from fast_prompt_tuning import (
    EmaCallback,
    PartialPLM,
    ProgressiveCallback,
    Schedule,
    activation_scores,
    soft_prompt_config,
)
from fast_prompt_tuning.errors import ConfigError, ModelError, ScheduleError, ScoreError
from fast_prompt_tuning.prompt.soft_prompt import prompt_parameter
from fast_prompt_tuning.schedule.stages import Stage

STEPS = 10  # cr: growths before steps 2, 4 and 6


def size(stage: Stage) -> Stage:
    return dataclasses.replace(stage, steps=0)


def build(name: str) -> tuple[Any, Rows]:
    """A tiny PLM and 12 rows of data for it."""
    if name == "bert-classifier":
        config = BY_NAME["bert"].config()
        config.is_decoder, config.num_labels = False, 3
        config.problem_type = "single_label_classification"  # else the model sets it when it first computes a loss
        torch.manual_seed(0)
        plm = BertForSequenceClassification(config).eval()
        return plm, Rows({**BY_NAME["bert"].batch(size=6), "labels": torch.arange(6) % 3})
    return BY_NAME[name].plm(), Rows(BY_NAME[name].batch(size=6))


class Recorder(TrainerCallback):
    """What size the model has inside every training forward, and at every event outside."""

    def __init__(self, run: Any):
        self.run, self.outside = run, []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.outside.append((name, self.run.partial.stage))
        return super().__getattribute__(name)


class Run:
    """The three-line script, with spies."""

    def __init__(self, name: str, folder: Any, method: str = "cr", callbacks: tuple = (), **options: Any):
        plm, self.data = build(name)
        seq2seq = bool(plm.config.is_encoder_decoder)
        calibration_batches = [self.data.batch]
        torch.manual_seed(0)
        # -- the three lines of the README, as they stand there
        model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
        partial = PartialPLM(model, neuron_scores=activation_scores(model, calibration_batches))
        schedule = Schedule.preset(method, partial.full_stage, total_steps=STEPS)
        # --
        self.model, self.partial, self.schedule, self.plm = model, partial, schedule, plm
        self.before, self.after = Recorder(self), Recorder(self)
        self.trainer = (Seq2SeqTrainer if seq2seq else Trainer)(
            model=model,
            args=arguments(folder, seq2seq, **options),
            train_dataset=self.data,
            eval_dataset=self.data,
            callbacks=[self.before, ProgressiveCallback(partial, schedule), self.after, *callbacks],
        )
        self.inside: list[tuple[int, Stage]] = []
        self.layers_run: list[int] = []
        model.register_forward_pre_hook(self._spy)
        self.base = {k: v.clone() for k, v in plm.state_dict().items()}
        self.modules, self.own = dict(model.named_modules()), {m: set(m.__dict__) for m in model.modules()}
        self.kind = type(model)
        self.config = plm.config.to_dict()

    def _spy(self, model: Any, _args: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self.inside.append((self.trainer.state.global_step, size(self.partial.stage)))

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    def sizes(self, steps: Any) -> list[tuple[int, Stage]]:
        """What the schedule says of each step; without the steps of a stage, which are no part of its size."""
        return [(step, size(self.schedule.stage_at(step))) for step in steps]

    def assert_restored(self) -> None:
        """The full model, bit for bit, with nothing of ours left in it."""
        assert self.partial.stage.same_size(self.partial.full_stage)
        state = self.plm.state_dict()
        assert list(state) == list(self.base)
        # PEFT trains its own copy of a classification head; that is no base weight.
        assert all(torch.equal(v, self.base[k]) for k, v in state.items() if ".modules_to_save." not in k)
        modules = dict(self.model.named_modules())
        assert modules.keys() == self.modules.keys()
        assert all(modules[k] is m for k, m in self.modules.items())
        accelerates = {"_is_accelerate_prepared"}
        assert {m: set(m.__dict__) - accelerates for m in self.model.modules()} == self.own
        assert self.plm.config.to_dict() == self.config

    def logits(self, model: Any = None) -> torch.Tensor:
        model = self.model if model is None else model
        model.eval()
        with torch.no_grad():
            return model(**self.data.batch).logits


# -- the script -------------------------------------------------------------------------------------------------------

SCRIPT = ["t5", "bart", "llama", "gpt2", "bert-classifier"]


@pytest.mark.parametrize("name", SCRIPT)
def test_the_three_line_script(name, tmp_path):
    run = Run(name, tmp_path / "run")
    prompt = prompt_parameter(run.model)
    start, untuned = prompt.detach().clone(), run.logits()
    run.trainer.train()
    run.model.save_pretrained(tmp_path / "prompt")

    # Inside a step the size is the schedule's; at every event, whoever listens and wherever, the model is full.
    assert run.inside == run.sizes(range(STEPS))
    assert len({stage.layers_in(stage.stacks[0]) for _, stage in run.inside}) == 4
    for recorder in (run.before, run.after):
        assert {event for event, _ in recorder.outside} >= {"on_step_begin", "on_step_end", "on_log", "on_train_end"}
        assert all(stage.is_full(run.partial.full_stage) for _, stage in recorder.outside)

    run.assert_restored()
    assert prompt_parameter(run.model) is prompt
    assert not torch.equal(prompt, start)
    assert not torch.equal(run.logits(), untuned)
    assert all(math.isfinite(loss) for loss in run.losses)
    loaded = PeftModel.from_pretrained(build(name)[0], tmp_path / "prompt")
    assert torch.equal(run.logits(loaded), run.logits())


def test_the_loss_of_a_step_is_that_of_its_stage(tmp_path):
    run = Run("llama", tmp_path, logging_strategy="no", learning_rate=0.0)
    losses = []
    own = run.trainer.compute_loss
    run.trainer.compute_loss = lambda *a, **k: losses.append((a[1], own(*a, **k))) or losses[-1][1]
    run.trainer.train()
    assert len(losses) == STEPS
    for step, (batch, loss) in enumerate(losses):
        with run.partial.at(run.schedule.stage_at(step)), torch.no_grad():
            torch.testing.assert_close(loss.detach(), run.model(**batch).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["pt", "ld", "fr"])
def test_every_method(method, tmp_path):
    run = Run("llama", tmp_path, method)
    run.trainer.train()
    assert run.inside == run.sizes(range(STEPS))
    run.assert_restored()


def test_plain_tuning_is_what_the_trainer_does_without_us(tmp_path):
    ours = Run("llama", tmp_path / "a", "pt")
    ours.trainer.train()
    plain = Run("llama", tmp_path / "b", "pt")
    plain.trainer.remove_callback(ProgressiveCallback)
    plain.trainer.train()
    assert ours.losses == plain.losses
    assert torch.equal(prompt_parameter(ours.model), prompt_parameter(plain.model))


def test_growing_keeps_parameter_optimizer_state_and_learning_rates(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
            prompt = prompt_parameter(model)
            inner = optimizer.state[prompt]
            seen.append((prompt, inner["exp_avg"], int(inner["step"]), lr_scheduler.get_last_lr()[0], inner))

    run = Run("llama", tmp_path, callbacks=(Watch(),), lr_scheduler_type="linear", warmup_steps=2)
    run.trainer.train()
    assert len(seen) == STEPS
    for prompt, average, _, _, inner in seen:
        assert prompt is prompt_parameter(run.model)
        assert average is seen[0][1]
        assert inner is seen[0][4]
    assert [s[2] for s in seen] == list(range(1, STEPS + 1))
    plain = Run("llama", tmp_path, "pt", lr_scheduler_type="linear", warmup_steps=2)
    plain.trainer.train()
    rates = [e["learning_rate"] for e in plain.trainer.state.log_history if "learning_rate" in e]
    assert [e["learning_rate"] for e in run.trainer.state.log_history if "learning_rate" in e] == rates
    assert [s[3] for s in seen[:-1]] == rates[1:]


def test_evaluation_and_saving_in_mid_run_are_the_full_models(tmp_path):
    found = []

    class Check(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            size = run.trainer.args.per_device_eval_batch_size
            assert size >= len(run.data)
            with torch.no_grad():
                found.append((metrics["eval_loss"], run.model(**run.data.batch).loss.item()))

        def on_save(self, args, state, control, **kwargs):
            folder = tmp_path / f"checkpoint-{state.global_step}"
            loaded = PeftModel.from_pretrained(build("llama")[0], folder)
            training = run.model.training
            assert torch.equal(run.logits(loaded), run.logits())
            run.model.train(training)

    run = Run(
        "llama",
        tmp_path,
        callbacks=(Check(),),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    prompt = prompt_parameter(run.model)
    run.trainer.train()
    assert len(found) == STEPS
    for reported, full in found:
        assert reported == pytest.approx(full, abs=1e-6)
    best = min(reported for reported, _ in found)
    assert run.trainer.state.best_metric == pytest.approx(best)
    assert prompt_parameter(run.model) is prompt
    assert run.trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)
    run.assert_restored()


def test_generation_in_mid_run_works_on_the_full_model(tmp_path):
    run = Run("t5", tmp_path, eval_strategy="steps", eval_steps=3, predict_with_generate=True, generation_max_length=5)
    run.trainer.train()
    assert sum("eval_loss" in entry for entry in run.trainer.state.log_history) >= 3
    run.assert_restored()


# -- how a run may be set up ------------------------------------------------------------------------------------------


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    run = Run("llama", tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=1)
    run.trainer.train()
    assert run.inside == run.sizes(step for step in range(STEPS) for _ in range(3))
    assert run.schedule.total_steps == STEPS
    run.assert_restored()


def test_epochs_instead_of_steps(tmp_path):
    run = Run("llama", tmp_path, max_steps=-1, num_train_epochs=4)  # 3 steps each
    run.trainer.train()
    assert [step for step, _ in run.inside] == list(range(12))
    assert run.inside[-1][1].is_full(run.partial.full_stage)  # past the schedule's end: its last stage


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
# With re-entrant checkpointing torch says that a segment has no input that needs a gradient, which is right.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_gives_the_same_run(name, reentrant, tmp_path):
    plain = Run(name, tmp_path / "a")
    plain.trainer.train()
    run = Run(
        name,
        tmp_path / "b",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    run.trainer.train()
    assert run.losses == pytest.approx(plain.losses, abs=1e-5)
    torch.testing.assert_close(prompt_parameter(run.model), prompt_parameter(plain.model), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, run.base[k]) for k, v in run.plm.state_dict().items())


def test_a_second_train_starts_at_the_first_stage_again(tmp_path):
    run = Run("llama", tmp_path)
    run.trainer.train()
    run.inside.clear()
    run.trainer.train()
    assert run.inside == run.sizes(range(STEPS))
    run.assert_restored()
    assert type(run.model) is run.kind


def test_the_callback_may_be_added_later_and_first_or_last(tmp_path):
    run = Run("llama", tmp_path)
    callback = run.trainer.pop_callback(ProgressiveCallback)
    run.trainer.add_callback(callback)
    run.trainer.train()
    assert run.inside == run.sizes(range(STEPS))
    for recorder in (run.before, run.after):
        assert all(stage.is_full(run.partial.full_stage) for _, stage in recorder.outside)
    run.assert_restored()


def test_a_loss_of_the_users_own_may_run_the_model_twice_and_ask_the_full_one(tmp_path):
    run = Run("llama", tmp_path)
    own, seen = run.trainer.compute_loss, []

    def compute_loss(model, inputs, **kwargs):
        with torch.no_grad():
            model(**inputs)
            seen.append(size(run.partial.stage))
        model.eval()(**inputs)
        return (own(model.train(), inputs, **kwargs) + own(model, inputs, **kwargs)) / 2

    run.trainer.compute_loss = compute_loss
    run.trainer.train()
    assert run.inside == run.sizes(step for step in range(STEPS) for _ in range(2))
    assert all(stage.is_full(run.partial.full_stage) for stage in seen)
    run.assert_restored()
    plain = Run("llama", tmp_path)
    plain.trainer.train()
    assert run.losses == pytest.approx(plain.losses, abs=1e-5)


def test_nothing_of_the_trainer_is_replaced_and_no_batch_cut_without_being_attached(tmp_path):
    run = Run("llama", tmp_path)
    run.trainer.train()
    assert not [
        name for name, value in run.trainer.__dict__.items() if callable(getattr(type(run.trainer), name, None))
    ]
    full = run.partial.full_stage
    schedule = Schedule([dataclasses.replace(full, batch=1, steps=2), dataclasses.replace(full, steps=2)])
    callback = ProgressiveCallback(run.partial, schedule)
    trainer = Trainer(run.model, arguments(tmp_path), train_dataset=run.data, callbacks=[callback])
    with pytest.raises(ScheduleError, match=r"write callback\.attach\(trainer\) after the Trainer is made"):
        trainer.train()
    callback.attach(trainer)
    callback.attach(trainer)
    assert trainer.train().global_step == STEPS


def test_a_compiled_model_is_refused(tmp_path):
    run = Run("llama", tmp_path)
    run.trainer.args.torch_compile = True
    with pytest.raises(ModelError, match="torch_compile=True compiles the model at one size"):
        run.trainer.train()


def test_a_bare_model_that_checkpoints_its_layers_and_trains_all_its_weights(tmp_path):
    losses = []
    for checkpoints in (False, True):
        plm, data = build("llama")
        partial = PartialPLM(plm, keep_neurons="first")
        callback = ProgressiveCallback(partial, Schedule.preset("cr", partial.full_stage, total_steps=STEPS))
        options = {"gradient_checkpointing": checkpoints, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer = Trainer(plm, arguments(tmp_path, **options), train_dataset=data, callbacks=[callback])
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        assert partial.stage == partial.full_stage
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_partial_plm_of_the_bare_model_works_too(tmp_path):
    plm, data = build("llama")
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
    partial = PartialPLM(plm, keep_neurons="first")
    schedule = Schedule.preset("cr", partial.full_stage, total_steps=STEPS)
    stages = []
    model.register_forward_pre_hook(lambda *_: stages.append(size(partial.stage)))
    Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=data,
        callbacks=[ProgressiveCallback(partial, schedule)],
    ).train()
    assert stages == [size(schedule.stage_at(step)) for step in range(STEPS)]


# -- broken off -------------------------------------------------------------------------------------------------------


class Prompts(TrainerCallback):
    """The prompt between steps (at index 0 before the first), and inside them."""

    def __init__(self):
        self.between, self.inside = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.between.append(prompt_parameter(model).detach().clone())

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.inside.append(prompt_parameter(model).detach().clone())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.between.append(prompt_parameter(model).detach().clone())


@pytest.mark.parametrize(
    ("optimizer", "accumulate"), [("sgd", 1), ("adamw_torch", 1), ("adamw_torch", 2), ("adafactor", 1)]
)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_running_mean_is_what_the_trainer_meets_and_changes_no_step(name, optimizer, accumulate, tmp_path):
    rate = 1.0 if optimizer == "sgd" else 0.05  # sgd keeps no state
    options = {"optim": optimizer, "learning_rate": rate, "gradient_accumulation_steps": accumulate}
    plain, mean = Prompts(), Prompts()
    Run(name, tmp_path, callbacks=(plain,), **options).trainer.train()
    run = Run(name, tmp_path, callbacks=(EmaCallback(0.8), mean), **options)
    run.trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(plain.inside, mean.inside, strict=True))
    wanted = plain.between[0].double()
    for step, (trained, found) in enumerate(zip(plain.between, mean.between, strict=True)):
        decay = min(0.8, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * trained.double() if step else wanted
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(prompt_parameter(run.model), mean.between[-1])
    assert not torch.allclose(plain.between[-1], mean.between[-1], atol=1e-3)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_running_mean_is_resumed_exactly(step, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = Run("llama", tmp_path, callbacks=(EmaCallback(),), **options)
    whole.trainer.train()
    again = Run("llama", tmp_path / "again", callbacks=(EmaCallback(),))
    again.trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert again.losses == pytest.approx(whole.losses, abs=1e-6)
    assert torch.equal(prompt_parameter(again.model), prompt_parameter(whole.model))


def test_a_prompt_set_between_two_trainings_is_where_the_second_starts(tmp_path):
    class Inside(Prompts):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.inside.append(prompt_parameter(model).detach().clone())

    seen = Inside()
    run = Run("llama", tmp_path, callbacks=(EmaCallback(), seen))
    run.trainer.train()
    with torch.no_grad():
        prompt_parameter(run.model).fill_(0.25)
    seen.inside.clear()
    run.trainer.train()
    assert torch.equal(seen.inside[0], torch.full_like(seen.inside[0], 0.25))


def test_a_step_that_is_broken_off_leaves_the_mean(tmp_path):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    seen = Prompts()
    options = {"gradient_accumulation_steps": 2}
    run = Run("llama", tmp_path, callbacks=(EmaCallback(), seen, Stop()), **options)
    run.trainer.train()
    assert run.trainer.state.global_step == 4
    assert torch.equal(prompt_parameter(run.model), seen.between[4])


def test_a_running_mean_that_cannot_be(tmp_path):
    for decay in (1.0, -0.1, math.nan):
        with pytest.raises(ConfigError, match=f"decay={decay!r} must be at least 0 and below 1"):
            EmaCallback(decay)
    plm, data = build("llama")
    with pytest.raises(ModelError, match="no soft prompt"):
        Trainer(plm, arguments(tmp_path), train_dataset=data, callbacks=[EmaCallback()]).train()
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=3))
    with pytest.raises(ModelError, match="DeepSpeed, which steps by itself"):
        EmaCallback().on_train_begin(SimpleNamespace(deepspeed={"stage": 2}), None, None, model=model)


class Boom(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("place", "error"),
    [(place, Boom) for place in ("forward", "backward", "step_begin", "step_end", "log", "data")]
    + [(place, KeyboardInterrupt) for place in ("forward", "backward", "step_end")],
)
@pytest.mark.parametrize("at", [0, 3])
def test_a_run_broken_off_leaves_the_full_model(place, at, error, tmp_path):
    class Fail(TrainerCallback):
        on = True

        def fail(self, state):
            if self.on and state.global_step >= at:
                raise error("boom")

        def on_step_begin(self, args, state, control, **kwargs):
            if place == "step_begin":
                self.fail(state)

        def on_step_end(self, args, state, control, **kwargs):
            if place == "step_end":
                self.fail(state)

        def on_log(self, args, state, control, **kwargs):
            if place == "log":
                self.fail(state)

    fail = Fail()
    run = Run("llama", tmp_path, callbacks=(fail,))
    layer = run.plm.model.layers[0].mlp
    handles = []
    if place == "forward":
        handles = [layer.register_forward_hook(lambda *_: fail.fail(run.trainer.state))]
    elif place == "backward":
        handles = [layer.register_full_backward_hook(lambda *_: fail.fail(run.trainer.state))]
    elif place == "data":
        rows = type(run.data).__getitem__
        broken = type("Broken", (Rows,), {"__getitem__": lambda s, i: fail.fail(run.trainer.state) or rows(s, i)})
        run.trainer.train_dataset = broken(run.data.batch)
    with pytest.raises(error, match="boom"):
        run.trainer.train()
    for handle in handles:
        handle.remove()
    run.assert_restored()
    assert all(stage.is_full(run.partial.full_stage) for r in (run.before, run.after) for _, stage in r.outside)
    with torch.no_grad():
        assert torch.isfinite(run.logits()).all()
    # And the same trainer can train again.
    fail.on = False
    run.inside.clear()
    run.trainer.train()
    assert run.inside == run.sizes(range(STEPS))
    run.assert_restored()


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_resuming_from_any_step_continues_the_uninterrupted_run(name, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    whole = Run(name, tmp_path, **options)
    whole.trainer.train()
    for step in range(1, 8):  # before, at and after every growth
        again = Run(name, tmp_path / "again", **{**options, "save_strategy": "no"})
        prompt_parameter(again.model).data.zero_()
        again.trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.inside == again.sizes(range(step, STEPS))
        assert len(again.losses) == STEPS  # the log comes with the checkpoint
        assert again.losses == pytest.approx(whole.losses, abs=1e-6)
        torch.testing.assert_close(prompt_parameter(again.model), prompt_parameter(whole.model), rtol=0, atol=1e-6)
        again.assert_restored()


def test_resuming_on_the_same_trainer_after_an_interruption(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = Run("llama", tmp_path / "a", **options)
    whole.trainer.train()

    class Interrupt(TrainerCallback):
        on = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.on and state.global_step == 5:
                raise KeyboardInterrupt

    interrupt = Interrupt()
    run = Run("llama", tmp_path / "b", callbacks=(interrupt,), **options)
    with pytest.raises(KeyboardInterrupt):
        run.trainer.train()
    interrupt.on = False
    run.trainer.train(resume_from_checkpoint=True)
    assert run.losses == pytest.approx(whole.losses, abs=1e-6)
    assert torch.equal(prompt_parameter(run.model), prompt_parameter(whole.model))


# -- what it says -----------------------------------------------------------------------------------------------------


def test_growth_is_logged_with_sizes_before_and_after(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fast_prompt_tuning.train.growth")
    Run("t5", tmp_path).trainer.train()
    lines = [r.getMessage() for r in caplog.records if r.name == "fast_prompt_tuning.train.growth"]
    assert len(lines) == 4
    assert lines[0].startswith("step 0: tuning on 1 layers × 6 neurons")
    assert lines[1].startswith("step 2: growing 1 layers × 6 neurons to 3 layers × 12 neurons")
    assert lines[3].startswith("step 6: growing 4 layers × 18 neurons to 5 layers × 24 neurons")
    assert "{'encoder': [0, 2, 4], 'decoder': [0, 2, 4]}" in lines[1]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("fast_prompt")]


@pytest.mark.parametrize(("steps", "warned"), [(5, True), (6, True), (7, False)])
def test_a_run_that_never_reaches_the_last_stage_is_warned_of(steps, warned, tmp_path, caplog):
    run = Run("llama", tmp_path, max_steps=steps)
    run.trainer.train()
    messages = [r.getMessage() for r in caplog.records if r.name == "fast_prompt_tuning.train.callback"]
    if warned:
        assert f"training stops after {steps} steps, but the schedule reaches its last stage at step 6" in messages[0]
        assert f"total_steps={steps}" in messages[0]
    else:
        assert not messages
    run.assert_restored()


def test_a_schedule_that_ends_on_a_partial_model_is_warned_of(tmp_path, caplog):
    run = Run("llama", tmp_path)
    (callback,) = (c for c in run.trainer.callback_handler.callbacks if isinstance(c, ProgressiveCallback))
    callback.schedule = Schedule([Stage(LAYERS, FFN, 2), Stage(3, FFN, STEPS - 2)])
    run.trainer.train()
    messages = [r.getMessage() for r in caplog.records if r.name == "fast_prompt_tuning.train.callback"]
    assert len(messages) == 1
    assert "the last stage is 3 layers × 24 neurons, not the full model" in messages[0]
    run.assert_restored()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_schedule_that_does_not_fit_is_refused_before_any_step():
    plm, _ = build("llama")
    partial = PartialPLM(plm)
    with pytest.raises(ScheduleError, match=r"layers=9 does not fit: .* choose 1 to 5"):
        ProgressiveCallback(partial, Schedule([Stage(2, FFN, 5), Stage(9, FFN, 5)]))
    with pytest.raises(ScoreError, match="activation_scores"):
        ProgressiveCallback(partial, Schedule([Stage(2, 10, 5), Stage(LAYERS, FFN, 5)]))
    assert partial.stage == partial.full_stage


def test_a_trainer_of_another_model_is_refused(tmp_path):
    """Else every step would silently run on the full model."""
    run, other = Run("llama", tmp_path), Run("llama", tmp_path)
    trainer = Trainer(
        model=other.model,
        args=arguments(tmp_path),
        train_dataset=run.data,
        callbacks=[ProgressiveCallback(run.partial, run.schedule)],
    )
    with pytest.raises(ModelError, match="another model than the Trainer's; make it of the model"):
        trainer.train()
    assert torch.equal(prompt_parameter(other.model), prompt_parameter(run.model))


def test_several_gpus_in_one_process_are_refused(tmp_path):
    """`torch.nn.DataParallel` copies modules by their attributes: every copy would run the first GPU's layers."""
    run = Run("llama", tmp_path)
    run.trainer.args._n_gpu = 2
    with pytest.raises(ModelError, match="2 GPUs in one process"):
        run.trainer.train()


# -- it learns --------------------------------------------------------------------------------------------------------


def toy(family: Settings, size: int, seed: int, mixed: bool) -> dict[str, torch.Tensor]:
    """Name the class of the first of four tokens; `mixed`: of the first or the last, as a token in front says."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, VOCAB, (size, 4), generator=generator)
    which = torch.randint(0, 2, (size, 1), generator=generator) * mixed
    answer = 10 + ids.gather(1, which * 3) % 4
    if mixed:
        ids = torch.cat([3 + which, ids], 1)
    if family.encoder_decoder:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": answer}
    ids = torch.cat([ids, torch.full_like(answer, 9), answer], 1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 1, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize(
    ("name", "sizes", "pretraining", "rate"),
    [
        ("t5-gated", {"d_model": 32, "d_ff": 64, "num_layers": 4, "num_decoder_layers": 3}, 320, 0.3),
        (
            "llama",
            {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "initializer_range": 0.05},
            400,
            0.1,
        ),
    ],
)
def test_fpt_learns_through_all_its_growths(name, sizes, pretraining, rate, tmp_path):
    # From scratch, all weights: the model learns two tasks and which of them the first token asks for.
    family, steps = BY_NAME[name], 160
    plm = family.plm(**sizes).train()
    optimizer = torch.optim.AdamW(plm.parameters(), lr=3e-3, fused=True)
    for step in range(pretraining):
        loss = plm(**toy(family, 64, step, mixed=True)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05

    # Then the prompt has to ask, in that token's place.
    data, held_out = toy(family, 1000, 1000, mixed=False), toy(family, 200, 1001, mixed=False)
    torch.manual_seed(0)
    model = get_peft_model(plm, soft_prompt_config(plm, num_virtual_tokens=4)).eval()
    calibration_batches = [{k: v[:200] for k, v in data.items()}]
    partial = PartialPLM(model, neuron_scores=activation_scores(model, calibration_batches))
    schedule = Schedule.preset("cr", partial.full_stage, total_steps=steps)
    losses: dict[tuple[int, str], float] = {}

    class Measure(TrainerCallback):
        def loss(self, stage: Stage) -> float:
            model.eval()
            with partial.at(stage), torch.no_grad():
                return model(**held_out).loss.item()

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step in schedule.boundaries:
                losses[schedule.index_at(state.global_step), "start"] = self.loss(schedule.stage_at(state.global_step))

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (*schedule.boundaries, schedule.total_steps):
                step = state.global_step - 1
                losses[schedule.index_at(step), "end"] = self.loss(schedule.stage_at(step))

    measure = Measure()
    before = measure.loss(partial.full_stage)
    options = {"max_steps": steps, "per_device_train_batch_size": 64, "learning_rate": rate, "weight_decay": 0.0}
    trainer = (Seq2SeqTrainer if family.encoder_decoder else Trainer)(
        model=model,
        args=arguments(
            tmp_path, family.encoder_decoder, **options, lr_scheduler_type="constant", logging_strategy="no"
        ),
        train_dataset=Rows(data),
        callbacks=[ProgressiveCallback(partial, schedule), measure],
    )
    trainer.train()
    after = measure.loss(partial.full_stage)
    assert before > 2
    assert after < before / 10
    for stage in range(4):  # each stage lowers its own partial PLM's loss, unless there is nothing left to lower
        start, end = losses[stage, "start"], losses[stage, "end"]
        assert end < start or end < 0.01, (stage, start, end)
    assert losses[0, "end"] > losses[1, "end"] > losses[2, "end"] > after or losses[2, "end"] < 0.01
