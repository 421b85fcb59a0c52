"""Budgets: limits for a pruned model's parameters, MACs, bytes or latency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from hfcompress.measure import machine
from hfcompress.models.shape import Layer, Shape, shape_of
from hfcompress.pruning.costs import Costs, Target
from hfcompress.pruning.latency_table import LatencyTable, Setting, costs_in_time, predict, time_models
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("parameters", "macs", "bytes", "latency")
_SETTING = ("device", "batch_size", "length", "threads", "dtype")


class Budget(StrictModel):
    """A limit for the pruned model: one of `parameters`, `macs`, `bytes` and `latency`.

    The first three are shares of the transformer layers' totals. Embeddings and task head are not counted, because a
    budget cuts nothing of them; norms and output biases are counted and stay. `latency` is a share of the whole model's
    time.
    """

    parameters: float | None = Field(default=None, gt=0, lt=1)
    """Share of the layers' parameters."""
    macs: float | None = Field(default=None, gt=0, lt=1)
    """Share of the layers' MACs (multiply-accumulate operations) at the task's `max_length`."""
    bytes: float | None = Field(default=None, gt=0, lt=1)
    """Share of the layers' stored bytes."""
    latency: float | None = Field(default=None, gt=0, lt=1)
    """Share of the model's time here, from token ids to logits, by a table of timings: 0.5 is twice as fast."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The device of a `latency`."""
    batch_size: int = Field(default=32, ge=1)
    """Rows of a batch, for a `latency`."""
    length: int = Field(default=128, ge=1)
    """Tokens of a row without padding, for a `latency`."""
    threads: int | None = Field(default=None, ge=1)
    """Threads for a `latency`. The default is the count with which the whole model is fastest: of 1, 2, 4, … and the
    largest that `OMP_NUM_THREADS`, CPU affinity and a container's CPU quota allow."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights, for a `latency`."""

    @model_validator(mode="after")
    def _require_one_kind(self) -> Budget:
        named = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(named) != 1:
            found = " and ".join(f"`{kind}`" for kind in named) or "none"
            raise ValueError(f"a budget is one of `parameters`, `macs`, `bytes` and `latency`; this one gives {found}")
        idle = self.says(*_SETTING)
        if idle and self.latency is None:
            raise ValueError(f"`{idle[0]}` is only for a `latency`; leave it out")
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


def costs_of(budget: Budget, shape: Shape, group: int, length: int, table: LatencyTable | None = None) -> Costs:
    """Computes the costs of a model's heads and neurons, in the unit of a budget.

    Args:
        budget: Decides the unit.
        shape: The model's shape; each FFN width is a multiple of `group`.
        group: The number of neurons that are kept or cut together.
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
    table: LatencyTable | None = None,
    done: float = 1.0,
    empty_blocks: bool = False,
) -> Target:
    """Computes the cost that a model must reach.

    Args:
        budget, group, length, table: See `costs_of`.
        shape: The model's shape before any cutting; the budget is a share of this one.
        now: The shape of the model that is scored, which earlier rounds may have cut.
        done: The share of all the cutting that is done after this round.
        empty_blocks: True if whole attention and FFN blocks may be cut; else each keeps one head group or `group`
            neurons.
    """
    whole = costs_of(budget, shape, group, length, table).whole
    least = 0 if empty_blocks else 1
    stays = (1 - done * (1 - budget.share)) * whole
    return Target(costs_of(budget, now, group, length, table), stays, least, least * group)


def compare_latency(
    budget: Budget, table: LatencyTable, source: PreTrainedModel, pruned: PreTrainedModel
) -> dict[str, Any]:
    """Compares the target of a `latency`, the prediction of the table and new measurements, in milliseconds.

    The table predicts a share of the source's time, so that the current speed of the machine changes both alike.
    """
    setting = replace(budget.setting, threads=table.threads or budget.threads)
    start = machine.read_counters()
    before, after = time_models([source, pruned], setting)
    busy = bool(table.busy or machine.find_other_work(start)) and setting.device == "cpu"
    predicted = [predict(table, shape_of(model.config.to_dict())) for model in (source, pruned)]
    return {
        "device": setting.device_name,
        "batch_size": setting.batch_size,
        "length": setting.length,
        "threads": setting.permitted_threads[-1],
        "dtype": setting.dtype,
        "source_ms": round(before * 1000, 4),
        "target_ms": round(before * budget.share * 1000, 4),
        "predicted_ms": round(before * predicted[1] / predicted[0] * 1000, 4),
        "measured_ms": round(after * 1000, 4),
        **({"busy": True} if busy else {}),
    }
