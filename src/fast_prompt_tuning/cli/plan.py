"""The commands about cost: `fpt plan` and `fpt reproduce`."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..errors import ConfigError
from ..schedule.auto import best_case, default_ladder
from ..schedule.stages import Schedule
from .console import emit, people, quiet_libraries, wants_json


def _stacks(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else None


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.1f}%"


def plan(
    model: Annotated[str, typer.Option(help="Hub id, folder, or a config.json: weights are not needed.")],
    method: Annotated[str, typer.Option(help="pt, ld, fr, cr, or auto at its cheapest.")] = "cr",
    steps: Annotated[int, typer.Option(help="Optimizer steps of the whole run.")] = 30_000,
    input_tokens: Annotated[int, typer.Option(help="Text tokens of an input, without the prompt.")] = 492,
    prompt_tokens: Annotated[int, typer.Option(help="Virtual tokens of the soft prompt.")] = 20,
    target_tokens: Annotated[int | None, typer.Option(help="Target tokens; default 10, or the task's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 32,
    stacks: Annotated[str | None, typer.Option(help="Stacks to cut, e.g. encoder,decoder; default all.")] = None,
    task: Annotated[str | None, typer.Option(help="Take target length and stacks from this task.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="A schedule of your own: LAYERSxFFN[@BATCH[xTOKENS]]:STEPS,…, e.g. 8x384:100,30x1536@4:50,30x1536:50"
        ),
    ] = None,
    placement: Annotated[
        str, typer.Option(help="prefix; suffix: the prompt after the text; infix: within it.")
    ] = "prefix",
    after_tokens: Annotated[int, typer.Option(help="Of the text tokens, those after an infix prompt.")] = 0,
    examples: Annotated[int, typer.Option(help="Training examples, whose texts suffix and infix keep.")] = 1000,
    convention: Annotated[str, typer.Option(help="all: every product; linear: as the paper's tool counts.")] = "all",
    compare: Annotated[str | None, typer.Option(help="Methods side by side, e.g. pt,ld,fr,cr.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Also time real steps here, for 20 seconds.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the weights, for memory and --measure.")] = "bfloat16",
) -> None:
    """What a run will cost, before it is run: FLOPs, memory, seconds. Next: `fpt train`."""
    from ..cost import plan as plans
    from ..cost.flops import CONVENTIONS, BatchShape, CostModel

    if convention not in CONVENTIONS:
        raise ConfigError(f"--convention {convention!r} is unknown; choose one of {', '.join(CONVENTIONS)}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"--dtype {dtype!r} is unknown; choose bfloat16, float16 or float32")
    if placement not in ("prefix", "suffix", "infix"):
        raise ConfigError(f"--placement {placement!r} is unknown; choose prefix, suffix or infix")
    if (placement == "infix") != (after_tokens > 0) or not 0 <= after_tokens < max(input_tokens, 1):
        raise ConfigError(
            f"--after-tokens {after_tokens} with --placement {placement}: tokens after an infix prompt, and of no "
            f"other, from 1 to {input_tokens - 1} of --input-tokens {input_tokens}"
        )
    kept = placement != "prefix"
    if kept and measure:
        raise ConfigError("--measure times steps with the prompt in front; leave it out, or --placement")
    quiet_libraries(transformers_only=True)
    if model.endswith(".gguf") or ("/" not in model and not Path(model).exists()):  # the others need no PyTorch
        from ..plm.loading import locate

        model = locate(model)
    config = plans.load_config(model)
    full = plans.full_stage(config)
    if placement == "infix" and len(full.stacks) > 1:
        raise ConfigError(
            "--placement infix is for decoder-only models: an encoder reads its text as a whole; use suffix"
        )
    chosen = _stacks(stacks)
    if task is not None:
        from ..data.tasks import load_task

        found = load_task(task)
        target_tokens = found.max_target_tokens if target_tokens is None else target_tokens
        chosen = chosen or tuple(s for s in found.stacks if s in full.stacks) or None
    shape = BatchShape(
        batch=batch_size,
        input_tokens=input_tokens - after_tokens,
        prompt_tokens=prompt_tokens + after_tokens,  # they cost what the prompt does
        target_tokens=10 if target_tokens is None else target_tokens,
        placement="suffix" if kept else "prefix",
        text_examples=0 if kept else None,
    )
    bytes_each = 4 if dtype == "float32" else 2
    common: dict[str, Any] = {"convention": convention, "dtype_bytes": bytes_each}
    out = people()
    if compare:
        methods = [m.strip() for m in compare.split(",") if m.strip()]
        if stages or measure or kept:
            raise ConfigError("--compare has no --stages, --measure or --placement; plan one method with them")
        if not methods:
            raise ConfigError(f"--compare {compare!r} names no method, for example pt,ld,fr,cr")
        found_plans = plans.compare(config, methods, shape, total_steps=steps, stacks=chosen, **common)
        if wants_json():
            emit({name: p.to_dict() for name, p in found_plans.items()})
            return
        out.print(_comparison(found_plans))
        return
    if stages:
        schedule = Schedule.from_dict(_parse_stages(stages, chosen or full.stacks, batch_size, input_tokens))
    elif method == "auto":
        schedule = best_case(default_ladder(full, batch_size), steps)
    else:
        schedule = Schedule.preset(method, full, total_steps=steps, stacks=chosen)
    schedule.check_fits(full)
    made = plans.make_plan(config, schedule, shape, **common)
    if measure:
        made = made.with_timing(plans.measure_stages(config, schedule, shape, dtype=dtype))
    texts: dict[str, Any] = {}
    if kept:
        cost = CostModel.from_config(config)
        shapes = {"text_cache": shape}
        if len(full.stacks) > 1:
            shapes["text_cache_cross_attention"] = replace(shape, kept_cross=True)
        for name, each in shapes.items():
            texts[name] = plans.plan_texts(cost, schedule, each, examples=examples, dtype_bytes=bytes_each)
    if wants_json():
        emit({**made.to_dict(), **{name: asdict(found) for name, found in texts.items()}})
        return
    asked = replace(shape, prompt_tokens=prompt_tokens, input_tokens=input_tokens)
    out.print(_stage_table(made, full, asked))
    where = "after" if placement == "suffix" else "within"
    for name, each in texts.items():
        if name != "text_cache":
            out.print("\nwith cache.cross_attention: true")
        out.print(_text_lines(each, examples, where, bytes_each), highlight=False)


def _text_lines(texts: Any, examples: int, where: str, bytes_each: int) -> str:
    from ..report.tables import human_flops

    return (
        f"prompt {where} the text, relative to a step with the prompt in front: {_percent(texts.warm)} with the texts "
        f"kept, {_percent(texts.cold)} without\n"
        f"texts kept: {texts.bytes_per_example / 2**20:.2f} MiB an example, {_bytes(texts.bytes)} for {examples:,} "
        f"(cache.budget_mib; about {_bytes(texts.bytes / bytes_each)} with cache.dtype: int8); running them once: "
        f"{human_flops(texts.fill_flops)}, not in the table"
    )


def _parse_stages(text: str, stacks: tuple[str, ...], batch_size: int, input_tokens: int) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)x(\d+)(?:@(\d+)(?:x(\d+))?)?:(\d+)", part.strip())
        if found is None:
            raise ConfigError(f"--stages {part!r} is not LAYERSxFFN[@BATCH[xTOKENS]]:STEPS, for example 8x384:100")
        numbers = dict(zip(("layers", "ffn", "batch", "length", "steps"), found.groups(), strict=True))
        stages.append({"stacks": list(stacks), **{k: int(v) for k, v in numbers.items() if v is not None}})
        for name, option, limit in (("batch", "--batch-size", batch_size), ("length", "--input-tokens", input_tokens)):
            if stages[-1].get(name, 0) > limit:
                raise ConfigError(f"--stages {part!r} has a {name} above {option} {limit}; lower it")
    return stages


def _stage_table(made: Any, full: Any, shape: Any) -> Table:
    from ..report.tables import flops_unit, human_flops, human_seconds, size_text

    table = Table(
        title=f"{full}, batches of {shape.batch} × ({shape.prompt_tokens} + {shape.input_tokens}) tokens, "
        f"targets of {shape.target_tokens}",
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    timed = made.seconds is not None
    unit, prefix = flops_unit(max(s.flops_per_step for s in made.stages))
    parts = [n for n in ("batch", "length") if any(getattr(s.stage, n) is not None for s in made.stages)]
    columns = ["stage", "layers", "width", *parts, "steps", f"{prefix}FLOPs/step", "of full", "memory"]
    for name in (*columns, *(("s/step", "time") if timed else ())):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for i, stage in enumerate(made.stages, start=1):
        cells = [
            f"{i} (full)" if stage.relative_flops == 1 else str(i),
            size_text(stage.stage.layers),
            size_text(stage.stage.ffn),
            *(str(getattr(stage.stage, n) or "all") for n in parts),
            str(stage.stage.steps),
            f"{stage.flops_per_step / unit:.4g}",
            _percent(stage.relative_flops),
            _bytes(stage.weight_bytes + stage.activation_bytes),
        ]
        if timed:
            cells += [f"{stage.seconds_per_step:.3f}", human_seconds(stage.seconds)]
        table.add_row(*cells)
    table.add_section()
    peak = max(s.weight_bytes + s.activation_bytes for s in made.stages)
    totals = ["run", "", "", *("" for _ in parts), str(made.total_steps), human_flops(made.flops)]
    totals += [_percent(made.relative_flops), _bytes(peak)]
    if timed:
        totals += [_percent(made.relative_seconds), human_seconds(made.seconds)]
    table.add_row(*totals)
    return table


def _comparison(found: dict[str, Any]) -> Table:
    from ..report.tables import human_flops, size_text

    table = Table(title="Methods side by side, same steps and batches", title_justify="left", header_style="bold")
    for name in ("method", "stages (layers × width : steps)", "FLOPs", "of plain", "peak memory"):
        table.add_column(name, justify="left" if name in ("method", "stages (layers × width : steps)") else "right")
    for name, made in found.items():
        stages = "  ".join(f"{size_text(s.stage.layers)}×{size_text(s.stage.ffn)}:{s.stage.steps}" for s in made.stages)
        memory = max(s.weight_bytes + s.activation_bytes for s in made.stages)
        table.add_row(name, stages, human_flops(made.flops), _percent(made.relative_flops), _bytes(memory))
    return table
