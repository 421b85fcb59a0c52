"""What a card says of a prune stage: what it was told, what came of it, and the pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hfcompress.models.artifact import open_artifact
from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning.criteria.base import CRITERIA
from hfcompress.pruning.stage import Prune
from hfcompress.recipe.loader import load
from hfcompress.report import card
from hfcompress.report.hub_metadata import validate
from tests import factories

TRAIN = {"epochs": 2, "losses": ["soft_labels"]}
TRAINED = "2 epochs by `soft_labels` from `parent`"
NAMED = re.compile(r" by `(\w+)` \(.*?\)(?=;)")


def sentence(**options: Any) -> str:
    return Prune.model_validate({"kind": "prune", **options}).describe()


def test_the_criterion_is_named_with_its_paper() -> None:
    taylor = f"`taylor` ({CRITERIA.get('taylor').source})"
    assert sentence(heads=0.25, ffn=0.5, recover=TRAIN) == (
        f"**prune**: cuts 25% of the heads and 50% of the FFN neurons by {taylor}; recovery: {TRAINED}"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ffn": 0.4}, "cuts 40% of the FFN neurons by `taylor`; no recovery"),
        ({"heads": 0.5, "attention_blocks": 1, "ffn_blocks": 2},
         "cuts 50% of the heads, 1 whole attention block and 2 whole FFN blocks by `taylor`; no recovery"),
        ({"criterion": "cosine", "layers": 3}, "cuts 3 whole layers by `cosine`; no recovery"),
        ({"criterion": "magnitude", "hidden": 0.25}, "cuts 25% of the hidden dimensions by `magnitude`; no recovery"),
        ({"vocabulary": "corpus"}, "cuts the tokens that do not occur in the data; no recovery"),
        ({"budget": {"macs": 0.5}},
         "cuts heads and FFN neurons down to 50% of the layers' MACs by `taylor`; no recovery"),
        ({"budget": {"bytes": 0.3}, "rearrange": True, "tune": "scales"},
         "cuts heads and FFN neurons down to 30% of the layers' bytes by `taylor`; units swapped by their joint "
         "importance (Kwon et al. 2022); remaining units scaled by least squares (Kwon et al. 2022); no recovery"),
        ({"budget": {"latency": 0.5, "batch_size": 8, "length": 64}},
         "cuts heads and FFN neurons down to 50% of the model's latency at batch 8 of 64 tokens by `taylor`; "
         "no recovery"),
        ({"criterion": "magnitude", "weights": {"share": 0.6, "block": [4, 1]}},
         "sets 60% of the layers' weights in blocks of 4 x 1 to zero by `magnitude`; no recovery"),
        ({"criterion": "wanda", "weights": {"n_of_m": [1, 4]}, "vocabulary": "corpus"},
         "cuts the tokens that do not occur in the data and sets 3 of each 4 of the layers' weights to zero by "
         "`wanda`; no recovery"),
        ({"budget": {"parameters": 0.4}, "schedule": {"use": "iterative", "rounds": 3}, "recover": TRAIN},
         f"cuts heads and FFN neurons down to 40% of the layers' parameters by `taylor`; in 3 rounds; recovery after "
         f"each round: {TRAINED}"),
        ({"heads": 0.5, "schedule": "gradual", "train": TRAIN},
         f"cuts 50% of the heads by `taylor`; during training: {TRAINED}; no recovery"),
        ({"criterion": "l0", "budget": {"macs": 0.5}, "train": TRAIN, "recover": {"max_steps": 9, "losses":
          ["hard_labels"], "lora": {}}},
         f"cuts heads and FFN neurons down to 50% of the layers' MACs by `l0`; during training: {TRAINED}; recovery: "
         "9 steps by `hard_labels` from labels, through LoRA"),
        ({"criterion": "magnitude", "weights": {"share": 0.5}, "train": TRAIN,
          "schedule": {"use": "lottery", "rounds": 2, "rewind_steps": 200}},
         f"sets 50% of the layers' weights to zero by `magnitude`; a lottery ticket drawn in 2 rounds, each from the "
         f"weights of step 200 (Frankle & Carbin 2019): {TRAINED}; no recovery"),
        ({"heads": 0.5, "schedule": {"use": "lottery", "rounds": 1}, "train": TRAIN},
         f"cuts 50% of the heads by `taylor`; a lottery ticket drawn in 1 round, each from the weights before training "
         f"(Frankle & Carbin 2019): {TRAINED}; no recovery"),
    ],
)  # fmt: skip
def test_it_says_what_the_stage_was_told(options: dict[str, Any], said: str) -> None:
    assert NAMED.sub(r" by `\1`", sentence(**options)) == f"**prune**: {said}"


KEPT: dict[str, Any] = {
    "heads": [[3, 4], [4, 4]], "ffn": [[1024, 2048], [512, 2048]], "hidden": [32, 32],
    "layers": {"kept": [1, 2], "of": 2},
}  # fmt: skip
LATENCY = {
    "source_ms": 41.234, "target_ms": 20.617, "predicted_ms": 19.9, "measured_ms": 21.31, "batch_size": 32,
    "length": 128, "device": "A processor", "threads": 2, "dtype": "float32",
}  # fmt: skip
SPARSITY = {"share": 0.6004, "dense_bytes": 438_000_000, "sparse_bytes": 268_300_000}


@pytest.mark.parametrize(
    ("notes", "facts"),
    [
        ({"kept": KEPT}, ["It keeps 7 of 8 attention heads and 1,536 of 4,096 FFN neurons."]),
        ({"kept": {**KEPT, "layers": {"kept": [1, 4], "of": 4}, "hidden": [24, 32]}, "vocabulary": [1_900, 30_522]},
         ["It keeps layers 1 and 4 of 4, and in them 7 of 8 attention heads, 1,536 of 4,096 FFN neurons, 24 of "
          "32 hidden dimensions and 1,900 of 30,522 tokens."]),
        ({"kept": KEPT, "latency": LATENCY},
         ["It keeps 7 of 8 attention heads and 1,536 of 4,096 FFN neurons.",
          "The latency was 41.2 ms before the cut. The target was 20.6 ms, the prediction 19.9 ms, and the measured "
          "latency 21.3 ms (batch 32 of 128 tokens in float32 on A processor, 2 threads)."]),
        ({"kept": KEPT, "sparsity": SPARSITY},
         ["It keeps 7 of 8 attention heads and 1,536 of 4,096 FFN neurons.",
          "60.0% of the weights in the linear modules of its layers are zero. Dense runtimes gain nothing from zeros: "
          "they take as much time and memory as any other number. In the smallest sparse format for each matrix the "
          "weights would take 268.3 MB; as they are, they take 438.0 MB."]),
    ],
)  # fmt: skip
def test_it_says_what_was_cut(notes: dict[str, Any], facts: list[str]) -> None:
    assert Prune.summarize(notes) == facts


@pytest.fixture
def rendered(tmp_path: Path, data: Path) -> Any:
    """Renders the card of a model in `tmp_path/final`, with notes and picture files."""
    stages = [{"kind": "prune", "heads": 0.25}]
    loaded = load(factories.recipe(tmp_path / "recipe.yaml", tmp_path / "teacher", data, stages=stages))

    def render(model: Any, cuts: dict[str, Any], *files: str) -> str:
        from hfcompress.models.artifact import save_model

        path = tmp_path / "final"
        save_model(model, factories.tokenizer(), path)
        for name in files:
            (path / name).write_bytes(b"")
        content = {
            "name": "tiny",
            "environment": {"cpu": "A processor", "cpu_flags": [], "cores": 2, "accelerator": None},
            "task": {"split": "test", "max_length": 16},
            "rows": [factories.report_row("source"), factories.report_row("01-prune", "prune")],
            "cuts": cuts,
        }
        return card.render(loaded, content, open_artifact(path, "01-prune", "prune"))

    return render


def test_a_section_shows_the_facts_and_the_pictures_that_lie_beside_the_card(rendered: Any) -> None:
    notes = {"kept": KEPT, "latency": LATENCY, "sensitivity": {}}
    text = rendered(factories.model(), {"01-prune": notes}, "01-prune-kept.png", "01-prune-latency.png", "tradeoff.png")

    section = text.partition("## What was cut\n")[2].partition("\n## ")[0]
    assert "\n### 01-prune\n\nIt keeps 7 of 8 attention heads" in section
    assert re.findall(r"!\[\w+\]\((.*?)\)\n\n\*(.*?)\*\n", section) == [
        ("01-prune-kept.png", "Attention heads and FFN neurons that each layer keeps."),
        (
            "01-prune-latency.png",
            "The latency predicted from the timings of single blocks, and the measured latency of the model.",
        ),
    ]
    assert "sensitivity" not in section, "a picture that was not drawn is not shown"
    assert "(tradeoff.png)" in text
    validate(text)


def test_blocks_of_a_card_are_set_off_by_one_empty_line(rendered: Any) -> None:
    notes = {"kept": KEPT, "latency": LATENCY, "sparsity": SPARSITY}
    full = rendered(factories.model(), {"01-prune": notes, "02-prune": notes}, "01-prune-kept.png", "02-prune-kept.png")
    bare = rendered(factories.model(), {})

    for text in (full, bare):
        prose = re.sub(r"```.*?```", "code", text.partition("\n# ")[2], flags=re.DOTALL)
        lines = prose.split("\n")
        assert "\n\n\n" not in prose
        for i, line in enumerate(lines):
            if line.startswith(("#", "![", "*A")):
                assert lines[i + 1] == "", f"no empty line after {line!r}"
                assert i == 0 or lines[i - 1] == "", f"no empty line before {line!r}"
    assert full.count("\n### 0") == 2
    assert "What was cut" not in bare


def test_a_picture_that_does_not_lie_beside_the_card_is_not_linked(rendered: Any) -> None:
    assert ".png" not in rendered(factories.model(), {"01-prune": {"kept": KEPT, "latency": LATENCY}})


def test_only_a_shape_beyond_the_stock_configs_needs_remote_code(rendered: Any) -> None:
    small = cut(factories.model(), [Keep((0,), tuple(range(8))), Keep((0, 1), tuple(range(16)))])

    assert "No stock config can express" in (text := rendered(small, {}))
    assert text.count("trust_remote_code=True") == 4


def test_a_stock_shape_needs_none(rendered: Any) -> None:
    assert "trust_remote_code" not in rendered(factories.model(), {})
