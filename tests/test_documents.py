"""The commands and snippets of README and docs: they run here, or at least exist."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import TypeAdapter

import hfcompress as hfc
from hfcompress.cli import app
from hfcompress.data.quickstart import vocabulary
from hfcompress.recipe.loader import find_shipped, load, parse, validate
from hfcompress.recipe.schema import Recipe, spell_out
from hfcompress.recipe.yaml_text import parse_yaml
from tests import documents, factories, loopback_hub
from tests.factories import run_cli
from tests.run.test_hub import point_at

ROOT = documents.ROOT
SHORT = {"hours=1": "hours=0.0001"}
"""A search tries one candidate, however little time it has."""
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
Capture = pytest.CaptureFixture[str]


def _hfcompress_commands() -> Iterator[Any]:
    """Each command of `hfcompress` in a block or a sentence of a page."""
    for page in PAGES:
        blocks = [text for _, text in documents.read_blocks(page, "bash", "yaml")]
        lines = [line.removeprefix("- run: ") for text in blocks for line in documents.list_commands(text)]
        found = [line[line.index("hfcompress ") :] for line in lines if re.search(r"(^|\s)hfcompress \w", line)]
        found += [span for span in documents.list_spans(page) if re.match(r"hfcompress \w", span) and "…" not in span]
        for command in dict.fromkeys(found):
            if " COMMAND" not in command:
                yield pytest.param(command, id=f"{page.stem}: {command}"[:90])


@pytest.mark.parametrize("command", _hfcompress_commands())
def test_a_command_of_a_page_is_one(command: str) -> None:
    words = shlex.split(re.sub(r"<(\w+)>", r"\1", command).partition(" > ")[0])[1:]
    name, arguments = words[0], words[1:]
    assert name in COMMANDS
    if name in ("list", "doctor", "schema") and not any(map(str.isupper, arguments)):
        assert run_cli(name, *arguments) == 0
    if not [word for word in arguments if not word.startswith("-")]:
        return  # a command that is only mentioned, with or without an option
    if name == "init" and "--model" not in arguments:
        arguments = [*arguments, "--model", "M", "--data", "F"]
    found = COMMANDS[name].make_context(
        name, [word.replace("N", "3", 1) if word == "N" else word for word in arguments]
    )
    recipe = found.params.get("recipe") or found.params.get("task" if name == "evaluate" else "", None)
    if recipe in find_shipped():
        load(find_shipped()[recipe], found.params.get("overrides"))
    elif recipe is not None:
        assert recipe.endswith(".yaml") or recipe.isupper(), f"there is no recipe '{recipe}'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_make_targets_of_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    code = [*documents.list_spans(page), *(text for _, text in documents.read_blocks(page, "bash"))]
    for text in code:
        for place in re.findall(r"(?<![\w/.])(?:scripts|recipes|examples|benchmarks)/[\w./-]+\.(?:py|yaml)", text):
            assert (ROOT / place).is_file(), f"{page.name} names {place}"
        for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def _yaml_blocks() -> Iterator[Any]:
    for page in PAGES:
        for number, (_, text) in enumerate(documents.read_blocks(page, "yaml")):
            if not text.startswith("jobs:"):
                yield pytest.param(text, id=f"{page.stem} {number}")


@pytest.mark.parametrize("text", _yaml_blocks())
def test_yaml_of_a_page_is_valid(text: str) -> None:
    """A whole recipe, or a part of one; of a list of alternatives, each line."""
    if re.search("^name:", text, re.MULTILINE):
        validate(parse(text, Path("page.yaml")))
        return
    alternatives = text.splitlines() if all(re.match(r"\w+: *\{", line) for line in text.splitlines()) else [text]
    for part in alternatives:
        (key, value), *_ = parse_yaml(part, Path("page.yaml"))[0].items()
        TypeAdapter(_place_of(key)).validate_python(value)


def _place_of(key: str) -> Any:
    places = {"student": hfc.Distill, "metric": hfc.TextClassification, "measure": Recipe, "hub": Recipe}
    field = places[key].model_fields[key]
    return field.annotation


# The tutorial


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory. Log handlers that a library makes meanwhile go: they write to the captured stream."""
    monkeypatch.chdir(tmp_path)
    loggers = [logging.getLogger(name) for name in (None, "transformers")]
    before = [list(logger.handlers) for logger in loggers]
    yield tmp_path
    for logger, handlers in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers


