"""Trains a student with its teachers, once everything that can be known before has been looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfcompress.base.console import say
from hfcompress.base.errors import HfcompressError, Problem
from hfcompress.base.shape import Shape, shape_of
from hfcompress.data.labels import require_same_labels
from hfcompress.model.artifact import Artifact, label_ids, load_numbers, load_tokenizer, read_config, weights_hash
from hfcompress.stages.base import Bench, process_state, require_trainable
from hfcompress.stages.heads import has_head
from hfcompress.stages.layer_map import pairs_of
from hfcompress.stages.taught import Taught
from hfcompress.stages.teachers import Member, Teaching, same_tokenizer, translation
from hfcompress.stages.train import Train, row_count

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.model.masks import Masks


def teach(
    student: PreTrainedModel,
    taught: Taught,
    train: Train,
    parent: Artifact,
    bench: Bench,
    tokenizer: PreTrainedTokenizerBase,
    raw: datasets.Dataset | None = None,
    masks: Masks | None = None,
) -> None:
    """Trains the student in place; notes its dev score and the teachers'.

    Args:
        student: The model to train.
        taught: Losses and teachers.
        train: How to train.
        parent: What `teacher: parent` means.
        bench: The stage's bench.
        tokenizer: The student's.
        raw: Rows to train on in place of the train split.
        masks: What lies over the student while it trains.

    Raises:
        HfcompressError: for a teacher that was never fine-tuned, or that cannot teach this student.
    """
    from transformers import set_seed

    from hfcompress.stages import training

    labels = dict(student.config.label2id or {})
    rows = {"train": bench.encoded("train", tokenizer, labels, raw), "dev": bench.encoded("dev", tokenizer, labels)}
    teaching, first, pairs = None, None, list[tuple[int, int]]()
    if taught.asks:
        artifacts = [bench.artifact(name, parent) for name in taught.teacher.models]
        own = shape_of(student.config.to_dict())
        _require_meeting(own, artifacts, taught)
        teaching = _teaching(taught, train, artifacts, bench, tokenizer, rows, labels, raw)
        first = require_trainable(artifacts[0], "a teacher")
        pairs += pairs_of(taught.layer_map, len(own.layers), len(first.layers))
    set_seed(bench.seed)
    objective = training.Objective(
        student, taught.losses, bench.task, first, tuple(pairs), dynamic=taught.layer_map == "dynamic", masks=masks
    )
    _say_what_is_ahead(objective, teaching, train, rows["train"], bench)
    training.examine(objective, teaching, rows["train"], tokenizer)
    bench.notes["dev"] = training.train(
        objective,
        train,
        rows=rows,
        tokenizer=tokenizer,
        checkpoints=bench.checkpoints,
        seed=bench.seed,
        teaching=teaching,
        callbacks=bench.callbacks,
    )


def _require_meeting(student: Shape, artifacts: Sequence[Artifact], taught: Taught) -> None:
    problems = list[Problem]()
    for index, artifact in enumerate(artifacts):
        problems += taught.meeting_problems(student, require_trainable(artifact, "a teacher"), first=index == 0)
    if problems:
        raise HfcompressError([Problem(p.message, p.fix) for p in problems])


def _teaching(
    taught: Taught,
    train: Train,
    artifacts: Sequence[Artifact],
    bench: Bench,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Any],
    labels: Mapping[str, int],
    raw: datasets.Dataset | None,
) -> Teaching:
    from hfcompress.stages.answers import answers_of

    count = row_count(rows["train"])
    kept = taught.kept(train, bench.task.head, count, process_state().num_processes)
    fingerprint = bench.fingerprint(raw)
    members, notes = list[Member](), list[dict[str, Any]]()
    for index, artifact in enumerate(artifacts):
        model, headed = _loaded(artifact, bench.task, any(loss.needs_logits for loss in taught.losses))
        member, asked = Member(artifact.stage, model, load_tokenizer(artifact.path, bench.task)), rows
        if not same_tokenizer(member.tokenizer, tokenizer):
            if count is None or bench.task.head == "mask":
                raise HfcompressError(
                    f"the teacher {member.stage} has another vocabulary than the student, and a task on raw text "
                    "compares what they say of each token",
                    "use a teacher with the same tokenizer, and `vocabulary: keep`",
                )
            asked = {
                "train": bench.encoded("train", member.tokenizer, labels, raw),
                "dev": bench.encoded("dev", member.tokenizer, labels),
            }
            member.ids = translation(tokenizer, member.tokenizer, rows["train"], asked["train"])
            member.foreign = member.ids is None
        _require_understanding(member, taught, bench.task, index, labels)
        notes.append({"stage": artifact.stage, "dev": _examined(member, asked["dev"], bench.task) if headed else None})
        content = (kept if index == 0 else "logits") if kept or member.foreign else None
        if content is not None:
            member.answers = answers_of(
                model, member.tokenizer, asked["train"], bench.task, content,  # type: ignore[arg-type]
                weights=weights_hash(artifact.path), fingerprint=fingerprint,
            )  # fmt: skip
            member.model = None
        members.append(member)
    bench.notes["teacher"] = notes[0] if len(notes) == 1 else notes
    return Teaching(members, taught.teacher, bench.task.head)


def _loaded(artifact: Artifact, task: Any, needs_logits: bool) -> tuple[PreTrainedModel, bool]:
    """The teacher, and whether it has the task's head; one that is asked about its layers alone needs none."""
    config = read_config(artifact.path)
    headed = has_head(config, task)
    if headed and (problems := task.head_problems(config)):
        raise HfcompressError(
            replace(p, message=f"the teacher {artifact.stage}: {p.message}", key=()) for p in problems
        )
    fresh = not headed and not needs_logits and task.head == "mask"
    return load_numbers(artifact.path, task.auto_class, fresh_head=fresh), headed


