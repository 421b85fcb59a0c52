"""The teachers of a student: one model or several, which run in each step or are read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hfcompress.distillation.teacher_cache import Answers
from hfcompress.models.forward import Observation, observe
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.task import Task


class Teachers(StrictModel):
    """One teacher or several, an ensemble.

    The student learns from the combined logits; losses on layers use the first teacher.
    """

    models: list[str] = Field(min_length=1)
    """The teachers: each is `source`, `parent`, `model` (the recipe's own), an earlier stage such as `01-distill` (a
    teacher assistant), a directory (also of a peft adapter) or a Hub id."""
    combine: Literal["mean", "confidence"] = "mean"
    """`mean` of the logits, or `confidence`, which divides a teacher's weight by the entropy of its answer to each row
    (or token)."""
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    """The weight of each teacher in the mean."""

    @model_validator(mode="after")
    def _require_weight_each(self) -> Teachers:
        if self.weights is not None and len(self.weights) != len(self.models):
            raise ValueError(f"{len(self.models)} teachers have {len(self.weights)} weights; give one weight for each")
        return self


def _parse(value: Any) -> Any:
    if isinstance(value, str):
        return {"models": [value]}
    return {"models": value} if isinstance(value, list) else value


AnyTeachers = Annotated[Teachers, BeforeValidator(_parse, json_schema_input_type=str | list[str] | Teachers)]
"""A name, a list of names, or `{models, combine, weights}`."""


@dataclass(frozen=True)
class TeacherBatch:
    """The part of a batch for one teacher: its cached outputs, or its own tokens, or nothing.

    accelerate and the data loader move any object with `to` and `pin_memory`.

    Attributes:
        logits: Cached logits, `(batch, labels)` or `(batch, length, labels)`; None if the model runs.
        hidden_states: Cached hidden states, `(batch, layers + 1, length, hidden)`, or of the first token alone; None
            if no loss needs them.
        tokens: The tokens of the teacher's own tokenizer for these rows; None if it reads the student's.
    """

    logits: Tensor | None = None
    hidden_states: Tensor | None = None
    tokens: Mapping[str, Tensor] | None = None

    def to(self, device: Any, non_blocking: bool = False) -> TeacherBatch:
        """Copies its tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TeacherBatch:
        """Copies its tensors to pinned memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> TeacherBatch:
        tokens = None if self.tokens is None else {name: change(tensor) for name, tensor in self.tokens.items()}
        logits, states = (None if tensor is None else change(tensor) for tensor in (self.logits, self.hidden_states))
        return TeacherBatch(logits, states, tokens)


@dataclass
class Member:
    """One teacher of an ensemble.

    Attributes:
        stage: Its name in the recipe.
        model: The model; None if `answers` has all outputs that are needed.
        tokenizer: Its tokenizer.
        rows: The train rows, encoded by its tokenizer; None if the student's rows are the same.
        answers: Its cached outputs; None if it has no cache.
    """

    stage: str
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    rows: datasets.Dataset | None = None
    answers: Answers | None = None

    def prepare(self, rows: Tensor, length: int, multiple: int | None, task: Task) -> TeacherBatch:
        """Reads the cached outputs for some rows, or makes a batch of them; the arguments are those of the ensemble."""
        import torch

        if self.answers is not None:
            found = {name: torch.from_numpy(values) for name, values in self.answers.of(rows.numpy(), length).items()}
            return TeacherBatch(found["logits"], found.get("hidden_states", found.get("cls")))
        if self.rows is None:
            return TeacherBatch()
        batch = task.batch(self.rows.__getitems__(rows.tolist()), self.tokenizer, multiple)
        return TeacherBatch(tokens={name: value for name, value in batch.items() if name not in ("labels", "index")})

    def ask(
        self, tokens: Mapping[str, Tensor], own: TeacherBatch, needs: frozenset[str], layers: frozenset[int] | None
    ) -> Observation:
        """Returns the cached outputs for a batch, or runs the model on it without gradients."""
        import torch

        if own.logits is not None:
            return Observation(own.logits, () if own.hidden_states is None else tuple(own.hidden_states.unbind(1)))
        assert self.model is not None
        with torch.no_grad():
            return observe(self.model, tokens if own.tokens is None else own.tokens, needs, layers)


class TeacherEnsemble:
    """The teachers of a training, asked together about each batch.

    A teacher whose tokenizer makes other inputs than the student's gets its own inputs.
    """

    def __init__(self, members: Sequence[Member], options: Teachers, task: Task) -> None:
        self.members, self.options, self.task = members, options, task

    def to(self, device: Any) -> TeacherEnsemble:
        """Moves the models to a device, in eval mode."""
        for member in self.members:
            if member.model is not None:
                member.model.to(device).eval()
        return self

    def prepare(self, rows: Tensor, length: int, multiple: int | None = None) -> list[TeacherBatch]:
        """Makes the part of a batch for each teacher; empty if the batch itself is enough for all.

        Args:
            rows: `(batch,)` row numbers, on the CPU.
            length: The padded length of the student's batch.
            multiple: The padded length of a batch is a multiple of it.
        """
        if all(member.answers is None and member.rows is None for member in self.members):
            return []
        return [member.prepare(rows, length, multiple, self.task) for member in self.members]

    def ask(
        self,
        tokens: Mapping[str, Tensor],
        prepared: Sequence[TeacherBatch] = (),
        needs: frozenset[str] = frozenset(),
        layers: frozenset[int] | None = None,
    ) -> Observation:
        """Computes or reads the teachers' outputs for a batch, with combined logits.

        Args:
            tokens: The student's token tensors.
            prepared: The result of `prepare` for this batch.
            needs: The outputs of the first teacher that losses need besides logits.
            layers: The layers whose queries, keys and values are kept.
        """
        own = prepared or [TeacherBatch()] * len(self.members)
        outputs = [
            member.ask(tokens, batch, needs if index == 0 else frozenset(), layers)
            for index, (member, batch) in enumerate(zip(self.members, own, strict=True))
        ]
        if len(outputs) == 1:
            return outputs[0]
        logits = combine_logits([output.logits for output in outputs], self.options, self.task.head)
        return replace(outputs[0], logits=logits)


def combine_logits(logits: Sequence[Tensor], options: Teachers, head: str) -> Tensor:
    """Computes the weighted mean of several teachers' logits, `Σ w_k z_k / Σ w_k`.

    With `combine: confidence` each weight is divided by the entropy of the answer (Kwon et al. 2020, Adaptive
    Knowledge Distillation Based on Entropy, ICASSP).

    Args:
        logits: One tensor for each teacher, of equal shapes.
        options: The way to combine them.
        head: A key of `TASK_HEADS`: the distributions of a span head are over the tokens.
    """
    import torch

    stacked = torch.stack([z.float() for z in logits])
    weights = stacked.new_tensor(options.weights or [1.0] * len(logits)).reshape(-1, *(1 for _ in logits[0].shape))
    if options.combine == "confidence":
        axis = -2 if head == "span" else -1
        entropy = -(stacked.softmax(axis) * stacked.log_softmax(axis)).sum(axis, keepdim=True)
        weights = weights / entropy.clamp(min=1e-6)
    return (stacked * weights).sum(0) / weights.expand_as(stacked).sum(0)
