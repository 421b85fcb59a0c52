"""The YAML that a recipe is written in: what is read, what is refused, and at which line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hfcompress.recipe import loader, yaml_text
from hfcompress.utils.errors import HfcompressError

HERE = Path("recipe.yaml")


def parse(text: str) -> loader.Document:
    return loader.parse(text, HERE)


def refused(text: str) -> str:
    with pytest.raises(HfcompressError) as caught:
        parse(text)
    return str(caught.value)


@pytest.mark.parametrize("spelling", ["5e-5", "5E-5", "5.0e-5", "+5e-05", ".5e-4", "0.00005"])
def test_a_number_with_an_exponent_is_a_float(spelling: str) -> None:
    value = parse(f"rate: {spelling}").data["rate"]
    assert type(value) is float
    assert value == pytest.approx(0.00005)


def test_a_quoted_number_stays_a_text() -> None:
    assert parse("rate: '5e-5'").data == {"rate": "5e-5"}


@pytest.mark.parametrize("text", ["2024-01-01", "2024-13-45", "2001-12-14t21:59:43.10-05:00", "="])
def test_a_date_is_a_text(text: str) -> None:
    assert parse(f"name: {text}").data == {"name": text}


def test_a_key_is_the_word_that_stands_there() -> None:
    text = "{null: 1, no: 2, 1.50: 3, 010: 4, ~: 5, 2024-01-01: 6, yes: 7, 1_0: 8, on: 9, 0x1: 10}"
    words = [pair.partition(":")[0].strip() for pair in text.strip("{}").split(",")]
    assert list(parse(text).data) == words


def test_a_key_that_stands_twice_is_refused_with_both_lines() -> None:
    message = refused("name: a\ntask:\n  label: x\n  text: y\n  label: z\n")
    assert "recipe.yaml:5 task.label" in message
    assert "first on line 3" in message


def test_a_tag_that_builds_an_object_is_refused_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr("os.system", ran.append)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: ran.append(a))
    for call in ("os.system ['id']", "subprocess.Popen [['id']]"):
        message = refused(f"name: a\nmodel: !!python/object/apply:{call}\n")
        assert "recipe.yaml:2" in message
        assert "tags that build objects are refused" in message
    assert ran == []


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("name: a\nmodel: b: c\n", ":2", "mapping values are not allowed here"),
        ("name: a\nstages: [1, 2\n", ":3", "expected ',' or ']'"),
        ("name: a\n\tmodel: b\n", ":2", "cannot start any token"),
        ("name: *nothing\n", ":1", "undefined alias 'nothing'"),
        ("name: a\n---\nname: b\n", ":2", "another document"),
        ("? [a, b]\n: 1\n", ":1", "a key is a word"),
        ("name: a\nmodel: !!timestamp x\n", ":2", "could not determine a constructor for the tag"),
        ("name: a\nmodel: !!int x\n", ":2", "not an int: x"),
        ("name: a\nmodel: !!float x\n", ":2", "not a float: x"),
        ("name: a\nmodel: !!bool x\n", ":2", "not a bool: x"),
        ("name: a\nmodel: !!int ''\n", ":2", "not an int"),
        ("name: a\nmodel: !!binary eA==\n", ":2", "could not determine a constructor"),
        ("name: a\nmodel: !!set {a, b}\n", ":2", "could not determine a constructor"),
        ("name: a\nmodel: !!omap [a: 1]\n", ":2", "could not determine a constructor"),
        ("name: a\nmodel: !!map x\n", ":2", "expected a mapping node"),
        ("name: a\nmodel: {<<: x}\n", ":2", "expected a mapping or list of mappings for merging"),
        (f"name: a\nseed: {'9' * 5000}\n", ":2", "not an int: 9999"),
        (f"name: a\nseed: {'9' * 400}\n", ":2", "it has more than 64 bits"),
        ("name: a\nseed: 0x1ffffffffffffffff\n", ":2", "it has more than 64 bits"),
        ('name: a\nmodel: "x\\0y"\n', ":2", "a character that no file can hold"),
        ('name: a\n"x\\ud800": y\n', ":2", "a character that no file can hold"),
        ("name: \x00\n", "", "special characters are not allowed"),
        ("[" * 5000, "", "nested too deep"),
        ("- a\n- b\n", "", "a recipe is a mapping (name, model, task, stages), but this is a list"),
        ("just words\n", "", "this is a str"),
        ("", "", "the recipe is empty"),
        ("# only a comment\n", "", "the recipe is empty"),
    ],
)
def test_what_is_no_recipe_is_refused_at_its_line(text: str, line: str, why: str) -> None:
    message = refused(text)
    assert message.startswith(f"recipe.yaml{line}:")
    assert why in message


def test_aliases_that_multiply_are_refused() -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert f"more than {yaml_text.MAX_NODES:,} values" in refused("\n".join(["l0: &l0 [x]", *levels]))


def test_aliases_that_multiply_as_merged_keys_are_refused() -> None:
    levels = [f"l{n}: &l{n} {{a: *l{n - 1}, b: *l{n - 1}, c: *l{n - 1}}}" for n in range(1, 15)]
    assert "values once its aliases are followed" in refused("\n".join(["l0: &l0 {x: 1}", *levels]))


def test_an_alias_of_itself_is_refused() -> None:
    assert "recipe.yaml:1: an alias contains itself" in refused("a: &a\n  - *a\n")


def test_an_alias_used_twice_is_fine() -> None:
    read = parse("first: &t {epochs: 1}\nsecond: {train: *t}\nthird: {<<: *t, rate: 2}\n")
    assert read.data == {"first": {"epochs": 1}, "second": {"train": {"epochs": 1}}, "third": {"epochs": 1, "rate": 2}}


def test_a_file_of_ten_megabytes_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * 10_000_000)
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: pytest.fail("it was read"))
    with pytest.raises(HfcompressError, match=r"10,000,000 bytes; a recipe has at most 1,000,000"):
        loader.read(path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: caf\xe9\n".encode("latin-1"))
    with pytest.raises(HfcompressError, match=r"latin\.yaml is not UTF-8 text .* at byte 9"):
        loader.read(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path, "is a directory, not a recipe"),
        (tmp_path / "pipe", "is a special file, not a recipe"),
        (Path("/dev/zero"), "is a special file, not a recipe"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
    ):
        with pytest.raises(HfcompressError, match=why):
            loader.read(path)


def test_a_file_that_is_not_there_names_the_next_command(tmp_path: Path) -> None:
    with pytest.raises(HfcompressError, match=r"no such recipe: .*gone\.yaml\n.*hfcompress list recipes"):
        loader.read(tmp_path / "gone.yaml")


RECIPE = """\
name: a
stages:
  - kind: distill
    losses: [soft_labels]
    train: {epochs: 1}
  - kind: prune
  - kind: quantize
    backend: onnx_int8
