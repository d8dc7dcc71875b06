"""One run from a recipe: load, check everything, score, train on the schedule, evaluate on the full PLM, save."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from . import checkpoint, fingerprint, metrics, parallel, tasks
from .callback import AutoCallback, ProgressiveCallback
from .config import CacheConfig, RunConfig
from .data import (
    Collator,
    LengthBatchSampler,
    encode,
    examples_fingerprint,
    input_lengths,
    tokens_fingerprint,
    train_calibration,
    train_split,
)
from .errors import CheckpointError, ConfigError, DataError, TrainingStopped
from .evaluation import Prediction, batches_of, by_length, combine, generate, score_labels
from .flops import BatchShape, CostModel, FlopsLedger, forward_flops, generation_flops, text_flops
from .growth import AutoSchedule, probe_examples
from .layer_scores import LAYER_KINDS, LayerScores, block_influence, greedy_removal
from .models import cache_dir, describe_dtype, load_plm, load_tokenizer, locate
from .objective import choose_attention
from .partial_plm import PartialPLM, get_plm
from .placement import SuffixPromptModel, check_suffix
from .plan import full_stage, load_config
from .results import Point, RunResult, environment, save_result, write_atomic
from .schedule import Schedule, Stage
from .scoring import NeuronScores, activation_scores
from .soft_prompt import (
    context_length,
    init_soft_prompt,
    load_prompt,
    placement_of,
    prompt_parameter,
    soft_prompt_config,
)
from .text_cache import DiskTextCache, TextCache
from .trainer import (
    CANNOT_WRITE,
    PromptTrainer,
    StepGuard,
    batch_shape,
    make_collator,
    make_optimizer,
    training_arguments,
)

logger = logging.getLogger(__name__)

OURS = ("config.yaml", "result.json", "log.jsonl", "predictions.jsonl", "scores.safetensors", "layers.safetensors")
OUR_FOLDERS = ("prompt", "model", "checkpoints")


@dataclass
class Session:
    """A loaded PLM, tokenizer and task: what training and evaluation share.

    `examples` holds each split as text, `encoded` the same rows as token ids; `choices` the label words' token ids.
    """

    config: RunConfig
    plm: Any
    tokenizer: Any
    task: tasks.Task
    cost: CostModel
    examples: dict[str, Dataset] = field(default_factory=dict)
    encoded: dict[str, Dataset] = field(default_factory=dict)
    choices: dict[str, list[int]] = field(default_factory=dict)
    _texts: tuple[CacheConfig, TextCache] | None = None

    @property
    def texts(self) -> TextCache:
        """Where a prompt after the text finds its texts' states; shared by the runs that share a session."""
        chosen = self.config.cache
        if self._texts is None or self._texts[0] != chosen:
            if chosen.tier == "disk":
                folder = chosen.folder or cache_dir() / "texts"
                made: TextCache = DiskTextCache(self.plm, folder, budget_mib=chosen.budget_mib)
            else:
                made = TextCache(self.plm, budget_mib=0 if chosen.tier == "none" else chosen.budget_mib)
            self._texts = chosen, made
        return self._texts[1]

    @property
    def decoder(self) -> bool:
        return not self.plm.config.is_encoder_decoder

    @property
    def max_target_tokens(self) -> int:
        return self.config.data.max_target_tokens or self.task.max_target_tokens


@dataclass(frozen=True)
class Evaluation:
    """Scores of one prompt (or none) on a split, with every prediction and what it cost."""

    result: metrics.MetricResult
    predictions: list[Prediction]
    answers: list[str]
    flops: float
    seconds: float


def task_of(config: RunConfig) -> tasks.Task:
    """The task a recipe names, or the one its templates make."""
    data = config.data
    if data.task is not None:
        return tasks.load_task(data.task)
    return tasks.task_from_templates(
        files=data.files,
        input_template=data.input_template or "",
        target_template=data.target_template or "",
        labels=data.labels,
        max_target_tokens=data.max_target_tokens or 64,
    )


def open_session(config: RunConfig, splits: Iterable[str], *, resume: bool = False) -> Session:
    """Load and check model, tokenizer and data of a recipe before any compute is spent.

    Args:
        resume: for a run that goes on: a measured dtype (`auto`) stays the one it began with.

    Raises:
        FptError: whatever does not fit, naming it.
    """
    task = task_of(config)
    dtype: str = config.model.dtype
    if dtype == "auto":
        past = read_log(Path(config.output) / "log.jsonl") if resume else []
        dtype = "float32" if config.method == "full" else past[-1].get("dtype", dtype) if past else dtype
    tokenizer = load_tokenizer(config.model.path, revision=config.model.revision)
    device = parallel.start(config.model.device)
    plm = load_plm(config.model.path, dtype=dtype, device=device, revision=config.model.revision)
    if len(set(parallel.gather(str(plm.dtype)))) > 1:  # the processes' probes differ: all take the exact one
        plm = load_plm(config.model.path, dtype="float32", device=device, revision=config.model.revision)
    session = Session(config, plm, tokenizer, task, CostModel.from_model(plm))
    if config.prompt.placement == "suffix":
        check_suffix(plm)
    limit = context_length(plm)
    longest = config.prompt.tokens + config.data.max_input_tokens
    longest += session.max_target_tokens if session.decoder else 0
    if limit is not None and longest > limit:
        raise ConfigError(
            f"prompt.tokens={config.prompt.tokens} + data.max_input_tokens={config.data.max_input_tokens} + target "
            f"need {longest} positions, but this model has {limit}; lower data.max_input_tokens"
        )
    choose_attention(plm, config.prompt.tokens + config.data.max_input_tokens + session.max_target_tokens)
    for split in splits:
        _load_split(session, split)
    if task.labels:
        for word, text in task.choices(decoder=session.decoder).items():
            session.choices[word] = tokenizer(text, add_special_tokens=not session.decoder)["input_ids"]
    return session


