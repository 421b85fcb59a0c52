"""The command line. A heavy module is imported only when a command needs it."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfcompress.utils.errors import HfcompressError, Problem, disk_problem, require_directory
from hfcompress.utils.launch import is_lost_process
from hfcompress.utils.logging import (
    err,
    guard_terminal,
    log,
    log_to_terminal,
    out,
    print_table,
    print_text,
    print_traceback,
)
from hfcompress.utils.stop import stoppable

if TYPE_CHECKING:
    from hfcompress.report.gate import Limits

app = typer.Typer(
    name="hfcompress",
    help="Make a Hugging Face transformer small, fast and cheap, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: stages.0.train.epochs=1")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The run directory; default runs/NAME.")]


def _load(recipe: str, overrides: list[str] | None) -> Any:
    from hfcompress.recipe.loader import find, load

    return load(find(recipe), overrides)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="recipes, losses, criteria, backends or metrics; all if left out")] = "",
) -> None:
    """List the shipped recipes, and everything that a recipe can name."""
    from hfcompress.report.listing import SECTIONS, render_section

    if what and what not in SECTIONS:
        from hfcompress.utils.errors import did_you_mean

        raise HfcompressError(f"there is no list of '{what}'", did_you_mean(what, SECTIONS))
    for name in [what] if what else SECTIONS:
        out().print(render_section(name))


@app.command()
def show(recipe: RecipeFile, overrides: Overrides = None, full: bool = False) -> None:
    """Print a recipe; --full adds every default."""
    from hfcompress.recipe.schema import spell_out
    from hfcompress.recipe.yaml_text import dump_yaml

    loaded = _load(recipe, overrides)
    text = dump_yaml(spell_out(loaded.recipe)) if full or overrides else loaded.document.text
    out().print(text.rstrip("\n"))


@app.command()
def copy(
    recipe: RecipeFile,
    target: Annotated[
        Path | None, typer.Argument(help="A file or directory; default: this directory, with the same name.")
    ] = None,
) -> None:
    """Copy a shipped recipe so that you can edit it; no file is overwritten."""
    from hfcompress.recipe.loader import find, read

    source = read(find(recipe))
    path = target or Path(source.path.name)
    path = path / source.path.name if path.is_dir() else path
    if path.exists():
        raise HfcompressError(f"{path} exists already", "give another name")
    require_directory(path.parent, "the directory to copy into")
    path.write_text(source.text, encoding="utf-8")
    out().print(f"{path}: edit it, then `hfcompress check {path}`")


@app.command()
def init(
    model: Annotated[str, typer.Option("--model", "-m", help="A directory or Hub id.")],
    data: Annotated[
        str,
        typer.Option("--data", "-d", help="A csv, tsv, jsonl, json, txt or parquet file, a directory, or a Hub id."),
    ],
    text: Annotated[str, typer.Option(help="The column with the text, or two with a comma; guessed by default.")] = "",
    label: Annotated[str | None, typer.Option(help="The column with the label; guessed by default.")] = None,
    task: Annotated[
        str | None, typer.Option(help="The type of the task, such as regression; guessed by default.")
    ] = None,
    target_speedup: Annotated[
        float, typer.Option(min=1.0, max=100.0, help="How much faster it should get on a CPU.")
    ] = 3.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe file; default: NAME.yaml here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides how one file is split.")] = 42,
    encoding: Annotated[str, typer.Option(help="The encoding of text files, such as cp1252.")] = "utf-8",
    config: Annotated[
        str | None, typer.Option("--config", help="The configuration of a data set on the Hub, such as sst2.")
    ] = None,
) -> None:
    """Look at a data file and write a first recipe for it; one file is split into train, dev and test."""
    from hfcompress.recipe.proposal import propose
    from hfcompress.report.statistics.power import describe_test_size
    from hfcompress.utils.wording import count

    columns = tuple(name.strip() for name in text.split(",") if name.strip())
    _hide_foreign_progress()
    made = propose(model, data, output, columns, label, task, target_speedup, seed, encoding, config)
    found = made.columns
    out().print(f"task: {found.type}; text: {', '.join(found.text)}; label: {found.label or 'none'}")
    for fact in made.profile.describe():
        out().print(fact)
    if made.split is not None:
        left_out = f"; left out: {count(made.left_out, 'row')} without text or label" if made.left_out else ""
        out().print(f"split: {data} into {made.split}{left_out}")
    rows = made.profile.rows
    judged = "test" if "test" in rows else "dev"
    if found.type == "text-classification":
        out().print(f"{judged}: {describe_test_size(rows[judged])}")
    out().print(f"stages: {', '.join(made.stages)}")
    if found.label is None:
        log.warning("no column looks like a label, so it is read as raw text; name one with --label")
    for warning in made.profile.warnings():
        log.warning(warning)
    out().print(f"{made.path}: read it, then `hfcompress check {made.path}` and `hfcompress run {made.path}`")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, by which an editor completes and checks them."""
    import json

    from hfcompress.recipe.json_schema import make_json_schema

    out().print(json.dumps(make_json_schema(), indent=2, ensure_ascii=False))


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Find every mistake in a recipe, before anything is trained."""
    from hfcompress.recipe.license import ask_for_license
    from hfcompress.recipe.validate import check as check_
    from hfcompress.report.doctor import list_warnings

    loaded = _load(recipe, overrides)
    check_(loaded)
    ask_for_license(loaded.recipe)
    for warning in list_warnings(loaded.recipe):
        log.warning(warning)
    out().print(f"{loaded.document.path} is correct: {', '.join(loaded.recipe.stage_names())}")


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Show the shape, parameters, bytes, MACs and steps of each stage, without loading weights.

    The figures are exact, except those with ~, which depend on a budget or a corpus.
    """
    from hfcompress.recipe.plan import plan as plan_
    from hfcompress.report.listing import render_plan

    loaded = _load(recipe, overrides)
    rows = plan_(loaded)
    out().print(loaded.headline)
    print_table(render_plan(rows, loaded.recipe.task.max_length))


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Output = None,
    only: Annotated[str | None, typer.Option(help="Run only the stages of this kind.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
) -> None:
    """Run a recipe. The same command again resumes at the first unfinished stage."""
    from hfcompress.utils.launch import hand_over_to_torchrun

    hand_over_to_torchrun()
    loaded = _load(recipe, overrides)
    if only is not None and only not in KINDS:
        from hfcompress.utils.errors import did_you_mean

        raise HfcompressError(f"--only {only}: there is no such kind of stage", did_you_mean(only, KINDS))
    from hfcompress.run.runner import run as run_

    _hide_foreign_progress()
    finished = run_(loaded, output or Path("runs") / loaded.recipe.name, only, fresh)
    if finished is not None:
        _print_run(finished.report, finished.directory)
        if finished.commit:
            out().print(f"pushed {finished.commit}")
        if finished.push_problem:
            _complain([str(finished.push_problem)])
            raise typer.Exit(1)


def _hide_foreign_progress() -> None:
    """Hides the progress bars of files that libraries read and write; the bars of trainings stay."""
    import logging as standard

    from transformers.utils import logging

    # They warn of kernels that they could download or that are for GPUs, and of what one library does with another.
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        standard.getLogger(name).setLevel(standard.ERROR)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


KINDS = ("finetune", "distill", "prune", "quantize")


def _print_report(content: dict[str, Any], wide: bool = False) -> None:
    """Prints the table, how the last model (or, if wide, each) compares with the source, and how it was measured."""
    from hfcompress.report.conditions import describe_conditions
    from hfcompress.report.cost_tables import render_cost_tables
    from hfcompress.report.tables import describe_left_out, render_table
    from hfcompress.report.verdicts import describe_verdicts

    print_table(render_table(content, wide))
    for line in describe_left_out(content, wide):
        out().print(line)
    for table in render_cost_tables(content) if wide else ():
        out().print()
        print_table(table)
    for sentence in describe_verdicts(content)[0 if wide else -1 :]:
        print_text(sentence)
    print_text(describe_conditions(content))


def _print_run(content: dict[str, Any], directory: Path, wide: bool = False) -> None:
    from hfcompress.report.conditions import was_busy

    _print_report(content, wide)
    if was_busy(content):
        out().print(f"busy   to time the models again: hfcompress report {directory} --measure")
    for label, path in (
        ("plot", directory / "plots" / "tradeoff.png"),
        ("report", directory / "report.md"),
        ("page", directory / "report.html"),
        ("model", directory / "final"),
        ("card", directory / "final" / "README.md"),
    ):
        if path.exists():
            out().print(f"{label:7}{path}")


Wide = Annotated[bool, typer.Option("--wide", help="Print all columns, however wide the terminal is.")]
MaxDrop = Annotated[
    str | None, typer.Option(metavar="MARGIN", help="The largest loss of quality: 1% of the source's, or 0.01.")
]
PerClass = Annotated[str | None, typer.Option(metavar="MARGIN", help="The largest loss of F1 of any class.")]
MinSpeedup = Annotated[
    float | None, typer.Option(min=0.0, help="How many times faster it must be, at each batch size and length timed.")
]
At = Annotated[
    str | None, typer.Option(metavar="BATCH[xLENGTH]", help="Judge the speed-up there alone: 32, or 1x64 for a length.")
]
MaxMb = Annotated[float | None, typer.Option(min=0.0, help="The largest size of its weights, in MB.")]
MaxWh = Annotated[float | None, typer.Option(min=0.0, help="The largest energy of 1,000 rows, in watt-hours.")]
ByEstimate = Annotated[bool, typer.Option("--by-estimate", help="Judge the measured figures, however unsure they are.")]
Model = Annotated[str | None, typer.Option("--model", help="The row to judge; default: the last.")]


def _read_limits(
    max_drop: str | None,
    per_class: str | None,
    min_speedup: float | None,
    max_mb: float | None,
    max_wh: float | None,
    by_estimate: bool,
    at: str | None,
) -> Limits:
    from hfcompress.report.gate import Limits
    from hfcompress.utils.margin import Margin, parse_margin

    def read(option: str, value: str | None) -> Margin | None:
        try:
            return None if value is None else parse_margin(value)
        except ValueError as error:
            raise HfcompressError(f"{option}: {error}") from None

    if at is not None and min_speedup is None:
        raise HfcompressError(f"--at {at} says where a speed-up is judged", "give --min-speedup too")
    drop, classes = read("--max-drop", max_drop), read("--per-class", per_class)
    return Limits(drop, classes, min_speedup, max_mb, max_wh, by_estimate, at)


def _judge(content: dict[str, Any], limits: Limits, model: str | None) -> tuple[str, int]:
    """Prints the verdict for people on standard error; returns it as JSON, and the exit code."""
    import json

    from hfcompress.report.gate import EXIT, as_json, check_limits

    checks = check_limits(content, limits, model)
    for check in checks:
        err().print(f"{check.verdict}: {check.limit}: {check.sentence}")
    verdict = as_json(content, checks, model)
    return json.dumps(verdict, indent=2) + "\n", 0 if verdict["passed"] else EXIT


@app.command()
def gate(
    report: Annotated[Path, typer.Argument(metavar="RUN|REPORT", help="A run directory, or a report.json.")],
    max_drop: MaxDrop = None,
    per_class: PerClass = None,
    min_speedup: MinSpeedup = None,
    max_mb: MaxMb = None,
    max_wh: MaxWh = None,
    by_estimate: ByEstimate = False,
    at: At = None,
    model: Model = None,
) -> None:
    """Judge a measured model by limits: exit 0 if it keeps to all of them, 3 if not or if that is not shown.

    The verdict is JSON on standard output.
    """
    from hfcompress.report.report import read, read_file

    limits = _read_limits(max_drop, per_class, min_speedup, max_mb, max_wh, by_estimate, at)
    if not limits:
        raise HfcompressError("no limit is given", "such as --max-drop 1%, --min-speedup 3 or --max-mb 30")
    verdict, status = _judge(read_file(report) if report.is_file() else read(report), limits, model)
    out().print(verdict, end="")
    raise typer.Exit(status)


def _refuse_to_write_into_a_run(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise HfcompressError(f"{output} is a file, not a directory", "choose another one with --output")
    if (output / "recipe.lock.json").exists():
        raise HfcompressError(f"{output} is a run directory and has its own report", "choose another one with --output")


@app.command()
def search(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Output = None,
    max_drop: MaxDrop = None,
    goal: Annotated[str | None, typer.Option(help="latency or size.")] = None,
    hours: Annotated[float | None, typer.Option(help="Time for the whole search.")] = None,
    min_speedup: MinSpeedup = None,
    max_mb: MaxMb = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="A database for the trials; default: a file in the run.")
    ] = None,
) -> None:
    """Find the fastest (or smallest) model within a limit on the loss of quality, by trying chains of stages.

    Exit 0 if one was found, 3 if not: the nearest attempt is then kept. The same command again goes on.
    """
    from hfcompress.recipe.loader import load_with_target

    named = {"max_drop": max_drop, "goal": goal, "hours": hours, "min_speedup": min_speedup, "max_mb": max_mb}
    _search(load_with_target(recipe, overrides, named), output, storage)


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A directory or Hub id.")],
    data: Annotated[str, typer.Argument(help="A data file, or a directory with splits.")],
    text: Annotated[str, typer.Option(help="The column with the text, or two with a comma; guessed by default.")] = "",
    label: Annotated[str | None, typer.Option(help="The column with the label; guessed by default.")] = None,
    max_drop: MaxDrop = None,
    goal: Annotated[str | None, typer.Option(help="latency or size.")] = None,
    hours: Annotated[float | None, typer.Option(help="Time for the whole search.")] = None,
    min_speedup: MinSpeedup = None,
    max_mb: MaxMb = None,
    output: Output = None,
) -> None:
    """Make a model as fast as a limit on the loss of quality allows: `init`, then `search`, in one command."""
    from hfcompress.recipe.loader import load_with_target
    from hfcompress.recipe.proposal import name_recipe, propose

    path = name_recipe(data)
    _hide_foreign_progress()
    if path.exists():
        held = _load(str(path), None).recipe
        if held.model != model:
            raise HfcompressError(
                f"{path} is there, and is a recipe for {held.model}, not for {model}",
                f"remove it, or use it as it is: `hfcompress search {path}`",
            )
        log.info(f"{path} is there, and is used: its data is {held.task.dataset}, columns {', '.join(held.task.text)}")
    else:
        columns = tuple(name.strip() for name in text.split(",") if name.strip())
        made = propose(model, data, path, columns, label)
        for warning in made.profile.warnings():
            log.warning(warning)
    named = {"max_drop": max_drop, "goal": goal, "hours": hours, "min_speedup": min_speedup, "max_mb": max_mb}
    _search(load_with_target(str(path), None, named), output, None)


