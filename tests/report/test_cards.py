"""Cards: those in model_cards/ are what `make cards` renders, and what a card says of each kind of report."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from hfcompress.models.artifact import Artifact, open_artifact
from hfcompress.recipe.loader import load
from hfcompress.report import card
from tests import factories

_SPEC = importlib.util.spec_from_file_location("cards_script", Path(__file__).parents[2] / "scripts" / "cards.py")
assert _SPEC is not None
assert _SPEC.loader is not None
cards = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cards)

DISTILL = [{"kind": "distill", "student": {"layers": 1}, "losses": ["soft_labels"]}]
FOUND = {
    "change": -0.004, "low": -0.009, "high": 0.001, "reading": "within noise", "units": 872, "lower_is_better": False,
    "margin": "1%", "verdict": "shown", "p_margin": 0.0004, "margin_test": "score test, Tango 1998", "power": "why",
    "broken": 9, "repaired": 5, "p_value": 0.42, "agreement": 0.98, "slices": {},
    "flips": {"broken": [{"row": 1, "text": "a secret text"}], "repaired": []},
}  # fmt: skip


@pytest.mark.parametrize("folder", cards.list_folders(), ids=lambda folder: folder.name)
def test_a_card_is_what_its_report_says(folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == cards.render(folder)


@pytest.mark.parametrize("folder", cards.list_folders(), ids=lambda folder: folder.name)
def test_a_card_fits_the_hub(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    tables = [line for line in text.splitlines() if line.startswith("|---")]
    assert max(line.count("---") for line in tables) <= 8
    assert "](http" not in text
    shown = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"][-1]["against_source"].get("flips")
    assert not any(each.get("text", "-" * 99) in text for kind in (shown or {}).values() for each in kind)


@pytest.fixture
def rendered(tmp_path: Path, data: Path) -> Any:
    """Renders the card of a distilled model with figures that nobody measured; as an earlier version wrote them."""

    def render(row: dict[str, Any], stages: Any = DISTILL, task: Any = None, artifact: Any = None, **more: Any) -> str:
        changes = {"task": task} if task else {}
        loaded = load(factories.recipe(tmp_path / "r.yaml", tmp_path / "teacher", data, stages=stages, **changes))
        source = factories.report_row("source", "source")
        source["quality"] = dict.fromkeys(row["quality"], 0.9) | {"n": 48}
        content = {
            "schema": 1, "name": "tiny", "task": {"split": "test", "max_length": 16},
            "environment": {"cpu": "A processor", "cpu_flags": [], "cores": 2, "accelerator": None},
            "rows": [source, row], **more,
        }  # fmt: skip
        return card.render(loaded, content, artifact or open_artifact(model, row["stage"], row["kind"]))

    model = factories.save(factories.model(), tmp_path / "model")
    return render


def _headline(text: str) -> str:
    return text.partition("\n# tiny\n")[2].partition("\n|")[0].strip()


def test_a_report_of_an_earlier_version_has_no_verdict(rendered: Any) -> None:
    text = rendered(factories.report_row("01-distill", quality=0.91, speedup=1.9, compression=2.0))
    assert _headline(text) == (
        "**tiny** classifies texts. It is the local model `teacher`, compressed with hfcompress: distilled. The result "
        "is a PyTorch model with float32 weights.\n\n"
        "It has **101.1%** of its source's accuracy (0.9100 against 0.9000) and is **2.0x smaller** (2 MB), **1.9x "
        "faster** at batch 1 and **1.9x faster** at batch 8."
    )
    assert "What got worse" not in text
    assert "loss of more than" not in text


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "**Verdict: within 1%.** A loss of more than 1% is ruled out (p \\< 0.001). The change, -0.0040 (-0.0090 "
             "to +0.0010), is within noise."),
        ({"verdict": "not shown", "power": "48 rows can show 5%"},
         "**Verdict: not shown to be within 1%.** A loss of more than 1% is not ruled out: 48 rows can show 5%"),
        ({"verdict": "worse", "reading": "worse"}, "**Verdict: worse by more than 1%.** The change, -0.0040"),
    ],
)  # fmt: skip
def test_the_verdict_is_in_words(rendered: Any, found: dict[str, Any], said: str) -> None:
    text = rendered(factories.report_row("01-distill", quality=0.896, against_source=FOUND | found))
    assert said in _headline(text)
    assert "9 of 872 became wrong, 5 became right." in text.partition("## What got worse")[2]
    assert "a secret text" not in text


def test_a_model_that_was_asked_other_units_has_no_verdict(rendered: Any) -> None:
    text = rendered(factories.report_row("01-distill", against_source={"not_compared": "its tokenizer differs"}))
    assert "**No verdict**: its tokenizer differs." in _headline(text)


def test_a_metric_of_which_less_is_better_has_no_share(rendered: Any, tmp_path: Path) -> None:
    task = {"type": "fill-mask", "dataset": str(factories.write_corpus(tmp_path)), "metric": "perplexity"}
    row = factories.report_row("01-distill", speedup=0.5) | {"quality": {"perplexity": 1.5, "n": 9}}
    assert "Its perplexity is **1.5000** (the source's is 0.9000); it is" in (text := rendered(row, task=task))
    assert "**2.0x slower** at batch 8." in text
    assert "of its source's" not in text


def test_figures_that_a_report_need_not_have_are_in_the_table(rendered: Any) -> None:
    row = factories.report_row("01-distill", cold_start={"seconds": 2.0}, embedding_bytes=100)
    assert "cold start" not in rendered(row), "the source's is not known"
    assert "embeddings" not in rendered(row)


def test_a_model_of_bitsandbytes_names_its_packages(rendered: Any, tmp_path: Path) -> None:
    path = factories.save(factories.model(), tmp_path / "bnb")
    config = json.loads((path / "config.json").read_text())
    quantization = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (path / "config.json").write_text(json.dumps(config | quantization))
    text = rendered(
        factories.report_row("01-quantize", "quantize"),
        stages=[{"kind": "quantize", "backend": "bnb_4bit"}],
        artifact=Artifact(path, "01-quantize", "quantize", None, "torch", "int4"),
    )
    assert "`pip install transformers torch bitsandbytes accelerate`" in text


def test_blocks_of_a_card_are_what_they_look_like(rendered: Any) -> None:
    text = rendered(factories.report_row("01-distill", quality=0.896, against_source=FOUND)).partition("\n---\n")[2]
    page = MarkdownIt("commonmark").enable("table").render(text)
    assert page.count("<table>") == 1
    assert "<td>McNemar's exact test, p = 0.42</td>" in page
    assert page.count('<pre><code class="language-python">') == 2


def test_a_run_becomes_a_card_of_model_cards(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    factories.recipe(run / "recipe.yaml", teacher, data, stages=DISTILL)
    loaded = load(run / "recipe.yaml", ["hub.license=mit"])
    lock = {"recipe": loaded.recipe.model_dump(mode="json"), "overrides": ["hub.license=mit"]}
    (run / "recipe.lock.json").write_text(json.dumps(lock))
    factories.save(factories.model(), run / "final")
    rows = [factories.report_row("source", "source"), factories.report_row("01-distill", against_source=FOUND)]
    content = {
        "schema": 2, "name": "tiny", "task": {"split": "test", "max_length": 16, "metric": "accuracy"},
        "environment": {"cpu": "A processor", "cpu_flags": [], "cores": 2, "accelerator": None}, "rows": rows,
    }  # fmt: skip
    (run / "report.json").write_text(json.dumps(content))
    monkeypatch.setattr(cards, "CARDS", tmp_path / "cards")
    cards.main([str(run), "mine"])
    made = tmp_path / "cards" / "mine"
    text = (made / "README.md").read_text()
    assert "license: mit" in text
    assert "Run with `--set hub.license=mit`." in text
    assert "the local model" in text
    assert not any(str(tmp_path) in path.read_text() for path in made.glob("*.[jyR]*"))
    assert "a secret text" not in (made / "report.json").read_text()
    assert (made / "tradeoff.png").is_file()
    assert cards.render(made) == text
    for wrong in ([str(run)], [str(run), "../x"], [str(tmp_path), "x"]):
        with pytest.raises(SystemExit):
            cards.main(wrong)
    assert "not a run directory" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "cards").iterdir()) == ["mine"]
