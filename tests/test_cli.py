"""The command line: what it prints, what it imports, and how it ends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hfcompress import __version__
from hfcompress.recipe.loader import find_shipped, load
from hfcompress.recipe.yaml_text import parse_yaml
from tests.factories import run_cli, snapshot

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *arguments: object) -> str:
    """What is said of a mistake: exit 2, on standard error, without a traceback."""
    assert run_cli(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def printed(capsys: Capture, *arguments: object) -> str:
    assert run_cli(*arguments) == 0
    return capsys.readouterr().out


def in_a_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "hfcompress"]), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_names_every_command(capsys: Capture) -> None:
    assert set(re.findall(r"^  (\w+)  ", printed(capsys, "--help"), re.MULTILINE)) == {
        "list", "show", "copy", "init", "schema", "check", "plan", "run", "search", "compress", "evaluate", "gate",
        "report", "card", "push", "doctor", "convert",
    }  # fmt: skip


def test_looking_at_recipes_models_and_the_machine_imports_no_torch(recipe: Path, teacher: Path) -> None:
    code = """
import sys
import hfcompress.data.quickstart
from hfcompress import cli
recipe, model = sys.argv[1:]
for arguments in (["check", recipe], ["plan", recipe], ["list"], ["schema"], ["--help"], ["doctor"], ["doctor", model]):
    sys.argv = ["hfcompress", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, arguments
    heavy = {"torch", "transformers", "accelerate", "onnxruntime"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    done = in_a_process(code, recipe, teacher)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command_and_a_mistake_ends_with_two(tmp_path: Path) -> None:
    done = in_a_process("", "check", tmp_path / "gone.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no such recipe: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["chekc"], "chekc"),
        (["check"], "RECIPE"),
        (["run", "tinybert", "--fast"], "--fast"),
        (["plan", "tinybert", "--set"], "--set"),
        (["evaluate", "model"], "--task"),
    ],
)
def test_a_command_that_is_spelled_wrong_ends_with_two(capsys: Capture, arguments: list[str], why: str) -> None:
    assert why in refused(capsys, *arguments)


def test_a_bug_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("hfcompress.recipe.loader.load", broken)
    with pytest.raises(ZeroDivisionError):
        run_cli("check", recipe)


def test_control_c_says_how_to_go_on(capsys: Capture, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hfcompress.run.runner.run", interrupted)
    assert run_cli("run", recipe) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


# --- list, show, copy


def test_list_shows_every_section(capsys: Capture) -> None:
    text = printed(capsys, "list")
    for section in ("recipes", "losses", "criteria", "backends", "metrics"):
        assert f"\n{section}" in f"\n{text}"


@pytest.mark.parametrize(
    ("section", "row"),
    [
        ("recipes", "tinybert"),
        ("losses", "attention_scores"),
        ("criteria", "taylor"),
        ("backends", "onnx_int8"),
        ("metrics", "matthews_correlation"),
    ],
)
def test_list_shows_one_section(capsys: Capture, section: str, row: str) -> None:
    text = printed(capsys, "list", section)
    assert text.startswith(section)
    assert row in text


def test_list_shows_the_source_and_options_of_a_component(capsys: Capture) -> None:
    row = next(line for line in printed(capsys, "list", "losses").splitlines() if "soft_labels" in line)
    assert "arXiv:1503.02531" in row
    assert "weight, loss, temperature" in row


def test_list_of_an_unknown_section_offers_the_nearest(capsys: Capture) -> None:
    assert "did you mean 'losses'?" in refused(capsys, "list", "loses")


def test_show_prints_the_file_verbatim(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        find_shipped()["tinybert"].read_text() + "# :rocket: [bold]not markup[/bold] " + "long " * 60 + "\n"
    )
    assert printed(capsys, "show", path) == path.read_text()


@pytest.mark.parametrize("arguments", [["--full"], ["--set", "seed=7"]])
def test_show_full_prints_a_recipe_that_means_the_same(capsys: Capture, tmp_path: Path, arguments: list[str]) -> None:
    text = printed(capsys, "show", "tinybert", *arguments)
    path = tmp_path / "full.yaml"
    path.write_text(text)
    assert parse_yaml(text, Path("shown"))[0]["measure"]["bootstrap"] == 1000
    assert load(path).recipe == load(find_shipped()["tinybert"], arguments[1:]).recipe


def test_copy_gives_a_recipe_that_can_be_edited(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for arguments, path in (
        ([], "tinybert.yaml"),
        (["mine.yaml"], "mine.yaml"),
        (["folder"], "folder/tinybert.yaml"),
    ):
        assert f"hfcompress check {path}" in printed(capsys, "copy", "tinybert", *arguments)
        assert (tmp_path / path).read_bytes() == find_shipped()["tinybert"].read_bytes()


def test_copy_never_overwrites(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert "exists already" in refused(capsys, "copy", "tinybert", path)
    assert path.read_text() == "mine"


def test_copy_into_a_directory_that_is_not_there(capsys: Capture, tmp_path: Path) -> None:
    assert "directory to copy into not found" in refused(capsys, "copy", "tinybert", tmp_path / "gone" / "r.yaml")


# --- check and plan


def test_check_says_that_a_recipe_is_sound(capsys: Capture, recipe: Path) -> None:
    assert printed(capsys, "check", recipe) == f"{recipe} is correct: 01-distill, 02-prune, 03-quantize\n"


def test_check_tells_every_mistake_on_a_line_of_its_own(capsys: Capture, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("kind: prune", "kind: prun").replace("max_length", "maxlength"))
    errors = [line for line in refused(capsys, "check", recipe).splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all(f"{recipe}:" in line for line in errors)


def test_plan_shows_exact_counts(capsys: Capture, recipe: Path) -> None:
    from tests import factories

    text = printed(capsys, "plan", recipe)
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert {"model", "01-distill", "02-prune", "03-quantize"} <= rows.keys()
    for stage, layers in (("model", 2), ("01-distill", 1)):
        count = sum(p.numel() for p in factories.model(layers=layers).parameters())
        assert f" {count:,} " in rows[stage]
    for heading in ("layers", "heads", "FFN", "parameters", "encoder", "MB", "MACs at 16", "steps"):
        assert heading in text
    assert "…" not in text


# --- run, evaluate, report, card, push


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--only", "prun"], "--only prun: there is no such kind of stage\n    did you mean 'prune'?"),
        (["--only", "finetune"], "the recipe has no finetune stage\n    it has: distill, prune, quantize"),
        (["--only", "prune", "--fresh"], "--fresh throws away the stages before prune"),
        (["--set", "stages.0.train.epochs=x"], "valid number, not 'x'"),
    ],
)
def test_run_refuses_before_it_writes(
    capsys: Capture, recipe: Path, tmp_path: Path, arguments: list[str], why: str
) -> None:
    before = snapshot(tmp_path)
    assert why in refused(capsys, "run", recipe, "--output", tmp_path / "out", *arguments)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["report"], "holds no report.json\n    `hfcompress run RECIPE` writes one"),
        (["card"], "is not a run directory\n    give what `hfcompress run` wrote"),
        (["card", "--write"], "is not a run directory"),
        (["push", "--dry-run", "--repo", "user/name"], "holds no finished model with a card"),
    ],
)
@pytest.mark.parametrize("where", ["empty", "gone"])
def test_a_directory_that_is_no_run_is_refused(
    capsys: Capture, tmp_path: Path, command: list[str], why: str, where: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert why in refused(capsys, command[0], tmp_path / where, *command[1:])
    assert snapshot(tmp_path) == {}


def test_a_report_that_is_not_json_is_refused(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{")
    assert "report.json is not JSON" in refused(capsys, "report", tmp_path)


@pytest.mark.parametrize(("name", "why"), [("file", "is a file"), ("run", "is a run directory and has its own report")])
def test_evaluate_looks_at_its_output_before_it_measures(
    capsys: Capture, recipe: Path, teacher: Path, tmp_path: Path, name: str, why: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.lock.json").write_text("{}")
    before = snapshot(tmp_path)
    assert why in refused(capsys, "evaluate", teacher, "--task", recipe, "--output", tmp_path / name)
    assert snapshot(tmp_path) == before


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert version("hfcompress") == __version__


# --- names that no file system can hold


LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["check", LONG], "File name too long"),
        (["run", "RECIPE", "-o", LONG], "too long for the file system"),
        (["report", LONG], "too long for the file system"),
        (["push", LONG], "too long for the file system"),
        (["copy", "tinybert", f"{LONG}.yaml"], "too long for the file system"),
        (["evaluate", "MODEL", "--task", "RECIPE", "-o", LONG], "too long for the file system"),
        (["check", "RECIPE", "--set", f"model={LONG}"], "model"),
        (["check", "RECIPE", "--set", "model=~nobody/x"], "no such model directory: ~nobody/x"),
        (["check", "RECIPE", "--set", f"task.dataset={LONG}"], "task.dataset"),
        (["check", "RECIPE", "--set", "task.dataset=~nobody/x"], "~nobody/x"),
        (["check", "RECIPE", "--set", f"task.splits.dev={LONG}"], "task.dataset"),
        (["check", "RECIPE", "--set", f"stages.0.teacher=./{LONG}"], "stages.0.teacher"),
        (["check", "RECIPE", "--set", "stages.0.teacher=~nobody/x"], "stages.0.teacher"),
        (["check", "RECIPE", "--set", f"stages.0.augment={{glove: ./{LONG}}}"], "glove"),
        (["check", "RECIPE", "--set", "stages.0.augment={glove: ~nobody/x}"], "glove"),
        (["doctor", LONG], "model"),
        (["doctor", "~nobody/x"], "no such model directory"),
        (["convert", "~nobody/x", "y"], "~nobody/x"),
        (["convert", "MODEL", LONG], "too long for the file system"),
    ],
)
def test_a_name_that_no_file_system_holds_is_a_mistake_of_the_user(
    capsys: Capture, recipe: Path, teacher: Path, arguments: list[str], why: str
) -> None:
    named = {"RECIPE": str(recipe), "MODEL": str(teacher)}
    assert why in refused(capsys, *(named.get(argument, argument) for argument in arguments))
