"""A loaded model, tokenizer and task, and what a prompt answers and scores with them."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset

from ..cost.flops import work_flops
from ..cost.shapes import CostModel
from ..data import metrics, submissions, task_files, tasks
from ..data.encoding import encode, label_ids
from ..data.readers import load_examples
from ..errors import ConfigError, DataError, ModelError
from ..files import write_atomic
from ..placements import placement_of
from ..plm.loading import cache_dir, load_tokenizer, loadable_config
from ..plm.objective import choose_attention
from ..prompt.generation import GenerationOptions
from ..prompt.places import place
from ..prompt.prediction import Prediction, combine
from ..prompt.prompted import Input, PromptedPLM, placement_named
from ..prompt.soft_prompt import context_length
from ..prompt.text_cache import DiskTextCache, TextCache, check_cross_attention
from ..recipe import CacheConfig, RunConfig
from ..train import parallel
from ..train.batches import sampler_of, steps_an_epoch
from .choices import chosen
from .folder import read_log
from .loaded import loaded

logger = logging.getLogger(__name__)


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
        settings = self.config.cache
        if self._texts is None or self._texts[0] != settings:
            options = {"cross_attention": settings.cross_attention}
            if settings.tier == "disk":
                folder = settings.folder or cache_dir() / "texts"
                cache: TextCache = DiskTextCache(self.plm, folder, budget_mib=settings.budget_mib, **options)
            else:
                budget = 0 if settings.tier == "none" else settings.budget_mib
                cache = TextCache(self.plm, budget_mib=budget, **options)
            self._texts = settings, cache
        return self._texts[1]

    def prompted(self, prompt: torch.Tensor | None, where: str | None = None) -> PromptedPLM:
        """The PLM with a prompt's values `(P, H)`, None for zero-shot, or several `(K, P, H)`.

        Args:
            where: the prompt stands; default as the recipe says.

        Raises:
            ConfigError: vectors of another width, or a place that does not go with the task.
        """
        where = where or self.config.prompt.placement
        kind = placement_named(where)
        if prompt is None:
            return place(self.plm, None)
        width = self.plm.get_input_embeddings().weight.shape[-1]
        if prompt.shape[-1] != width:
            raise ConfigError(
                f"the prompt has vectors of {prompt.shape[-1]} numbers, this model's embeddings {width}: it is another "
                "model's prompt; choose one that was tuned on this model"
            )
        _check_tail(self.task, kind)
        return place(self.plm, prompt.to(self.plm.device), where, self.texts if kind.spec().keeps_texts else None)

    @property
    def decoder(self) -> bool:
        return not self.plm.config.is_encoder_decoder

    @property
    def max_target_tokens(self) -> int:
        return self.config.data.max_target_tokens or self.task.max_target_tokens

    def answer_of(self, text: str) -> str:
        """A generated text as the metric wants it: the label word where it is exactly a label's target."""
        targets = self.task.choices(decoder=self.decoder)
        words = {self.task.postprocess(target): word for word, target in targets.items()}
        answer = self.task.postprocess(text)
        return words.get(answer, answer)


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
        task = task_files.load_task(data.task)
    else:
        task = task_files.task_from_templates(
            files=data.files,
            input_template=data.input_template or "",
            target_template=data.target_template or "",
            labels=data.labels,
            max_target_tokens=data.max_target_tokens or 64,
        )
    return task if data.hub is None else task_files.with_source(task, data.hub, data.hub_config, data.splits)


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
    loadable_config(config.model.path, revision=config.model.revision)  # first: where there is none, it says why
    tokenizer = load_tokenizer(config.model.path, revision=config.model.revision)
    plm = loaded(config, dtype)
    config = chosen(config, task, plm)
    session = _checked(Session(config, plm, tokenizer, task, CostModel.from_model(plm)))
    for split in splits:
        load_split(session, split)
    if "train" in session.examples:
        _check_targets(session)
        session.config = with_steps(session.config, session.encoded["train"])
    return session


def with_steps(config: RunConfig, rows: Dataset) -> RunConfig:
    """The recipe with `train.steps` in place of `train.epochs`, of which a part of a step is a whole one."""
    if config.train.epochs is None:
        return config
    an_epoch = steps_an_epoch(sampler_of(rows, config.train), config.train)
    steps = {"epochs": None, "steps": math.ceil(config.train.epochs * an_epoch)}
    return config.model_copy(update={"train": config.train.model_copy(update=steps)})