def _search(loaded: Any, output: Path | None, storage: str | None) -> None:
    import json

    from hfcompress.report.gate import EXIT
    from hfcompress.searching.run import FOLDER, find_model
    from hfcompress.searching.table import render_trials

    _hide_foreign_progress()
    directory = output or Path("runs") / loaded.recipe.name
    found = find_model(loaded, directory, storage)
    print_table(render_trials(json.loads((directory / FOLDER / "search.json").read_text(encoding="utf-8"))))
    if found.run is None:
        raise HfcompressError("every trial failed", f"see {directory / FOLDER / 'search.json'}")
    _print_run(found.run.report, found.run.directory)
    if found.ending.best is None:
        err().print("no model keeps to the limits; the one above is the nearest attempt")
        raise typer.Exit(EXIT)


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Directories or Hub ids; the others are compared with the first."),
    ],
    task: Annotated[
        str, typer.Option("--task", metavar="RECIPE", help="The recipe with the task and the options of `measure`.")
    ],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report into this directory.")] = None,
    wide: Wide = False,
    max_drop: MaxDrop = None,
    per_class: PerClass = None,
    min_speedup: MinSpeedup = None,
    max_mb: MaxMb = None,
    max_wh: MaxWh = None,
    by_estimate: ByEstimate = False,
    at: At = None,
    model: Model = None,
) -> None:
    """Measure any models side by side on the same rows; DIRECTORY:FILE.onnx picks one of several graphs.

    With limits it ends as `gate` does: exit 3 if the last model does not keep to them.
    """
    from hfcompress.measure.answers import FILE, write_answers
    from hfcompress.report.report import write
    from hfcompress.run.compare import compare
    from hfcompress.run.directory import exclusive
    from hfcompress.utils.files import write_text

    if output is not None:
        _refuse_to_write_into_a_run(output)
    limits = _read_limits(max_drop, per_class, min_speedup, max_mb, max_wh, by_estimate, at)
    _hide_foreign_progress()
    content, answers = compare(models, _load(task, overrides))
    _print_report(content, wide)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        with exclusive(output):
            write_answers(answers, [row["stage"] for row in content["rows"]], output / FILE)
            write(content, output)
        out().print(f"report {output / 'report.md'}")
        out().print(f"page   {output / 'report.html'}")
    if limits:
        verdict, status = _judge(content, limits, model)
        if output is not None:
            write_text(output / "gate.json", verdict)
        raise typer.Exit(status)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A directory or Hub id; only its config is read.")
    ] = None,
) -> None:
    """Show which backends run well on this machine; or what of a MODEL can be cut, and how the result loads."""
    from hfcompress.data.source import model_config
    from hfcompress.measure.hardware import abilities, describe_abilities
    from hfcompress.measure.machine import watch_machine
    from hfcompress.report.doctor import examine, render_findings
    from hfcompress.report.listing import render_backends

    diagnosis = examine(model_config(model)) if model is not None else None
    facts = {**describe_abilities(abilities()), **(diagnosis.facts if diagnosis else {"just now": watch_machine()})}
    for name, value in facts.items():
        out().print(f"{name:16} {value}")
    print_table(render_findings(diagnosis) if diagnosis else render_backends())


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A pruned checkpoint: a directory or Hub id.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The directory to write; it must not exist.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="A model with the config and tokenizer that SOURCE lacks."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read pickled weights: only tensors, and no code."),
    ] = False,
) -> None:
    """Convert a pruned checkpoint of transformers 4, TextPruner, CoFi or nn_pruning so that it loads again."""
    from hfcompress.pruning.convert.convert import convert as convert_
    from hfcompress.pruning.convert.convert import summarize

    _hide_foreign_progress()
    for line in summarize(convert_(source, target, base, allow_pickle)):
        out().print(line)
    out().print(f"model {target}")


RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/NAME.")]


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, such as runs/NAME.")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the models again, then write the report, plots and card.")
    ] = False,
    wide: Wide = False,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="Write the scores as files of another format: every-eval-ever."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the comparison of several runs into this directory.")
    ] = None,
) -> None:
    """Print the report of a run again, and redraw its plots; of several runs, put their last models side by side.

    Of runs that differ only in the seed, it also prints mean ± standard deviation.
    """
    from hfcompress.report.report import read, write
    from hfcompress.run.directory import exclusive

    if output is not None and len(runs) == 1:
        raise HfcompressError("--output is for several runs", "one run has its report in its own directory")
    if format_ is not None:
        if len(runs) > 1 or measure:
            raise HfcompressError("--format writes the scores of one run", "name one run, without --measure")
        _write_format(runs[0], format_)
        return
    if len(runs) > 1:
        if measure:
            raise HfcompressError("--measure times the models of one run", "name one run at a time")
        if output is not None:
            _refuse_to_write_into_a_run(output)
        _print_side_by_side(runs, wide, output)
        return
    (run_directory,) = runs
    if measure:
        from hfcompress.run.again import measure_again

        _hide_foreign_progress()
        content = measure_again(run_directory)
    else:
        read(run_directory)
        with exclusive(run_directory):
            content = read(run_directory)
            write(content, run_directory)
    _print_run(content, run_directory, wide)


