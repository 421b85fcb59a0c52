"""Trains a student with its teachers, after all checks that can be made before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageContext, require_trainable
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
from hfcompress.distillation.teacher_quality import require_better_than_chance
from hfcompress.distillation.teachers import Member, TeacherEnsemble
from hfcompress.models.artifact import Artifact, label_ids, load_finite_model, load_tokenizer, read_config, weights_hash
from hfcompress.models.shape import Shape, shape_of
from hfcompress.training.options import Train, count_rows
from hfcompress.training.task_heads import has_task_head
from hfcompress.utils.distributed import process_state
from hfcompress.utils.errors import HfcompressError, Problem
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.task import Task
    from hfcompress.training.overlay import TrainingOverlay


def train_student(
    student: PreTrainedModel,
    options: DistillationOptions,
    train: Train,
    parent: Artifact,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    raw: datasets.Dataset | None = None,
    masks: TrainingOverlay | None = None,
) -> dict[str, Any]:
    """Trains a student in place.

    Args:
        student: The model to train.
        options: Its losses and teachers.
        train: The options of the training.
        parent: The model that `teacher: parent` means.
        context: The stage's context.
        tokenizer: The student's tokenizer.
        raw: Rows to train on instead of the train split.
        masks: The overlay of the student while it trains.

    Returns:
        The facts: the scores of student and teachers on the dev split.

    Raises:
        HfcompressError: for a teacher that is not better than chance, or that cannot teach this student.
    """
    from transformers import set_seed

    from hfcompress.training import trainer
    from hfcompress.training.objective import Objective

    labels = dict(student.config.label2id or {})
    rows = {"train": context.encode("train", tokenizer, labels, raw), "dev": context.encode("dev", tokenizer, labels)}
    teachers, first, pairs, facts = None, None, list[tuple[int, int]](), dict[str, Any]()
    if options.needs_teacher:
        artifacts = [context.artifact(name, parent) for name in options.teacher.models]
        own = shape_of(student.config.to_dict())
        _require_compatible(own, artifacts, options, context.task)
        teachers, facts["teacher"] = _load_teachers(options, train, artifacts, context, tokenizer, rows, labels, raw)
        first = require_trainable(artifacts[0], "a teacher")
        pairs += pairs_of(options.layer_map, len(own.layers), len(first.layers))
    set_seed(context.seed)
    objective = Objective(
        student,
        options.losses,
        context.task,
        first,
        tuple(pairs),
        dynamic=options.layer_map == "dynamic",
        masks=masks,
        states=[loss.state_of(rows["train"], labels) for loss in options.losses],
    )
    _log_steps_and_memory(objective, teachers, train, rows["train"], context)
    trainer.check_first_step(objective, teachers, rows["train"], tokenizer)
    facts["dev"] = trainer.train(
        objective,
        train,
        rows=rows,
        tokenizer=tokenizer,
        checkpoints=context.checkpoints,
        seed=context.seed,
        teachers=teachers,
        callbacks=context.callbacks,
    )
    return facts


def _require_compatible(
    student: Shape, artifacts: Sequence[Artifact], options: DistillationOptions, task: Task
) -> None:
    problems = list[Problem]()
    for index, artifact in enumerate(artifacts):
        teacher = require_trainable(artifact, "a teacher")
        problems += length_problems(artifact.stage, teacher, task)
        problems += options.compatibility_problems(student, teacher, first=index == 0)
    _require_none(problems)


def _require_none(problems: Sequence[Problem]) -> None:
    if problems:
        raise HfcompressError([Problem(p.message, p.fix) for p in problems])


def _load_teachers(
    options: DistillationOptions,
    train: Train,
    artifacts: Sequence[Artifact],
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Any],
    labels: Mapping[str, int],
    raw: datasets.Dataset | None,
) -> tuple[TeacherEnsemble, Any]:
    """Loads and checks the teachers, and fills their caches; returns the ensemble and the dev scores."""
    from hfcompress.distillation.fill_cache import fill_teacher_cache

    cached = options.cache_content(train, context.task.head, count_rows(rows["train"]), process_state().num_processes)
    fingerprint = context.fingerprint(raw)
    members, scores = list[Member](), list[dict[str, Any]]()
    for index, artifact in enumerate(artifacts):
        model, headed = _load_teacher(artifact, context.task, any(loss.needs_logits for loss in options.losses))
        _require_none(label_problems(artifact.stage, label_ids(model.config.to_dict()), labels, context.task))
        member, theirs = Member(artifact.stage, model, load_tokenizer(artifact.path, context.task)), rows
        if not same_behaviour(tokenizer, member.tokenizer):
            theirs = {
                "train": context.encode("train", member.tokenizer, labels, raw),
                "dev": context.encode("dev", member.tokenizer, labels),
            }
        if not same_inputs(tokenizer, member.tokenizer, rows, theirs):
            compared = rows["train"], theirs["train"], options, context.task.head, index == 0
            _require_none(reading_problems(member.stage, tokenizer, member.tokenizer, *compared))
            member.rows = theirs["train"]
        made_by = context.stage_of(artifact)
        score = require_better_than_chance(member, theirs["dev"], context.task, made_by) if headed else None
        scores.append({"stage": artifact.stage, "dev": score})
        content: Any = (cached if index == 0 else "logits") if cached else None
        if content:
            given = {"weights": weights_hash(artifact.path), "fingerprint": fingerprint}
            member.answers = fill_teacher_cache(
                model, member.tokenizer, theirs["train"], context.task, content, **given
            )
            member.model = None
        members.append(member)
    ensemble = TeacherEnsemble(members, options.teacher, context.task)
    return ensemble, scores[0] if len(scores) == 1 else scores


def _load_teacher(artifact: Artifact, task: Task, needs_logits: bool) -> tuple[PreTrainedModel, bool]:
    """Loads a teacher, and returns true beside it if it has the task head; losses on layers do not need one."""
    config = read_config(artifact.path)
    if has_task_head(config, task):
        _require_none(head_problems(artifact.stage, config, task))
    fresh = not needs_logits and task.head == "mask" and not has_task_head(config, task)
    return load_finite_model(artifact.path, task.auto_class, fresh_head=fresh), not fresh


def _log_steps_and_memory(
    objective: Any, teachers: TeacherEnsemble | None, train: Train, rows: Any, context: StageContext
) -> None:
    """Logs the number of steps and the memory that they need, before any epoch."""
    count = count_rows(rows)
    steps = train.steps(count, process_state().num_processes)
    lengths = rows["length"][:] if count is not None else [context.task.max_length]
    live = [m.model for m in teachers.members if m.model is not None] if teachers is not None else []
    needed = estimate_memory(objective, live, train.batch_size, max(lengths))
    log.info(
        f"training: {steps:,} steps of {train.batch_size * train.gradient_accumulation} rows on each process, up to "
        f"{max(lengths)} tokens, about {needed / 1e9:.1f} GB of memory"
    )


def estimate_memory(objective: Any, teachers: Sequence[Any], batch: int, length: int) -> int:
    """Estimates the bytes that a step needs.

    These are weights, gradients and two moments of the student, the teachers' weights, and the activations.
    A layer keeps about `34 · batch · length · hidden` bytes in half precision (Korthikanti et al. 2022,
    arXiv:2205.05198, eq. 2, without the attention maps), twice that in float32.
    """
    trained = sum(p.numel() * (16 if p.requires_grad else 4) for p in objective.parameters())
    frozen = sum(p.numel() * 4 for teacher in teachers for p in teacher.parameters())
    config = objective.student.config
    return int(trained + frozen + 68 * batch * length * config.hidden_size * config.num_hidden_layers)
