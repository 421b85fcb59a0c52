"""The latency table: the time that heads and neurons take on this device, measured once and cached."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.source import cache_home
from hfcompress.measure import machine
from hfcompress.measure.environment import cpu_name
from hfcompress.measure.timing import TRIALS
from hfcompress.models.forward import select_inputs
from hfcompress.models.freezing import freeze
from hfcompress.models.shape import Layer, Shape, shape_of
from hfcompress.pruning.costs import Costs
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.hashing import hash_json
from hfcompress.utils.lock import shared_file
from hfcompress.utils.logging import log
from hfcompress.utils.processors import default_threads, thread_counts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ROUNDS = 7
"""The number of rounds in which models take turns; the median of a model's rounds is its time."""
TURN = 0.02
"""The shortest turn in seconds; the cost of the clock and of kernel launches does not matter in a long turn."""
DEPTH = 2
"""The number of layers of the models from which the time of one layer is computed."""
POINTS = 8
"""The number of head counts and of FFN widths that are timed, besides 0; times between them are interpolated."""
FEW_WORDS = 64
"""The vocabulary of a model that is timed for its layers alone."""
STEPS = 2**14
"""The number of steps that the whole model's time is divided into; costs are rounded up to a step."""

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Setting:
    """The conditions under which a model is timed; there is no padding.

    Attributes:
        device: `cpu` or `cuda`.
        batch_size: Rows of a batch.
        length: Tokens of a row.
        threads: Threads of one operator on a CPU; by default the permitted number with which the whole model is
            fastest.
        dtype: The type of the weights: `float32`, `float16` or `bfloat16`.
    """

    device: str = "cpu"
    batch_size: int = 32
    length: int = 128
    threads: int | None = None
    dtype: str = "float32"

    @property
    def permitted_threads(self) -> list[int]:
        """The numbers of threads that are permitted."""
        return [self.threads] if self.threads else thread_counts(default_threads())

    @property
    def device_name(self) -> str:
        """The name of the device.

        Raises:
            HfcompressError: if this machine has no such device.
        """
        import torch

        if self.device == "cpu":
            return cpu_name()
        if not torch.cuda.is_available():
            raise HfcompressError("the budget is a latency on cuda, and there is no GPU", "say `device: cpu`")
        return torch.cuda.get_device_name(0)


@dataclass(frozen=True)
class LatencyTable:
    """The times of a model's parts, in seconds.

    Attributes:
        empty: The model without attention heads and neurons: embeddings, norms, residuals and task head.
        heads: `(query heads, seconds they add in one layer)`, ascending from 0.
        neurons: `(FFN width, seconds it adds in one layer)`, ascending from 0.
        threads: Threads of one operator in all timings.
        busy: The other work of the machine meanwhile; empty if it was quiet.
    """

    empty: float
    heads: Points
    neurons: Points
    threads: int | None = None
    busy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the table as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> LatencyTable:
        """Reads the table that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: if it is no such table.
        """
        heads, neurons = (tuple((int(x), float(s)) for x, s in found[kind]) for kind in ("heads", "neurons"))
        return cls(float(found["empty"]), heads, neurons, found["threads"], found["busy"])


def predict(table: LatencyTable, shape: Shape) -> float:
    """Predicts the seconds of a model with these layers, of the architecture and depth that the table was made for."""
    layers = [_interpolate(table.heads, x.heads) + _interpolate(table.neurons, x.ffn) for x in shape.layers]
    return table.empty + sum(layers)


def costs_in_time(table: LatencyTable, shape: Shape, group: int) -> Costs:
    """Computes the costs of head groups and of groups of `group` neurons, in nanoseconds.

    Each cost is rounded up to one of `STEPS` steps, so that there are few different sums and none is too low.
    """
    step = max(math.ceil(predict(table, shape) * 1e9 / STEPS), 1)
    blocks, runs = (shape.layers[:1], len(shape.layers)) if shape.spec.shared_layers else (shape.layers, 1)

    def block(points: Points, unit: int, most: int) -> tuple[int, ...]:
        return tuple(round_up(runs * _interpolate(points, k)) for k in range(0, most + 1, unit))

    def round_up(seconds: float) -> int:
        return math.ceil(seconds * 1e9 / step) * step

    return Costs(
        tuple(block(table.heads, shape.group, x.heads) for x in blocks),
        tuple(block(table.neurons, group, x.ffn) for x in blocks),
        group,
        round_up(table.empty),
    )