def _write_format(run_directory: Path, name: str) -> None:
    import time

    from hfcompress.report.every_eval_ever import write_records
    from hfcompress.run.directory import exclusive, open_finished

    if name != "every-eval-ever":
        raise HfcompressError(f"there is no format '{name}'", "the only one is every-eval-ever")
    open_finished(run_directory)
    with exclusive(run_directory):
        loaded, content = open_finished(run_directory)
        for path in write_records(loaded, content, run_directory, int(time.time())):
            out().print(str(path))


def _print_side_by_side(runs: list[Path], wide: bool, output: Path | None) -> None:
    from hfcompress.report.report import read, write
    from hfcompress.report.seeds import group_by_seed, read_recipe, render_group
    from hfcompress.report.side_by_side import join_reports

    distinct = len({run.name for run in runs}) == len(runs)
    directories = {run.name if distinct else str(run): run for run in runs}
    contents = {name: read(run) for name, run in directories.items()}
    joined = join_reports(contents)
    _print_report(joined, wide)
    recipes = {name: read_recipe(run, contents[name]) for name, run in directories.items()}
    for group in group_by_seed(contents, recipes):
        out().print()
        print_table(render_group(group))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write(joined, output)
        out().print(f"page   {output / 'report.html'}")


@app.command()
def card(
    run_directory: RunDirectory,
    write_: Annotated[bool, typer.Option("--write", help="Write the card into final/ instead of printing it.")] = False,
) -> None:
    """Render the model card of a run from its report."""
    from hfcompress.run.directory import exclusive, open_finished
    from hfcompress.utils.files import write_text

    open_finished(run_directory)
    with exclusive(run_directory) if write_ else nullcontext():
        text = _render_card(run_directory)
        if write_:
            write_text(run_directory / "final" / "README.md", text)
    if write_:
        out().print(str(run_directory / "final" / "README.md"))
    else:
        out().print(text, end="")