def _load_split(session: Session, split: str) -> None:
    data = session.config.data
    bad: list[DataError] = []
    examples = tasks.load_examples(
        session.task,
        split,
        decoder=session.decoder,
        files=data.files or None,
        on_bad_row=data.on_bad_row,
        limit={"train": data.train_limit, "test": data.test_limit}.get(split, data.validation_limit),
        seed=session.config.train.seed if split == "train" else 0,
        bad_rows=bad,
    )
    for error in bad:
        logger.warning("skipped: %s", error)
    session.examples[split] = examples
    session.encoded[split] = encode(
        examples,
        session.tokenizer,
        decoder=session.decoder,
        max_input_tokens=data.max_input_tokens,
        max_target_tokens=session.max_target_tokens,
    )


def input_ids_of(session: Session, rows: Dataset) -> list[list[int]]:
    """Token ids of the inputs alone: a decoder-only row holds its target behind them."""
    if not session.decoder:
        return list(rows["input_ids"])
    return [ids[: len(ids) - n] for ids, n in zip(rows["input_ids"], rows["n_target"], strict=True)]


def predict(
    session: Session,
    prompt: torch.Tensor | None,
    inputs: Sequence[list[int]],
    *,
    voting: str = "probabilities",
    placement: str | None = None,
) -> tuple[list[Prediction], list[str], float]:
    """Answers to tokenized inputs: predictions, their texts, FLOPs spent. Several processes share the work.

    Args:
        prompt: `(P, H)`, None for zero-shot, or several `(K, P, H)`: an ensemble, all prompts in the same batches.
        voting: how an ensemble agrees, see `evaluation.combine`.
        placement: where the prompt stands; default as the recipe says.
    """
    if parallel.size() == 1:
        return _predict(session, prompt, inputs, voting, placement)
    mine = parallel.share(inputs)
    found, answers, spent = _predict(session, prompt, mine, voting, placement) if mine else ([], [], 0.0)
    return parallel.merge(found), parallel.merge(answers), sum(parallel.gather(spent))


def _predict(
    session: Session, prompt: torch.Tensor | None, inputs: Sequence[list[int]], voting: str, placement: str | None
) -> tuple[list[Prediction], list[str], float]:
    settings, task = session.config.eval, session.task
    width = session.plm.get_input_embeddings().weight.shape[-1]
    if prompt is not None and prompt.shape[-1] != width:
        raise ConfigError(
            f"the prompt has vectors of {prompt.shape[-1]} numbers, this model's embeddings {width}: it is another "
            "model's prompt"
        )
    several = 1 if prompt is None or prompt.dim() == 2 else len(prompt)
    asked, inputs = len(inputs), [ids for ids in inputs for _ in range(several)]
    longest_label = max((len(ids) for ids in session.choices.values()), default=0)
    placed = "prefix" if prompt is None else placement or session.config.prompt.placement
    where: dict[str, Any] = {}
    if placed == "suffix":
        where = {"placement": placed, "cache": session.texts}
        session.texts.ran.clear()
    if session.choices:
        found = score_labels(
            session.plm,
            prompt,
            inputs,
            session.choices,
            batch_size=settings.batch_size,
            length_normalize=settings.length_normalize,
            **where,
        )
    else:
        found = generate(
            session.plm,
            session.tokenizer,
            prompt,
            inputs,
            max_new_tokens=session.max_target_tokens,
            num_beams=settings.num_beams,
            batch_size=settings.batch_size,
            stop_at_newline=session.decoder,
            **where,
        )
    if several > 1:
        found = [combine(found[i * several : (i + 1) * several], voting) for i in range(asked)]
    answers = [p.text if session.choices else task.postprocess(p.text) for p in found]
    spent = sum(text_flops(session.cost, None, *ran) for ran in session.texts.ran) if where else 0.0
    for picked in batches_of(by_length(inputs), settings.batch_size):
        shape = BatchShape(
            batch=len(picked),
            input_tokens=max(len(inputs[i]) for i in picked),
            prompt_tokens=0 if prompt is None else prompt.shape[-2],
            target_tokens=longest_label or session.max_target_tokens,
            placement="suffix" if where else "prefix",
            text_examples=0 if where else None,
        )
        if session.choices:
            passes = 1 if session.decoder and longest_label == 1 else len(session.choices)
            spent += passes * forward_flops(session.cost, None, shape)
        else:
            spent += settings.num_beams * generation_flops(session.cost, shape)
    return found, answers, spent


def evaluate(
    session: Session,
    prompt: torch.Tensor | None,
    split: str = "validation",
    *,
    voting: str = "probabilities",
    placement: str | None = None,
) -> Evaluation:
    """Score a prompt, or an ensemble of them, on a split, with the PLM at the size it has: full, outside a step."""
    rows = session.examples[split]
    if 0 in session.encoded[split]["n_target"]:
        raise DataError(f"the split {split!r} has examples without a label, so it cannot be scored; use --submission")
    start = time.perf_counter()
    inputs = input_ids_of(session, session.encoded[split])
    found, answers, flops = predict(session, prompt, inputs, voting=voting, placement=placement)
    result = metrics.evaluate(
        session.task.metric,
        answers,
        rows["references"],
        rows["group"] if session.task.expand else None,  # ids of a user's own file may repeat and mean nothing
        primary=session.task.primary,
    )
    return Evaluation(result, found, answers, flops, time.perf_counter() - start)


