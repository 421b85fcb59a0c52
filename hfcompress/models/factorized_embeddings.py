"""Factorizes word embeddings into a product of two matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import empty_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 4096


def factor_embeddings(model: PreTrainedModel, rank: int, counts: Tensor) -> tuple[PreTrainedModel, float]:
    """Copies a model with word embeddings that are a table `(words, rank)` times a matrix `(rank, width)`.

    The product minimizes `sum over words of n |e - e'|^2`: with `V` the first eigenvectors of `E' diag(n) E`, the table
    is `E V` and the matrix `V'`. The weight `n` of a word is its frequency plus one, so that every word counts.

    Source: weighted low-rank factors, Chen et al. 2018, arXiv:1806.06950, section 3.2; factored embeddings of a text
    classifier, Acharya et al. 2019, arXiv:1811.00641.

    Args:
        model: A model whose task head does not share its word embeddings; it is not changed.
        rank: The inner width.
        counts: The number of times that each token occurs in the texts, `(words,)`.

    Returns:
        The model, and the share of `sum of n |e|^2` that the product keeps.
    """
    import torch

    name, table = _table(model)
    words, often = table.double(), table.new_ones(len(table)).double()
    often[: len(counts)] += counts.to(table.device)  # a table may have more rows than there are tokens
    moments = words.T @ (words * often[:, None])
    values, vectors = torch.linalg.eigh(moments)
    basis = vectors[:, -rank:].flip(1)
    small = empty_model(
        type(model).__name__, replace(shape_of(model.config.to_dict()), embedding_rank=rank), model.config
    )
    weights = {k: v for k, v in model.state_dict().items() if k != f"{name}.weight"}
    weights[f"{name}.table.weight"] = (words @ basis).to(table.dtype)
    weights[f"{name}.projection.weight"] = basis.to(table.dtype)
    small.load_state_dict(weights, strict=True)
    kept = float(values[-rank:].sum() / values.sum())
    return small.train(model.training), kept


def _table(model: PreTrainedModel) -> tuple[str, Tensor]:
    """Finds the path of the word embeddings and their weights."""
    words = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is words)
    return name, words.weight.detach()


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Tensor:
    """Counts each token in the texts, special tokens included: `(words,)`."""
    import torch

    counts, rest = torch.zeros(len(tokenizer), dtype=torch.long), iter(texts)
    while rows := list(islice(rest, _ROWS)):
        ids = [i for row in tokenizer(rows, verbose=False)["input_ids"] for i in row]
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(counts))
    return counts
