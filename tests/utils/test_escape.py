"""What foreign strings cannot do: move a terminal's cursor, put a tag or a line into a card, tell of this machine."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hfcompress.models.artifact import Artifact
from hfcompress.recipe.loader import load
from hfcompress.recipe.yaml_text import parse_yaml
from hfcompress.report import card, tables
from hfcompress.utils import logging as console
from hfcompress.utils.errors import Problem
from hfcompress.utils.escape import code, code_block, markdown, one_line, printable, without_tokens
from hfcompress.utils.places import is_place, last_part, shorten_places, shorten_settings
from tests import factories

NASTY = [
    "\x1b[2J\x1b]0;title\x07", "a\rerror: b", "a\nerror: all is well", "\u202egnp.exe", "\x9b31m", "\udcff", "\x00",
    "\u2028", "[bold]x[/bold]", "[/]", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!-- x",
    "](https://evil.example) [x](javascript:alert(1))", "| x | y |", "`", "```", "``` \n<b>", "~~~", "&lt;b&gt;",
    "**x**", "__x__", "# x", "- x", "1. x", "$x$", "www.evil.example", "https://evil.example", "a\\`b", "---", "  ",
]  # fmt: skip
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u202e]")


@pytest.fixture(autouse=True)
def _fresh_consoles() -> Any:
    console.out.cache_clear()
    console.err.cache_clear()
    yield
    console.out.cache_clear()
    console.err.cache_clear()


# The terminal.


@pytest.mark.parametrize("text", NASTY)
def test_a_text_is_printed_without_its_control_characters(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("name", title=text)
    table.add_row(text)
    table.add_row(Text(text))
    console.print_table(table)
    console.out().print(text)
    console.log.info(text)
    printed = capsys.readouterr()
    assert not CONTROLS.search(printed.out + printed.err)
    if "bold" in text:
        assert printed.err == f"{text}\n"


def test_our_own_colours_newlines_and_tabs_stay() -> None:
    stream = io.StringIO()
    coloured = console._console(file=stream, force_terminal=True, color_system="standard")
    coloured.print("a\n\tb", style="red")
    assert "\x1b[31m" in stream.getvalue()
    assert "a" in stream.getvalue()
    assert stream.getvalue().count("\n") == 2


def test_a_wide_table_is_not_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(*(f"heading number {n}" for n in range(30)))
    console.print_table(table)
    printed = capsys.readouterr().out
    assert all(f"heading number {n}" in printed for n in range(30))


def test_no_part_of_a_problem_begins_a_line_of_its_own() -> None:
    text = str(Problem("a\nb", "c\nd", ("e\nf",), "g\nh:1"))
    assert text == "g\\nh:1 e\\nf: a\\nb\n    c\\nd"


def test_what_libraries_log_and_warn_of_is_safe(capsys: pytest.CaptureFixture[str]) -> None:
    before, plain = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        console.guard_terminal()
        record = logging.getLogRecordFactory()("x", logging.WARNING, "x.py", 1, "a%s", ("\x1b[2J",), None)
        assert record.getMessage() == "a\\x1b[2J"
        assert "\x1b" not in warnings.formatwarning("\x1b[2J", UserWarning, "x.py", 1, "")
    finally:
        logging.setLogRecordFactory(before)
        warnings.formatwarning = plain


def test_a_traceback_is_safe(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_traceback(ValueError, ValueError("\x1b[2J hf_" + "a" * 34), None)
    printed = capsys.readouterr().err
    assert "\\x1b[2J" in printed
    assert "aaaa" not in printed


@pytest.mark.parametrize("token", ["hf_" + "aB3" * 12, "a-token-of-another-kind"])
def test_a_token_is_never_printed(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert without_tokens(f"you sent Bearer {token}, {token}") == "you sent Bearer <token>, <token>"
    assert token not in printable(token) + one_line(token)


@pytest.mark.parametrize("arguments", [
    ["chekc\x1b[2J"], ["list", "\x1b[2J"], ["check", "\x1b[2J\u202e"], ["check", "tinybert", "--set", "\x1b[2J=1"],
    ["check", "tinybert", "--set", "\x1b[2J"], ["check", "tinybert", "--set", 'task.metric="\\e[2J\\r"'],
    ["plan", "tinybert", "--set", 'model="\\e[2J"'], ["check", "tinybert", "--set", 'stages.0.kind="\\e[2J"'],
    ["run", "tinybert", "--only", "\x1b[2J"], ["show", "\x1b[2J"], ["copy", "tinybert", "\x1b[2J/x"],
    ["report", "\x1b[2J"], ["card", "\x1b[2J"], ["push", "\x1b[2J"], ["push", "x", "--\x1b[2J"], ["doctor", "\x1b[2J"],
    ["convert", "\x1b[2J", "\x1b[2J"], ["evaluate", "\x1b[2J", "--task", "quickstart"], ["doctor", "[/]"],
])  # fmt: skip
def test_no_command_prints_control_characters(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert factories.run_cli(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err
    assert not CONTROLS.search(printed.out + printed.err)


def test_columns_labels_and_settings_are_printed_safely(
    recipe: Path, data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "good \x1b[2J\tgo\x1b[1mod\n" * 3 + "bad\tb\u202ead\n" * 3
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.tsv").write_text("sent\x1b[2Jence\tlab\x07el\n" + rows)
    config = json.loads((teacher / "config.json").read_text())
    named = tmp_path / "mo\x1b[2Jdel"
    named.mkdir()
    (named / "config.json").write_text(json.dumps(config | {"model_type": "be\x1b[2Jrt"}))
    task = f"task={{type: text-classification, dataset: {tmp_path}, text: [sentence], label: label, max_length: 16}}"
    text = task.replace("[sentence]", r'["sent\e[2Jence"]').replace("label: label", r'label: "lab\ael"')
    for setting in (task, text, f"model={tmp_path}/mo", rf'model="{tmp_path}/mo\e[2Jdel"'):
        for command in ("check", "plan", "show"):
            factories.run_cli(command, recipe, "--set", setting)
    factories.run_cli("doctor", named)
    printed = capsys.readouterr()
    assert "\\x1b[2J" in printed.err
    assert not CONTROLS.search(printed.out + printed.err)


def test_an_undecodable_file_name_is_printed(tmp_path: Path) -> None:
    command = [sys.executable.encode(), b"-m", b"hfcompress", b"check", b"\xff\x1b.yaml"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"\\udcff\\x1b.yaml" in done.stderr


# The card.


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.comments: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [str(value) for _, value in attrs]

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def html(text: str) -> Tags:
    """What the Hub's kind of Markdown (with tables and raw HTML) makes of a text."""
    found = Tags()
    found.feed(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text))
    assert found.comments == []
    return found


