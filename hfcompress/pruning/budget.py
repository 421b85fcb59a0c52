"""Budgets: the share of the layers' parameters, MACs or bytes, or of the model's latency here, that may stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from hfcompress.measure import machine
from hfcompress.models.shape import Layer, Shape, shape_of
from hfcompress.pruning.costs import Costs, Target
from hfcompress.pruning.latency_table import Setting, Table, costs_in_time, predict, timed
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("parameters", "macs", "bytes", "latency")
_SETTING = ("device", "batch_size", "length", "threads", "dtype")


class Budget(StrictModel):
    """How much may stay; one of `parameters`, `macs`, `bytes` and `latency`.

    The first three are shares of what the transformer layers have; the embeddings and the head are not counted, since
    nothing of them is cut. Norms and output biases count and stay. `latency` is a share of the whole model's time.
    """

    parameters: float | None = Field(default=None, gt=0, lt=1)
    """Share of the layers' parameters."""
    macs: float | None = Field(default=None, gt=0, lt=1)
    """Share of the layers' multiply-accumulates at the task's `max_length`."""
    bytes: float | None = Field(default=None, gt=0, lt=1)
    """Share of the layers' stored bytes."""
    latency: float | None = Field(default=None, gt=0, lt=1)
    """Share of the model's time here, from token ids to logits, by a table of real timings: 0.5 is twice as fast."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where a `latency` holds."""
    batch_size: int = Field(default=32, ge=1)
    """Rows of a batch at which a `latency` holds."""
    length: int = Field(default=128, ge=1)
    """Tokens of a row at which a `latency` holds, all of them real."""
    threads: int | None = Field(default=None, ge=1)
    """Threads at which a `latency` holds. The default is the count at which the whole model is fastest, of 1, 2, 4, …
    and the most that `OMP_NUM_THREADS`, CPU affinity and a container's CPU quota allow."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision at which a `latency` holds."""

    @model_validator(mode="after")
    def _one_kind(self) -> Budget:
        named = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(named) != 1:
            found = " and ".join(f"`{kind}`" for kind in named) or "none"
            raise ValueError(f"a budget is one of `parameters`, `macs`, `bytes` and `latency`, and here is {found}")
        idle = self.says(*_SETTING)
        if idle and self.latency is None:
            raise ValueError(f"`{idle[0]}` is for a `latency`; leave it out")
        return self

    @property
    def kind(self) -> str:
        """The key that is given."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def share(self) -> float:
        """The share that may stay."""
        return float(getattr(self, self.kind))

    @property
    def setting(self) -> Setting:
        """The conditions of a `latency`."""
        return Setting(self.device, self.batch_size, self.length, self.threads, self.dtype)


def costs_of(budget: Budget, shape: Shape, group: int, length: int, table: Table | None = None) -> Costs:
    """What heads and neurons of a model cost, in the unit of a budget.

    Args:
        budget: Names the unit.
        shape: The model's; each FFN width is a multiple of `group`.
        group: Neurons that stay or go together.
        length: Tokens of a row, for MACs.
        table: Timings of this model, for a `latency`.
    """
    if budget.latency is not None:
        assert table is not None
        return costs_in_time(table, shape, group)
    amount, runs = _AMOUNTS[budget.kind], len(shape.layers)
    blocks = shape.layers[:1] if shape.spec.shared_layers else shape.layers

    def of(heads: int, ffn: int) -> int:
        return amount(replace(shape, layers=(Layer(heads, ffn),) * runs), length)

    head, neurons = ((of(*unit) - of(0, 0)) // len(blocks) for unit in ((shape.group, 0), (0, group)))
    return Costs(
        tuple(tuple(head * k for k in range(x.heads // shape.group + 1)) for x in blocks),
        tuple(tuple(neurons * k for k in range(x.ffn // group + 1)) for x in blocks),
        group,
        of(0, 0) - amount(replace(shape, layers=()), length),
    )


_AMOUNTS: dict[str, Callable[[Shape, int], int]] = {
    "parameters": lambda shape, _: shape.encoder_parameters,
    "macs": lambda shape, length: shape.macs(length),
    "bytes": lambda shape, _: shape.bytes,
}


def target_of(
    budget: Budget,
    shape: Shape,
    now: Shape,
    group: int,
    length: int,
    table: Table | None = None,
    done: float = 1.0,
    empty_blocks: bool = False,
) -> Target:
    """What a model must come to.

    Args:
        budget, group, length, table: See `costs_of`.
        shape: The model's before any cutting; the budget is a share of this one.
        now: The model's as it is scored, which earlier rounds may have cut.
        done: How much of the cutting, as a share of all of it, this round comes to.
        empty_blocks: True to let attention and FFN blocks go whole; else each keeps one unit, or `group` neurons.
    """
    whole = costs_of(budget, shape, group, length, table).whole
    least = 0 if empty_blocks else 1
    stays = (1 - done * (1 - budget.share)) * whole
    return Target(costs_of(budget, now, group, length, table), stays, least, least * group)


def compare_latency(budget: Budget, table: Table, source: PreTrainedModel, pruned: PreTrainedModel) -> dict[str, Any]:
    """What a `latency` asked for, what the table foretold and what a run of both models now takes, in milliseconds.

    The table foretells a share of the source's time: how fast the machine is just now touches both alike.
    """
    setting = replace(budget.setting, threads=table.threads or budget.threads)
    start = machine.moment()
    before, after = timed([source, pruned], setting)
    busy = bool(table.busy or machine.other_work(start)) and setting.device == "cpu"
    foretold = [predict(table, shape_of(model.config.to_dict())) for model in (source, pruned)]
    return {
        "device": setting.device_name,
        "batch_size": setting.batch_size,
        "length": setting.length,
        "threads": setting.permitted_threads[-1],
        "dtype": setting.dtype,
        "source_ms": round(before * 1000, 4),
        "target_ms": round(before * budget.share * 1000, 4),
        "predicted_ms": round(before * foretold[1] / foretold[0] * 1000, 4),
        "measured_ms": round(after * 1000, 4),
        **({"busy": True} if busy else {}),
    }
