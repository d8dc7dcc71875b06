"""What README and docs say is so: code runs, commands parse, numbers are those of committed results or of the code."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from settings import BY_NAME, HIDDEN
from toy import toy
from transformers import AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments
from typer.main import get_command

from fast_prompt_tuning import soft_prompt_config
from fast_prompt_tuning.cli import app as cli
from fast_prompt_tuning.cost.units import human_seconds
from fast_prompt_tuning.data import metrics, task_files, tasks
from fast_prompt_tuning.data.readers import load_examples
from fast_prompt_tuning.paper.costs import PAPER_TABLE2, paper_table1_flops, paper_table2_flops
from fast_prompt_tuning.plm import families
from fast_prompt_tuning.prompt.soft_prompt import save_suffix_prompt
from fast_prompt_tuning.recipe import load
from fast_prompt_tuning.report.signal import interval
from fast_prompt_tuning.report.tables import table_rows
from fast_prompt_tuning.run.results import load_result

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPRODUCTION = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
LANGUAGES = {"python", "sh", "yaml", "text"}
"""Of code blocks: the first three are checked below; `text` is output and the like."""


def blocks(text: str, language: str) -> list[str]:
    return [code for found, code in fenced(text) if found == language]


def fenced(text: str) -> list[tuple[str, str]]:
    """Every fenced block of a page as (language, code)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)


def pages_with(language: str) -> list[str]:
    return [name for name, path in PAGES.items() if blocks(path.read_text(encoding="utf-8"), language)]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    assert {language for language, _ in fenced(PAGES[page].read_text(encoding="utf-8"))} <= LANGUAGES


