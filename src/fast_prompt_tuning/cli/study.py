"""The commands that look into partial models and prompts: `fpt score` and `fpt similarity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ..errors import ConfigError
from .console import Config, Sets, check_output, check_picture, emit, people, quiet_libraries, say, wants_json


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
    signal: Annotated[
        bool,
        typer.Option(
            "--signal",
            help="Would a smaller stage save anything? What stages (the recipe's, or those of ld, fr and cr) and parts "
            "of the batch teach the full PLM for their cost.",
        ),
    ] = False,
    after: Annotated[
        int, typer.Option(help="With --signal: ask at the initial prompt, and after so many plain steps.", min=0)
    ] = 8,
    at: Annotated[Path | None, typer.Option(help="With --signal: ask at this run's prompt instead.")] = None,
    examples: Annotated[
        int | None,
        typer.Option(help="With --fidelity or --signal: training examples to measure on; default 32.", min=1),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="With --fidelity or --signal: draw it into this new .png or .svg file.")
    ] = None,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Score neurons and layers once, for several runs; see which sizes would pay. Next: `fpt train`."""
    from ..recipe import load

    settings = load(config, sets)
    if picture and bool(fidelity) == signal:
        raise ConfigError("--picture shows one of --fidelity and --signal; add --fidelity evenly,greedy, or --signal")
    if at is not None and not signal:
        raise ConfigError(f"--at {str(at)!r} is where --signal asks; add --signal")
    if not (output or layers or fidelity or signal):
        raise ConfigError("there is nothing to make; give --output, --layers, --fidelity or --signal")
    for path in (output, layers):
        check_output(path)
    check_picture(picture)
    if layers is not None and settings.scoring.keep_layers not in ("influence", "greedy"):
        raise ConfigError("--layers needs layers that are chosen by score: --set scoring.keep_layers=greedy")
    parts = _parts(sizes)
    from ..run import fidelity as study
    from ..run.preparation import score_layers_of_run, score_neurons
    from ..run.session import open_session
    from ..run.signal import report as signal_of
    from ..train import parallel

    selections = study.parse_selections(fidelity) if fidelity else {}
    quiet_libraries()
    session = open_session(settings, ("train",))
    main = parallel.rank() == 0  # it writes and speaks for all processes
    written: dict[str, Any] = {}
    if layers is not None:
        layer_scores = score_layers_of_run(session)
        if layer_scores is None:
            raise ConfigError(f"--layers: method={settings.method!r} leaves out no layers; use ld, cr or stages")
        written["layers"] = str(layers)
        if main:
            layer_scores.save(layers)
            say(f"{layer_scores.metadata['examples']} examples → {layers}")
    if output is not None:
        scores = score_neurons(session)
        written["output"] = str(output)
        if main:
            scores.save(output)
            say(f"{scores.metadata['examples']} examples, {scores.metadata['tokens']} activations → {output}")
    if selections:
        written["fidelity"] = study.report(session, selections, parts, examples or 32)
    if signal:
        written["signal"] = signal_of(session, examples=examples, after=after, at=at)
    if not main:
        return
    if selections:
        people().print(_fidelity_table(written["fidelity"]))
    if signal:
        _show_signal(written["signal"])
    written |= {"picture": str(picture)} if picture is not None else {}
    if wants_json():
        emit(written)  # before the picture, which may fail
    if picture is not None:
        from ..report import figures, pictures
        from ..report import signal as signal_report

        if signal:
            drawn = signal_report.picture(written["signal"])
        else:
            drawn = pictures.fidelity(written["fidelity"]["rows"], written["fidelity"]["full_loss"])
        figures.save(drawn, picture)
        say(str(picture))


def _show_signal(record: dict[str, Any]) -> None:
    from ..cost.units import human_flops, human_seconds
    from ..report.signal import tables

    for table in tables(record):
        people().print(table)
    spent = sum(record["flops"].values())
    steps = spent / record["prompts"][0]["step_flops"]
    say(record["verdict"])
    took = f"{human_seconds(record['seconds'])} and {human_flops(spent)}, {steps:.0f} plain steps"
    say(f"Asked of {record['examples']} training examples: {took}.")


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
    check_picture(picture)
    prompts = [load_prompt(run) for run in runs]
    matrix = similarity_matrix(prompts).tolist()
    records = [_run_record(run) for run in runs]
    names = [record["name"] for record in records]
    if wants_json():
        tokens = [[prompt_similarity(a, b).tolist() for b in prompts] for a in prompts]
        emit({"runs": records, "similarity": matrix, "by_token": tokens})
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "run", "quality of the full model", *map(str, range(1, len(runs) + 1))):
        table.add_column(column, justify="left" if column == "run" else "right")
    for i, (record, row) in enumerate(zip(records, matrix, strict=True), start=1):
        quality = "–" if record["value"] is None else f"{record['value']:.1f} {record['metric']}"
        table.add_row(str(i), escape(record["name"]), escape(quality), *(f"{value:.2f}" for value in row))
    people().print(table)
    if picture is not None:
        from ..report import figures, pictures

        figures.save(pictures.heat_map(names, matrix, "mean cosine similarity, token by token"), picture)
        say(str(picture))


def _run_record(folder: Path) -> dict[str, Any]:
    """Name, stages and quality of a run; the folder's name alone for a bare prompt."""
    record: dict[str, Any] = {"path": str(folder), "name": folder.resolve().name, "value": None, "metric": None}
    if (folder / "result.json").is_file():
        from ..run.results import load_result

        result = load_result(folder)
        record |= {"name": result.name, "metric": result.primary, "value": result.metrics[result.primary]}
        record |= {"method": result.method, "seed": result.config["train"]["seed"], "schedule": result.schedule}
    return record
