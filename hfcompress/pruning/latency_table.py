"""The latency table: what heads and neurons cost in time on this device, measured once and kept."""

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
"""How often the models take turns; of each, the median counts."""
TURN = 0.02
"""Seconds that a turn lasts at least, so that the clock's and the launches' own time do not matter."""
DEPTH = 2
"""Layers of the models that are timed for one layer's time."""
POINTS = 8
"""Head counts, and as many FFN widths, that are timed besides none; between them the time is interpolated."""
FEW_WORDS = 64
"""Rows of the word embeddings of a model that is timed for its layers alone."""
STEPS = 2**14
"""Steps that the whole model's time is divided into; costs are rounded up to one."""

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Setting:
    """Under which conditions a model is timed; every token is a real one.

    Attributes:
        device: `cpu` or `cuda`.
        batch_size: Rows of a batch.
        length: Tokens of a row.
        threads: Of one operator on a CPU; by default the count at which the whole model is fastest, of those that are
            permitted.
        dtype: Of the weights: `float32`, `float16` or `bfloat16`.
    """

    device: str = "cpu"
    batch_size: int = 32
    length: int = 128
    threads: int | None = None
    dtype: str = "float32"

    @property
    def permitted_threads(self) -> list[int]:
        """The numbers of threads to choose from."""
        return [self.threads] if self.threads else thread_counts(default_threads())

    @property
    def device_name(self) -> str:
        """What the device calls itself.

        Raises:
            HfcompressError: where it is not there.
        """
        import torch

        if self.device == "cpu":
            return cpu_name()
        if not torch.cuda.is_available():
            raise HfcompressError("a latency on cuda is asked for, and there is no GPU", "say `device: cpu`")
        return torch.cuda.get_device_name(0)


