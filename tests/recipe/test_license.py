"""The licence that a card names: the recipe's, else that of the models that the weights come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfcompress.data.license import License, UnknownLicenseError, read_license
from hfcompress.data.source import BUILTIN
from hfcompress.recipe.license import find_license
from hfcompress.recipe.loader import load
from hfcompress.recipe.schema import Hub
from tests import factories


def _model(folder: Path, metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# tiny\n")
    return folder


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: cc-by-nc-4.0", License("cc-by-nc-4.0")),
        ("license: mit\nlicense_name: left out, since mit is on the list", License("mit")),
        ("license: other", License("other")),
        ("license: other\nlicense_name: tiny-terms\nlicense_link: https://example.org/terms",
         License("other", "tiny-terms", "https://example.org/terms")),
        ("license: other\nlicense_name: tiny-terms\nlicense_link: LICENSE", License("other", "tiny-terms")),
        ('license: other\nlicense_name: "a\\nb"\nlicense_link: javascript:x', License("other", r"a\nb")),
    ],
)  # fmt: skip
def test_a_directory_tells_its_licence(tmp_path: Path, metadata: str, expected: License) -> None:
    assert read_license(str(_model(tmp_path / "m", metadata))) == expected


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ("language: en", "names no licence"),
        ("license: unknown", "names no licence"),
        ("license: [mit, apache-2.0]", "does not name exactly one licence"),
        ("license: CC BY-NC 4.0", "'CC BY-NC 4.0', no licence id"),
        ("license: [mit", "cannot be read"),
        ("- a list", "cannot be read"),
    ],
)
def test_a_directory_that_does_not_tell_its_licence(tmp_path: Path, metadata: str, why: str) -> None:
    with pytest.raises(UnknownLicenseError, match=why.replace("[", r"\[")):
        read_license(str(_model(tmp_path / "m", metadata)))


def test_a_directory_without_a_card_and_the_builtin_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownLicenseError, match="it has no card"):
        read_license(str(tmp_path))
    assert read_license(BUILTIN) == License("apache-2.0")


def _find(tmp_path: Path, data: Path, source: str, **changes: Any) -> License:
    path = factories.recipe(tmp_path / "r.yaml", _model(tmp_path / "source", source), data, **changes)
    return find_license(load(path).recipe)


def test_the_recipe_comes_first(tmp_path: Path, data: Path) -> None:
    assert _find(tmp_path, data, "license: mit") == License("mit")
    assert _find(tmp_path, data, "license: mit", hub={"license": "cc0-1.0"}) == License("cc0-1.0")
    named = {"license": "other", "license_name": "tiny-terms", "license_link": "https://example.org/terms"}
    assert _find(tmp_path, data, "license: mit", hub=named) == License(*named.values())


def test_a_student_of_another_licence_is_a_question(tmp_path: Path, data: Path) -> None:
    student = _model(tmp_path / "student", "license: cc-by-nc-4.0")
    stages = [{"kind": "distill", "student": {"from": str(student)}, "losses": ["soft_labels"]}]
    with pytest.raises(UnknownLicenseError, match=r"different licences: source \(mit\), student \(cc-by-nc-4.0\)"):
        _find(tmp_path, data, "license: mit", stages=stages)
    assert _find(tmp_path, data, "license: cc-by-nc-4.0", stages=stages) == License("cc-by-nc-4.0")


def test_a_push_needs_a_repository() -> None:
    assert Hub(repo="user/name", push=True).push
    with pytest.raises(ValueError, match="it needs `repo: user/name`"):
        Hub(push=True)


def test_check_asks_for_the_licence(
    tmp_path: Path, teacher: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = factories.recipe(tmp_path / "r.yaml", teacher, data)
    assert factories.run_cli("check", recipe) == 0
    said = " ".join("".join(capfd.readouterr()).split())
    assert f"the licence of {teacher.name} is not known: it has no card (README.md)" in said
    assert "say `hub: {license: …}` in the recipe" in said
    assert factories.run_cli("check", recipe, "--set", "hub.license=mit") == 0
    assert "licence" not in "".join(capfd.readouterr())


def test_what_was_recorded_is_what_the_card_names(tmp_path: Path, teacher: Path, data: Path) -> None:
    from hfcompress.report.hub_metadata import _read_license

    loaded = load(factories.recipe(tmp_path / "r.yaml", teacher, data))
    assert _read_license(loaded, {"license": {"license": "mit"}}) == {"license": "mit"}
    assert _read_license(loaded, {"license": None}) == {}
    assert _read_license(loaded, {}) == {}  # as earlier versions wrote reports
    named = load(factories.recipe(tmp_path / "r.yaml", teacher, data, hub={"license": "gpl-3.0"}))
    assert _read_license(named, json.loads('{"license": {"license": "mit"}}'))["license"] == "gpl-3.0"
