"""The pages and cards are true: what the schema says, what a run rendered, links that lead somewhere."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hfcompress.recipe.schema import Recipe
from hfcompress.report.hub_metadata import validate

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))


def _script(name: str) -> Any:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / f"{name}.py")))


def test_the_recipe_reference_is_what_the_schema_says() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert text == _script("reference").write_reference(), "run `make docs`"


def test_every_key_that_a_recipe_can_have_has_a_row() -> None:
    reference = _script("reference")
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    blocks = {
        (title if title in reference.REGISTRIES else "", part.partition("\n")[0]): part
        for title, section in sections.items()
        for part in section.split("\n### ")[1:]
    }

    def rows(name: str, section: str = "") -> set[str]:
        block = blocks[section, name]
        also = re.search(r"^and the keys of (.*)\.$", block, re.MULTILINE)
        inherited = re.findall(r"`(\w+)`", also.group(1)) if also else []
        return set(re.findall(r"^\| `([^`]+)` \|", block, re.MULTILINE)).union(*map(rows, inherited))

    for model in reference.models_in(Recipe):
        assert rows(model.__name__) == {field.alias or name for name, field in model.model_fields.items()}
    for title, registry in reference.REGISTRIES.items():
        for name in registry.names():
            assert rows(f"`{name}`", title) == set(registry.get(name).model_fields)
    assert {"ranges", "freeze"} <= rows("QatTraining")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


HOSTS = {
    "docs.openvino.ai", "docs.pytorch.org", "example.org", "github.com", "huggingface.co", "json-schema.org",
    "onnxruntime.ai", "pytorch.org", "raw.githubusercontent.com",
}  # fmt: skip
"""The hosts that pages, cards, recipes and code may name: no registry of packages, and no place that does not exist."""


@pytest.mark.parametrize("folder", ["hfcompress", "docs", "model_cards", "recipes", "examples", "scripts", "."])
def test_only_known_hosts_are_named(folder: str) -> None:
    pattern = "*" if folder == "." else "**/*"
    files = [path for path in (ROOT / folder).glob(pattern) if path.suffix in {".md", ".py", ".yaml", ".txt", ".toml"}]
    assert files
    for path in files:
        for host in re.findall(r"https?://([\w.-]+\.[a-z]+)", path.read_text(encoding="utf-8")):
            assert host in HOSTS, f"{path} names {host}"


def test_the_documented_component_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from hfcompress.models.forward import Observation
    from hfcompress.training.loss import Step

    text = (ROOT / "docs" / "components.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert source is not None
    (tmp_path / "documented_cosine.py").write_text(source.group(1), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = importlib.import_module("documented_cosine").Cosine()
    states = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    same = Observation(torch.zeros(2, 2), (states,))
    opposite = Observation(torch.zeros(2, 2), (-states,))
    assert loss.compute(Step(same, same, mask, None, (1,), None), None).item() == pytest.approx(0, abs=1e-6)
    assert loss.compute(Step(same, opposite, mask, None, (1,), None), None).item() == pytest.approx(2, abs=1e-6)
    sys.modules.pop("documented_cosine")


def test_there_is_a_card_from_a_real_run() -> None:
    assert CARDS


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_a_committed_card_would_be_taken_by_the_hub(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    validate(text)
    results = ModelCard(text).data.eval_results
    value = results[0].metric_value
    assert (path.parent / "tradeoff.png").read_bytes().startswith(b"\x89PNG"), "the plot stands beside the card"
    assert f"{value:.4f}" in text, "the text and the metadata tell of different figures"
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text), "a path of one machine"
    assert "hf_" not in text