def _render_card(run_directory: Path) -> str:
    from hfcompress.models.artifact import open_artifact
    from hfcompress.report.card import render
    from hfcompress.run.directory import open_finished

    loaded, content = open_finished(run_directory)
    return render(loaded, content, open_artifact(run_directory / "final", content["rows"][-1]["stage"]))


@app.command()
def push(
    run_directory: RunDirectory,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="USER/NAME", help="The repository; default: the recipe's hub.repo.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, but send nothing.")] = False,
    stage: Annotated[
        int | None,
        typer.Option("--stage", metavar="N", help="Publish the model of stage N, with its own card."),
    ] = None,
) -> None:
    """Publish a run's model and card in one commit.

    The command gives up if the Hub does not answer for a minute; HFCOMPRESS_HUB_TIMEOUT sets another number of seconds.
    """
    from hfcompress.run import push as push_

    repo, private = push_.choose_repository(run_directory, repo, private)
    with push_.open_model(run_directory, stage, repo) as folder:
        files = push_.list_uploads(folder)
        for file in files:
            out().print(f"{file.size / 1e6:10.3f} MB  {file.name}")
        out().print(f"{sum(f.size for f in files) / 1e6:10.3f} MB  in {len(files)} files, to {repo}")
        if not dry_run:
            out().print(push_.commit(files, run_directory.resolve().name, repo, private))