# -- python: the blocks of a page run one after the other, on tiny models ----------------------------------------------


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT's generate, of what it is given itself
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    """`...` stands for what a Trainer is usually given, and runs are short; the rest is as it stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "REGISTRY", dict(families.REGISTRY))
    monkeypatch.setattr(metrics, "_registry", dict(metrics.METRICS))
    family = BY_NAME["t5" if page == "README.md" else "llama"]
    batch = family.batch()
    plm = family.plm()
    get_peft_model(family.plm(), soft_prompt_config(plm, num_virtual_tokens=4)).save_pretrained("prompt")
    save_suffix_prompt("runs/news", torch.randn(4, HIDDEN), placement="suffix", base_model="m", model_fingerprint="")
    names = {
        "torch": torch,
        "tokenizer": AutoTokenizer.from_pretrained(toy().llama),
        "get_peft_model": get_peft_model,
        "Trainer": Seq2SeqTrainer,
        "Seq2SeqTrainer": Seq2SeqTrainer,
        "plm": plm,
        "t5": BY_NAME["t5"].plm(),
        "calibration_batches": [batch],
        "question": {k: batch[k][:1] for k in ("input_ids", "attention_mask")},
        "rows": [{k: v[i] for k, v in batch.items()} for i in range(3)] * 4,
        "collate": lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]},
        "args": Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
    }
    for code in blocks(PAGES[page].read_text(encoding="utf-8"), "python"):
        code = code.replace(" ..., ", " args=args, train_dataset=rows, data_collator=collate, ").replace("30_000", "4")
        exec(compile(code, page, "exec"), names)
    if 'save_pretrained("prompt")' in PAGES[page].read_text(encoding="utf-8"):
        assert (tmp_path / "prompt" / "adapter_model.safetensors").is_file()


# -- yaml: a task, or settings of a recipe -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml_blocks_are_valid(page):
    for text in blocks(PAGES[page].read_text(encoding="utf-8"), "yaml"):
        found = yaml.safe_load(text)
        if {"model", "output"} <= set(found):
            assert load(found)
            continue
        if "dataset_path" in found:  # a task of lm-evaluation-harness, which tests/engines runs
            continue
        if "input_template" in found:
            assert tasks.Task.model_validate(found)
            continue
        whole = yaml.safe_load(load("bbc_topics_smollm2").to_yaml())
        for section, values in found.items():
            whole[section] = {**whole[section], **values} if isinstance(whole.get(section), dict) else values
        assert load(whole)


# -- sh: every command of ours parses, every other one is there --------------------------------------------------------


def commands(page: str) -> list[str]:
    return [
        line
        for text in blocks(PAGES[page].read_text(encoding="utf-8"), "sh")
        for line in text.replace("\\\n", " ").splitlines()
        if line.split("#")[0].strip()
    ]


def parse(line: str) -> None:
    """Parse an `fpt` line as the command does; nothing is run."""
    program, *words = shlex.split(line.split(" > ")[0], comments=True)
    assert program == "fpt"
    group = get_command(cli.app)
    if words[0] in ("--install-completion", "--show-completion"):
        assert any(words[0] in option.opts for option in group.params)
        return
    context = group.make_context("fpt", words)
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", pages_with("sh"))
def test_shell_blocks_parse(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M)
    for line in commands(page):
        program, *words = shlex.split(line, comments=True)
        if program == "fpt":
            parse(line)
        elif program == "make":
            assert words[0] in targets, line
        elif "-m fast_prompt_tuning " in line:
            assert program in ("torchrun", "accelerate"), line
            parse("fpt " + line.split("-m fast_prompt_tuning ")[1])
        elif module := re.search(r"-m fast_prompt_tuning\.(\S+)", line):
            assert (ROOT / "src/fast_prompt_tuning" / f"{module[1].replace('.', '/')}.py").is_file(), line
        elif program in ("python", "torchrun"):
            (script,) = (w for w in words if w.endswith(".py"))
            assert (ROOT / script).is_file(), line
        else:
            assert (program, words[0]) == ("pip", "install"), line
            assert all(e in extras for w in words for e in re.findall(r"\[([\w-]+)\]", w)), line


def test_every_commands_help_ends_with_an_example_that_parses():
    for name, command in get_command(cli.app).commands.items():
        _, example = cli.COMMANDS[name]
        assert command.epilog == f"Example: {example}"
        assert example.startswith(f"fpt {name}")
        parse(example)


@pytest.mark.parametrize("line", ["fpt trian", "fpt train", "fpt ls --nothing", "fpt plan --model m --steps many"])
def test_a_wrong_command_would_be_seen(line):
    with pytest.raises(Exception, match=r"(?i)no such|missing|not a valid|valid integer"):
        parse(line)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_exist(page):
    known = set(get_command(cli.app).commands)
    assert set(re.findall(r"`fpt ([a-z]+)", PAGES[page].read_text(encoding="utf-8"))) <= known


# -- the site ----------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "PartialPLM" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for page in tmp_path.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", page.read_text(encoding="utf-8")):
            address = re.search(r"(?:src|href)=\"?(https?:)?//", tag)
            assert not address or "canonical" in tag, (page.name, tag)


def test_every_page_is_in_the_sites_navigation_or_one_step_from_it():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w/]+\.md)$", settings, flags=re.M))
    assert len(listed) <= 25
    reached = set(re.findall(r"^  ([\w/]+\.md)$", settings, flags=re.M))
    assert listed | reached == {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    for page in reached:
        name = re.escape(page.rsplit("/")[-1])
        linking = [p for p in listed if re.search(rf"\]\([\w./]*\b{name}", PAGES[f"docs/{p}"].read_text("utf-8"))]
        assert linking, f"{page} is in no menu, and no page of the menu links to it"


@pytest.mark.parametrize(("script", "picture"), [("draw", "how_it_works"), ("house", "house")])
def test_a_figure_is_drawn_by_its_script(tmp_path, script, picture):
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures" / f"{script}.py"))["draw"](tmp_path / "drawn.svg")
    texts = [re.findall(r"<!-- (.*?) -->", p.read_text()) for p in (drawn, ROOT / f"docs/pictures/{picture}.svg")]
    assert texts[0] == texts[1]
    assert {"how_it_works": "3 layers × 512", "house": "schedule/"}[picture] in texts[0]


def test_the_terminal_shows_the_recorded_session(tmp_path):
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures" / "terminal.py"))["draw"](tmp_path / "drawn.svg")
    assert drawn.read_bytes() == (ROOT / "docs" / "pictures" / "terminal.svg").read_bytes()
    session = (ROOT / "docs" / "pictures" / "terminal.txt").read_text(encoding="utf-8")
    for line in session.splitlines():
        if line.startswith("$ "):
            parse(line.removeprefix("$ "))


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_readmes_demo_is_the_committed_one():
    record = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    for run in record["runs"].values():
        parts = [run["relative_flops"], run["relative_seconds"]] if run["flops"] else [None, None]
        cells = [run["name"], f"{run['value']:.1f}", *("–" if p is None else f"{100 * p:.0f}%" for p in parts)]
        assert f"| {' | '.join(cells)} |" in README
    assert (ROOT / "docs" / "pictures" / "demo.png").is_file()


def test_the_step_times_are_the_committed_ones():
    record = json.loads((ROOT / "benchmarks" / "results" / "step_time.json").read_text())
    page = PAGES["docs/fast_step.md"].read_text(encoding="utf-8")
    for result in record["results"]:
        row = next(line for line in page.splitlines() if line.startswith(f"| {result['title']} |"))
        assert f"| {result['plain']['median']:.2f} | {result['fpt_run']['median']:.2f} |" in row


@pytest.mark.parametrize("convention", ["linear", "all"])
def test_the_flops_columns_are_what_the_code_counts(convention):
    found = [f"{100 * part:.1f}" for part in paper_table1_flops("large", convention=convention)]
    for start in (0, 3, 6):
        assert " / ".join(found[start : start + 3]) in REPRODUCTION
    runs = paper_table2_flops("large", convention=convention)
    assert " / ".join(f"{100 * runs[m]:.1f}" for m in PAPER_TABLE2["large"]) in REPRODUCTION


def test_the_table_of_many_prompts_is_the_committed_one():
    page = PAGES["docs/guides/serving.md"].read_text(encoding="utf-8")
    for r in json.loads((ROOT / "benchmarks" / "results" / "many_prompts.json").read_text()):
        cells = [f"{r['seconds_a_text']['shared']:.2f}", f"{r['ratio']:.0%}", f"{r['ratio_to_in_front']:.0%}"]
        assert f"| {r['batch']} | {' | '.join(cells)} |" in page
        assert r["same_answers"] == 1


def test_the_engines_answers_are_the_committed_ones():
    pages = {"lm_eval": "docs/guides/lm_eval.md", "pipeline": "docs/guides/serving.md"}
    places = {"prefix": "in front", "suffix": "after the text", "infix": "within the text"}
    for r in json.loads((ROOT / "benchmarks" / "results" / "engines.json").read_text()):
        page = PAGES[pages[r["engine"]]].read_text(encoding="utf-8")
        assert f"| {places[r['placement']]} | {r['equal']} of {r['examples']} |" in page


def test_llama_cpps_answers_are_the_committed_ones():
    page = PAGES["docs/guides/llama_cpp.md"].read_text(encoding="utf-8")
    places = {"prefix": "in front", "suffix": "after the text"}
    for r in json.loads((ROOT / "benchmarks/results/gguf_answers.json").read_text())["runs"]:
        assert r["equal"] + len(r["different"]) == r["examples"]
        gap = max(abs(pair["log_probability"]) for pair in r["different"])
        assert f"| {places[r['placement']]} | {r['equal']} of {r['examples']} | {gap:.3f} |" in page


LONGEST_SENTENCE = 25


@pytest.mark.parametrize("name", PAGES)
def test_sentences_are_short(name):
    text = re.sub(r"```.*?```", "", PAGES[name].read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "!"))]
    prose = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", "\n".join(lines)))
    paragraphs = re.split(r"\n\s*\n|\n\s*[-*] |\n\d+\. ", prose)
    ends = r"(?<=[.!?;:])[*)\]]*\s+|(?<=[.!?;:][*)])[*]*\s+"
    found = [part for each in paragraphs for part in re.split(ends, each.replace("\n", " "))]
    assert [part for part in found if len(part.split()) > LONGEST_SENTENCE] == []


def test_the_page_of_settings_is_the_codes():
    made = [sys.executable, "-c", "import settings; print(settings.page(), end='')"]
    printed = subprocess.run(made, capture_output=True, text=True, check=True, cwd=ROOT / "docs").stdout
    assert printed == PAGES["docs/settings.md"].read_text(encoding="utf-8"), "run python docs/settings.py"


def test_the_readme_is_short():
    assert len(README.split()) <= 700
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", README, flags=re.DOTALL)
    assert len(re.findall(r"(?<![\w.-])\d[\d.,]*", prose)) <= 40


def test_the_task_in_the_guide_loads_and_renders(tmp_path):
    page = (ROOT / "docs" / "guides" / "own_task.md").read_text(encoding="utf-8")
    (text,) = (block for block in blocks(page, "yaml") if "name" in yaml.safe_load(block))
    (tmp_path / "tickets.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "train.jsonl").write_text('{"text": "My bill is wrong", "label": "billing"}\n')
    task = task_files.load_task(str(tmp_path / "tickets.yaml"))
    (row,) = load_examples(task, "train", decoder=True)
    assert row["input"] == "My bill is wrong\nTeam:"
    assert row["target"] == " billing"


def test_recipes_in_the_readme_exist():
    for name in re.findall(r"fpt show recipe (\w+)", README):
        recipe = ROOT / "src" / "fast_prompt_tuning" / "recipes" / f"{name}.yaml"
        assert yaml.safe_load(recipe.read_text(encoding="utf-8"))


def test_the_gpus_numbers_are_the_committed_ones():
    page = PAGES["docs/reproduction.md"].read_text(encoding="utf-8")
    large, xl = (
        json.loads((ROOT / f"benchmarks/results/gpu_cost_{name}.json").read_text()) for name in ("large", "xl")
    )
    for a, b in zip(large["rows"], xl["rows"], strict=True):
        numbers = (a["wall_clock"], a["flops_all"], b["wall_clock"], b["flops_all"])
        row = f"| {a['method'].upper()} {a['layers']}, {a['ffn']} / {b['ffn']} | "
        assert row + " | ".join(f"{n:.1f}" for n in numbers) + f" | {a['paper_wall_clock']} |" in page
    for found in (large, xl):
        assert f"{100 * found['full']['utilisation']:.0f}% " in page
        assert f"{found['peak_memory_bytes'] / 2**30:.1f} GiB" in page


def test_the_guides_numbers_are_the_committed_ones():
    demo = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["runs"]
    row = next(line for line in PAGES["docs/guides/schedule.md"].read_text().splitlines() if "demo.json" in line)
    assert f"{demo['cr']['value']:.1f}% against {demo['plain']['value']:.1f}% of plain" in row
    assert f"for {100 * demo['cr']['relative_flops']:.0f}% of its FLOPs" in row
    guide = PAGES["docs/guides/own_task.md"].read_text()
    results = ROOT / "benchmarks" / "results" / "tasks"
    for name, metric, start in (
        ("topics", "accuracy", "| BBC topics"),
        ("headlines", "rougeL", "| BBC headlines"),
        ("squad2", "em", "| SQuAD 2.0"),
    ):
        record = json.loads((results / f"{name}.json").read_text())
        row = next(line for line in guide.splitlines() if line.startswith(start))
        values = (record[which]["metrics"][metric] for which in ("zero_shot", "tuned"))
        assert row.endswith("| " + " | ".join(f"{value:.1f}" for value in values) + " |"), row


def test_the_readme_lists_every_model_type():
    built_in = {model_type for family in families._BUILT_IN for model_type in (family.name, *family.peers)}
    assert not {name for name in built_in if f"`{name}`" not in README}


def test_the_reports_picture_is_of_the_committed_runs():
    plain, fpt = (load_result(ROOT / "benchmarks" / "results" / "report" / f"{name}.json") for name in ("pt", "cr"))
    guide = PAGES["docs/guides/cli.md"].read_text()
    lower = plain.metrics["accuracy"] - fpt.metrics["accuracy"]
    assert f"ends {lower:.0f} points lower" in guide
    assert 0.98 < table_rows([plain, fpt])[1]["relative_flops"] < 1.02  # "as much as plain prompt tuning"
    assert f"{plain.steps} steps of 8 examples, one seed, {plain.examples} validation examples" in guide
    assert (ROOT / "docs" / "pictures" / "report.png").is_file()


def test_the_fidelity_table_is_the_committed_one():
    page = (ROOT / "docs" / "methods" / "layer_selection.md").read_text(encoding="utf-8")
    found = [
        json.loads((ROOT / "benchmarks" / "results" / f"fidelity_{model}.json").read_text(encoding="utf-8"))["fidelity"]
        for model in ("smollm2", "gemma")
    ]
    assert [f"{f['full_loss']:.2f}" in page for f in found] == [True, True]
    sizes = (90, 75, 50, 25)
    for i, pair in enumerate(zip(*(f["rows"] for f in found), strict=True)):
        cells = [f"{r['relative_flops']:.0%} | {r['loss']:.2f}, {r['agreement']:.0%}" for r in pair]
        assert f"| `{pair[0]['selection']}` | {sizes[i % 4]}% | {' | '.join(cells)} |" in page


def test_the_signals_table_is_the_committed_one():
    page = PAGES["docs/methods/signal.md"].read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "signal_smollm2.json").read_text(encoding="utf-8"))["signal"]
    first, second = (prompt["rows"] for prompt in found["prompts"])
    for name, row in first.items():
        cells = [interval(each[name][key]) for each in (first, second) for key in ("cosine", "per_flop")]
        assert f"| {name} | {row['flops']:.0%} | {' | '.join(cells)} |" in page
    assert f'"{found["verdict"]}"' in page
    assert f"moved by {found['prompts'][1]['moved']:.2f} of its norm" in page
    steps = sum(found["flops"].values()) / found["prompts"][0]["step_flops"]
    assert f"It took {steps:.0f} plain steps: {human_seconds(found['seconds'])}" in page
    assert (found["examples"], found["dtype"]) == (64, "bfloat16")


@pytest.mark.parametrize("kind", ["influence", "greedy"])
def test_the_signal_of_layer_choices_is_the_committed_one(kind):
    page = PAGES["docs/methods/signal.md"].read_text(encoding="utf-8")
    file = ROOT / "benchmarks" / "results" / f"signal_smollm2_{kind}.json"
    found = json.loads(file.read_text(encoding="utf-8"))["signal"]
    assert found["keep_layers"] == kind
    for size in (22, 15):
        rows = [prompt["rows"][f"{size} layers × 1536 neurons"] for prompt in found["prompts"]]
        cells = [interval(row[key]) for row in rows for key in ("cosine", "per_flop")]
        assert f"| {size} of 30 | `{kind}` | {' | '.join(cells)} |" in page


def test_the_study_of_the_signal_is_the_committed_one():
    study = [sys.executable, str(ROOT / "benchmarks" / "signal_study.py"), "--summary"]
    printed = subprocess.run(study, capture_output=True, text=True, check=True).stdout
    stages, runs, partial, prompts, along = printed.strip().split("\n\n")
    page = PAGES["docs/methods/signal.md"].read_text(encoding="utf-8")
    assert stages in page
    assert runs in page
    assert along in page
    median, best = re.findall(r"\d\.\d\d", partial)
    assert f"{partial.split()[0]} partial stages taught {median}" in page.replace("\n", " ")
    assert f"at most {best}" in page
    shown = [row for row in prompts.splitlines()[2:] if "-influence" not in row]
    assert [row for row in shown if row not in page] == []


def test_the_tables_of_held_out_loss_are_the_committed_ones_and_meet_their_targets():
    script = [sys.executable, str(ROOT / "benchmarks" / "quality" / "held_out.py"), "--check"]
    chosen, rates, runs = (
        subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip().split("\n\n")
    )
    assert chosen in PAGES["docs/methods/auto.md"].read_text(encoding="utf-8")
    assert rates in PAGES["docs/methods/rate.md"].read_text(encoding="utf-8")
    assert runs in PAGES["docs/measured.md"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("adapters.py", "docs/guides/schedule.md"),
        ("grown_placement.py", "docs/methods/auto.md"),
        ("reparametrised.py", "docs/methods/auto.md"),
    ],
)
def test_the_table_of_a_comparison_is_the_committed_one(script, page):
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--summary"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert len(table.splitlines()) > 3
    assert table in PAGES[page].read_text(encoding="utf-8")


def test_the_table_of_slow_prompts_is_the_committed_one():
    script = [sys.executable, str(ROOT / "benchmarks" / "slow_prompt.py"), "--summary"]
    table, certain = subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip().split("\n\n")
    page = PAGES["docs/methods/layer_dropping.md"].read_text(encoding="utf-8")
    assert table in page
    assert certain in page