def _interpolate(points: Points, count: int) -> float:
    import numpy as np

    return float(np.interp(count, [x for x, _ in points], [seconds for _, seconds in points]))


def find_table(model: PreTrainedModel, setting: Setting) -> LatencyTable:
    """Reads the table for a model and setting from the cache, or measures it and adds it to the cache."""
    shape = shape_of(model.config.to_dict())
    identity = _identity(model, shape, setting)
    name = hash_json(identity)
    path = cache_home() / "latency" / f"{name}.json"
    found = _read(path, identity)
    if found is None:
        log.info(f"timing heads and FFN widths on {setting.device_name}, once for this kind of model")
        before = machine.read_counters()
        found = measure_table(model, shape, setting)
        found = replace(found, busy=machine.find_other_work(before) if setting.device == "cpu" else "")
        _write(path, identity, found)
    if found.busy:  # a busy table is cached too: a run that was interrupted must continue with the same table
        log.info(f"these timings were made on a busy machine ({found.busy}): delete {path} to measure again")
    return found


def measure_table(model: PreTrainedModel, shape: Shape, setting: Setting, rounds: int = ROUNDS) -> LatencyTable:
    """Times models with random weights whose layers have heads alone, neurons alone, or neither.

    Each model has `DEPTH` equal layers. A layer's time is the time of its model less that of the model with empty
    layers, divided by `DEPTH`. If noise makes more units seem faster than fewer, both get their mean.
    """
    most_heads, most_neurons = (max(sizes) for sizes in zip(*((x.heads, x.ffn) for x in shape.layers), strict=True))
    heads = [k * shape.group for k in _spread_counts(most_heads // shape.group)]
    widths = _spread_counts(most_neurons)
    layers = [Layer(0, 0), *(Layer(k, 0) for k in heads), *(Layer(0, w) for w in widths)]
    models = [_make_probe_model(model, replace(shape, layers=(layer,) * DEPTH)) for layer in layers]
    models.append(_make_random_model(model, replace(shape, layers=(Layer(0, 0),) * len(shape.layers))))
    setting = replace(setting, threads=fastest_threads(model, setting))
    bare, *parts, empty = time_models(models, setting, rounds)
    added = [(seconds - bare) / DEPTH for seconds in parts]
    return LatencyTable(
        empty,
        tuple(zip([0, *heads], _make_monotone(added[: len(heads)]), strict=True)),
        tuple(zip([0, *widths], _make_monotone(added[len(heads) :]), strict=True)),
        setting.threads,
    )


def fastest_threads(model: PreTrainedModel, setting: Setting) -> int:
    """Finds the number of threads with which a model is fastest, of those that the setting permits."""
    numbers = setting.permitted_threads
    if len(numbers) == 1 or setting.device != "cpu":
        return numbers[-1]
    return min(numbers, key=lambda number: time_models([model], replace(setting, threads=number), TRIALS)[0])


def _spread_counts(most: int) -> list[int]:
    """Makes at most `POINTS` evenly spaced counts up to `most`."""
    return sorted({round(most * k / POINTS) for k in range(1, POINTS + 1)} - {0})


def _make_probe_model(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """Makes a model with a tiny vocabulary: the time of its layers does not depend on it."""
    return _make_random_model(model, replace(shape, vocab=FEW_WORDS), pad_token_id=0)


def _make_random_model(model: PreTrainedModel, shape: Shape, **changes: Any) -> PreTrainedModel:
    from hfcompress.models.surgery import empty_model

    config = deepcopy(model.config)
    config.update(changes)
    return empty_model(type(model).__name__, shape, config)


def _make_monotone(seconds: Sequence[float]) -> list[float]:
    """Returns 0, then the closest values by least squares that never fall (pool adjacent violators), at least 0."""
    pools: list[tuple[float, int]] = []
    for value in seconds:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            total, count = total + pools[-1][0], count + pools[-1][1]
            pools.pop()
        pools.append((total, count))
    return [0.0, *(max(total / count, 0.0) for total, count in pools for _ in range(count))]


def time_models(models: Sequence[PreTrainedModel], setting: Setting, rounds: int = ROUNDS) -> list[float]:
    """Times models in rounds in which they take turns; returns each model's median seconds for a batch.

    The models are left as they were.

    Raises:
        HfcompressError: if a model does not take rows of this length, or there is no such device.
    """
    import numpy as np
    import torch

    _ = setting.device_name
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.permitted_threads[-1])
    try:
        with ExitStack() as stack:
            runs = [TimedModel(stack, model, setting) for model in models]
            seconds = [[run.turn() for run in runs] for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    return [float(median) for median in np.median(seconds, axis=0)]


class TimedModel:
    """A model on the device with a batch, after a warm-up.

    Args:
        stack: Restores the model at its end.
        model: The model.
        setting: The conditions.
    """

    def __init__(self, stack: ExitStack, model: PreTrainedModel, setting: Setting) -> None:
        import torch

        self.cuda = setting.device == "cuda"
        dtype, weight = getattr(torch, setting.dtype), next(model.parameters())
        if (weight.device.type, weight.dtype) != (setting.device, dtype):
            model = deepcopy(model).to(setting.device, dtype)  # type: ignore[call-overload]
        stack.enter_context(freeze(model))
        self.model, self.batch = model, select_inputs(model, _make_batch(model, setting))
        self.repeats = 1
        warm = min(self.turn() for _ in range(2))
        self.repeats = max(math.ceil(TURN / warm), 1)

    def turn(self) -> float:
        """Times a turn of forward passes; returns the mean seconds of one."""
        import torch

        with torch.inference_mode():
            self._finish()
            start = time.perf_counter()
            for _ in range(self.repeats):
                self.model(**self.batch)
            self._finish()
            return (time.perf_counter() - start) / self.repeats

    def _finish(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()


def _make_batch(model: PreTrainedModel, setting: Setting) -> dict[str, Tensor]:
    import torch

    shape = shape_of(model.config.to_dict())
    if setting.length > shape.usable_positions:
        message = f"the budget is a latency at {setting.length} tokens, and the model takes {shape.usable_positions}"
        raise HfcompressError(message, "give the budget a smaller `length`")
    size, generator = (setting.batch_size, setting.length), torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab // 2, shape.vocab, size, generator=generator)
    return {"input_ids": ids.to(setting.device), "attention_mask": torch.ones_like(ids).to(setting.device)}


def _identity(model: PreTrainedModel, shape: Shape, setting: Setting) -> dict[str, Any]:
    """Collects everything that a table depends on."""
    import torch
    import transformers

    config = model.config
    activations = (getattr(config, key, None) for key in ("hidden_act", "activation", "hidden_activation"))
    return {
        "device": setting.device_name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "setting": asdict(setting) | {"threads": setting.permitted_threads},
        "model": type(model).__name__.removeprefix("Pruned"),
        "attention": config._attn_implementation,
        "activation": next((name for name in activations if name), None),
        "sizes": [shape.hidden, shape.head_dim, shape.group, shape.embedding, shape.vocab, shape.labels],
        "layers": [len(shape.layers), max(x.heads for x in shape.layers), max(x.ffn for x in shape.layers)],
        "timing": [ROUNDS, TURN, DEPTH, POINTS],
    }


def _read(path: Path, identity: dict[str, Any]) -> LatencyTable | None:
    """Reads the table in a file; None if there is no file, or it is damaged or has another identity."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        table = LatencyTable.from_json(record)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return table if record.get("identity") == identity else None


def _write(path: Path, identity: dict[str, Any], table: LatencyTable) -> None:
    with shared_file(path) as scratch:
        scratch.write_text(json.dumps({"identity": identity, **table.to_json()}, indent=1), encoding="utf-8")
