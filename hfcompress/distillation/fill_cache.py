"""Runs a teacher over all rows once, and keeps its outputs for all later runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.source import cache_home
from hfcompress.data.tokenizer_state import hash_inputs, input_state
from hfcompress.distillation.teacher_cache import Answers, Content, Writer, find_fault, open_answers
from hfcompress.measure.environment import versions
from hfcompress.models.forward import observe
from hfcompress.utils.distributed import broadcast, on_main_process, process_state
from hfcompress.utils.files import remove
from hfcompress.utils.hashing import hash_json
from hfcompress.utils.lock import shared_directory
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.task import Task

FORMAT = 2
"""The version of the cache; answers of an earlier version are not used."""


def fill_teacher_cache(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    task: Task,
    content: Content,
    *,
    weights: str,
    fingerprint: str,
) -> Answers:
    """Reads a teacher's outputs for all rows from the cache, or computes and keeps them; called on every process.

    The teacher runs in float32, in batches of similar length. A live teacher gives the same bits in a batch of the same
    rows; in another batch, kernels round differently.

    Args:
        model: The teacher.
        tokenizer: Its tokenizer.
        rows: Rows encoded with this tokenizer; their `index` is the row number.
        task: The task.
        content: The outputs to keep besides the logits.
        weights: A hash of the teacher's weights.
        fingerprint: A hash of the data.
    """
    identity = {
        "format": FORMAT,
        "teacher": weights,
        "tokenizer": hash_json(input_state(tokenizer)),
        "data": fingerprint,
        "inputs": hash_inputs(rows),
        "task": hash_json(task.model_dump(mode="json", exclude={"dataset", "metric"})),
        "content": content,
        "versions": {name: versions()[name] for name in ("torch", "transformers")},
        "device": process_state().device.type,
    }
    path = cache_home() / "teachers" / hash_json(identity)
    if _is_usable(path, identity):
        log.info(f"teacher: {len(rows):,} answers read from {path}")
        return open_answers(path)
    with ExitStack() as stack:
        scratch = _scratch(stack, path)
        writer = Writer(scratch)
        on_main_process(lambda: _create(writer, model, rows, task, content))
        _fill(writer, model, tokenizer, rows, task, content)
        process_state().wait_for_everyone()
        on_main_process(lambda: writer.finish(identity))
        on_main_process(stack.close)
    log.info(f"teacher: {len(rows):,} answers kept in {path}")
    return open_answers(path)


def _is_usable(path: Path, identity: Mapping[str, Any]) -> bool:
    """True if the first process finds usable answers; it removes unusable ones."""

    def look() -> bool:
        if not path.exists():
            return False
        fault = find_fault(path, identity)
        if fault is not None:
            log.info(f"teacher: the answers in {path} are made again, because {fault}")
            remove(path)
        return fault is None

    return bool(broadcast(look() if process_state().is_main_process else None))


def _scratch(stack: ExitStack, path: Path) -> Path:
    """Returns the directory that all processes write to; the first makes it, and renames it to `path` at the end."""
    made: list[Path] = []
    on_main_process(lambda: made.append(stack.enter_context(shared_directory(path))))
    scratch: Path = broadcast(made[0] if made else None)
    return scratch


def _create(writer: Writer, model: PreTrainedModel, rows: datasets.Dataset, task: Task, content: Content) -> None:
    config: Any = model.config
    writer.create(
        rows["length"][:],
        2 if task.head == "span" else config.num_labels,
        by_token=task.head != "sequence",
        content=content,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
    )


def _fill(
    writer: Writer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    task: Task,
    content: Content,
) -> None:
    """Runs the teacher over this process's share of the batches, and writes the outputs."""
    import torch

    from hfcompress.training.batches import make_batches

    state = process_state()
    model = model.to(state.device).eval()
    needs = frozenset({"hidden_states"} if content != "logits" else ())
    for number, batch in enumerate(make_batches(rows, tokenizer, task, 64)):
        if number % state.num_processes != state.process_index:
            continue
        tokens = {name: value.to(state.device) for name, value in batch.items()}
        with torch.inference_mode():
            seen = observe(model, tokens, needs)
        answers = {"logits": seen.logits.float().cpu().numpy()}
        if content == "cls":
            answers["cls"] = torch.stack([h[:, 0] for h in seen.hidden_states], 1).float().cpu().numpy()
        elif content == "hidden_states":
            answers["hidden_states"] = torch.stack(seen.hidden_states, 2).float().cpu().numpy()
        writer.write(batch["index"].numpy(), answers)
    writer.close()
