"""Checks, by the report of loading, that all weights of a model came from its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfcompress.models.architectures import TASK_HEADS, class_name_of, task_head_of
from hfcompress.models.foreign_directories import gives_embeddings
from hfcompress.utils.errors import HfcompressError

_COMPUTED = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|attn\.bias|num_batches_tracked)$")
"""Buffers that older versions of transformers stored; every version computes them."""
_OTHER_HEADS = frozenset(
    {
        "cls", "lm_head", "vocab_transform", "vocab_layer_norm", "vocab_projector", "predictions", "mlm", "head",
        "decoder", "classifier", "pre_classifier", "qa_outputs", "score", "sop_classifier", "seq_relationship",
        "discriminator_predictions", "generator_predictions", "generator_lm_head", "lm_predictions", "mask_predictions",
        "sequence_summary", "dropout",
    }
)  # fmt: skip
"""The modules of earlier task heads in a checkpoint; another task head does not read them."""


def require_complete_weights(
    path: Path, auto_class: str, report: Mapping[str, Any], config: Mapping[str, Any], fresh_head: bool = False
) -> None:
    """Checks that every weight of a loaded model came from its checkpoint.

    Buffers that the model computes by itself may be missing. The file may also hold a pooler that the task head does
    not read, and the weights of other task heads.

    Args:
        path: The model directory, for messages.
        auto_class: The class that it was loaded with.
        report: The result of `loading_report.loading_report`.
        config: Its config.json.
        fresh_head: True if the task head will be trained anyway, so it may be missing or have other sizes.

    Raises:
        HfcompressError: for a weight that did not come from it.
    """
    body = _Body(report)
    missing = [name for name in report["missing"] if not _COMPUTED.search(name)]
    if any(name in body and ".pooler." not in name for name in missing) or (missing and not fresh_head):
        headless = all(name not in body or ".pooler." in name for name in missing)
        raise HfcompressError(
            f"{path} lacks {_count(missing)} of the weights that {auto_class} needs ({_list_some(missing)}): "
            + (_tell_headless(path) if headless else "they would be random"),
            "put a `finetune` stage first, or name a model that was fine-tuned for this task"
            if headless
            else "fetch or save the model again; names that differ from transformers' belong to another class",
        )
    mismatched = [name for name in report["mismatched"] if not fresh_head or name in body]
    if mismatched:
        raise HfcompressError(
            f"{path} has {_count(mismatched)} weights of other sizes than its config.json says "
            f"({_list_some(mismatched)})",
            "use the config.json that belongs to the weights; `hfcompress convert` reads pruned checkpoints",
        )
    left = [name for name in report["unexpected"] if not _is_spare(name, body, report, config, fresh_head)]
    if left:
        raise HfcompressError(
            f"{path} holds {_count(left)} weights that {auto_class} has no place for ({_list_some(left)}), so its "
            "answers would not be those that it was trained to give",
            "use the config.json that belongs to the weights; if they are known to do nothing, save the model once "
            f"without them: {auto_class}.from_pretrained(OLD).save_pretrained(NEW)",
        )
    _require_own_head(path, auto_class, config, fresh_head)


def _tell_headless(path: Path) -> str:
    if gives_embeddings(path):
        return "it is a sentence-transformers model, which gives embeddings and has no task head"
    return "its task head was never trained"


def require_finite_weights(path: Path, not_finite: Sequence[str]) -> None:
    """Checks that all weights are finite.

    Args:
        path: The model directory, for the message.
        not_finite: The result of `loading_report.not_finite`.

    Raises:
        HfcompressError: for weights that are NaN or infinite.
    """
    if not_finite:
        more = f", and {len(not_finite) - 1} more" if len(not_finite) > 1 else ""
        raise HfcompressError(
            f"{path}: {not_finite[0]}{more} has values that are NaN or infinite",
            "train the model again, or start from an earlier checkpoint",
        )


def _require_own_head(path: Path, auto_class: str, config: Mapping[str, Any], fresh_head: bool) -> None:
    """Refuses a config that names another kind of task head: the weights of two kinds may have the same names."""
    trained, wanted = task_head_of(class_name_of(config)), task_head_of(auto_class)
    if trained is not None and wanted is not None and trained != wanted and not fresh_head:
        raise HfcompressError(
            f"{path} is a model {TASK_HEADS[trained].removeprefix('For')} and not "
            f"{TASK_HEADS[wanted].removeprefix('For')}: "
            f"config.json names {class_name_of(config)}, and its task head means something else",
            "put a `finetune` stage first, or name a model that was fine-tuned for this task",
        )


class _Body:
    """The names of the weights outside the task head."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.prefix, self.children = f"{report['prefix']}.", set(report["body"])

    def __contains__(self, name: str) -> bool:
        return (self.prefix != "." and name.startswith(self.prefix)) or name.partition(".")[0] in self.children


def _is_spare(name: str, body: _Body, report: Mapping[str, Any], config: Mapping[str, Any], fresh_head: bool) -> bool:
    """True if the model does not use a weight of its checkpoint."""
    if _COMPUTED.search(name) or "pooler" in name.split("."):
        return True
    if config.get("quantization_config") and name in report["beside"]:
        return True
    return name not in body and (fresh_head or name.partition(".")[0] in _OTHER_HEADS)


def _count(names: Sequence[str]) -> str:
    return f"{len(names):,}"


def _list_some(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
