"""Is anything ever lost? Kills, faults, resumption, several processes and fuzzing, on tiny models and real processes.

    python benchmarks/reliability/run.py --out benchmarks/reliability/report.json --page docs/reliability.md --check
    python benchmarks/reliability/run.py --quick --check      # the part that the test suite runs

The whole takes about half an hour on two cores; `--only kills,faults` makes some parts. Coverage-guided fuzzing needs
atheris (the extra `fuzz`) and is left out without it. `--check` exits 1 where a target is missed: every
kill survived, every fault and hostile file borne, no crash, every resumption bit-equal, two processes within 1e-5.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

KILLED = {"one process killed": "data", "one process killed, weights sharded": "shard"}
DISTRIBUTED_GAP = 1e-5
"""Relative: a sum over two processes is rounded in another order."""


def kills(quick: bool, work: Path) -> dict[str, Any]:
    """SIGKILL at random moments."""
    import scenarios

    return scenarios.kills(work, 3 if quick else 60, steps=12 if quick else 48)


def faults(quick: bool, work: Path) -> dict[str, Any]:
    """Every fault of `faults.py`: borne, or what went wrong."""
    from faults import FAULTS

    return _borne(FAULTS, quick, work)


def hostile(quick: bool, work: Path) -> dict[str, Any]:
    """Every file of `hostile.py`: refused or harmless, or what went wrong."""
    from hostile import HOSTILE

    return _borne(HOSTILE, quick, work)


def _borne(cases: dict[str, Callable[[Path], None]], quick: bool, work: Path) -> dict[str, Any]:
    chosen = list(cases)[:1] if quick else list(cases)  # the test suite runs each as a test of its own
    found = {}
    for i, name in enumerate(chosen):
        place = work / str(i)
        place.mkdir()
        try:
            cases[name](place)
            found[name] = {"recovered": True, "promise": _promise(cases[name])}
        except Exception as error:
            found[name] = {"recovered": False, "promise": _promise(cases[name]), "error": repr(error)[:500]}
    return found


def _promise(function: Callable[..., Any]) -> str:
    return " ".join(str(function.__doc__).split())


def resume(quick: bool, work: Path) -> dict[str, Any]:
    """Resumed from every step: bit-equal to the run that was never interrupted."""
    import scenarios

    if quick:
        return scenarios.resume_table(work, ["cr"], points=[2])
    table = scenarios.resume_table(work, [k for k in scenarios.KINDS if k != "auto"])
    return {**table, **scenarios.resume_table(work, ["auto"], steps=24)}


def distributed(quick: bool, work: Path) -> dict[str, Any]:
    """Two processes against one."""
    import scenarios

    kinds = list(scenarios.DISTRIBUTED)
    found: dict[str, Any] = {"runs": scenarios.distributed(work / "runs", kinds[3:5] if quick else kinds)}
    if not quick:
        found |= {name: scenarios.one_process_killed(work / way, way) for name, way in KILLED.items()}
    return found


def moved(quick: bool, work: Path) -> dict[str, Any]:
    """A checkpoint of two processes, resumed on one and on four."""
    import scenarios

    return {} if quick else scenarios.moved(work)


def fuzzing(quick: bool, work: Path) -> dict[str, Any]:
    """Random mutations of every kind of file."""
    import fuzz

    try:
        return fuzz.fuzz(10 if quick else 1000)
    finally:
        logging.disable(logging.NOTSET)


def coverage(quick: bool, work: Path) -> dict[str, Any]:
    """The same targets, guided by what they cover."""
    import fuzz

    if quick:
        return {}
    found = fuzz.coverage(20, work)
    return {"not run": "atheris is not installed"} if found is None else found


PARTS: dict[str, Callable[[bool, Path], dict[str, Any]]] = {
    "kills": kills,
    "faults": faults,
    "hostile": hostile,
    "resume": resume,
    "distributed": distributed,
    "moved": moved,
    "fuzz": fuzzing,
    "coverage": coverage,
}


def missed(report: dict[str, Any]) -> list[str]:
    """Targets that a report misses, in words; parts that were not run are no miss."""
    wrong = []
    if (k := report.get("kills")) and k["survived"] < k["tried"]:
        wrong.append(f"kills survived: {k['survived']} of {k['tried']}")
    for part in ("faults", "hostile"):
        rows = report.get(part, {}).items()
        wrong += [f"{part}: not borne: {name}: {row['error']}" for name, row in rows if not row["recovered"]]
    for kind, rows in report.get("resume", {}).items():
        wrong += [f"resumed from step {step}: {kind}" for step, row in rows.items() if not row["bit_equal"]]
    for kind, row in [*report.get("distributed", {}).get("runs", {}).items(), *report.get("moved", {}).items()]:
        if not row["largest_relative_difference"] <= DISTRIBUTED_GAP:
            wrong.append(f"several processes: {kind}: {row['largest_relative_difference']:.1e}")
    for name in KILLED:
        killed = report.get("distributed", {}).get(name, {})
        if killed and (
            killed["exit_code"] != 1 or not (killed["said"] and killed["checkpoint"]) or killed["traceback"]
        ):
            wrong.append(f"{name}: {killed}")
    for part in ("fuzz", "coverage"):
        for name, row in report.get(part, {}).items():
            if isinstance(row, dict) and row["crashes"]:
                wrong.append(f"{part}: {name}: {row['crashes']}")
    return wrong


def page(report: dict[str, Any]) -> str:
    """The report as Markdown: `docs/reliability.md`."""
    k, faults, hostile, spread = (report[part] for part in ("kills", "faults", "hostile", "distributed"))
    cases = sum(row["cases"] for row in report["fuzz"].values())
    guided = [row for row in report["coverage"].values() if isinstance(row, dict)]
    crashes = sum(len(row["crashes"]) for row in [*report["fuzz"].values(), *guided])
    rows = [row for table in report["resume"].values() for row in table.values()]
    lines = [
        "# Reliability",
        "",
        "Measured by `benchmarks/reliability/run.py` on tiny models, with real processes, signals and files "
        f"(`benchmarks/reliability/report.json`, {report['environment']['device']}, "
        f"torch {report['environment']['torch']}). "
        "This page is made from that report.",
        "",
        "| what | result |",
        "| --- | --- |",
        f"| kills survived / tried | {k['survived']} / {k['tried']} |",
        f"| faults borne / injected | {sum(f['recovered'] for f in faults.values())} / {len(faults)} |",
        f"| hostile files borne / made | {sum(f['recovered'] for f in hostile.values())} / {len(hostile)} |",
        f"| resumptions bit-equal / tried | {sum(r['bit_equal'] for r in rows)} / {len(rows)} |",
        f"| fuzz cases, random / coverage-guided | {cases} / {sum(row['cases'] for row in guided)} |",
        f"| crashes among them | {crashes} |",
        "| largest relative loss difference, two processes against one | "
        f"{max(r['largest_relative_difference'] for r in spread['runs'].values()):.1e} |",
        "",
        "## Kills",
        "",
        "Runs are ended with SIGKILL at random moments and resumed, again and again. After every kill no file under "
        "its final name may be torn and no checkpoint gone; every run that came to its end must be, to the last bit, "
        f"the one that was never killed. {k['where']['while training']} kills fell after the first checkpoint, "
        f"{k['where']['before the first checkpoint']} before it (loading, scoring, first step); {k['runs']} runs were "
        "finished in between.",
        "",
        "## Resumed from every step",
        "",
        "Compared are each later step's batch, model size and loss, the metrics and the final prompt. CPU, float32.",
        "",
        "| run | " + " | ".join(POINTS) + " |",
        "| --- |" + " --- |" * len(POINTS),
    ]
    for kind, table in report["resume"].items():
        cells = []
        for point in POINTS:
            these = [r for r in table.values() if r["point"] == point]
            stages = sorted({r["stage"] for r in these})
            equal = sum(r["bit_equal"] for r in these)
            cells.append(f"{equal} / {len(these)} (stages {', '.join(map(str, stages))})" if these else "–")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines += ["", "## Faults", "", "| fault | what is promised, and checked | borne |", "| --- | --- | --- |"]
    lines += [f"| {n} | {f['promise']} | {'yes' if f['recovered'] else 'NO'} |" for n, f in faults.items()]
    lines += [
        "",
        "## Hostile files",
        "",
        "Made to do harm. Each is refused by one of the package's own errors within 15 s and 1000 MiB, or does none.",
        "",
        "| file | what is promised, and checked | held |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {n} | {f['promise']} | {'yes' if f['recovered'] else 'NO'} |" for n, f in hostile.items()]
    lines += [
        "",
        "## Two processes against one",
        "",
        "gloo on CPU, the same global batches; the last batch of an epoch has one example, so one process has none.",
        "",
        "| run | steps | largest relative difference of a loss | metrics equal |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {n} | {r['steps']} | {r['largest_relative_difference']:.1e} | {'yes' if r['metrics_equal'] else 'no'} |"
        for n, r in spread["runs"].items()
    ]
    killed = spread["one process killed"]
    lines += [
        "",
        "A run of two processes is stopped, and goes on from its checkpoint of step 6 with one or with four (`ld`, "
        "`--allow-changed`). Four cannot share the toy's two heads of keys and values:",
        "",
        "| `train.parallel`, processes | steps | largest relative difference of a loss | metrics equal |",
        "| --- | --- | --- | --- |",
        *(
            f"| {n} | {r['steps']} | {r['largest_relative_difference']:.1e} | {'yes' if r['metrics_equal'] else 'no'} |"
            for n, r in report["moved"].items()
        ),
        "",
        f"One of two processes killed: the other ends with exit code {killed['exit_code']} and says:",
        "",
        *(f"> {line}" for line in killed["said"]),
        "",
        "With weights that are sharded over the processes it says the same, and the checkpoint is as usable.",
        "",
        f"The last checkpoint (step {killed['checkpoint']}) verifies.",
        "",
        "## Fuzzing",
        "",
        "Each case works or ends in one of the package's own errors; anything else, or ten seconds, is a crash.",
        "",
        "| read | random cases | coverage-guided cases | crashes |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in report["fuzz"].items():
        other = report["coverage"].get(name)
        crashed = len(row["crashes"]) + (len(other["crashes"]) if other else 0)
        lines.append(f"| {name} | {row['cases']} | {other['cases'] if other else '–'} | {crashed} |")
    return "\n".join(lines) + "\n"


POINTS = ("within a stage", "before a growth", "at a growth", "after a growth")


def main(arguments: list[str] | None = None) -> int:
    """Make the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part of each, in about a minute")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--out", type=Path, help="write the report here; parts not run are kept from what is there")
    parser.add_argument("--page", type=Path, help="and as Markdown here")
    options = parser.parse_args(arguments)
    from fast_prompt_tuning.run.results import environment

    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.is_file() else {}
    report["command"] = "python benchmarks/reliability/run.py" + (" --quick" if options.quick else "")
    report["environment"] = environment("cpu")
    seconds = report.setdefault("seconds", {})
    for name in options.only.split(","):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            report[name] = PARTS[name](options.quick, Path(work))
        seconds[name] = round(time.monotonic() - start)
        print(f"{name}: {seconds[name]} s", flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.page:
        options.page.write_text(page(report))
    wrong = missed(report)
    print("\n".join(wrong) or "every target met")
    return int(bool(wrong) and options.check)


if __name__ == "__main__":
    sys.exit(main())