@pytest.mark.parametrize("text", NASTY)
def test_a_text_is_shown_literally_by_markdown(text: str) -> None:
    assert html(f"It is {markdown(text)}, and ends.").tags == ["p"]
    assert html(f"It is {code(text)}, and ends.").tags == ["p", "code"]
    table = f"| a | b |\n|---|---|\n| {markdown(text)} | {code(text, in_table=True)} |\n"
    assert html(table).tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "code"]
    assert html(f"{code_block(text, 'yaml')}\n\nIt ends.").tags == ["pre", "code", "p"]
    assert not CONTROLS.search(markdown(text) + code(text) + code_block(text))


@pytest.mark.parametrize("text", ["A processor (2 cores), avx512_vnni", "1.5x", "-", "01-distill", "0.950-1.000"])
def test_an_ordinary_text_is_not_changed(text: str) -> None:
    assert markdown(text) == text


NAME = "<script>alert(1)</script> `x` ![i](https:\\evil) | ``` [l](javascript:1) <!-- \x1b[2J\u202e\n---\n# head"


def rendered(tmp_path: Path, name: str) -> str:
    quoted = json.dumps(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""# {one_line(name)}
name: tiny
model: {json.dumps(str(tmp_path / "secret" / "<img src=x>`m"))}
task: {{type: text-classification, dataset: {json.dumps(str(tmp_path / "secret") + "/da`ta<b>")},
       text: [{quoted}], label: {quoted}, config: {quoted}, max_length: 16}}
stages:
  # ```
  # <b>
  - {{kind: distill, teacher: {quoted}, losses: [soft_labels]}}
  - {{kind: quantize, backend: {{use: onnx_int8}}}}
"""
    )
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    loaded = load(path, [f"task.label={json.dumps(name + name)}", f"model={tmp_path}/secret/x"])
    content = {
        "schema": 1,
        "name": "tiny",
        "environment": {"cpu": name, "cpu_flags": [name], "cores": 2, "accelerator": None, "versions": {}},
        "task": {"split": "test", "max_length": 16, "metric": "accuracy"},
        "rows": [factories.report_row("source", "source"),
                 factories.report_row("02-quantize", "quantize", speedup=2.0)],
        "rounded": {"02-quantize": {
            "odd_weights": [{"layer": name, "channels": 2, "what": "zeros"}],
            "mixed": {"metric": "accuracy", "max_drop": 0.5, "holds": True, "float": 0.9, "kept": [name],
                      "tried": [], "layers": [{"layers": [name], "error": 0.1, "metric": 0.8}]},
        }},
    }  # fmt: skip
    graph = "onnx/model_quantized.onnx"
    return card.render(loaded, content, Artifact(model, "02-quantize", "quantize", None, "onnx", "int8", graph))


def shape(text: str) -> list[str]:
    return html(ModelCard(text).text).tags


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A card of plain names."""
    return rendered(tmp_path_factory.mktemp("plain"), "plain")


@pytest.mark.parametrize("name", [NAME, *NASTY])
def test_a_card_with_foreign_names_has_the_tags_of_any_card(tmp_path: Path, plain: str, name: str) -> None:
    if name in ("\udcff", "\x00", "  "):
        pytest.skip("no recipe can hold it")
    text = rendered(tmp_path, name)
    assert shape(text) == shape(plain)
    assert not CONTROLS.search(text)
    assert not [value for value in html(ModelCard(text).text).attributes if "evil" in value or "javascript" in value]
    data = ModelCard(text).data
    assert data.model_name == "tiny"
    assert set(data.to_dict()) == set(ModelCard(plain).data.to_dict())


def test_a_card_names_no_place_and_links_no_registry(tmp_path: Path) -> None:
    text = rendered(tmp_path, "plain")
    assert str(tmp_path) not in text
    assert "secret" not in text
    assert "](http" not in text
    assert "compressed with hfcompress" in text


def test_the_recipe_in_a_card_is_still_a_recipe(plain: str) -> None:
    (block,) = re.findall(r"^(`{3,})yaml\n(.*?)\n\1$", plain, re.DOTALL | re.MULTILINE)
    assert parse_yaml(block[1], Path("card"))[0]["model"] == "<img src=x>`m"


def test_a_report_in_markdown_keeps_its_cells() -> None:
    content = {
        "name": "x", "environment": {"cpu": "a\nb", "cpu_flags": [], "cores": 2, "accelerator": None, "versions": {}},
        "task": {"split": "test", "max_length": 16},
        "rows": [factories.report_row("a|b\nc", "source"), factories.report_row("<b>`")],
    }  # fmt: skip
    lines = tables.render_markdown(content).splitlines()
    assert len(lines) == 2 + 2 + 2
    assert html(tables.render_markdown(content)).tags.count("td") == 2 * len(tables.list_headings(content))


# Places on this machine.


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: /home/ada/my-model", "model: my-model"),
        ("model: '/home/ada/my model'  # /home/ada/my model, twice", 'model: "my model"  # my model, twice'),
        ("model: ~/models/bert", "model: bert"),
        ("model: ~ada/models/bert/", "model: bert"),
        (r"model: C:\Users\ada\bert", "model: bert"),
        (r'model: "C:\\Users\\ada\\bert"', "model: bert"),
        (r"model: \\server\share\bert", "model: bert"),
        ("model: file:///home/ada/bert", "model: bert"),
        ("task: {dataset: &d /data/x y, label: a}", 'task: {dataset: &d "x y", label: a}'),
        ("a: |\n  see /home/ada/x here\n", "a: |\n  see x here\n"),
        ("# /home/ada/x.yaml\na: 1", "# x.yaml\na: 1"),
        ("model: user/name@refs/pr/1", "model: user/name@refs/pr/1"),
        ("model: ../models/bert", "model: ../models/bert"),
        ("a: 1  # https://huggingface.co/a/b and/or 1 / 2", "a: 1  # https://huggingface.co/a/b and/or 1 / 2"),
        ("no: [yaml /home/ada/x", "no: [yaml x"),
    ],
)
def test_a_place_in_a_recipe_is_its_name_alone(text: str, told: str) -> None:
    assert shorten_places(text) == told


