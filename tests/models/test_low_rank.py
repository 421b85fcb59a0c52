"""Word embeddings as a product of two matrices: the best one there is, saved, loaded and cut like any other model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress.measure.verify import verify
from hfcompress.models.architectures import ARCHITECTURES
from hfcompress.models.artifact import load_tokenizer, open_artifact, read_config, save_model
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.factorized_embeddings import factor_embeddings, token_counts
from hfcompress.models.forward import observe, select_inputs
from hfcompress.models.shape import config_of, shape_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.models.vocabulary import prune_vocabulary, select_tokens
from hfcompress.pruning.hidden_dimensions import cut_hidden
from hfcompress.recipe.loader import load
from hfcompress.recipe.validate import check
from tests import factories

COUNTS = torch.arange(len(factories.WORDS)) ** 2


def literal_loss(table: torch.Tensor, other: torch.Tensor) -> float:
    return float(((COUNTS + 1)[:, None] * (table - other).double().square()).sum())


def product(model: Any) -> torch.Tensor:
    return model.get_input_embeddings()(torch.arange(len(factories.WORDS))).detach()


def test_no_product_of_the_rank_is_nearer_by_frequency() -> None:
    """Eckart & Young: the best product of the weighted table, its singular vectors scaled back."""
    model = factories.model()
    table = model.get_input_embeddings().weight.detach()
    small, kept = factor_embeddings(model, 5, COUNTS)
    root = (COUNTS + 1).double().sqrt()[:, None]
    u, s, v = torch.linalg.svd(table.double() * root, full_matrices=False)
    best = (u[:, :5] * s[:5] @ v[:5]) / root
    assert torch.allclose(product(small).double(), best, atol=1e-5)
    assert kept == pytest.approx(1 - literal_loss(table, product(small)) / literal_loss(table, 0 * table), abs=1e-6)
    unweighted, _ = factor_embeddings(model, 5, 0 * COUNTS)
    assert literal_loss(table, product(small)) < literal_loss(table, product(unweighted))


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_table_of_low_rank_is_answered_for_exactly(family: str) -> None:
    model = factories.model(family)
    words = model.get_input_embeddings().weight
    with torch.no_grad():
        words.copy_(torch.randn(len(words), 6) @ torch.randn(6, words.shape[1]))
    small, kept = factor_embeddings(model, 6, COUNTS)
    inputs = select_inputs(model, factories.batch())
    assert torch.allclose(small(**inputs).logits, model(**inputs).logits, atol=1e-4)
    assert kept == pytest.approx(1)
    shape = shape_of(small.config.to_dict())
    assert shape == replace(shape_of(model.config.to_dict()), embedding_rank=6)
    assert shape.parameters == sum(p.numel() for p in small.parameters())
    assert shape_of(config_of(shape, model.config.to_dict())) == shape


def test_it_loads_in_every_way_and_after_every_other_cut(tmp_path: Path) -> None:
    model, _ = factor_embeddings(factories.model(), 8, COUNTS)
    model = cut(model, [Keep((0, 2), tuple(range(16))), Keep((1,), tuple(range(40)))])
    model = cut_hidden(model, range(0, 32, 2))
    tokenizer, ids = prune_vocabulary(factories.tokenizer(), ["good film"])
    small = select_tokens(model, ids, tokenizer)
    assert small.get_input_embeddings().table.weight.shape == (len(ids), 8)
    save_model(small, tokenizer, tmp_path)
    artifact = open_artifact(tmp_path, kind="prune")
    found = verify(artifact, logits_of(small, make_dummy_inputs(tmp_path)), "AutoModelForSequenceClassification")
    assert found.keys() == {"transformers", "hfcompress", "onnx"}
    assert artifact.shape is not None
    assert artifact.shape.bytes == pytest.approx(artifact.disk_bytes, rel=0.6)  # a header of names beside tiny weights


def test_it_is_trained_as_other_weights_are() -> None:
    model, _ = factor_embeddings(factories.model(), 8, COUNTS)
    observe(model, factories.batch()).logits.sum().backward()
    words = model.get_input_embeddings()
    assert words.table.weight.grad.abs().sum() > 0
    assert words.projection.weight.grad.abs().sum() > 0


def test_tokens_are_counted_with_the_special_ones() -> None:
    counts = token_counts(factories.tokenizer(), ["good film", "good"])
    ids = {word: index for index, word in enumerate(factories.WORDS)}
    assert counts[ids["good"]] == counts[ids["[CLS]"]] == counts[ids["[SEP]"]] == 2
    assert (counts[ids["film"]], counts.sum()) == (1, 7)


def recipe(tmp_path: Path, **stage: Any) -> Any:
    data = factories.write_data(tmp_path / "data")
    teacher = factories.fine_tuned(tmp_path / "teacher", data)
    return load(factories.recipe(tmp_path / "r.yaml", teacher, data, stages=[{"kind": "prune", **stage}]))


@pytest.mark.usefixtures("in_process")
def test_a_stage_makes_it_and_the_plan_is_exact(tmp_path: Path) -> None:
    from hfcompress.run.runner import run

    loaded = recipe(tmp_path, embedding_rank=4, vocabulary="keep")
    planned = check(loaded)[-1]
    finished = run(loaded, tmp_path / "run")
    assert finished is not None
    final = finished.artifacts[-1]
    assert final.shape == planned
    assert not planned.estimated
    assert read_config(final.path)["embedding_rank"] == 4
    assert finished.report["cuts"]["01-prune"]["embedding_rank"]["rank"] == 4
    assert len(load_tokenizer(final.path)) == len(factories.WORDS)
    assert "a table of width 4 and a matrix" in (tmp_path / "run" / "final" / "README.md").read_text()


@pytest.mark.parametrize(
    ("rank", "head", "message"),
    [
        (16, "sequence", "a product of rank 16 has no fewer weights than a table of width 32"),
        (4, "mask", "a product has no such table"),
    ],
)
def test_a_rank_that_saves_nothing_or_a_shared_table_is_refused(rank: int, head: str, message: str) -> None:
    from hfcompress.pruning.stage import Prune

    shape = shape_of(factories.model(head=head).config.to_dict(), head=head)
    task: Any = type("Task", (), {"is_streamed": False})
    stage = Prune.model_validate({"kind": "prune", "embedding_rank": rank})
    (found,) = stage.problems(shape, {}, task)
    assert message in found.message
    assert found.key == ("embedding_rank",)


def test_a_product_is_not_made_twice() -> None:
    from hfcompress.pruning.stage import Prune

    shape = replace(shape_of(factories.model().config.to_dict()), embedding_rank=8)
    task: Any = type("Task", (), {"is_streamed": False})
    (found,) = Prune.model_validate({"kind": "prune", "embedding_rank": 4}).problems(shape, {}, task)
    assert "already a product of rank 8" in found.message
