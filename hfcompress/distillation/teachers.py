"""Who teaches: one model or several, live or from a cache of their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hfcompress.distillation.teacher_cache import Answers
from hfcompress.models.forward import Observed, observe
from hfcompress.training.loss import TAUGHT
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.task import Task

_NOT_ASKED = ("labels", "index")


class Teachers(StrictModel):
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
        rows: The train rows as its own tokenizer encodes them; None where the student's rows are the same.
        answers: Its cached answers.
    """

    stage: str
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    rows: datasets.Dataset | None = None
    answers: Answers | None = None

    def look(self, tokens: Mapping[str, Tensor], needs: frozenset[str], layers: frozenset[int] | None) -> Observed:
        """The live model's forward pass over a batch that its own tokenizer made."""
        import torch

        assert self.model is not None
        with torch.no_grad():
            return observe(self.model, tokens, needs, layers)


class TeacherEnsemble:
    """The teachers of a training run, asked together about each batch.

    A teacher whose tokenizer makes other inputs of the rows than the student's is given its own.
    """

    def __init__(self, members: Sequence[Member], options: Teachers, task: Task) -> None:
        self.members, self.options, self.task = members, options, task

    def to(self, device: Any) -> TeacherEnsemble:
        """Moves the live teachers to a device."""
        for member in self.members:
            if member.model is not None:
                member.model.to(device).eval()
        return self

    def attach(self, rows: Any, length: int, multiple: int | None = None) -> dict[str, Tensor]:
        """What travels with a batch for each teacher: its cached answers, or its own tokens of the same rows.

        Args:
            rows: `(batch,)` row numbers, on the CPU.
            length: Tokens the student's batch is padded to.
            multiple: The padded length of a batch is a multiple of it.
        """
        import torch

        found: dict[str, Tensor] = {}
        for index, member in enumerate(self.members):
            own: Mapping[str, Tensor] = {}
            if member.answers is not None:
                own = {name: torch.from_numpy(x) for name, x in member.answers.of(rows.numpy(), length).items()}
            elif member.rows is not None:
                own = self.task.batch(member.rows.__getitems__(rows.tolist()), member.tokenizer, multiple)
            found |= {f"{TAUGHT}.{index}.{name}": tensor for name, tensor in own.items() if name not in _NOT_ASKED}
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
        tokens = {name: value for name, value in batch.items() if not name.startswith(TAUGHT)}
        seen = []
        for index, member in enumerate(self.members):
            own = {
                name.rpartition(".")[2]: value for name, value in batch.items() if name.startswith(f"{TAUGHT}.{index}.")
            }
            if "logits" in own:
                states = own.get("hidden_states", own.get("cls"))
                seen.append(Observed(own["logits"], () if states is None else tuple(states.unbind(1))))
            else:
                seen.append(member.look(own or tokens, needs if index == 0 else frozenset(), layers))
        if len(seen) == 1:
            return seen[0]
        return replace(seen[0], logits=combined([s.logits for s in seen], self.options, self.task.head))


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