def write_predictions(path: Path, rows: Dataset, evaluation: Evaluation) -> None:
    """One JSON object a line: id, input, gold answers, prediction, score."""
    lines = [
        json.dumps(
            {"id": i, "input": text, "gold": gold, "prediction": answer, "score": round(found.score, 6)},
            ensure_ascii=False,
        )
        for i, text, gold, answer, found in zip(
            rows["id"], rows["input"], rows["references"], evaluation.answers, evaluation.predictions, strict=True
        )
    ]
    write_atomic(path, "\n".join(lines) + "\n")


def write_submission(session: Session, prompt: torch.Tensor | None, split: str, path: Path) -> None:
    """Answers to a split, which needs no labels, in the benchmark's own format (`tasks.write_submission`)."""
    on_device = None if prompt is None else prompt.to(session.plm.device)
    _, answers, _ = predict(session, on_device, input_ids_of(session, session.encoded[split]))
    tasks.write_submission(session.task, path, list(session.examples[split]["id"]), answers)


def full_size(config: RunConfig) -> Stage:
    """The full size of a recipe's model, from its config alone."""
    return full_stage(load_config(locate(config.model.path)))


def _partial_of_run(session: Session, folder: Path) -> PartialPLM:
    """The PLM as a run in `folder` cuts it: its way of choosing layers and neurons, and its scores, if it made any."""
    neurons, layers = folder / "scores.safetensors", folder / "layers.safetensors"
    return _cut_by(
        session.config,
        session.plm,
        NeuronScores.load(neurons) if neurons.is_file() else None,
        LayerScores.load(layers) if layers.is_file() else None,
    )


def evaluate_partial(session: Session, folder: Path) -> Evaluation:
    """The prompt of a partial-only run on the partial PLM it was tuned on, as in the paper's Table 1."""
    partial = _partial_of_run(session, folder)
    schedule = session.config.schedule(partial.full_stage, session.task.stacks)
    with partial.at(schedule.stages[-1]):
        return evaluate(session, load_prompt(folder / "prompt").to(session.plm.device))


def partial_of(session: Session, size: str, folder: Path) -> AbstractContextManager[PartialPLM]:
    """A block that runs on the partial PLM of `LAYERSxFFN`, neurons chosen by the scores of the run in `folder`.

    Raises:
        ConfigError: not of that form. ScheduleError, ScoreError: it does not fit, or the run has scored no neurons.
    """
    layers, _, ffn = size.partition("x")
    if not (layers.isdigit() and ffn.isdigit()):
        raise ConfigError(f"--partial {size!r} is not LAYERSxFFN, for example 15x768")
    partial = _partial_of_run(session, folder)
    stacks = tuple(session.config.stacks or (s for s in partial.full_stage.stacks if s in session.task.stacks))
    stage = Stage(int(layers), int(ffn), stacks=stacks or partial.full_stage.stacks)
    partial.check(stage)
    return partial.at(stage)


# -- the run's folder -------------------------------------------------------------------------------------------------


def check_folder(config: RunConfig, *, overwrite: bool, resume: bool, allow_changed: bool = False) -> None:
    """Raise where the run's folder cannot be used; nothing is written, so it can be asked before weights are loaded.

    Args:
        allow_changed: go on with a recipe that has changed since the run began.

    Raises:
        ConfigError: it holds a run already, holds other files, or there is nothing to resume, or another recipe's.
    """
    folder = Path(config.output)
    saved = folder / "config.yaml"
    if overwrite and resume:
        raise ConfigError("--overwrite and --resume exclude each other; choose one")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={str(folder)!r} is a file; choose a folder")
    if resume:
        if not saved.is_file():
            raise ConfigError(f"output={str(folder)!r} holds no run to resume; leave out --resume")
        changed = recipe_changes(config)
        if changed and not allow_changed:
            raise ConfigError(
                f"the recipe has changed since the run began: {'; '.join(changed)}; set it back, or add --allow-changed"
            )
    elif saved.exists() and not _is_ours(saved):
        raise ConfigError(f"output={str(folder)!r} has a config.yaml that is not a run's; choose another folder")
    elif saved.exists() and not overwrite:
        raise ConfigError(f"output={str(folder)!r} holds a run already; add --resume, --overwrite, or choose another")
    elif not saved.exists() and folder.is_dir() and any(not _WORK.match(f.name) for f in folder.iterdir()):
        raise ConfigError(f"output={str(folder)!r} is not empty and holds no run of ours; choose another folder")


_WORK = re.compile(r"\.lock$|\.config\.yaml-")  # all that a run killed before its first word leaves


def recipe_changes(config: RunConfig) -> list[str]:
    """How a recipe differs from the one saved in its output folder."""
    saved = Path(config.output) / "config.yaml"
    try:
        before = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{str(saved)!r} cannot be read ({type(error).__name__}); use --overwrite") from error
    now = config.model_dump(mode="json")
    if isinstance(before, dict):
        before["output"] = now["output"]  # the same folder, however it is spelled
    return differences(before, now)


