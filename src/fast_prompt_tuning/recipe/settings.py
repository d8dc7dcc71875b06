"""The recipe: every setting of a run, validated before anything is loaded, saved resolved with the run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

from ..placements import FRONT, PLACEMENTS
from ..schedule.auto import AutoSchedule, default_ladder
from ..schedule.stages import Schedule, Stage

UserPath = Annotated[str, Strict(), AfterValidator(os.path.expanduser)]
"""A path as people write it: `~` is their home, and bytes (`!!binary`) are none."""


def _placed(name: str) -> str:
    if name not in PLACEMENTS:
        raise PydanticCustomError("placement", f"choose one of {', '.join(PLACEMENTS)}")
    return name


YamlOff = BeforeValidator(lambda value: "off" if value is False else value)
"""YAML 1.1 reads the word `off` as false."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(_Section):
    """Which PLM."""

    path: UserPath = Field(min_length=1, description="hub id, local folder, .gguf file, or smollm2-135m")
    revision: str | None = Field(None, description="revision on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the frozen weights")
    device: str | None = Field(None, description="torch device; default CUDA where there is one")


class DataConfig(_Section):
    """Which task, which files of it, and how much of each text."""

    task: UserPath | None = Field(None, min_length=1, description="built-in task (fpt ls tasks) or a task's YAML file")
    input_template: str | None = Field(None, description="Jinja template of the input, in place of a task")
    target_template: str | None = Field(None, description="Jinja template of the target, in place of a task")
    labels: list[str] | None = Field(None, description="with templates: the closed set of the field `label`")
    files: dict[str, UserPath] = Field(
        default_factory=dict, description="split -> local file, in place of the task's own"
    )
    hub: str | None = Field(
        None, min_length=1, description="in place of files: data set on the Hub, or a folder of one"
    )
    hub_config: str | None = Field(None, description="its configuration")
    splits: dict[str, str] = Field(
        default_factory=dict, description="split -> the data set's own, such as validation: test or train[90%:]"
    )
    train_limit: int | None = Field(None, ge=1, description="use at most this many training examples")
    validation_limit: int | None = Field(None, ge=1, description="evaluate on at most this many examples")
    test_limit: int | None = Field(None, ge=1, description="test on at most this many examples; default all")
    max_input_tokens: int = Field(492, ge=1, description="text tokens an input may have, the prompt not counted")
    max_target_tokens: int | None = Field(None, ge=1, description="default: the task's own")
    on_bad_row: Literal["error", "skip"] = Field("error", description="what to do with rows that cannot be used")

    @model_validator(mode="after")
    def _one_task(self) -> DataConfig:
        templates = (self.input_template, self.target_template)
        if self.task is None and None in templates:
            raise ValueError("needs a task, or input_template and target_template; set data.task")
        if self.task is not None and (templates != (None, None) or self.labels is not None):
            raise ValueError(f"task={self.task!r} has templates and labels of its own; leave out data.task or these")
        for name in ("hub_config", "splits"):
            if (value := getattr(self, name)) and self.hub is None:
                raise ValueError(f"{name}={value!r} is of no data set; set data.hub, or leave it out")
        if self.hub is not None and self.files:
            raise ValueError(f"hub={self.hub!r} and files both say where the rows are; leave one of them out")
        if self.task is None and not (self.files or self.hub):
            raise ValueError("templates need rows; set data.files.train and data.files.validation, or data.hub")
        return self


class PromptConfig(_Section):
    """The soft prompt."""

    tokens: int = Field(20, ge=1, description="virtual tokens P")
    init: Literal["uniform", "vocab", "text", "prompt"] = Field("vocab", description="how its values start")
    text: str | None = Field(None, description="the text of init: text")
    path: UserPath | None = Field(None, description="the saved prompt of init: prompt")
    placement: Annotated[str, AfterValidator(_placed)] = Field(
        FRONT, description="; ".join(f"{name}: {place.where}" for name, place in PLACEMENTS.items())
    )

    @model_validator(mode="after")
    def _needs(self) -> PromptConfig:
        for name, init in (("text", "text"), ("path", "prompt")):
            value = getattr(self, name)
            if self.init == init and not value:
                raise ValueError(f"init={self.init!r} needs prompt.{name}; set it")
            if self.init != init and value is not None:
                raise ValueError(
                    f"{name}={value!r} is not used with init={self.init!r}; leave it out, or set init={init}"
                )
        return self