"""


def set_(*assignments: str) -> loader.Document:
    read = parse(RECIPE)
    for assignment in assignments:
        read = loader.override(read, assignment)
    return read


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (("name",), 1),
        (("stages", 0), 3),
        (("stages", 0, "losses", 0), 4),
        (("stages", 0, "train", "epochs"), 5),
        (("stages", 0, "train", "not there"), 5),
        (("stages", 2, "backend"), 8),
        (("stages", 2, "backend", "use"), 8),
    ],
)
def test_a_key_path_has_its_line_or_that_of_the_nearest_above(key: tuple[str | int, ...], line: int) -> None:
    assert parse(RECIPE).where(key) == f"recipe.yaml:{line}"


def test_a_key_path_that_stands_nowhere_has_the_file() -> None:
    assert loader.Document(HERE, "", {}).where(("hub",)) == "recipe.yaml"


def test_an_override_goes_into_lists_and_leaves_the_rest_and_the_text() -> None:
    read = set_("stages.0.train.epochs=0.5", "stages.0.losses.0=hard_labels")
    assert read.data["stages"][0] == {"kind": "distill", "losses": ["hard_labels"], "train": {"epochs": 0.5}}
    assert read.data["stages"][1:] == parse(RECIPE).data["stages"][1:]
    assert read.text == RECIPE


def test_an_override_makes_what_is_not_there_yet() -> None:
    assert set_("stages.1.recover.train.epochs=2").data["stages"][1] == {
        "kind": "prune",
        "recover": {"train": {"epochs": 2}},
    }


def test_an_override_of_an_option_spells_out_a_component_given_by_name() -> None:
    data = set_("stages.2.backend.per_channel=false", "stages.0.losses.0.temperature=2.0").data
    assert data["stages"][2]["backend"] == {"use": "onnx_int8", "per_channel": False}
    assert data["stages"][0]["losses"] == [{"use": "soft_labels", "temperature": 2.0}]


@pytest.mark.parametrize(
    ("assignment", "value"),
    [("name=b", "b"), ("name=3e-5", 3e-5), ("name=[a, 1]", ["a", 1]), ("name=", None), ("name=a=b", "a=b")],
)
def test_the_value_of_an_override_is_read_as_yaml(assignment: str, value: Any) -> None:
    assert set_(assignment).data["name"] == value


def test_an_override_is_where_its_value_comes_from() -> None:
    read = set_("stages.0.train={epochs: x}")
    assert read.where(("stages", 0, "train", "epochs")) == "--set stages.0.train"
    assert read.where(("stages", 0, "losses")) == "recipe.yaml:4"


@pytest.mark.parametrize(
    ("assignment", "why"),
    [
        ("stages.0.train.epochs", "not an assignment"),
        ("=3", "not an assignment"),
        ("stages.3.kind=prune", "'3' is not one of the 3 entries counted from 0"),
        ("stages.-1.kind=prune", "'-1' is not one of the 3 entries"),
        ("stages.²=prune", "'²' is not one of the 3 entries"),
        ("stages.last.kind=prune", "'last' is not one of the 3 entries"),
        ("name.first.second=1", "'first' cannot be set inside the value 'a'"),
        ("stages.0.train.epochs.more=1", "'more' cannot be set inside the value 1"),
        ("name=[1", "not YAML"),
        ("name=!!int x", "not an int: x"),
        ("stages..kind=prune", "one of its parts is empty"),
        (".name=prune", "one of its parts is empty"),
        ("name.=prune", "one of its parts is empty"),
        (".".join("a" * 5000) + "=1", "it has 5000 parts"),
        (f"stages.{'9' * 5000}.kind=1", "is not one of the 3 entries"),
        ("stages.99999999999.kind=1", "is not one of the 3 entries"),
        ("name=!!python/object/apply:os.getcwd []", "tags that build objects are refused"),
        ("stages.0.train={epochs: 1, epochs: 2}", "the key 'epochs' occurs twice"),
    ],
)
def test_an_override_that_cannot_be_made_says_why(assignment: str, why: str) -> None:
    with pytest.raises(HfcompressError) as caught:
        set_(assignment)
    assert "--set" in str(caught.value)
    assert why in str(caught.value)
