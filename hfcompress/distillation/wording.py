"""Describes a training for the card: its length, its losses and its teachers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from hfcompress.data.source import is_local
from hfcompress.utils.escape import code
from hfcompress.utils.places import is_place, last_part
from hfcompress.utils.wording import count, join

if TYPE_CHECKING:
    from hfcompress.distillation.options import DistillationOptions
    from hfcompress.distillation.recovery import Recover
    from hfcompress.training.options import Train
    from hfcompress.utils.registry import Component

_PLACE = re.compile(r", (?=eq\.|sections? )")
"""Where the name of a paper ends, and the equation or section begins."""


def describe_training(training: Recover | None) -> str:
    """Describes a training in another stage in a few words; empty if there is none."""
    if training is None:
        return ""
    losses = " and ".join(f"`{loss.name}`" for loss in training.losses)
    adapters = ", through LoRA" if training.lora else ""
    return f"{describe_length(training)} by {losses} from {describe_teachers(training)}{adapters}"


def describe_length(train: Train) -> str:
    """Gives the length of a training, in epochs or in steps."""
    return count(train.max_steps, "step") if train.max_steps else count(train.epochs, "epoch")


def describe_losses(losses: Sequence[Component]) -> str:
    """Names losses with the place where each is defined; a paper that several losses follow is named once."""
    parts = []
    for paper, group in groupby(losses, key=lambda loss: _PLACE.split(loss.source, maxsplit=1)[0]):
        names = [(loss.name, loss.source.removeprefix(paper).removeprefix(", ")) for loss in group]
        if len(names) == 1:
            ((name, place),) = names
            parts.append(f"`{name}` ({paper}{f', {place}' if place else ''})")
        else:
            parts.append(
                f"{join([f'`{name}` ({place})' if place else f'`{name}`' for name, place in names])} of {paper}"
            )
    return join(parts) if len(parts) < 3 else "; ".join(parts)


def describe_teachers(options: DistillationOptions) -> str:
    """Names the teachers, or the labels if no loss needs a teacher."""
    if not options.needs_teacher:
        return "labels"
    return " and ".join(code(shorten_name(name)) for name in options.teacher.models)


def shorten_name(name: str) -> str:
    """Shortens a path to its last part, since the rest means nothing on other machines; other names stay."""
    return last_part(name) if is_local(name) or is_place(name) else name