class CacheConfig(_Section):
    """What texts leave behind, kept between steps where the prompt stands after them (prompt.placement)."""

    tier: Literal["none", "memory", "disk"] = Field("memory", description="where; none computes it at every step")
    budget_mib: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="most MiB of it; default half of the free memory, on disk 8192"
    )
    cross_attention: bool = Field(
        False, description="of an encoder-decoder, keep its keys and values: cheaper steps, far more room"
    )
    folder: UserPath | None = Field(None, description="of tier disk, shared by runs; default in $FPT_CACHE")

    @model_validator(mode="before")
    @classmethod
    def _without_dtype(cls, section: Any) -> Any:
        """Recipes that runs saved before `cache.dtype` was cut hold its default."""
        if not isinstance(section, dict) or "dtype" not in section:
            return section
        if section["dtype"] != "model":
            raise ValueError(
                f"dtype={section['dtype']!r} is gone: texts kept in 8 bits ended worse and took longer; leave it out"
            )
        return {name: value for name, value in section.items() if name != "dtype"}


class StageConfig(_Section):
    """One stage of a schedule of your own. Numbers hold for every stack in `stacks`; a mapping gives one each."""

    layers: int | dict[str, int] | None = Field(None, description="layers kept; default all")
    ffn: int | dict[str, int] | None = Field(None, description="FFN neurons kept; default all")
    batch: int | None = Field(None, ge=1, description="examples of each forward pass; default train.batch_size")
    length: int | None = Field(None, ge=1, description="text tokens of an input; default data.max_input_tokens")
    steps: int | None = Field(None, ge=1, description="optimizer steps; left out with method: auto")
    stacks: list[str] | None = None

    def stage(self, full: Stage, stacks: tuple[str, ...]) -> Stage:
        """This stage of a model whose full size is `full`; `stacks` are cut where the stage names none."""
        stacks = tuple(self.stacks or stacks)
        layers: Any = {s: full.layers_in(s) for s in stacks} if self.layers is None else self.layers
        ffn: Any = {s: full.ffn_in(s) for s in stacks} if self.ffn is None else self.ffn
        return Stage(layers, ffn, self.steps or 0, stacks, self.batch, self.length)


class ScoringConfig(_Section):
    """How neurons and layers are chosen for the partial PLMs."""

    examples: int = Field(256, ge=1, description="training examples the neurons are scored on (the paper: 1000)")
    kind: Literal["mean", "max", "integrated_gradients"] = Field("mean", description="activation score")
    path: UserPath | None = Field(None, description="scores made before with fpt score, instead of scoring again")
    keep_layers: Literal["evenly", "first", "influence", "greedy"] = Field("evenly", description="which layers stay")
    layer_examples: int = Field(16, ge=1, description="training examples layers are chosen on (influence, greedy)")
    layer_candidates: int | None = Field(4, ge=1, description="layers greedy tries a round; null: all that are left")
    layer_path: UserPath | None = Field(None, description="layer scores made before with fpt score")
    keep_neurons: Literal["activation", "first"] = Field("activation", description="which neurons stay")

    @model_validator(mode="after")
    def _used(self) -> ScoringConfig:
        if self.path is not None and self.keep_neurons != "activation":
            raise ValueError(f"path={self.path!r} is not used with keep_neurons={self.keep_neurons!r}; leave one out")
        if self.layer_path is not None and self.keep_layers not in ("influence", "greedy"):
            raise ValueError(
                f"layer_path={self.layer_path!r} is not used with keep_layers={self.keep_layers!r}; leave it out, or "
                "set keep_layers to influence or greedy, whichever the scores are of"
            )
        return self


class OptimConfig(_Section):
    """The optimizer; all of its settings, none hidden."""

    optimizer: Literal["adam", "adafactor", "prodigy"] = Field(
        "adam", description="adafactor is the paper's, for T5; prodigy finds its rate: leave lr at 1"
    )
    lr: float = Field(0.01, gt=0, allow_inf_nan=False, description="highest learning rate (the paper's Adafactor: 0.3)")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="what it does after the warm-up: fall to zero at the run's end, or stay (the paper)"
    )
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="the paper: 1e-5")
    warmup_steps: int = Field(0, ge=0, description="steps in which it rises from zero")
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False, description="gradient norm is clipped at this")
    ema_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="evaluate and save a running mean of the prompt, of this decay (0.9); null: the last prompt",
    )


