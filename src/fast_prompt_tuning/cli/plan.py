"""The command that says what a run will cost: `fpt plan`."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..errors import ConfigError
from ..placements import FRONT, PLACEMENTS, placement_of
from ..schedule.auto import AutoSchedule, best_case
from ..schedule.stages import Stage, size_text
from .console import Sets, emit, listed, people, quiet_libraries, wants_json

if TYPE_CHECKING:
    from ..recipe import RunConfig


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.1f}%"


OPTIONS = {
    "model": "model.path",
    "method": "method",
    "steps": "train.steps",
    "input_tokens": "data.max_input_tokens",
    "prompt_tokens": "prompt.tokens",
    "target_tokens": "data.max_target_tokens",
    "batch_size": "train.batch_size",
    "stacks": "stacks",
    "task": "data.task",
    "placement": "prompt.placement",
}
"""Options of `fpt plan` and the settings of a recipe they stand for."""
NO_TASK = "none"
"""In place of a task where a plan without a recipe names none."""


def plan(
    config: Annotated[str | None, typer.Option("--config", "-c", help="Recipe to plan; options replace parts.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or a config.json: weights are not needed.")] = None,
    method: Annotated[str | None, typer.Option(help="pt, ld, fr, cr, or auto at its cheapest; default auto.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the whole run; default 30000.")] = None,
    input_tokens: Annotated[
        int | None, typer.Option(help="Text tokens of an input, without the prompt; default 492.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Virtual tokens of the soft prompt; default 20.")] = None,
    target_tokens: Annotated[int | None, typer.Option(help="Target tokens; default 10, or the task's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples of a batch; default 16.")] = None,
    stacks: Annotated[str | None, typer.Option(help="Stacks to cut, e.g. encoder,decoder; default all.")] = None,
    task: Annotated[str | None, typer.Option(help="Take target length and stacks from this task.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="A schedule of your own: LAYERSxFFN[@BATCH[xTOKENS]]:STEPS,…, e.g. 8x384:100,30x1536@4:50,30x1536:50"
        ),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(help=f"Where the prompt stands: {', '.join(PLACEMENTS)}; default auto's choice."),
    ] = None,
    after_tokens: Annotated[int, typer.Option(help="Of the text tokens, those after a prompt within the text.")] = 0,
    examples: Annotated[int, typer.Option(help="Training examples, whose texts may be kept.")] = 1000,
    convention: Annotated[str, typer.Option(help="all: every product; linear: as the paper's tool counts.")] = "all",
    compare: Annotated[str | None, typer.Option(help="Methods side by side, e.g. pt,ld,fr,cr,auto.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Also plan for so many devices together.")] = None,
    device_memory: Annotated[str | None, typer.Option(help="Memory of each device, e.g. 24GiB.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Also time real steps here, for 20 seconds.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of the weights, for memory and --measure.")] = None,
    sets: Sets = [],  # noqa: B006
) -> None:
    """What a run will cost, before it is run: FLOPs, memory, seconds. Next: `fpt train`."""
    options = {k: v for k, v in locals().items() if k in OPTIONS and v is not None}
    from ..cost import plan as plans
    from ..cost import timing
    from ..cost.flops import CONVENTIONS
    from ..cost.shapes import BatchShape, CostModel
    from ..plm import configs

    if convention not in CONVENTIONS:
        raise ConfigError(f"--convention {convention!r} is unknown; choose one of {', '.join(CONVENTIONS)}")
    if (devices is None) != (device_memory is None):
        raise ConfigError(
            f"--devices {devices} and --device-memory {device_memory}: a plan for devices needs both; "
            "give, for example, --devices 8 --device-memory 24GiB"
        )
    memory = None if device_memory is None else _memory(device_memory)
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ConfigError(f"--dtype {dtype!r} is unknown; choose bfloat16, float16 or float32")
    recipe = _recipe(config, options, stages, sets)
    if recipe.train.epochs is not None:
        raise ConfigError(f"train.epochs={recipe.train.epochs} is no number of steps until data are read; give --steps")
    if recipe.method == "full":
        raise ConfigError("method='full' tunes all weights, which no plan counts; choose pt, ld, fr, cr or auto")
    quiet_libraries(transformers_only=True)
    name = recipe.model.path
    if name.endswith(".gguf") or ("/" not in name and not Path(name).exists()):  # the others need no PyTorch
        from ..plm.loading import locate

        name = locate(name)
    model_config = configs.load_config(name)
    full = configs.full_stage(model_config)
    if recipe.method == "auto" and compare is None and not measure:
        from ..run.choices import placed_by_auto

        recipe = placed_by_auto(recipe, decoder=len(full.stacks) == 1, asks=after_tokens > 0)
    placement, input_tokens = recipe.prompt.placement, recipe.data.max_input_tokens
    placed = placement_of(placement)
    if placed.needs_tail != (after_tokens > 0) or not 0 <= after_tokens < input_tokens:
        raise ConfigError(
            f"--after-tokens {after_tokens} with --placement {placement}: only a prompt within the text has tokens "
            f"after it; give --placement infix and --after-tokens from 1 to {input_tokens - 1}, below --input-tokens"
        )
    if placement != FRONT and measure:
        raise ConfigError("--measure times steps with the prompt in front; leave it out, or --placement")
    target, task_stacks = _of_task(recipe)
    asked = BatchShape(
        batch=recipe.train.batch_size,
        input_tokens=input_tokens,
        prompt_tokens=recipe.prompt.tokens,
        target_tokens=target,
    )
    placed.positions(decoder=len(full.stacks) == 1)  # raises where no prompt can stand
    shape = asked.placed(placed, tail=after_tokens)
    dtype = dtype or (recipe.model.dtype if recipe.model.dtype != "auto" else "bfloat16")
    bytes_each = 4 if dtype == "float32" else 2
    common: dict[str, Any] = {
        "convention": convention,
        "dtype_bytes": bytes_each,
        "accumulate": recipe.train.accumulate,
    }
    if compare is not None:
        methods = listed(compare)
        if stages or measure or placement != FRONT or devices:
            raise ConfigError(
                "--compare has no --stages, --measure, --devices or --placement; plan one method with them"
            )
        if not methods:
            raise ConfigError(f"--compare {compare!r} names no method, for example pt,ld,fr,cr")
        stacks_cut = tuple(recipe.stacks or (s for s in full.stacks if s in task_stacks)) or None
        by_method = plans.compare(
            model_config, methods, shape, total_steps=recipe.train.steps, stacks=stacks_cut, **common
        )
        if wants_json():
            emit({name: each.to_dict() for name, each in by_method.items()})
        else:
            people().print(_comparison(by_method))
        return
    schedule = recipe.schedule(full, task_stacks)
    if isinstance(schedule, AutoSchedule):
        schedule = best_case(schedule.ladder, recipe.train.steps)
    cost = CostModel.from_config(model_config)
    run_plan = plans.make_plan(model_config, schedule, shape, cost=cost, **common)
    if measure:
        run_plan = run_plan.with_timing(timing.measure_stages(model_config, schedule, shape, dtype=dtype))
    texts: dict[str, Any] = {}
    if placed.keeps_texts:
        shapes = {"text_cache": shape}
        if len(full.stacks) > 1:
            shapes["text_cache_cross_attention"] = replace(shape, kept_cross=True)
        for name, each in shapes.items():
            texts[name] = plans.plan_texts(cost, schedule, each, examples=examples, dtype_bytes=bytes_each)
    held: dict[str, Any] = {}
    if devices is not None and memory is not None:
        mib = recipe.cache.budget_mib
        # Without a budget, texts take what is left free, and need no room of their own.
        kept = min(texts["text_cache"].bytes, devices * mib * 2**20) if texts and mib is not None else 0
        options = {"accumulate": recipe.train.accumulate, "texts": kept, "dtype_bytes": bytes_each}
        sizes = [cost.sizes(stage) for stage in schedule.stages]
        whole = not any(size[name].ffn < cost.stacks[name].ffn for size in sizes for name in size)
        tensor = whole and bool(getattr(model_config, "base_model_tp_plan", None))
        able = {"data": True, "shard": whole, "tensor": tensor}
        held = _on_devices(cost, devices, memory, shape, able, options)
    if wants_json():
        emit({**run_plan.to_dict(), **{name: asdict(each) for name, each in texts.items()}, **held})
        return
    out = people()
    out.print(_stage_table(run_plan, full, asked))
    for name, each in texts.items():
        if name != "text_cache":
            out.print("\nwith cache.cross_attention: true")
        out.print(_text_lines(each, examples, placement), highlight=False)
    if held:
        out.print(_device_table(held["devices"], str(device_memory)))
        out.print(_command(held["devices"], config), highlight=False, soft_wrap=True)


def _memory(text: str) -> float:
    """Bytes of `24GiB`, `24GB` or `24`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|)", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError(f"--device-memory {text!r} is no size; give, for example, 24GiB")
    return float(match[1]) * (10**9 if match[2].upper() == "GB" else 2**30)