def test_a_place_is_what_begins_at_a_root_or_a_home() -> None:
    assert all(map(is_place, ["/a", "~/a", "~ada/a", "C:\\a", "c:/a", "\\\\srv\\a", "file:///a"]))
    assert not any(map(is_place, ["a", "a/b", "./a", "../a", "/", "</s>", "~", "https://x/y", "a: /b"]))
    assert [last_part(place) for place in ("/a/b/", "C:\\a\\b", "/")] == ["b", "b", ""]


def test_the_settings_of_a_model_name_no_place(tmp_path: Path) -> None:
    settings = {"_name_or_path": "/home/ada/bert", "vocab_file": "/home/ada/vocab.txt", "pad_token": "/x", "n": 1}
    (tmp_path / "adapter").mkdir()
    for name in ("config.json", "adapter/adapter_config.json"):
        (tmp_path / name).write_text(json.dumps({**settings, "inner": [{"base_model_name_or_path": "~/bert"}]}))
    (tmp_path / "untouched.json").write_text('{"a":1}')
    (tmp_path / "broken.json").write_text("{")
    shorten_settings(tmp_path)
    told = {"_name_or_path": "bert", "vocab_file": "vocab.txt", "pad_token": "/x", "n": 1}
    for name in ("config.json", "adapter/adapter_config.json"):
        assert json.loads((tmp_path / name).read_text()) == {**told, "inner": [{"base_model_name_or_path": "bert"}]}
    assert (tmp_path / "untouched.json").read_text() == '{"a":1}'