def main() -> None:
    """Runs the command line. Exit status: 0 done, 1 a failure, 2 the user's mistake, 130 or 143 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it warns of each retry; we report the result once
    guard_terminal()
    with log_to_terminal(), stoppable() as stop:
        try:
            status = app(standalone_mode=False)
        except HfcompressError as error:
            _complain([str(problem) for problem in error.problems])
            sys.exit(2)
        except BaseException as error:
            # Typer turns an interrupt into an error or an exit code; a library may turn it into its own error.
            interrupted = isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort"
            if stop.signal or interrupted or getattr(error, "code", None) == 130:
                _complain([INTERRUPTED])
                sys.exit(128 + (stop.signal or signal.SIGINT))
            if isinstance(error, SystemExit):
                raise
            if (usage := _format_usage(error)) is not None:
                err().print(usage)
                sys.exit(2)
            _fail(error)
        if status == 130:
            _complain([INTERRUPTED])
            sys.exit(128 + (stop.signal or signal.SIGINT))
    sys.exit(status or 0)


def _format_usage(error: BaseException) -> str | None:
    """Formats the message of Typer's parser for a wrong command; None for any other error."""
    if not (hasattr(error, "exit_code") and hasattr(error, "show")):  # click's errors, or those of its copy in Typer
        return None
    text = io.StringIO()
    error.show(file=text)
    return text.getvalue().rstrip("\n")


def _fail(error: BaseException) -> None:
    """Reports a failure that the machine caused, and raises any other again."""
    problem = disk_problem(error)
    if problem is not None:
        _complain([str(Problem(problem, FREE_SPACE))])
        sys.exit(2)
    if is_lost_process(error):
        _complain([f"another process of this run ended or no longer answers; {AGAIN}"], everywhere=True)
        sys.exit(1)
    sys.excepthook = print_traceback
    raise error


AGAIN = "the same command goes on from here"
INTERRUPTED = f"interrupted; {AGAIN}"
FREE_SPACE = (
    "free some space; --output, HFCOMPRESS_HOME, HF_DATASETS_CACHE and TMPDIR set the places of runs, caches and "
    "temporary files"
)


def _end_progress_bars() -> None:
    """Closes the progress bars of an interrupted training, so that an error starts on a new line."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm and tqdm.tqdm, "_instances", ())):
        bar.close()


def _complain(messages: list[str], everywhere: bool = False) -> None:
    if os.environ.get("RANK", "0") != "0" and not everywhere:
        return  # the first process of a distributed run reports it
    _end_progress_bars()
    for message in messages:
        err().print(f"error: {message}", style="red")


if __name__ == "__main__":
    main()