def _on_devices(
    cost: Any, devices: int, memory: float, shape: Any, able: dict[str, bool], options: dict[str, Any]
) -> dict[str, Any]:
    """Each way of `train.parallel` on so many devices, and the fewest of them that hold the run.

    Args:
        able: whether model and schedule can go that way at all.
    """
    from ..cost.devices import ROOM, WAYS, divides, fewest, share

    rows = {}
    for way in WAYS:
        each = share(cost, way, devices, shape, **options)
        least = fewest(cost, way, memory, devices, shape, **options) if able[way] else None
        possible = able[way] and (way != "tensor" or divides(cost, devices))
        rows[way] = {
            **asdict(each),
            "memory": each.memory,
            "fits": possible and each.memory <= ROOM * memory,
            "possible": possible,
            "fewest": least and least.devices,
        }
    return {"devices": rows}


def _device_table(rows: dict[str, Any], memory: str) -> Table:
    from ..cost.devices import ROOM

    number = next(iter(rows.values()))["devices"]
    table = Table(
        title=f"on {number} devices of {memory}, filled to {ROOM:.0%}: what each holds, receives in a step, and the "
        "fewest that do",
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    sizes = ("weights", "activations", "texts", "memory", "received")
    for name in ("parallel", *sizes, "fewest"):
        table.add_column(name, justify="left" if name == "parallel" else "right")
    for way, row in rows.items():
        cells = [_bytes(row[name]) if row["possible"] else "–" for name in sizes]
        table.add_row(way, *cells, str(row["fewest"] or "more"))
    return table


def _command(rows: dict[str, Any], config: str | None) -> str:
    """What to type for the way that sends least and fits."""
    fitting = [way for way, row in rows.items() if row["fits"]]
    if not fitting:
        return "it does not fit: give more devices, a smaller --batch-size, or --dtype bfloat16"
    way = min(fitting, key=lambda one: rows[one]["received"])
    command = f"torchrun --nproc-per-node {rows[way]['devices']} -m fast_prompt_tuning train"
    return f"{command} -c {config or 'RECIPE'} --set train.parallel={way}"


def _recipe(config: str | None, options: dict[str, Any], stages: str | None, sets: list[str]) -> RunConfig:
    """The recipe to plan: one that is given, or the least there is, with the options of the line in it."""
    from ..recipe import load, override

    if config is None and "model" not in options:
        raise ConfigError("there is nothing to plan; give --model, or a recipe with --config")
    source: Any = config or {
        "model": {"path": options["model"]},
        "data": {"task": NO_TASK},
        "train": {"steps": 30_000},
        "output": "plan",
    }
    if "stacks" in options:
        options["stacks"] = listed(options["stacks"])
    overrides = [override(OPTIONS[name], value) for name, value in options.items()]
    if "steps" in options:
        overrides.append(override("train.epochs", None))
    if "task" in options:  # it takes the place of a recipe's templates
        overrides += [override(f"data.{name}", None) for name in ("input_template", "target_template", "labels")]
    if stages is not None:
        parsed = _parse_stages(stages)
        total = sum(stage["steps"] for stage in parsed)
        overrides += [override("stages", parsed), override("train.steps", total), "method=cr"]
    elif "method" in options:
        overrides.append("stages=null")  # a recipe's own are another method's
    return load(source, [*sets, *overrides])


def _of_task(recipe: RunConfig) -> tuple[int, tuple[str, ...]]:
    """Target tokens and the stacks to cut, as a recipe's task has them."""
    target, stacks = 10 if recipe.data.task == NO_TASK else 64, list[str]()
    if recipe.data.task not in (None, NO_TASK):
        from ..data.task_files import load_task

        task = load_task(str(recipe.data.task))
        target, stacks = task.max_target_tokens, [*task.stacks]
    return recipe.data.max_target_tokens or target, tuple(stacks)


def _text_lines(texts: Any, examples: int, placement: str) -> str:
    from ..cost.units import human_flops

    return (
        f"placement {placement}, relative to a step with the prompt in front: {_percent(texts.warm)} with the texts "
        f"kept, {_percent(texts.cold)} without\n"
        f"texts kept: {texts.bytes_per_example / 2**20:.2f} MiB an example, {_bytes(texts.bytes)} for {examples:,} "
        f"(cache.budget_mib); running them once: {human_flops(texts.fill_flops)}, not in the table"
    )


def _parse_stages(text: str) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)(?:@(\d+)(?:x(\d+))?)?:(\d+)", part.strip())
        if match is None:
            raise ConfigError(f"--stages {part!r} is not LAYERSxFFN[@BATCH[xTOKENS]]:STEPS, for example 8x384:100")
        numbers = dict(zip(("layers", "ffn", "batch", "length", "steps"), match.groups(), strict=True))
        stages.append({k: int(v) for k, v in numbers.items() if v is not None})
    return stages


