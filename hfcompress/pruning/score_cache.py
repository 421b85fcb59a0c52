"""Keeps the scores of a model's heads and neurons on disk: they are the same for every budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hfcompress.data.source import cache_home
from hfcompress.measure.environment import versions
from hfcompress.models.artifact import weights_hash
from hfcompress.pruning.criteria.base import Scores
from hfcompress.pruning.schedules import OneShot
from hfcompress.utils.distributed import broadcast, on_main_process, process_state
from hfcompress.utils.hashing import hash_json
from hfcompress.utils.lock import shared_file
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.pruning.state import PruningRun


def find_scores(run: PruningRun, model: PreTrainedModel) -> Scores:
    """Reads the scores of the stage's parent from the cache, or computes them and adds them to it.

    Later rounds, and models of which layers or dimensions were cut before, are scored anew.

    Args:
        run: The stage.
        model: The model to score.
    """
    options = run.options
    if (
        not isinstance(options.schedule, OneShot)
        or options.layers
        or options.hidden
        or not options.criterion.needs_data
    ):
        log.info(f"prune: scoring heads and neurons by {options.criterion.name}")
        return options.criterion.scores(model, run.calibration)
    path = cache_home() / "scores" / f"{_make_key(run)}.safetensors"
    # One process looks: if some found the file and others computed, those would wait for one another.
    found = broadcast(_read(path) if process_state().is_main_process else None)
    if found is None:
        log.info(f"prune: scoring heads and neurons by {options.criterion.name}, once for all budgets")
        found = options.criterion.scores(model, run.calibration)
        on_main_process(lambda: _write(path, found))
    device = process_state().device
    return Scores([s.to(device) for s in found.heads], [s.to(device) for s in found.neurons])


def _make_key(run: PruningRun) -> str:
    """Hashes everything that the scores depend on."""
    return hash_json(
        {
            "parent": weights_hash(run.parent.path),
            "criterion": run.options.criterion.spell_out(),
            "task": run.context.task.model_dump(exclude={"dataset"}),
            "data": run.context.fingerprint(),
            "seed": run.context.seed,
            "versions": versions(),
            "device": process_state().device.type,
        }
    )


def _read(path: Path) -> Scores | None:
    """Reads scores; None if there is no file, or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        layers = len(tensors) // 2
        kinds = ("heads", "neurons")
        heads, neurons = ([tensors[f"{kind}.{layer}"] for layer in range(layers)] for kind in kinds)
    except (OSError, SafetensorError, KeyError):
        return None
    return Scores(heads, neurons)


def _write(path: Path, scores: Scores) -> None:
    from safetensors.torch import save_file

    tensors = {f"heads.{layer}": s.cpu().contiguous() for layer, s in enumerate(scores.heads)}
    tensors |= {f"neurons.{layer}": s.cpu().contiguous() for layer, s in enumerate(scores.neurons)}
    with shared_file(path) as scratch:
        save_file(tensors, scratch)