@pytest.mark.usefixtures("in_process")
def test_the_tutorial(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    page, done = ROOT / "docs" / "tutorial.md", []
    words = [*factories.WORDS[:5], *vocabulary()]
    model = factories.save(factories.model(vocab_size=len(words)), here / "model", words)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")  # as its card on the Hub says
    names = {"sentence-transformers/all-MiniLM-L6-v2": model, '{"train": 6000}': '{"train": 160}'}
    with loopback_hub.running() as hub:
        for language, text in documents.read_blocks(page, "bash", "python"):
            text = documents.replace_names(text, names)
            if text.startswith("pip install"):
                continue
            if language == "python":
                capsys.readouterr()
                exec(compile(text, page.name, "exec"), {})
                done.append(("python", 0, capsys.readouterr().out))
                continue
            if "push" in text:
                point_at(hub.url, here / "cache", monkeypatch)
            done += documents.run_bash(text, capsys)
        sent = hub.repositories["model", "user/films"]

    assert {command.partition(" ")[0] for command, _, _ in done} == {"hfcompress", "python"}
    for command, status, printed in done:
        assert status in ((0, 3) if " gate " in command else (0,)), (command, printed)
    said = {command.split()[1]: printed for command, _, printed in done if command != "python"}
    shown = next(text for language, text in documents.read_blocks(page) if text.startswith("task: "))
    for line, expected in zip(said["init"].splitlines(), shown.splitlines(), strict=False):
        assert re.split(r"\d", line)[0] == re.split(r"\d", expected)[0], "the page shows what init printed"
    assert json.loads(Path("recipe.schema.json").read_text())["title"] == "Recipe"
    answers = [printed for command, _, printed in done if command == "python"]
    assert re.fullmatch(r"(good|bad) the plot was not dull \.\n(good|bad) this film .*\n", answers[0])
    assert answers[1].count("'label'") == 2
    assert sent.private
    assert {"onnx/model_quantized.onnx", "README.md", "tokenizer.json"} <= set(sent.commits[sent.refs["main"]])


# Python


@pytest.fixture
def deep_teacher(tmp_path: Path, data: Path) -> Path:
    """Deep enough for the students of the pages."""
    model = factories.fine_tuned(tmp_path / "deep", data, layers=6, max_position_embeddings=128)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return model


@pytest.mark.usefixtures("in_process")
def test_python_of_the_readme(here: Path, deep_teacher: Path, data: Path) -> None:
    (_, text), *more = documents.read_blocks(ROOT / "README.md", "python")
    assert not more
    space: dict[str, Any] = {}
    exec(documents.replace_names(text, {**SHORT, "my-org/my-classifier": deep_teacher, '"data/"': f'"{data}"'}), space)
    assert [row["stage"] for row in space["run"].report.rows] == ["source", "01-distill", "02-quantize"]


@pytest.mark.usefixtures("in_process")
def test_python_of_the_api_page(
    here: Path, deep_teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(deep_teacher)
    files = {"train": str(data / "train.tsv"), "validation": str(data / "dev.tsv")}
    names = {**SHORT, "my-org/my-classifier": deep_teacher, '"data/"': f'"{data}"', "directory-b": deep_teacher,
             "user/model-c": deep_teacher}  # fmt: skip
    space: dict[str, Any] = {
        "hfc": hfc,
        "F": torch.nn.functional,
        "model": model,
        "model_a": model,
        "tokenizer": AutoTokenizer.from_pretrained(deep_teacher),
        "dataset": datasets.load_dataset("csv", data_files=files, delimiter="\t"),
    }
    with loopback_hub.running() as hub:
        for _, text in documents.read_blocks(ROOT / "docs" / "api.md", "python"):
            if "hfc.push" in text:
                point_at(hub.url, tmp_path / "cache", monkeypatch)
            exec(documents.replace_names(text, names), space)
        assert hub.repositories["model", "user/name"].private
    assert (here / "int8" / "onnx" / "model_quantized.onnx").is_file()
    assert len(space["report"].rows) == 3


@pytest.mark.parametrize("page", ["components", "data"])
def test_python_of_other_pages_runs(page: str) -> None:
    import evaluate

    import hfcompress.data.metrics

    blocks = documents.read_blocks(ROOT / "docs" / f"{page}.md", "python")
    assert blocks
    for number, (_, text) in enumerate(blocks):
        name = f"documented_{page}_{number}"
        space = {"__name__": name, "evaluate": evaluate, "hfcompress": hfcompress}
        exec(compile(text, name, "exec", dont_inherit=True), space)
        for made in [value for value in space.values() if isinstance(value, type) and value.__module__ == name]:
            made()


# FAQ


def _change_train(change: Callable[[list[str]], list[str]], encoding: str = "utf-8") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "data" / "train.tsv"
        path.write_bytes("\n".join(change(path.read_text(encoding="utf-8").splitlines())).encode(encoding))

    return apply


def _remove_head(folder: Path) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertModel"]}))


def _own_by_another(folder: Path) -> None:
    (folder / "runs" / "mine").mkdir(parents=True)
    lock = {"recipe": spell_out(load(folder / "recipe.yaml").recipe) | {"name": "other"}}
    (folder / "runs" / "mine" / "recipe.lock.json").write_text(json.dumps(lock))


def _rename(old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return apply


FAULTS: dict[str, tuple[Callable[[Path], None] | None, list[str]]] = {
    "unknown key": (None, ["--set", "stages.0.train.epoch=1"]),
    "no dev file": (_rename("data/dev.tsv", "data/held.tsv"), []),
    "train.tsv has no column": (None, ["--set", "task.text=[text]"]),
    "row 2 of": (_change_train(lambda lines: [*lines[:3], "a film\t", *lines[4:]]), []),
    "data/train.tsv cannot": (_change_train(lambda lines: [*lines[:3], "a film é\t1", *lines[4:]], "cp1252"), []),
    "the model is a": (_remove_head, []),
    "train: row 2": (_change_train(lambda lines: [*lines[:3], "a film\t2", *lines[4:]]), []),
    "model 'user/model'": (None, ["--set", "model=user/model"]),
    "model holds": (_rename("model/model.safetensors", "model/pytorch_model.bin"), []),
    "max_length is": (None, ["--set", "task.max_length=4096"]),
    "the student has": (None, ["--set", "stages.0.student.layers=4"]),
    "runs/mine belongs": (_own_by_another, []),
}
ENTRIES = re.findall(r"^## `(.*)`$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_faq_has_ten_entries() -> None:
    assert len(ENTRIES) >= 10


@pytest.mark.parametrize("message", ENTRIES)
def test_a_message_of_the_faq_is_what_is_printed(message: str, here: Path, capsys: Capture) -> None:
    factories.write_data(here / "data")
    factories.save(factories.model(), here / "model")
    factories.recipe(here / "recipe.yaml", Path("model"), Path("data"))
    fault, arguments = next(value for start, value in FAULTS.items() if message.startswith(start))
    if fault is not None:
        fault(here)
    command = ["run", "recipe.yaml", "-o", "runs/mine"] if fault is _own_by_another else ["check", "recipe.yaml"]
    assert run_cli(*command, *arguments) == 2
    assert message in capsys.readouterr().err