def _stage_table(plan: Any, full: Any, shape: Any) -> Table:
    from ..cost.units import flops_unit, human_flops, human_seconds

    table = Table(
        title=f"{full}, batches of {shape.batch} × ({shape.prompt_tokens} + {shape.input_tokens}) tokens, "
        f"targets of {shape.target_tokens}",
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    timed = plan.seconds is not None
    unit, prefix = flops_unit(max(s.flops_per_step for s in plan.stages))
    parts = [n for n in ("batch", "length") if any(getattr(s.stage, n) is not None for s in plan.stages)]
    columns = ["stage", "layers", "width", *parts, "steps", f"{prefix}FLOPs/step", "of full", "memory"]
    for name in (*columns, *(("s/step", "time") if timed else ())):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for i, stage in enumerate(plan.stages, start=1):
        cells = [
            f"{i} (full)" if stage.relative_flops == 1 else str(i),
            size_text(stage.stage.layers),
            size_text(stage.stage.ffn),
            *(str(getattr(stage.stage, n) or "all") for n in parts),
            str(stage.stage.steps),
            f"{stage.flops_per_step / unit:.4g}",
            _percent(stage.relative_flops),
            _bytes(stage.memory_bytes),
        ]
        if timed:
            cells += [f"{stage.seconds_per_step:.3f}", human_seconds(stage.seconds)]
        table.add_row(*cells)
    table.add_section()
    totals = ["run", "", "", *("" for _ in parts), str(plan.total_steps), human_flops(plan.flops)]
    totals += [_percent(plan.relative_flops), _bytes(plan.peak_bytes)]
    if timed:
        totals += [_percent(plan.relative_seconds), human_seconds(plan.seconds)]
    table.add_row(*totals)
    return table


def _comparison(by_method: dict[str, Any]) -> Table:
    from ..cost.units import human_flops

    table = Table(title="Methods side by side, same steps and batches", title_justify="left", header_style="bold")
    for name in ("method", "stages (layers × width @ batch : steps)", "FLOPs", "of plain", "peak memory"):
        table.add_column(name, justify="left" if name[0] in "ms" else "right")
    for name, plan in by_method.items():
        stages = "  ".join(_stage_text(s.stage) for s in plan.stages)
        table.add_row(name, stages, human_flops(plan.flops), _percent(plan.relative_flops), _bytes(plan.peak_bytes))
    return table


def _stage_text(stage: Stage) -> str:
    batch = "" if stage.batch is None else f"@{stage.batch}"
    return f"{size_text(stage.layers)}×{size_text(stage.ffn)}{batch}:{stage.steps}"
