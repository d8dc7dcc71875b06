"""The commands that look into partial models and prompts: `fpt score` and `fpt similarity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..errors import ConfigError
from .console import Config, Sets, check_output, emit, people, plain, quiet_libraries, wants_json


def score(
    config: Config,
    output: Annotated[
        Path | None, typer.Option(help="New safetensors file for the neurons' scores (scoring.path uses it).")
    ] = None,
    layers: Annotated[
        Path | None, typer.Option(help="New file for the scores of layers (scoring.layer_path uses it).")
    ] = None,
    fidelity: Annotated[
        str | None,
        typer.Option(
            help="How faithful partial models are, for ways to choose them: evenly, first, influence, greedy (layers), "
            "activation (neurons), joined by +; e.g. evenly,greedy,greedy+activation."
        ),
    ] = None,
    sizes: Annotated[str, typer.Option(help="With --fidelity: percent of the layers or neurons.")] = "90,75,50,25",
    examples: Annotated[int, typer.Option(help="With --fidelity: training examples to measure on.", min=1)] = 32,
    picture: Annotated[
        Path | None, typer.Option(help="With --fidelity: draw it into this new .png or .svg file.")
    ] = None,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Score neurons and layers once, for several runs; see which sizes are usable. Next: `fpt train`."""
    from ..recipe import load

    settings = load(config, sets)
    if picture and not fidelity:
        raise ConfigError("--picture shows what --fidelity measures; add --fidelity evenly,greedy")
    if not (output or layers or fidelity):
        raise ConfigError("there is nothing to make; give --output, --layers or --fidelity")
    for path in (output, layers, picture):
        if path is not None:
            check_output(path)
    if picture and picture.suffix not in (".png", ".svg"):
        raise ConfigError(f"--picture {str(picture)!r} must end in .png or .svg")
    if layers is not None and settings.scoring.keep_layers not in ("influence", "greedy"):
        raise ConfigError("--layers needs layers that are chosen by score: --set scoring.keep_layers=greedy")
    parts = _parts(sizes)
    from ..run import fidelity as study
    from ..run.preparation import score_layers_of_run, score_neurons
    from ..run.session import open_session

    selections = study.parse_selections(fidelity) if fidelity else {}
    quiet_libraries()
    session = open_session(settings, ("train",))
    out = people()
    made: dict[str, Any] = {}
    if layers is not None:
        found = score_layers_of_run(session)
        if found is None:
            raise ConfigError(f"--layers: method={settings.method!r} leaves out no layers; use ld, cr or stages")
        found.save(layers)
        made["layers"] = str(layers)
        out.print(plain(f"{found.metadata['examples']} examples → {layers}"), highlight=False, soft_wrap=True)
    if output is not None:
        scores = score_neurons(session)
        scores.save(output)
        made["output"] = str(output)
        said = f"{scores.metadata['examples']} examples, {scores.metadata['tokens']} activations → {output}"
        out.print(plain(said), highlight=False, soft_wrap=True)
    if selections:
        record = study.report(session, selections, parts, examples)
        out.print(_fidelity_table(record))
        made["fidelity"] = record
        made |= {"picture": str(picture)} if picture is not None else {}
    if wants_json():
        emit(made)  # before the picture, which may fail
    if picture is not None:
        from ..report import figures, pictures

        figures.save(pictures.fidelity(made["fidelity"]["rows"], made["fidelity"]["full_loss"]), picture)
        out.print(plain(str(picture)), highlight=False, soft_wrap=True)


def _parts(text: str) -> list[float]:
    try:
        parts = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        parts = []
    if not parts or not all(0 < part <= 1 for part in parts):
        raise ConfigError(f"--sizes {text!r} must be percentages above 0 and up to 100, for example 90,75,50,25")
    return parts


def _fidelity_table(record: dict[str, Any]) -> Table:
    from ..schedule.stages import size_text

    title = f"full model: {record['full_loss']:.2f} nats per token, {record['examples']} training examples"
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("selection", "layers", "width", "FLOPs", "loss", "agrees", "KL"):
        table.add_column(name, justify="left" if name == "selection" else "right")
    for row in record["rows"]:
        table.add_row(
            row["selection"],
            size_text(row["stage"]["layers"]),
            size_text(row["stage"]["ffn"]),
            f"{100 * row['relative_flops']:.0f}%",
            f"{row['loss']:.2f}",
            f"{100 * row['agreement']:.0f}%",
            f"{row['divergence']:.2f}",
        )
    return table


def similarity(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs, or of saved prompts.")],
    picture: Annotated[Path | None, typer.Option(help="Draw the heat map into this new .png or .svg file.")] = None,
) -> None:
    """How alike prompts are: cosine similarity token by token, averaged, with each run's quality beside it.

    Quality is the full model's under the run's prompt, also where the run was tuned on a partial model only: it says
    how well the prompt transfers. Prompts of one seed start from the same values, which alone makes them alike.
    """
    from ..prompt.soft_prompt import load_prompt, prompt_similarity, similarity_matrix

    if len(runs) < 2:
        raise ConfigError("similarity compares prompts; give at least two RUNs")
    if picture is not None:
        check_output(picture)
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise ConfigError(f"--picture {str(picture)!r} must end in .png or .svg")
    prompts = [load_prompt(run) for run in runs]
    matrix = similarity_matrix(prompts).tolist()
    records = [_run_record(run) for run in runs]
    names = [record["name"] for record in records]
    if wants_json():
        tokens = [[prompt_similarity(a, b).tolist() for b in prompts] for a in prompts]
        emit({"runs": records, "similarity": matrix, "by_token": tokens})
    out = people()
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "run", "quality of the full model", *map(str, range(1, len(runs) + 1))):
        table.add_column(column, justify="left" if column == "run" else "right")
    for i, (record, row) in enumerate(zip(records, matrix, strict=True), start=1):
        quality = "–" if record["value"] is None else f"{record['value']:.1f} {record['metric']}"
        table.add_row(str(i), plain(record["name"]), plain(quality), *(f"{value:.2f}" for value in row))
    out.print(table)
    if picture is not None:
        from ..report import figures, pictures

        figures.save(pictures.heat_map(names, matrix, "mean cosine similarity, token by token"), picture)
        out.print(plain(str(picture)), highlight=False, soft_wrap=True)


def _run_record(folder: Path) -> dict[str, Any]:
    """Name, stages and quality of a run; the folder's name alone for a bare prompt."""
    record: dict[str, Any] = {"path": str(folder), "name": folder.resolve().name, "value": None, "metric": None}
    if (folder / "result.json").is_file():
        from ..run.results import load_result

        result = load_result(folder)
        record |= {"name": result.name, "metric": result.primary, "value": result.metrics[result.primary]}
        record |= {"method": result.method, "seed": result.config["train"]["seed"], "schedule": result.schedule}
    return record