def beside(session: Session, config: RunConfig) -> Session:
    """A session of another run's recipe, without data, on the model that is loaded; kept texts are shared.

    Raises:
        FptError: as `open_session`.
    """
    task = task_of(config)
    shared = {"model": session.config.model, "cache": session.config.cache}
    config = chosen(config.model_copy(update=shared), task, session.plm)
    other = _checked(Session(config, session.plm, session.tokenizer, task, session.cost))
    if placement_of(config.prompt.placement).keeps_texts:
        other._texts = (config.cache, session.texts)
    return other


def _checked(session: Session) -> Session:
    """The session with its label words' tokens, once all of its recipe that needs no data fits the model."""
    config, plm, tokenizer, task = session.config, session.plm, session.tokenizer, session.task
    kind = placement_named(config.prompt.placement)
    kind.check(plm)
    if kind.spec().keeps_texts:
        check_cross_attention(plm, config.cache.cross_attention)
    _check_tail(task, kind)
    limit = context_length(plm)
    for needs in _positions(session):
        if limit is not None and sum(needs.values()) > limit:
            what = " + ".join(f"{name}={value}" for name, value in needs.items())
            raise ConfigError(f"{what} need {sum(needs.values())} positions, but this model has {limit}; lower one")
    _check_ids(session, tokenizer.pad_token_id)
    choose_attention(plm, config.prompt.tokens + config.data.max_input_tokens + session.max_target_tokens)
    if task.labels:
        texts = task.choices(decoder=session.decoder)
        most = session.max_target_tokens
        session.choices = label_ids(texts, tokenizer, decoder=session.decoder, max_target_tokens=most)
        _check_ids(session, max(i for ids in session.choices.values() for i in ids))
    return session


def _check_tail(task: tasks.Task, kind: type[PromptedPLM]) -> None:
    if kind.spec().needs_tail and task.truncate is None:
        raise ConfigError(
            f"prompt.placement={kind.placement!r} stands after the field that may be shortened, and the task "
            f"{task.name!r} names none; set truncate in its file, or use placement suffix"
        )


def _positions(session: Session) -> list[dict[str, int]]:
    """What has to fit into the positions of the model, or of its encoder and of its decoder."""
    config = session.config
    needs = {
        "prompt": ("prompt.tokens", config.prompt.tokens),
        "text": ("data.max_input_tokens", config.data.max_input_tokens),
        "target": ("data.max_target_tokens", session.max_target_tokens),
    }
    stacks = placement_of(config.prompt.placement).positions(session.decoder)
    return [dict(needs[part] for part in parts) for parts in stacks]


def load_split(session: Session, split: str) -> None:
    data = session.config.data
    bad: list[DataError] = []
    examples = load_examples(
        session.task,
        split,
        decoder=session.decoder,
        files=data.files or None,
        on_bad_row=data.on_bad_row,
        limit={"train": data.train_limit, "test": data.test_limit}.get(split, data.validation_limit),
        seed=session.config.train.seed if split == "train" else 0,
        bad_rows=bad,
        tokenizer=session.tokenizer,
    )
    for error in bad:
        logger.warning("skipped: %s", error)
    lines = sum("\n" in target.strip() for target in examples["target"]) if session.decoder else 0
    if lines and session.task.one_line and not session.task.labels:
        logger.warning(
            "%d targets of the split %r have several lines, but answers end with their first line; set one_line: false "
            "in the task's file (and make one of templates given as settings)",
            lines,
            split,
        )
    session.examples[split] = examples
    session.encoded[split] = encode_for(session, examples)


def encode_for(session: Session, examples: Dataset) -> Dataset:
    """Rendered examples as token ids that the session's PLM knows.

    Raises:
        ModelError: the tokenizer makes ids beyond the model's embeddings: it is another model's.
    """
    rows = encode(
        examples,
        session.tokenizer,
        session.task,
        decoder=session.decoder,
        max_input_tokens=session.config.data.max_input_tokens,
        max_target_tokens=session.max_target_tokens,
    )
    for table in rows.with_format("arrow").iter(10_000):
        for name in ("input_ids", "labels"):
            _check_ids(session, pc.max(pc.list_flatten(table[name])).as_py())
    return rows


def _check_ids(session: Session, largest: int | None) -> None:
    known = session.plm.get_input_embeddings().weight.shape[0]
    if largest is not None and largest >= known:
        raise ModelError(
            f"model.path={session.config.model.path!r}: its tokenizer makes the id {largest} "
            f"({session.tokenizer.convert_ids_to_tokens(largest)!r}), and the model has {known} embeddings: they do "
            "not belong together; save the tokenizer of this model beside it"
        )


