"""Trains a student with its teachers, once everything that can be known before has been looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageContext, require_trainable
from hfcompress.distillation.chance import examined
from hfcompress.distillation.layer_map import pairs_of
from hfcompress.distillation.options import DistillationOptions
from hfcompress.distillation.teacher_checks import (
    head_problems,
    label_problems,
    length_problems,
    reading_problems,
    same_behaviour,
    same_inputs,
)
from hfcompress.distillation.teachers import Member, TeacherEnsemble
from hfcompress.models.artifact import Artifact, label_ids, load_numbers, load_tokenizer, read_config, weights_hash
from hfcompress.models.shape import Shape, shape_of
from hfcompress.training.options import Train, row_count
from hfcompress.training.task_heads import has_head
from hfcompress.utils.distributed import process_state
from hfcompress.utils.errors import HfcompressError, Problem
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.task import Task
    from hfcompress.training.overlay import TrainingOverlay


def teach(
    student: PreTrainedModel,
    taught: DistillationOptions,
    train: Train,
    parent: Artifact,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    raw: datasets.Dataset | None = None,
    masks: TrainingOverlay | None = None,
) -> dict[str, Any]:
    """Trains the student in place.

    Args:
        student: The model to train.
        taught: Losses and teachers.
        train: How to train.
        parent: What `teacher: parent` means.
        context: The stage's context.
        tokenizer: The student's.
        raw: Rows to train on in place of the train split.
        masks: What lies over the student while it trains.

    Returns:
        The facts: the student's score on the dev split, and the teachers'.

    Raises:
        HfcompressError: for a teacher that is at chance, or that cannot teach this student.
    """
    from transformers import set_seed

    from hfcompress.training import trainer as training

    labels = dict(student.config.label2id or {})
    rows = {"train": context.encoded("train", tokenizer, labels, raw), "dev": context.encoded("dev", tokenizer, labels)}
    teaching, first, pairs, facts = None, None, list[tuple[int, int]](), dict[str, Any]()
    if taught.asks:
        artifacts = [context.artifact(name, parent) for name in taught.teacher.models]
        own = shape_of(student.config.to_dict())
        _require_meeting(own, artifacts, taught, context.task)
        teaching, facts["teacher"] = _teaching(taught, train, artifacts, context, tokenizer, rows, labels, raw)
        first = require_trainable(artifacts[0], "a teacher")
        pairs += pairs_of(taught.layer_map, len(own.layers), len(first.layers))
    set_seed(context.seed)
    objective = training.Objective(
        student,
        taught.losses,
        context.task,
        first,
        tuple(pairs),
        dynamic=taught.layer_map == "dynamic",
        masks=masks,
        states=[loss.state_of(rows["train"], labels) for loss in taught.losses],
    )
    _say_what_is_ahead(objective, teaching, train, rows["train"], context)
    training.examine(objective, teaching, rows["train"], tokenizer)
    facts["dev"] = training.train(
        objective,
        train,
        rows=rows,
        tokenizer=tokenizer,
        checkpoints=context.checkpoints,
        seed=context.seed,
        teaching=teaching,
        callbacks=context.callbacks,
    )
    return facts


def _require_meeting(student: Shape, artifacts: Sequence[Artifact], taught: DistillationOptions, task: Task) -> None:
    problems = list[Problem]()
    for index, artifact in enumerate(artifacts):
        teacher = require_trainable(artifact, "a teacher")
        problems += length_problems(artifact.stage, teacher, task)
        problems += taught.meeting_problems(student, teacher, first=index == 0)
    _require_none(problems)


def _require_none(problems: Sequence[Problem]) -> None:
    if problems:
        raise HfcompressError([Problem(p.message, p.fix) for p in problems])


def _teaching(
    taught: DistillationOptions,
    train: Train,
    artifacts: Sequence[Artifact],
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Any],
    labels: Mapping[str, int],
    raw: datasets.Dataset | None,
) -> tuple[TeacherEnsemble, Any]:
    """Gets the teachers ready: the ensemble, and each one's score on the dev split."""
    from hfcompress.distillation.answers import answers_of

    kept = taught.kept(train, context.task.head, row_count(rows["train"]), process_state().num_processes)
    fingerprint = context.fingerprint(raw)
    members, scores = list[Member](), list[dict[str, Any]]()
    for index, artifact in enumerate(artifacts):
        model, headed = _loaded(artifact, context.task, any(loss.needs_logits for loss in taught.losses))
        _require_none(label_problems(artifact.stage, label_ids(model.config.to_dict()), labels, context.task))
        member, asked = Member(artifact.stage, model, load_tokenizer(artifact.path, context.task)), rows
        if not same_behaviour(tokenizer, member.tokenizer):
            asked = {
                "train": context.encoded("train", member.tokenizer, labels, raw),
                "dev": context.encoded("dev", member.tokenizer, labels),
            }
        if not same_inputs(tokenizer, member.tokenizer, rows, asked):
            read = rows["train"], asked["train"], taught, context.task.head, index == 0
            _require_none(reading_problems(member.stage, tokenizer, member.tokenizer, *read))
            member.rows = asked["train"]
        tuned = any(made.kind == "finetune" and made.path == artifact.path for made in context.made.values())
        score = examined(member, asked["dev"], context.task, tuned) if headed else None
        scores.append({"stage": artifact.stage, "dev": score})
        content: Any = (kept if index == 0 else "logits") if kept else None
        if content:
            given = {"weights": weights_hash(artifact.path), "fingerprint": fingerprint}
            member.answers = answers_of(model, member.tokenizer, asked["train"], context.task, content, **given)
            member.model = None
        members.append(member)
    ensemble = TeacherEnsemble(members, taught.teacher, context.task)
    return ensemble, scores[0] if len(scores) == 1 else scores


def _loaded(artifact: Artifact, task: Task, needs_logits: bool) -> tuple[PreTrainedModel, bool]:
    """The teacher, and whether it has the task's head; one that is asked about its layers alone needs none."""
    config = read_config(artifact.path)
    if has_head(config, task):
        _require_none(head_problems(artifact.stage, config, task))
    fresh = not needs_logits and task.head == "mask" and not has_head(config, task)
    return load_numbers(artifact.path, task.auto_class, fresh_head=fresh), not fresh


def _say_what_is_ahead(
    objective: Any, teaching: TeacherEnsemble | None, train: Train, rows: Any, context: StageContext
) -> None:
    """Steps and memory, before any epoch."""
    count = row_count(rows)
    steps = train.steps(count, process_state().num_processes)
    lengths = rows["length"][:] if count is not None else [context.task.max_length]
    live = [m.model for m in teaching.members if m.model is not None] if teaching is not None else []
    needed = expected_bytes(objective, live, train.batch_size, max(lengths))
    log.info(
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