def _require_understanding(member: Member, taught: Taught, task: Any, index: int, labels: Mapping[str, int]) -> None:
    """Passes where teacher and student mean the same by a token, where that matters, and by a label."""
    assert member.model is not None
    if member.foreign and index == 0 and taught.needs:
        raise HfcompressError(
            f"the teacher {member.stage} has another tokenizer than the student, so their layers see other tokens",
            "use losses on logits alone (soft_labels, hard_labels), or a teacher with the same tokenizer",
        )
    if member.foreign and task.head != "sequence":
        raise HfcompressError(
            f"the teacher {member.stage} has another tokenizer than the student, so its answers are for other tokens",
            "use a teacher with the same tokenizer",
        )
    if task.head in ("sequence", "token") and len(labels) > 1:
        require_same_labels(f"the teacher {member.stage}", label_ids(member.model.config.to_dict()), labels)


def _examined(member: Member, dev: Any, task: Any) -> float | None:
    """The teacher's dev score, where it is better than answering without looking."""
    from hfcompress.data.metrics import LOWER_IS_BETTER
    from hfcompress.stages import training

    assert member.model is not None
    if task.head == "mask" and not task.mask_probability:
        return None
    score, blind = training.score(member.model, dev, member.tokenizer, task), task.baseline(dev)
    sign = -1 if task.metric in LOWER_IS_BETTER else 1
    margin = 0.02 if sign > 0 else -0.02 * blind
    if sign * score <= sign * (blind + margin):
        raise HfcompressError(
            f"the teacher scores {task.metric} {score:.4f} on the dev split, no better than answering without looking "
            f"({blind:.4f}): it was never fine-tuned for this task",
            "put a `finetune` stage first, or name a teacher that was",
        )
    say(f"teacher: {member.stage}, {task.metric} {score:.4f} on dev")
    return score


def _say_what_is_ahead(objective: Any, teaching: Teaching | None, train: Train, rows: Any, bench: Bench) -> None:
    """Steps and memory, before any epoch."""
    count = row_count(rows)
    steps = train.steps(count, process_state().num_processes)
    lengths = rows["length"][:] if count is not None else [bench.task.max_length]
    live = [m.model for m in teaching.members if m.model is not None] if teaching is not None else []
    needed = expected_bytes(objective, live, train.batch_size, max(lengths))
    say(
        f"ahead: {steps:,} steps of {train.batch_size * train.gradient_accumulation} rows a process, up to "
        f"{max(lengths)} tokens, about {needed / 1e9:.1f} GB of memory"
    )


def expected_bytes(objective: Any, teachers: Sequence[Any], batch: int, length: int) -> int:
    """Memory of a step: weights, gradients and two moments of what is trained, the teachers' weights, activations.

    A layer keeps about `34 · batch · length · hidden` bytes in half precision (Korthikanti et al. 2022,
    arXiv:2205.05198, eq. 2, without the attention maps), twice that in float32.
    """
    trained = sum(p.numel() * (16 if p.requires_grad else 4) for p in objective.parameters())
    frozen = sum(p.numel() * 4 for teacher in teachers for p in teacher.parameters())
    config = objective.student.config
    return int(trained + frozen + 68 * batch * length * config.hidden_size * config.num_hidden_layers)