def _check_targets(session: Session) -> None:
    for split in ("train", "validation"):
        rows = session.examples.get(split)
        empty = [i for i, target in zip(rows["id"], rows["target"], strict=True) if not target] if rows else []
        if empty:
            raise DataError(
                f"the split {split!r} has {len(empty)} examples without a target, {empty[0]!r} is the first: there is "
                "nothing to learn from them, or to score; leave these rows out of the file, or give them an answer"
            )


def input_ids_of(session: Session, rows: Dataset) -> list[list[int]]:
    """Token ids of the inputs alone: a decoder-only row holds its target behind them."""
    if not session.decoder:
        return list(rows["input_ids"])
    return [ids[: len(ids) - n] for ids, n in zip(rows["input_ids"], rows["n_target"], strict=True)]


def predict(
    session: Session, prompted: PromptedPLM, rows: Dataset, *, voting: str = "probabilities"
) -> tuple[list[Prediction], list[str], float]:
    """Answers to the inputs of rows that `encode` has made: predictions, their texts, FLOPs spent.

    Several processes share the work.

    Args:
        prompted: as `Session.prompted` makes it; several prompts are an ensemble, all of them in the same batches.
        voting: how an ensemble agrees, see `prediction.combine`.
    """
    inputs = [Input(ids, tail) for ids, tail in zip(input_ids_of(session, rows), rows["n_tail"], strict=True)]
    if parallel.size() == 1:
        return _predict(session, prompted, inputs, voting)
    mine, count = parallel.share(inputs), len(inputs)
    predictions, answers, flops = _predict(session, prompted, mine, voting) if mine else ([], [], 0.0)
    return parallel.merge(predictions, count), parallel.merge(answers, count), parallel.spent(flops)


def _predict(
    session: Session, prompted: PromptedPLM, rows: Sequence[Input], voting: str
) -> tuple[list[Prediction], list[str], float]:
    settings, task = session.config.eval, session.task
    prompt = prompted.prompt
    several = 1 if prompt is None or prompt.dim() == 2 else len(prompt)
    inputs = [row for row in rows for _ in range(several)]
    choices = session.choices if settings.labels == "likelihood" else {}
    if choices:
        predictions, work = prompted.score(
            inputs, choices, batch_size=settings.batch_size, length_normalize=settings.length_normalize
        )
    else:
        options = GenerationOptions(
            max_new_tokens=session.max_target_tokens,
            num_beams=settings.num_beams,
            batch_size=settings.batch_size,
            stop_at_newline=session.decoder and task.one_line,
        )
        predictions, work = prompted.generate(inputs, session.tokenizer, options)
    if several > 1:
        predictions = [combine(predictions[i * several : (i + 1) * several], voting) for i in range(len(rows))]
    answers = [p.text if choices else session.answer_of(p.text) for p in predictions]
    return predictions, answers, work_flops(session.cost, work)


def evaluate(
    session: Session, prompted: PromptedPLM, split: str = "validation", *, voting: str = "probabilities"
) -> Evaluation:
    """Score a prompt, or an ensemble of them, on a split, with the PLM at the size it has: full, outside a step."""
    rows = session.examples[split]
    if 0 in session.encoded[split]["n_target"]:
        raise DataError(f"the split {split!r} has examples without a label, so it cannot be scored; use --submission")
    start = time.perf_counter()
    encoded = session.encoded[split]
    predictions, answers, flops = predict(session, prompted, encoded, voting=voting)
    result = metrics.evaluate(
        session.task.metric,
        answers,
        rows["references"],
        rows["group"] if session.task.expand else None,  # ids of a user's own file may repeat and mean nothing
        primary=session.task.primary,
    )
    return Evaluation(result, predictions, answers, flops, time.perf_counter() - start)


def write_predictions(path: Path, rows: Dataset, evaluation: Evaluation) -> None:
    """One JSON object a line: id, input, gold answers, prediction, score."""
    lines = [
        json.dumps(
            {
                "id": i,
                "input": text,
                "gold": gold,
                "prediction": answer,
                "score": round(prediction.score, 6) if math.isfinite(prediction.score) else None,
            },
            ensure_ascii=False,
        )
        for i, text, gold, answer, prediction in zip(
            rows["id"], rows["input"], rows["references"], evaluation.answers, evaluation.predictions, strict=True
        )
    ]
    write_atomic(path, "\n".join(lines) + "\n")


def write_submission(session: Session, prompted: PromptedPLM, split: str, path: Path) -> None:
    """Answers to a split, which needs no labels, in the benchmark's own format (`submissions.write_submission`)."""
    _, answers, _ = predict(session, prompted, session.encoded[split])
    if parallel.rank() == 0:
        submissions.write_submission(session.task, path, list(session.examples[split]["id"]), answers)