class TrainConfig(_Section):
    """Length and shape of the run."""

    steps: int = Field(0, ge=0, description="optimizer steps")
    epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="passes over the training examples, in place of steps"
    )
    patience: int | None = Field(
        None, ge=1, description="end after so many evaluations without a better first metric; default never"
    )
    batch_size: int = Field(16, ge=1, description="examples per forward pass and process")
    batch_tokens: int | None = Field(
        None, ge=1, description="text tokens per forward pass at most, padding included: long texts in smaller batches"
    )
    accumulate: int = Field(1, ge=1, description="forward passes per optimizer step")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations on the full PLM; default 10")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; default as eval_every")
    save_minutes: float | None = Field(None, gt=0, allow_inf_nan=False, description="and minutes between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept")
    keep: Literal["best", "last"] = Field("best", description="which prompt the run ends with, by the first metric")
    log_every: int = Field(10, ge=1, description="steps between log lines")
    dropout: Annotated[Literal["off", "model"] | None, YamlOff] = Field(
        None, description="in training, off or as the model's config says; default off, and model for method full"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    compile: bool = Field(False, description="torch.compile layers for training steps: pays in runs of many steps")
    parallel: Literal["data", "shard", "tensor"] = Field(
        "data",
        description="several processes hold the PLM each (data), or in parts: gathered layer by layer (shard, FSDP2), "
        "or computed together (tensor)",
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="tensorboard, wandb, trackio"
    )
    seed: int = Field(0, ge=0)

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations."""
        return self.eval_every or max(1, math.ceil(self.steps / 10))

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.steps and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs} are both a length; leave one of them out")
        if not self.steps and self.epochs is None:
            raise ValueError(f"train.steps={self.steps} is no length of a run; set train.steps or train.epochs")
        return self


class EvalConfig(_Section):
    """How answers are made."""

    batch_size: int = Field(16, ge=1)
    num_beams: int = Field(1, ge=1, description="1 is greedy")
    length_normalize: bool = Field(False, description="label scoring: log-probability per token")
    labels: Literal["likelihood", "text"] = Field(
        "likelihood", description="the likeliest label; or greedy text, right where it is exactly the label (the paper)"
    )

    @model_validator(mode="after")
    def _used(self) -> EvalConfig:
        if self.labels == "text" and self.length_normalize:
            raise ValueError("length_normalize=True is not used with labels='text'; leave one of them out")
        return self


class RunConfig(_Section):
    """A whole run. `fpt train --config recipe.yaml --set train.steps=100` overrides single settings."""

    name: str | None = Field(None, description="what reports call the run")
    model: ModelConfig
    data: DataConfig
    method: Literal["pt", "ld", "fr", "cr", "auto", "full"] = Field(
        "auto", description="what is trained, and how it grows (fpt ls methods); cr where stages have steps"
    )
    stages: list[StageConfig] | None = Field(
        None, description="a schedule of your own instead of the paper's; with auto, what to try, small to large"
    )
    stacks: list[Literal["encoder", "decoder"]] | None = Field(None, description="stacks to cut; default the task's")
    prompt: PromptConfig = Field(default_factory=PromptConfig)  # type: ignore[arg-type]
    cache: CacheConfig = Field(default_factory=CacheConfig)  # type: ignore[arg-type]
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)  # type: ignore[arg-type]
    optim: OptimConfig = Field(default_factory=OptimConfig)  # type: ignore[arg-type]
    train: TrainConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)  # type: ignore[arg-type]
    output: UserPath = Field(min_length=1, description="folder of the run")

    @model_validator(mode="before")
    @classmethod
    def _method_and_layers(cls, given: Any) -> Any:
        """Stages that have steps are a schedule, as `cr` has one; the layers that `auto` leaves out influence least."""
        if not isinstance(given, dict):
            return given
        stages = given.get("stages")
        steps = isinstance(stages, list) and any(isinstance(stage, dict) and "steps" in stage for stage in stages)
        if steps and "method" not in given:
            given = {**given, "method": "cr"}
        scoring = given.get("scoring") or {}
        if given.get("method", "auto") == "auto" and not stages and isinstance(scoring, dict):
            return {**given, "scoring": {"keep_layers": "influence", **scoring}}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.optim.ema_decay is not None and self.method == "full":
            raise ValueError(
                f"optim.ema_decay={self.optim.ema_decay} averages the prompt, and method='full' has none; leave it out"
            )
        if self.prompt.placement != FRONT:
            place = f"prompt.placement={self.prompt.placement!r}"
            if self.method == "full":
                raise ValueError(f"{place} has no prompt with method='full'; leave one of them out")
            if self.train.gradient_checkpointing:
                raise ValueError(f"train.gradient_checkpointing cannot be used with {place}; leave it out")
            if self.train.compile:
                raise ValueError(f"train.compile cannot be used with {place}; leave it out")
        if self.cache.cross_attention and self.cache.tier == "none":
            raise ValueError("cache.cross_attention=True keeps nothing with cache.tier='none'; leave one of them out")
        output = Path(self.output).resolve()
        if self.cache.folder is not None and output in Path(self.cache.folder).resolve().parents:
            raise ValueError(
                f"cache.folder={self.cache.folder!r} lies inside output={self.output!r}, which must be the run's own; "
                "choose a folder beside it"
            )
        if self.train.compile and self.train.gradient_checkpointing:
            raise ValueError("train.compile cannot be used with train.gradient_checkpointing; leave one of them out")
        if self.stages is not None:
            self._check_stages(self.stages)
        return self

    def cut_stacks(self, full: Stage, task_stacks: Iterable[str] | None = None) -> tuple[str, ...]:
        """The stacks to cut: those named, else the task's that the model has, else all of the model's."""
        return tuple(self.stacks or (s for s in full.stacks if s in (task_stacks or ()))) or full.stacks

    def _check_stages(self, stages: list[StageConfig]) -> None:
        auto = self.method == "auto"
        if self.method in ("pt", "full"):
            raise ValueError(f"stages cannot be set with method={self.method!r}; leave one of them out")
        if not stages:
            raise ValueError("stages=[] names no stage; leave it out, or name some")
        for i, stage in enumerate(stages):
            if (stage.steps is None) != auto:
                fix = "leave it out, for auto decides, or set method=cr" if auto else "set it"
                raise ValueError(f"stages[{i}].steps={stage.steps} with method={self.method!r}; {fix}")
        if self.train.epochs is not None and not auto:
            raise ValueError(f"stages have steps, so train.epochs={self.train.epochs} cannot be set; set train.steps")
        total = sum(stage.steps or 0 for stage in stages)
        if total != self.train.steps and not auto:
            raise ValueError(f"stages add up to {total} steps, but train.steps={self.train.steps}; make them equal")
        for i, stage in enumerate(stages):
            for name, value, setting, limit in (
                ("batch", stage.batch, "train.batch_size", self.train.batch_size),
                ("length", stage.length, "data.max_input_tokens", self.data.max_input_tokens),
            ):
                if value is not None and value > limit:
                    raise ValueError(f"stages[{i}].{name}={value} is more than {setting}={limit}; lower it")

    def schedule(self, full: Stage, task_stacks: Iterable[str] | None = None) -> Schedule | AutoSchedule:
        """The run's schedule for a model whose full size is `full`.

        Args:
            task_stacks: stacks the task's presets cut, where `stacks` is not set; those the model lacks are ignored.

        Raises:
            ScheduleError: a size that does not fit the model, or too few steps.
        """
        stacks = self.cut_stacks(full, task_stacks)
        schedule: Schedule | AutoSchedule
        if self.method == "auto":
            whole = StageConfig().stage(full, stacks)  # type: ignore[call-arg]
            smaller = [stage for s in self.stages or () if (stage := s.stage(full, stacks)) != whole]
            ladder = [*smaller, whole] if self.stages else self.auto_ladder(whole, self.train.batch_size)
            schedule = AutoSchedule(ladder, self.train.steps)
        elif self.stages is not None:
            schedule = Schedule(s.stage(full, stacks) for s in self.stages)
        else:
            method = "pt" if self.method == "full" else self.method
            schedule = Schedule.preset(method, full, total_steps=self.train.steps, stacks=stacks)
        for stage in schedule.candidates:
            stage.check_fits(full)
        return schedule

    def auto_ladder(self, whole: Stage, batch_size: int) -> tuple[Stage, ...]:
        """The stages that `auto` climbs on batches of so many examples, where the recipe names none.

        Where texts are kept, their one pass is most of the cost: smaller batches save little of the rest, and ended
        higher in loss in five of six comparisons (docs/methods/auto.md).
        """
        if self.prompt.placement != FRONT:
            return (whole,)
        return default_ladder(whole, batch_size, self.train.steps)

    @property
    def trains_without_dropout(self) -> bool:
        """Frozen weights have nothing that dropout could regularise; where all are trained, the model's own is used."""
        return (self.train.dropout or ("model" if self.method == "full" else "off")) == "off"

    def to_yaml(self) -> str:
        """The resolved config; `load` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