RUN_MARK = "# The resolved recipe of a run of fast-prompt-tuning.\n"
"""First line of a run's config.yaml: what has it may be overwritten when asked, nothing else."""


def _is_ours(saved: Path) -> bool:
    with saved.open("rb") as file:
        return file.readline() == RUN_MARK.encode()


def prepare_folder(config: RunConfig, *, overwrite: bool, resume: bool, allow_changed: bool = False) -> Path:
    """Make the run's folder, refused where something would be lost; see `check_folder`.

    Raises:
        ConfigError: as `check_folder`, or it cannot be written.
    """
    check_folder(config, overwrite=overwrite, resume=resume, allow_changed=allow_changed)
    folder = Path(config.output)
    if resume:
        for place in (folder, folder / "checkpoints"):
            checkpoint.clear_leftovers(place)
        if recipe_changes(config):
            write_atomic(folder / "config.yaml", RUN_MARK + config.to_yaml())
        return folder
    doomed = [(folder / name).resolve() for name in (*OURS, *OUR_FOLDERS)]
    for name, used in (
        ("model.path", config.model.path),
        ("prompt.path", config.prompt.path),
        ("scoring.path", config.scoring.path),
        ("scoring.layer_path", config.scoring.layer_path),
        *((f"data.files.{split}", file) for split, file in config.data.files.items()),
    ):
        path = Path(used).resolve() if used else None
        if path is not None and path.exists() and any(path == d or d in path.parents for d in doomed):
            raise ConfigError(f"{name}={used!r} lies in the run that would be overwritten; choose another output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in OUR_FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in OURS:
            if name != "config.yaml":  # what marks the folder as a run's is replaced last, by a rename
                (folder / name).unlink(missing_ok=True)
        checkpoint.clear_leftovers(folder)
        write_atomic(folder / "config.yaml", RUN_MARK + config.to_yaml())
    except OSError as error:
        raise ConfigError(f"output={str(folder)!r} cannot be written: {error.strerror or error}") from error
    return folder


def differences(before: Any, after: Any, at: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(set(before) | set(after))
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{at}.{k}".lstrip("."))]
    return [] if before == after else [f"{at} was {before!r}, is {after!r}"]


class _RunLog(TrainerCallback):
    """Appends what the Trainer logs to `log.jsonl`; its state holds the same, so a full disk loses nothing."""

    def __init__(self, path: Path):
        self.path, self.told = path, False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
        except OSError as error:
            if not self.told:
                logger.warning("%s cannot be written (%s); training goes on", self.path, error)
            self.told = True


# -- training ---------------------------------------------------------------------------------------------------------


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    allow_changed: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    session: Session | None = None,
    on_schedule: Callable[[Schedule, Any], None] | None = None,
) -> RunResult:
    """Run a recipe to its end; see `docs/` for what lies in the folder afterwards.

    Started by torchrun or accelerate, every process calls it and gets the result; the main one writes.

    Args:
        allow_changed: resume although the recipe, the model's weights or the data have changed since the checkpoint.
        session: a loaded session of the same model and data, to share between runs.
        on_schedule: called with the schedule and the full size before the first step.

    Raises:
        FptError: bad input, before compute is spent. TrainingStopped: loss or gradient stayed non-finite, memory did
            not suffice, or another process ended; the last good prompt or checkpoint is there.
    """
    started = time.perf_counter()
    check_folder(config, overwrite=overwrite, resume=resume, allow_changed=allow_changed)
    set_seed(config.train.seed)
    session = session or open_session(config, ("train", "validation"), resume=resume)
    session.config = config
    model, trained = trainable(session)
    schedule, needed = _schedule(session, model)
    rows, held_out = session.encoded["train"], None
    if isinstance(schedule, AutoSchedule):
        step_examples = config.train.batch_size * config.train.accumulate * parallel.size()
        size = min(probe_examples(config.train.steps, step_examples), len(rows) // 4)
        held_out, rows = train_split(rows, size, config.train.seed)
    if config.train.batch_tokens is not None:  # refused here, where an example is longer
        lengths = input_lengths(rows)
        LengthBatchSampler(lengths, config.train.batch_size, seed=0, max_tokens=config.train.batch_tokens)
    identity = _identity(session)
    folder = Path(config.output)
    with ExitStack() as held:
        # All that can be refused has been: only now is an earlier run replaced, or a folder made.
        parallel.on_main(lambda: held.enter_context(checkpoint.locked(folder)))
        found = parallel.on_main(
            lambda: _prepare(config, identity, overwrite=overwrite, resume=resume, allow_changed=allow_changed)
        )
        if found is not None:
            _check_fits(found, model, config.method == "full")
        ledger = FlopsLedger()
        partial = _partial_plm(session, model, schedule, needed, folder, ledger)
        if on_schedule:
            on_schedule(schedule, session.cost.full_stage)
        data = rows, held_out
        return _train(
            session, data, model, trained, schedule, partial, folder, ledger, identity, found, started, callbacks
        )


def _train(
    session: Session,
    data: tuple[Dataset, Dataset | None],
    model: nn.Module,
    trained: list[nn.Parameter],
    schedule: Schedule,
    partial: PartialPLM | None,
    folder: Path,
    ledger: FlopsLedger,
    identity: dict[str, Any],
    found: checkpoint.Checkpoint | None,
    started: float,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    """The steps of a run whose folder is held, from the checkpoint `found` or the start.

    Args:
        data: the rows to train on, and those that `auto` probes with.
    """
    config = session.config
    rows, held_out = data
    spare = schedule.window if isinstance(schedule, AutoSchedule) else 0
    full_tuning = config.method == "full"
    reached, past = (found.step, found.record) if found else (0, {})
    history = log_of(found)
    if parallel.rank() == 0:
        write_log(folder, history)
    for what in ("probe", "eval"):
        ledger.add(what, past.get("flops", {}).get(what, 0.0))
    guard = StepGuard(trained, remember=not full_tuning, save_minutes=config.train.save_minutes)
    guard.seconds = past.get("train_seconds", 0.0)
    past_total = past.get("total_seconds", 0.0)

    def spent() -> dict[str, Any]:
        return {
            "train_seconds": guard.seconds,
            "total_seconds": past_total + time.perf_counter() - started,
            "dtype": str(session.plm.dtype).removeprefix("torch."),
        }

    best = _Best(folder / "checkpoints", session.task.primary, full_tuning, reached)

    def evaluate_prompt(step: int) -> dict[str, float]:
        scored = evaluate(session, None if full_tuning else prompt_parameter(model).detach())
        ledger.add("eval", scored.flops)
        best.offer(step, scored.result.values[session.task.primary], model)
        return dict(scored.result.values)

    trainer = PromptTrainer(
        model=model,
        args=training_arguments(config, str(folder / "checkpoints"), session.plm.device, spare_steps=spare),
        train_dataset=rows,
        eval_dataset=session.encoded["validation"],
        data_collator=make_collator(session.tokenizer, session.plm, tails=partial is not None),
        optimizers=make_optimizer(trained, config.optim),
        callbacks=[guard, _RunLog(folder / "log.jsonl"), *callbacks],
        schedule=schedule,
        cost=session.cost,
        prompt_tokens=0 if full_tuning else config.prompt.tokens,
        evaluate_prompt=evaluate_prompt,
        ledger=ledger,
        full_tuning=full_tuning,
        record={"config": config.model_dump(mode="json"), **identity},
        spent=spent,
        batch_tokens=config.train.batch_tokens,
        compile_layers=config.train.compile,
    )
    guard.trainer = trainer
    if isinstance(schedule, AutoSchedule) and partial is not None and held_out is not None:
        probe = make_collator(session.tokenizer, session.plm)(list(held_out))
        counted = lambda: ledger.add("probe", trainer.probe_flops(probe))  # noqa: E731
        trainer.add_callback(AutoCallback(partial, schedule, probe, on_probe=counted))
        schedule.replay(history)
    elif partial is not None:
        trainer.add_callback(ProgressiveCallback(partial, schedule))
    status, reason = "finished", None
    with guard:
        try:
            if found is not None and reached >= schedule.total_steps:
                trainer.resume_finished(str(found.folder))
            else:
                trainer.train(resume_from_checkpoint=str(found.folder) if found else None)
            if guard.signal is not None and trainer.state.global_step < schedule.total_steps:
                status, reason = "interrupted", f"signal {guard.signal}"
        except TrainingStopped as error:
            status, reason = "stopped", str(error)
            guard.go_back()
            trainer.store_flos()
        except RuntimeError as error:
            if not parallel.is_lost(error):
                raise
            raise TrainingStopped(
                "another process of this run has ended, so this one cannot go on; the last checkpoint is kept: start "
                "all of them again with --resume"
            ) from error
        finally:
            if partial is not None:
                partial.restore()
    if trainer.skipped_in_a_row:
        guard.go_back()  # the run ended within a row of bad steps: its prompt is the one before them
    ledger.add("train", trainer.state.total_flos)
    if status == "finished" and trainer.state.global_step % int(trainer.args.eval_steps or 1):
        trainer.evaluate()
    if (config.train.keep == "best" and status != "stopped") or (full_tuning and status == "stopped"):
        best.restore(model)  # all weights are too many to keep the last good ones: a stopped run has its best
    result = _finish(
        session, model, trainer, schedule, partial, folder, ledger, best, status, reason, spent(), identity
    )
    if status == "stopped":
        raise TrainingStopped(f"{reason} (saved in {folder / 'prompt'})")
    return result


def _identity(session: Session) -> dict[str, Any]:
    """What a checkpoint belongs to beside its recipe: hashes of the model's weights, the data and its tokens."""
    data = {split: examples_fingerprint(session.examples[split]) for split in ("train", "validation")}
    tokens = tokens_fingerprint(session.encoded["train"])
    return {
        "fingerprints": {"model": fingerprint.of_model(session.plm), **data, "tokens": tokens},
        "processes": parallel.size(),
    }


def _prepare(
    config: RunConfig, identity: dict[str, Any], *, overwrite: bool, resume: bool, allow_changed: bool
) -> checkpoint.Checkpoint | None:
    """Make the folder ready to be written, and find the checkpoint to go on from.

    Raises:
        ConfigError: as `prepare_folder`; or model, data or the number of processes have changed since the checkpoint.
    """
    folder, places = Path(config.output), Path(config.output) / "checkpoints"
    check_folder(config, overwrite=overwrite, resume=resume, allow_changed=allow_changed)
    changed = recipe_changes(config) if resume else []
    if resume:
        checkpoint.clear_leftovers(places)
    found = checkpoint.latest(places) if resume else None
    if found is not None:
        before = {key: found.record.get(key) for key in identity}
        changed += differences(before, identity)
    if changed and not allow_changed:
        raise ConfigError(
            f"changed since the checkpoint of step {found.step if found else 0}: {'; '.join(changed)}; set it back, or "
            "add --allow-changed to go on all the same"
        )
    prepare_folder(config, overwrite=overwrite, resume=resume, allow_changed=allow_changed)
    if changed:
        logger.warning("going on although changed: %s", "; ".join(changed))
        if any(c.startswith(("scoring", "fingerprints.model")) for c in changed):
            for name in ("scores.safetensors", "layers.safetensors"):  # of another model, or made another way
                (folder / name).unlink(missing_ok=True)
        if any(c.startswith(("fingerprints.model", "fingerprints.validation")) for c in changed):
            checkpoint.discard_best(places)  # measured on something else
    if resume and found is None:
        logger.warning("no checkpoint in %s that could be used: starting from step 0", folder)
    return found


def _check_fits(found: checkpoint.Checkpoint, model: nn.Module, full_tuning: bool) -> None:
    """Raise unless the checkpoint holds what this run trains (its recipe may have been changed on request)."""
    where = str(found.folder)
    if full_tuning != (not (found.folder / "adapter_config.json").is_file()):
        raise CheckpointError(f"{where!r} is of another method; use --overwrite")
    if not full_tuning:
        place = "suffix" if isinstance(model, SuffixPromptModel) else "prefix"
        have = (placement_of(found.folder), *load_prompt(found.folder).shape)
        if have != (want := (place, *prompt_parameter(model).shape)):
            raise CheckpointError(f"{where!r} holds a prompt {have}, this run needs {want}: placement, tokens, width")


def log_of(found: checkpoint.Checkpoint | None) -> list[dict[str, Any]]:
    """What was logged up to a checkpoint."""
    if found is None:
        return []
    state = json.loads((found.folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return list(state["log_history"])


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a `log.jsonl`; a torn last line (of a run that was killed) is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def write_log(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `log.jsonl` anew: a killed run may have torn its last line, or logged steps that will be made again."""
    write_atomic(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in history))


def trainable(session: Session) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model to train and its trained parameters: the soft prompt, or all weights for `full`."""
    config = session.config
    if config.method == "full":
        session.plm.requires_grad_(True)
        return session.plm, [p for p in session.plm.parameters() if p.requires_grad]
    session.plm.requires_grad_(False)
    model: Any
    if config.prompt.placement == "suffix":
        model = SuffixPromptModel(session.plm, config.prompt.tokens, cache=session.texts)
    else:
        model = get_peft_model(session.plm, soft_prompt_config(session.plm, num_virtual_tokens=config.prompt.tokens))
    init_soft_prompt(
        model,
        config.prompt.init,
        seed=config.train.seed,
        tokenizer=session.tokenizer,
        text=config.prompt.text,
        path=config.prompt.path,
    )
    return model, [prompt_parameter(model)]


@dataclass(frozen=True)
class _Needed:
    """What the schedule needs: a partial PLM at all, scores of its neurons and layers, and those made before.

    `down_to`: the fewest layers of each stack that needs layer scores.
    """

    partial: bool
    scores: bool
    given: NeuronScores | None
    down_to: dict[str, int]
    given_layers: LayerScores | None


def _schedule(session: Session, model: nn.Module) -> tuple[Schedule, _Needed]:
    """The schedule, checked against the model, and what it needs; nothing is computed or written yet."""
    config = session.config
    bare = PartialPLM(model, keep_neurons="first")
    full = bare.full_stage
    schedule = config.schedule(full, session.task.stacks)
    tried = schedule.ladder if isinstance(schedule, AutoSchedule) else schedule.stages
    for stage in tried:
        bare.check(stage)
    # A stage that only trains on part of each batch goes the same way as one of part of the model.
    partial = not all(s.is_full(full) and s.batch is None and s.length is None for s in tried)
    widths = any(stage.ffn_in(s) not in (None, full.ffn_in(s)) for stage in tried for s in stage.stacks)
    scores = partial and widths and config.scoring.keep_neurons == "activation"
    given = NeuronScores.load(config.scoring.path) if scores and config.scoring.path else None
    if given is not None:
        PartialPLM(model, neuron_scores=given)  # scores of another model are refused here
    down_to = fewest_layers(tried, full) if config.scoring.keep_layers in LAYER_KINDS else {}
    given_layers = LayerScores.load(config.scoring.layer_path) if down_to and config.scoring.layer_path else None
    if given_layers is not None:
        PartialPLM(model, keep_layers="score", layer_scores=given_layers)
    return schedule, _Needed(partial, scores, given, down_to, given_layers)


def fewest_layers(stages: Iterable[Stage], full: Stage) -> dict[str, int]:
    """For each stack that a stage leaves layers out of, the fewest it ever has."""
    found: dict[str, int] = {}
    for stage in stages:
        for stack in stage.stacks:
            layers = stage.layers_in(stack)
            if layers is not None and layers != full.layers_in(stack):
                found[stack] = min(layers, found.get(stack, layers))
    return found


def _partial_plm(
    session: Session, model: nn.Module, schedule: Schedule, needed: _Needed, folder: Path, ledger: FlopsLedger
) -> PartialPLM | None:
    """The partial PLM where a stage needs one; neurons are scored on training data if need be."""
    if not needed.partial:
        return None
    config, scores = session.config, needed.given
    if needed.scores and scores is None:
        scores = _neuron_scores(session, model, folder, ledger)
    layers = needed.given_layers
    if needed.down_to and layers is None:
        layers = _layer_scores(session, model, needed.down_to, folder, ledger)
    partial = _cut_by(config, model, scores, layers)
    for stage in schedule.stages:
        partial.check(stage)
    return partial


def _cut_by(
    config: RunConfig, model: nn.Module, neurons: NeuronScores | None, layers: LayerScores | None
) -> PartialPLM:
    """The partial PLM as a recipe's `scoring` chooses layers and neurons."""
    chosen = config.scoring
    by = "score" if chosen.keep_layers in LAYER_KINDS else chosen.keep_layers
    return PartialPLM(
        model, neuron_scores=neurons, layer_scores=layers, keep_layers=by, keep_neurons=chosen.keep_neurons
    )


def _neuron_scores(session: Session, model: nn.Module, folder: Path, ledger: FlopsLedger) -> NeuronScores:
    batches = calibration_batches(session, session.config.scoring.examples)
    ledger.add("score", sum(score_flops(session, batch) for batch in batches))
    file = folder / "scores.safetensors"

    def scores() -> NeuronScores:
        if not file.is_file():  # a resumed run takes the scores it began with, whatever the prompt is now
            _score(session, model, batches).save(file)
        return NeuronScores.load(file)

    return parallel.on_main(scores)  # the same on every process, whatever it computes on


def _score(session: Session, model: nn.Module, batches: list[dict[str, Any]]) -> NeuronScores:
    return activation_scores(scored(model), batches, kind=session.config.scoring.kind, metadata=_provenance(session))


def scored(model: nn.Module) -> nn.Module:
    """What neurons and layers are scored on: a prompt after the text leaves the text as it is without one."""
    return get_plm(model) if isinstance(model, SuffixPromptModel) else model


def _provenance(session: Session) -> dict[str, str]:
    return {
        "data": session.task.name,
        "data_fingerprint": examples_fingerprint(session.examples["train"]),
        "seed": str(session.config.train.seed),
    }


def _layer_scores(
    session: Session, model: nn.Module, down_to: dict[str, int], folder: Path, ledger: FlopsLedger
) -> LayerScores:
    file = folder / "layers.safetensors"

    def made() -> LayerScores:
        if not file.is_file():  # as with neurons: a resumed run keeps the layers it began with
            score_layers(session, model, session.config.scoring.keep_layers, down_to).save(file)
        return LayerScores.load(file)

    scores = parallel.on_main(made)
    ledger.add("score", float(scores.metadata["flops"]))
    return scores


def score_layers(session: Session, model: nn.Module, kind: str, down_to: dict[str, int]) -> LayerScores:
    """Layer scores of a kind of `LAYER_KINDS` on a session's training data; `metadata["flops"]` is their cost."""
    chosen = session.config.scoring
    batches = calibration_batches(session, chosen.layer_examples)
    metadata = _provenance(session)
    if kind == "influence":
        flops = sum(_forward_of(session, batch) for batch in batches)
        return block_influence(scored(model), batches, metadata={**metadata, "flops": flops})
    return greedy_removal(
        scored(model), batches, down_to=down_to, candidates=chosen.layer_candidates, metadata=metadata
    )


def score_neurons(session: Session, model: nn.Module | None = None) -> NeuronScores:
    """Activation scores on a session's training data, with its prompt as it is initialised where it is in front."""
    model = trainable(session)[0] if model is None else model
    return _score(session, model, calibration_batches(session, session.config.scoring.examples))


def score_layers_of_run(session: Session) -> LayerScores | None:
    """The layer scores that a session's recipe needs, made likewise; None where it needs none."""
    model, _ = trainable(session)
    _, needed = _schedule(session, model)
    return score_layers(session, model, session.config.scoring.keep_layers, needed.down_to) if needed.down_to else None


def score_flops(session: Session, batch: dict[str, Any]) -> float:
    """FLOPs of scoring one calibration batch: a forward pass, or one and several steps for integrated gradients."""
    once = _forward_of(session, batch)
    return once * (1 + 8 * 2) if session.config.scoring.kind == "integrated_gradients" else once


def _forward_of(session: Session, batch: dict[str, Any]) -> float:
    shape = batch_shape(batch, session.config.prompt.tokens, session.cost)
    return forward_flops(session.cost, None, shape, whole_last_layer=True)


def calibration_batches(session: Session, examples: int) -> list[dict[str, Any]]:
    """Batches of `examples` *training* examples, as the model's forward takes them."""
    rows = train_calibration(session.encoded["train"], examples, session.config.train.seed)
    collate: Collator = make_collator(session.tokenizer, session.plm)
    indices = by_length(rows["input_ids"])
    return [collate([rows[i] for i in picked]) for picked in batches_of(indices, session.config.train.batch_size)]


class _Best:
    """The best prompt so far by the task's first metric on the full PLM, kept on disk beside the checkpoints.

    Args:
        folder: where the checkpoints lie; the best is `best-STEP` there.
        reached: step that the run goes on from; a later best will be found again.
    """

    def __init__(self, folder: Path, primary: str, full_tuning: bool, reached: int):
        self.folder, self.primary, self.full_tuning = folder, primary, full_tuning
        self.step, self.value = 0, float("-inf")
        self.prompt: torch.Tensor | None = None
        self.saved: Path | None = None
        found = parallel.on_main(lambda: checkpoint.latest(folder, "best", until=reached))
        if found is not None:
            self.step, self.value, self.saved = found.step, found.record["value"], found.folder
            self.prompt = None if full_tuning else load_prompt(found.folder)
        if parallel.rank() == 0:
            checkpoint.discard_best(folder, after=reached)

    def offer(self, step: int, value: float, model: nn.Module) -> None:
        """Keep the model's prompt if it is the best yet; the earlier one on a tie."""
        if value <= self.value:
            return
        self.step, self.value = step, value
        if not self.full_tuning:
            self.prompt = prompt_parameter(model).detach().cpu().clone()
        self.saved = self.folder / f"best-{step}"
        if parallel.rank() != 0:
            return
        try:
            with checkpoint.new_folder(self.saved) as work:
                checkpoint.save_trained(work, model)
                checkpoint.seal(work, step, {"value": value, "metric": self.primary})
        except CANNOT_WRITE as error:
            logger.warning("the best prompt, of step %d, cannot be written (%s); training goes on", step, error)

    def restore(self, model: nn.Module) -> None:
        """Give the model its best prompt back, or all of its best weights."""
        with torch.no_grad():
            if self.prompt is not None:
                prompt_parameter(model).copy_(self.prompt)
            elif self.full_tuning and self.saved is not None:
                for file in sorted(self.saved.glob("*.safetensors")):
                    model.load_state_dict(load_file(file), strict=False)  # tied weights are saved once


def _finish(
    session: Session,
    model: nn.Module,
    trainer: PromptTrainer,
    schedule: Schedule,
    partial: PartialPLM | None,
    folder: Path,
    ledger: FlopsLedger,
    best: _Best,
    status: Any,
    reason: str | None,
    spent: dict[str, float],
    identity: dict[str, Any],
) -> RunResult:
    full_tuning = session.config.method == "full"
    prompt = None if full_tuning else prompt_parameter(model).detach()
    # A test split, where one is loaded, has had no part in choosing the best prompt.
    split = "test" if "test" in session.examples else "validation"
    final = evaluate(session, prompt, split)
    ledger.add("eval", final.flops)
    log: list[dict[str, Any]] = list(trainer.state.log_history)
    curve = [
        Point(
            step=r["step"],
            metrics={name: r[f"eval_{name}"] for name in final.result.values if f"eval_{name}" in r},
            train_flops=r["train_flops"],
            train_seconds=r["train_seconds"],
        )
        for r in log
        if f"eval_{session.task.primary}" in r
    ]
    config = session.config
    result = RunResult(
        name=config.name or folder.name,
        method=config.method,
        status=status,
        reason=reason,
        config=config.model_dump(mode="json"),
        schedule=schedule.to_dict(),
        boundaries=list(schedule.boundaries),
        kept_layers=[partial.kept_layers(s) for s in schedule.stages] if partial is not None else [],
        steps=trainer.state.global_step,
        skipped_steps=trainer.skipped,
        primary=session.task.primary,
        metrics=final.result.values,
        intervals=final.result.intervals,
        split=split,
        examples=final.result.n,
        best_step=best.step if config.train.keep == "best" else trainer.state.global_step,
        curve=list({p.step: p for p in curve}.values()),
        losses=[(r["step"], r["loss"]) for r in log if "loss" in r],
        flops=ledger.to_dict(),
        train_seconds=spent["train_seconds"],
        total_seconds=spent["total_seconds"],
        prompt_folder=None if full_tuning else str(folder / "prompt"),
        fingerprints={
            **{split: examples_fingerprint(rows) for split, rows in session.examples.items()},
            **identity["fingerprints"],
            **({"model": "trained"} if full_tuning else {}),
        },
        environment=environment(session.plm.device, dtype=describe_dtype(config.model.dtype, session.plm)),
    )
    if parallel.rank() == 0:
        try:
            with checkpoint.new_folder(folder / ("model" if full_tuning else "prompt")) as work:
                model.save_pretrained(str(work))  # type: ignore[operator]
                if full_tuning:
                    session.tokenizer.save_pretrained(str(work))  # a whole model, that `model.path` can name
            write_predictions(folder / "predictions.jsonl", session.examples[split], final)
            write_log(folder, log)
            save_result(result, folder)
        except CANNOT_WRITE as error:
            raise ConfigError(
                f"output={str(folder)!r} cannot be written at the end of the run ({error}); the checkpoints are kept: "
                "make room, and run it again with --resume"
            ) from error
    return result


def zero_shot(session: Session) -> RunResult:
    """The PLM without any prompt, as a result to compare with: on validation data, and on test data if loaded."""
    on = {split: evaluate(session, None, split) for split in ("validation", "test") if split in session.examples}
    split, found = list(on.items())[-1]
    start = Point(step=0, metrics=on["validation"].result.values, train_flops=0.0, train_seconds=0.0)
    return RunResult(
        name="zero-shot",
        method="none",
        status="evaluated",
        config=session.config.model_dump(mode="json"),
        schedule=[],
        boundaries=[],
        steps=0,
        primary=session.task.primary,
        metrics=found.result.values,
        intervals=found.result.intervals,
        split=split,
        examples=found.result.n,
        best_step=0,
        curve=[start],
        flops=FlopsLedger({"eval": sum(e.flops for e in on.values())}).to_dict(),
        train_seconds=0.0,
        total_seconds=sum(e.seconds for e in on.values()),
        fingerprints={"model": fingerprint.of_model(session.plm)},
        environment=environment(session.plm.device, dtype=describe_dtype(session.config.model.dtype, session.plm)),
    )
