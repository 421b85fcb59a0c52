"""The training objective: a student, its losses and their projections, as one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfcompress.models.forward import Observation, observe
from hfcompress.models.shape import Shape, shape_of
from hfcompress.training.loss import Loss, Pairs, Step, Units
from hfcompress.training.overlay import TrainingOverlay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.data.task import Task


class Objective(nn.Module):
    """A student, its losses and its training overlay as one module: DDP and checkpoints see all trained weights."""

    accepts_loss_kwargs = False  # the Trainer divides the loss by the accumulated batches

    def __init__(
        self,
        student: PreTrainedModel,
        losses: Sequence[Loss],
        task: Task,
        teacher: Shape | None = None,
        pairs: Pairs = (),
        dynamic: bool = False,
        masks: TrainingOverlay | None = None,
        states: Sequence[Tensor | None] = (),
    ) -> None:
        """Makes the projections of the losses.

        Args:
            student: The model to train.
            losses: The terms of the sum.
            task: The task.
            teacher: The first teacher's shape; None if no loss needs a teacher.
            pairs: `(m, g)`: student layer `m` learns from teacher layer `g`, both from 1.
            dynamic: True if `pairs` are only a start, see `Step`.
            masks: The overlay of the student while it trains.
            states: The result of each loss's `state_of`.
        """
        super().__init__()
        self.student = student
        self.masks = masks
        names = [loss.name for loss in losses]
        keys = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
        self.losses = dict(zip(keys, losses, strict=True))
        self.task, self.pairs, self.dynamic = task, pairs, dynamic
        self.needs = frozenset[str]().union(*(loss.needs for loss in losses))
        for key, state in zip(keys, states, strict=bool(states)):
            self.register_buffer(f"state_of_{key}", state, persistent=False)
        self.learned = nn.ModuleDict()
        self.layers = self.teacher_layers = frozenset[int]()
        if teacher is not None:
            self._match(shape_of(student.config.to_dict()), teacher)
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_pre_hook(_add_frozen)

    def _match(self, student: Shape, teacher: Shape) -> None:
        """Makes the projections of the losses, and finds the layers that they compare."""
        compared = [p for x in self.losses.values() if x.needs for p in x.layers(student, teacher, self.pairs)]
        self.layers, self.teacher_layers = frozenset(m for m, _ in compared), frozenset(g for _, g in compared)
        for key, loss in self.losses.items():
            module, name = loss.make_projection(student, teacher), loss.projection_name(key)
            if module is not None and name not in self.learned:
                self.learned[name] = module

    @property
    def leaves_parameters_unused(self) -> bool:
        """True if some parameters get no gradient: those of the task head, if no loss compares logits."""
        return not any(loss.needs_logits for loss in self.losses.values())

    def forward(
        self,
        labels: Tensor | None = None,
        teacher: Observation | None = None,
        progress: float = 0.0,
        shares: Tensor | None = None,
        **inputs: Tensor,
    ) -> dict[str, Any]:
        """Sums up the weighted losses; the overlay's penalty is the part named `mask`.

        Args:
            labels: The labels, as the task's `batch` makes them.
            teacher: The teachers' outputs for the same batch.
            progress: The share of the steps that are done, for weights and overlays that change.
            shares: `(losses,)`: the weight of the batch in its step for each loss, see `weigh_batches`; None if the
                batch is the whole step.
            **inputs: Token tensors.

        Returns:
            `loss`, the sum, and `parts`, each term by its name.
        """
        with self.under_overlay(progress):
            observed = observe(self.student, inputs, self.needs, self.layers)
            penalty = None if self.masks is None else self.masks.penalty(progress)
        mask = inputs["attention_mask"].bool()
        step = Step(observed, teacher, mask, labels, self.pairs, self.task, self.dynamic)
        learned = dict(self.learned.items())
        parts = {
            key: loss.weight_at(progress)
            * loss.compute(replace(step, state=self._state(key)), learned.get(loss.projection_name(key)))
            for key, loss in self.losses.items()
        }
        if shares is not None:
            parts = {key: part * share for (key, part), share in zip(parts.items(), shares, strict=True)}
        if penalty is not None:
            parts["mask"] = penalty
        return {"loss": torch.stack(list(parts.values())).sum(), "parts": parts}

    def units(self, batch: Mapping[str, Any]) -> Tensor:
        """Counts the units of each loss in a collated batch: `(losses,)`."""
        found = Units(batch["attention_mask"].bool(), batch.get("labels"), self.task)
        return torch.stack([loss.units(replace(found, state=self._state(key))) for key, loss in self.losses.items()])

    def _state(self, key: str) -> Tensor | None:
        """Returns the result of a loss's `state_of`."""
        state: Tensor | None = getattr(self, f"state_of_{key}", None)
        return state

    def under_overlay(self, progress: float) -> AbstractContextManager[None]:
        """Lays the overlay over the student while the context lasts."""
        return nullcontext() if self.masks is None else self.masks.lay_over(self.student, progress)


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keeps only the trained weights in a checkpoint, each tensor once: safetensors refuses shared tensors.

    A resumed training has the frozen weights already, and the state of a quantized layer cannot be loaded.
    """
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    kept = {prefix + name for name in (*trained, *(name for name, _ in module.named_buffers()))}
    for name in set(state) - kept:
        del state[name]


def _add_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Adds the weights that `_drop_frozen` left out to a checkpoint, from the module itself."""
    again = _second_names(module)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in again:
            state[prefix + name] = state[prefix + again[name]]
        elif not parameter.requires_grad:
            state.setdefault(prefix + name, parameter.detach())


def _second_names(module: nn.Module) -> dict[str, str]:
    """Maps the further names of shared tensors to their first names: a fill-mask head shares the embeddings."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[id(tensor)] for name, tensor in named if first.setdefault(id(tensor), name) != name}