@dataclass(frozen=True)
class Table:
    """Seconds.

    Attributes:
        empty: Of the model with its embeddings, head, norms and residuals, and neither heads nor neurons.
        heads: `(query heads, seconds they add in one layer)`, ascending from none.
        neurons: `(FFN width, seconds it adds in one layer)`, ascending from none.
        threads: Of one operator, on which all of it was timed.
        busy: What the machine did beside; empty where it was quiet.
    """

    empty: float
    heads: Points
    neurons: Points
    threads: int | None = None
    busy: str = ""

    def to_json(self) -> dict[str, Any]:
        """The table as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Table:
        """The table that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: if it is something else.
        """
        heads, neurons = (tuple((int(x), float(s)) for x, s in found[kind]) for kind in ("heads", "neurons"))
        return cls(float(found["empty"]), heads, neurons, found["threads"], found["busy"])


def predict(table: Table, shape: Shape) -> float:
    """Seconds that a model of these layers takes; for the architecture and depth that the table was made of."""
    layers = [_between(table.heads, x.heads) + _between(table.neurons, x.ffn) for x in shape.layers]
    return table.empty + sum(layers)


def costs_in_time(table: Table, shape: Shape, group: int) -> Costs:
    """What head groups and groups of `group` neurons cost, in nanoseconds.

    Each is rounded up to one of `STEPS` steps, so that few sums differ and none is too low.
    """
    step = max(math.ceil(predict(table, shape) * 1e9 / STEPS), 1)
    blocks, runs = (shape.layers[:1], len(shape.layers)) if shape.spec.shared_layers else (shape.layers, 1)

    def block(points: Points, unit: int, most: int) -> tuple[int, ...]:
        return tuple(rounded(runs * _between(points, k)) for k in range(0, most + 1, unit))

    def rounded(seconds: float) -> int:
        return math.ceil(seconds * 1e9 / step) * step

    return Costs(
        tuple(block(table.heads, shape.group, x.heads) for x in blocks),
        tuple(block(table.neurons, group, x.ffn) for x in blocks),
        group,
        rounded(table.empty),
    )


def _between(points: Points, count: int) -> float:
    import numpy as np

    return float(np.interp(count, [x for x, _ in points], [seconds for _, seconds in points]))


def find_table(model: PreTrainedModel, setting: Setting) -> Table:
    """The table for a model under a setting: the one kept in the cache, or a new one, which is kept."""
    shape = shape_of(model.config.to_dict())
    identity = _identity(model, shape, setting)
    name = hash_json(identity)
    path = cache_home() / "latency" / f"{name}.json"
    found = _read(path, identity)
    if found is None:
        log.info(f"timing heads and FFN widths on {setting.device_name}, once for this kind of model")
        before = machine.moment()
        found = measure_table(model, shape, setting)
        found = replace(found, busy=machine.other_work(before) if setting.device == "cpu" else "")
        _write(path, identity, found)
    if found.busy:  # kept all the same: a run that is interrupted must go on with what it began with
        log.info(f"these timings were made on a busy machine ({found.busy}): delete {path} to time anew")
    return found


def measure_table(model: PreTrainedModel, shape: Shape, setting: Setting, rounds: int = ROUNDS) -> Table:
    """Times models of random weights: whole layers of heads alone and of neurons alone, against layers of neither.

    Each is `DEPTH` equal layers, so a layer's share is what it takes beyond the empty one over `DEPTH`. Where noise
    makes more units seem faster than fewer, both get their mean.
    """
    most_heads, most_neurons = (max(sizes) for sizes in zip(*((x.heads, x.ffn) for x in shape.layers), strict=True))
    heads = [k * shape.group for k in _spread(most_heads // shape.group)]
    widths = _spread(most_neurons)
    layers = [Layer(0, 0), *(Layer(k, 0) for k in heads), *(Layer(0, w) for w in widths)]
    models = [_probe_model(model, replace(shape, layers=(layer,) * DEPTH)) for layer in layers]
    models.append(_random_model(model, replace(shape, layers=(Layer(0, 0),) * len(shape.layers))))
    setting = replace(setting, threads=fastest_threads(model, setting))
    bare, *parts, empty = timed(models, setting, rounds)
    added = [(seconds - bare) / DEPTH for seconds in parts]
    return Table(
        empty,
        tuple(zip([0, *heads], _monotone(added[: len(heads)]), strict=True)),
        tuple(zip([0, *widths], _monotone(added[len(heads) :]), strict=True)),
        setting.threads,
    )


def fastest_threads(model: PreTrainedModel, setting: Setting) -> int:
    """The number of threads, of those that a setting permits, on which a model is fastest."""
    numbers = setting.permitted_threads
    if len(numbers) == 1 or setting.device != "cpu":
        return numbers[-1]
    return min(numbers, key=lambda number: timed([model], replace(setting, threads=number), TRIALS)[0])


def _spread(most: int) -> list[int]:
    """At most `POINTS` counts up to `most`, evenly apart."""
    return sorted({round(most * k / POINTS) for k in range(1, POINTS + 1)} - {0})


def _probe_model(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """A model with next to no words: what it is timed for does not depend on them."""
    return _random_model(model, replace(shape, vocab=FEW_WORDS), pad_token_id=0)


def _random_model(model: PreTrainedModel, shape: Shape, **changes: Any) -> PreTrainedModel:
    from hfcompress.models.surgery import empty_model

    config = deepcopy(model.config)
    config.update(changes)
    return empty_model(type(model).__name__, shape, config)


def _monotone(seconds: Sequence[float]) -> list[float]:
    """Zero, then the nearest values by squares that never fall (pool adjacent violators) and are not negative."""
    pools: list[tuple[float, int]] = []
    for value in seconds:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            total, count = total + pools[-1][0], count + pools[-1][1]
            pools.pop()
        pools.append((total, count))
    return [0.0, *(max(total / count, 0.0) for total, count in pools for _ in range(count))]


def timed(models: Sequence[PreTrainedModel], setting: Setting, rounds: int = ROUNDS) -> list[float]:
    """Seconds that each model takes for a batch, the median over rounds in which they take turns.

    The models are left as they were.

    Raises:
        HfcompressError: where a model does not take rows of the length, or the device is not there.
    """
    import numpy as np
    import torch

    _ = setting.device_name
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.permitted_threads[-1])
    try:
        with ExitStack() as stack:
            runs = [Run(stack, model, setting) for model in models]
            seconds = [[run.turn() for run in runs] for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    return [float(median) for median in np.median(seconds, axis=0)]


class Run:
    """A model on the device with a batch, warmed up.

    Args:
        stack: Gives the model back as it was.
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
        self.model, self.batch = model, select_inputs(model, _batch(model, setting))
        self.repeats = 1
        warm = min(self.turn() for _ in range(2))
        self.repeats = max(math.ceil(TURN / warm), 1)

    def turn(self) -> float:
        """Seconds a forward pass takes, over as many as fill a turn."""
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


def _batch(model: PreTrainedModel, setting: Setting) -> dict[str, Tensor]:
    import torch

    shape = shape_of(model.config.to_dict())
    if setting.length > shape.usable_positions:
        message = f"a latency at {setting.length} tokens is asked for, and the model takes {shape.usable_positions}"
        raise HfcompressError(message, "give the budget a smaller `length`")
    size, generator = (setting.batch_size, setting.length), torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab // 2, shape.vocab, size, generator=generator)
    return {"input_ids": ids.to(setting.device), "attention_mask": torch.ones_like(ids).to(setting.device)}


def _identity(model: PreTrainedModel, shape: Shape, setting: Setting) -> dict[str, Any]:
    """All that a table depends on."""
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


def _read(path: Path, identity: dict[str, Any]) -> Table | None:
    """The table in a file; None where there is none, it is damaged or of something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        table = Table.from_json(record)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return table if record.get("identity") == identity else None


def _write(path: Path, identity: dict[str, Any], table: Table) -> None:
    with shared_file(path) as scratch:
        scratch.write_text(json.dumps({"identity": identity, **table.to_json()}, indent=1), encoding="utf-8")
