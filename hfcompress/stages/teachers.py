"""Who teaches: one model or several, live or from a cache of their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hfcompress.base.component import Strict
from hfcompress.data.teacher_cache import Answers
from hfcompress.model.observe import Observed, observe

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "taught"


class Teachers(Strict):
    """One teacher or an ensemble.

    The student learns from the combined logits; losses that look at layers look at those of the first.
    """

    models: list[str] = Field(min_length=1)
    """Each `source`, `parent`, `model` (the recipe's own), an earlier stage such as `01-distill` (a teacher assistant),
    a directory (a peft adapter's too) or a Hub id."""
    combine: Literal["mean", "confidence"] = "mean"
    """`mean` of the logits; `confidence` weighs each row (or token) by one over the entropy of the teacher's answer."""
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    """One factor a teacher in the mean."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> Teachers:
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(f"{len(self.models)} teachers have {len(self.weights)} weights; give each of them one")
        return self


def _parse(value: Any) -> Any:
    if isinstance(value, str):
        return {"models": [value]}
    return {"models": value} if isinstance(value, list) else value


AnyTeachers = Annotated[Teachers, BeforeValidator(_parse)]
"""A name, a list of names, or `{models, combine, weights}`."""


@dataclass
class Member:
    """A teacher at work.

    Attributes:
        stage: What the recipe calls it.
        model: The model; None where all that is asked of it is in `answers`.
        tokenizer: Its own.
        foreign: Whether its tokenizer splits texts in another way than the student's.
        ids: `(student vocabulary,)`: its id for each of the student's tokens, where the student's vocabulary is a part
            of its own; None where the two are the same.
        answers: Its cached answers.
    """

    stage: str
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    foreign: bool = False
    ids: Tensor | None = None
    answers: Answers | None = None

    def look(self, tokens: Mapping[str, Tensor], needs: frozenset[str], layers: frozenset[int] | None) -> Observed:
        """The live model's forward pass over a batch of the student's tokens."""
        import torch

        assert self.model is not None
        ids = tokens["input_ids"]
        if self.ids is not None:
            ids = self.ids[ids]
        # The batch is padded for the student.
        ids = ids.masked_fill(tokens["attention_mask"] == 0, self.tokenizer.pad_token_id)
        tokens = {**tokens, "input_ids": ids}
        with torch.no_grad():
            return observe(self.model, tokens, needs, layers)


class Teaching:
    """The teachers of a training run, asked together about each batch."""

    def __init__(self, members: Sequence[Member], options: Teachers, head: str) -> None:
        self.members, self.options, self.head = members, options, head

    def to(self, device: Any) -> Teaching:
        """Moves the live teachers to a device."""
        for member in self.members:
            if member.model is not None:
                member.model.to(device).eval()
                member.ids = member.ids if member.ids is None else member.ids.to(device)
        return self

    def attach(self, rows: Any, length: int) -> dict[str, Tensor]:
        """The cached answers to some rows as tensors, to travel with the batch.

        Args:
            rows: `(batch,)` row numbers, on the CPU.
            length: Tokens the batch is padded to.
        """
        import torch

        found = {}
        for index, member in enumerate(self.members):
            if member.answers is not None:
                for name, values in member.answers.of(rows.numpy(), length).items():
                    found[f"{PREFIX}.{index}.{name}"] = torch.from_numpy(values)
        return found

    def ask(
        self, batch: Mapping[str, Tensor], needs: frozenset[str] = frozenset(), layers: frozenset[int] | None = None
    ) -> Observed:
        """What the teachers show of a batch that `attach` has been through.

        Args:
            batch: Token tensors and attached answers.
            needs: What is looked at besides logits, of the first teacher.
            layers: The layers whose projections are kept.
        """
        tokens = {name: value for name, value in batch.items() if not name.startswith(PREFIX)}
        seen = []
        for index, member in enumerate(self.members):
            kept = {
                name.rpartition(".")[2]: value for name, value in batch.items() if name.startswith(f"{PREFIX}.{index}.")
            }
            if kept:
                states = kept.get("hidden_states", kept.get("cls"))
                seen.append(Observed(kept["logits"], () if states is None else tuple(states.unbind(1))))
            else:
                seen.append(member.look(tokens, needs if index == 0 else frozenset(), layers))
        if len(seen) == 1:
            return seen[0]
        return replace(seen[0], logits=combined([s.logits for s in seen], self.options, self.head))


def combined(logits: Sequence[Tensor], options: Teachers, head: str) -> Tensor:
    """One set of logits from several teachers'.

    `Σ w_k z_k / Σ w_k`; with `confidence` the weights are also divided by each answer's entropy (Kwon et al. 2020,
    Adaptive Knowledge Distillation Based on Entropy, ICASSP).

    Args:
        logits: Of equal shapes.
        options: How to combine them.
        head: A key of `HEADS`: a span head's distributions lie along the length.
    """
    import torch

    stacked = torch.stack([z.float() for z in logits])
    weights = stacked.new_tensor(options.weights or [1.0] * len(logits)).reshape(-1, *(1 for _ in logits[0].shape))
    if options.combine == "confidence":
        axis = -2 if head == "span" else -1
        entropy = -(stacked.softmax(axis) * stacked.log_softmax(axis)).sum(axis, keepdim=True)
        weights = weights / entropy.clamp(min=1e-6)
    return (stacked * weights).sum(0) / weights.expand_as(stacked).sum(0)


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every text the same ids, as far as their vocabularies and a sample tell."""
    sample = "Don't tokenizers differ? Naïve café — 3.14 UPPER lower, re-started [MASK] 東京."
    return one.get_vocab() == other.get_vocab() and one(sample)["input_ids"] == other(sample)["input_ids"]


def translation(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, own: datasets.Dataset, theirs: datasets.Dataset
) -> Tensor | None:
    """The teacher's id for each of the student's tokens, where both split these rows into the same tokens.

    Args:
        student, teacher: Their tokenizers.
        own, theirs: The same rows, encoded with each.

    Returns:
        `(student vocabulary,)`; None where they split a row in different ways.
    """
    import torch

    known = teacher.get_vocab()
    table = torch.zeros(max(student.get_vocab().values()) + 1, dtype=torch.long)
    for token, index in student.get_vocab().items():
        if token not in known:
            return None
        table[index] = known[token]
    ids = table.tolist()
    same = own["length"][:] == theirs["length"][:] and all(
        [ids[i] for i in row] == other for row, other in zip(own["input_ids"], theirs["input_ids"], strict=True)
    )
    return table if same else None
