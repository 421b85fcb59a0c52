"""The `augment:` block of a stage: makes new rows, and filters them by a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hfcompress.context import StageContext
from hfcompress.data.source import cache_home
from hfcompress.distillation.augmentation.augment import Keep, augment, read_augmented
from hfcompress.distillation.options import DistillationOptions
from hfcompress.measure.environment import cpu_flags, versions
from hfcompress.models.architectures import TASK_HEADS
from hfcompress.models.artifact import Artifact, label_ids, load_model, load_tokenizer, weights_hash
from hfcompress.models.forward import observe
from hfcompress.utils.distributed import broadcast, on_main_process, process_state
from hfcompress.utils.errors import Problem
from hfcompress.utils.hashing import hash_file, hash_json
from hfcompress.utils.places import is_file, local_path
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    import datasets
    from torch import Tensor

    from hfcompress.data.local_models import LocalModels
    from hfcompress.data.task import Task


class Augment(StrictModel):
    """Adds copies of the rows, in which a masked-language model replaces words.

    Source: TinyBERT, Jiao et al. 2020, arXiv:1909.10351, Algorithm 1.
    """

    copies: int = Field(default=20, ge=1)
    """The new rows for each row; for a pair of texts, the new rows for each text."""
    model: str = Field(default="google-bert/bert-base-uncased", min_length=1)
    """The masked-language model: a directory, a Hub id, or `model`, the recipe's own."""
    probability: float = Field(default=0.4, ge=0, le=1)
    """The probability that a word is replaced."""
    top_k: int = Field(default=15, ge=1)
    """The candidates for each replacement."""
    glove: str | None = None
    """A text file of word vectors (`word v1 v2 …`) for words of several tokens; without it these are not replaced."""
    minimum_confidence: float | None = Field(default=None, ge=0, le=1)
    """Keep a new row only if the (first) teacher predicts its label, with at least this probability."""
    tolerance: float | None = Field(default=None, gt=0)
    """Keep a new row of a regression only if the (first) teacher's score is this close to its score."""
    batch_size: int = Field(default=256, ge=1)
    """The masked texts in a forward pass."""
    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    """The precision of the masked-language model; `auto` is bfloat16 on a GPU or processor that computes with it, else
    float32."""

    @property
    def filters(self) -> bool:
        """True if the teacher decides which new rows are kept."""
        return self.minimum_confidence is not None or self.tolerance is not None

    def problems(self, task: Task, has_teacher: bool = True) -> list[Problem]:
        """Lists the problems of the block; their keys are paths inside the stage.

        Args:
            task: The stage's task.
            has_teacher: True if the stage has a teacher.
        """
        found = []
        if task.head != "sequence":
            message = f"augment rewrites texts for text-classification and regression, and the task is {task.type}"
            found.append(Problem(message, "leave it out", ("augment",)))
        elif self.minimum_confidence is not None and task.type == "regression":
            message, fix = (
                "a regression has no classes, so there is no confidence",
                "use `tolerance`, in units of the score",
            )
            found.append(Problem(message, fix, ("augment", "minimum_confidence")))
        elif self.tolerance is not None and task.type != "regression":
            message, fix = "a classification has no scores to compare", "use `minimum_confidence`"
            found.append(Problem(message, fix, ("augment", "tolerance")))
        elif self.filters and not has_teacher:
            key = "tolerance" if self.minimum_confidence is None else "minimum_confidence"
            fix = "leave it out, or add a loss that needs one"
            found.append(Problem("there is no teacher to ask about the new rows", fix, ("augment", key)))
        if self.glove is not None and not is_file(local_path(self.glove)):
            fix = "give the path of a text file such as glove.6B.300d.txt"
            found.append(Problem(f"no such file: {self.glove}", fix, ("augment", "glove")))
        return found


def augment_problems(options: Augment, models: LocalModels) -> list[Problem]:
    """Lists the problems of the masked-language model and the rows, if they are on this machine."""
    from hfcompress.data.local_models import collect_problems
    from hfcompress.distillation.augmentation.augment import require_fresh
    from hfcompress.distillation.augmentation.replacements import require_masks

    model, found = models.named.get(options.model), list[Problem]()
    if model is not None:
        found += collect_problems(lambda: require_masks(models.tokenizer(model), model.directory), ("augment", "model"))
    if model is not None and model.config is not None and not _fills_masks(model.config):
        message = f"the model {options.model} is a {model.config['architectures'][0]}, which cannot fill in masks"
        fix = "name a masked-language model, such as google-bert/bert-base-uncased"
        found.append(Problem(message, fix, ("augment", "model")))
    if models.readable:
        found += collect_problems(lambda: require_fresh(models.task.read("train")), ("augment",))
    return found


def _fills_masks(config: Mapping[str, Any]) -> bool:
    named = config.get("architectures")
    return not named or str(named[0]).endswith(TASK_HEADS["mask"])


def augment_rows(
    options: Augment, taught: DistillationOptions, parent: Artifact, context: StageContext
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Adds new rows to the train split. The first process makes them, once for all runs with the same options.

    Args:
        options: The block.
        taught: The stage; its first teacher filters the new rows if the block has a filter.
        parent: The model that `teacher: parent` means.
        context: The stage's context.

    Returns:
        The raw rows of the train split with the new ones, and the facts about them.
    """
    mlm = context.artifact(options.model, parent).path
    device = process_state().device
    bfloat16 = computes_in_bfloat16(options.precision, device.type)
    teacher = context.artifact(taught.teacher.models[0], parent) if options.filters else None
    identity = {
        "options": options.model_dump(exclude={"batch_size", "precision", "glove"}),
        "model": weights_hash(mlm),
        "glove": hash_file(local_path(options.glove)) if options.glove else None,
        "teacher": weights_hash(teacher.path) if teacher else None,
        "bfloat16": bfloat16,
        "task": context.task.model_dump(include={"type", "text", "label", "max_length"}),
        "data": context.fingerprint(),
        "seed": context.seed,
        "versions": versions(),
    }
    directory = cache_home() / "augmented" / hash_json(identity)

    def make() -> None:
        keep = None if teacher is None else make_label_filter(options, teacher, context.task)
        counts = augment(
            context.rows("train"),
            context.task.text,
            options,
            seed=context.seed,
            directory=directory,
            identity=identity,
            mlm=mlm,
            keep=keep,
            device=str(device),
            bfloat16=bfloat16,
        )
        facts.update(counts, data=directory.name)

    facts = dict[str, Any]()
    on_main_process(make)
    return read_augmented(directory), broadcast(facts)


def computes_in_bfloat16(precision: str, device: str) -> bool:
    """True if the masked-language model computes in bfloat16 on a kind of device."""
    if precision != "auto":
        return precision == "bfloat16"
    if device == "cuda":
        from torch import cuda

        return cuda.is_bf16_supported()
    return device == "cpu" and bool({"avx512_bf16", "amx_bf16"}.intersection(cpu_flags()))


def make_label_filter(options: Augment, teacher: Artifact, task: Task) -> Keep:
    """Makes the filter that keeps the rows whose label the teacher predicts."""
    import numpy as np
    import torch

    from hfcompress.training.batches import make_batches

    device = process_state().device
    model, tokenizer = load_model(teacher.path, task.auto_class).to(device), load_tokenizer(teacher.path, task)
    labels = label_ids(model.config.to_dict())

    def keep(rows: datasets.Dataset) -> list[bool]:
        agreed = np.zeros(len(rows), dtype=bool)
        for batch in make_batches(task.encode(rows, tokenizer, labels), tokenizer, task, options.batch_size):
            index, wanted = batch.pop("index"), batch.pop("labels").to(device)
            with torch.inference_mode():
                logits = observe(model, {name: value.to(device) for name, value in batch.items()}).logits.float()
            agreed[index.numpy()] = _agrees(logits, wanted, options).cpu().numpy()
        return agreed.tolist()

    return keep


def _agrees(logits: Tensor, labels: Tensor, options: Augment) -> Tensor:
    """Compares logits `(batch, labels)` with labels `(batch,)`; returns `(batch,)`, true for rows that agree."""
    if options.tolerance is not None:
        return (logits.squeeze(-1) - labels).abs() <= options.tolerance
    confidence, answers = logits.softmax(-1).max(-1)
    return (answers == labels) & (confidence >= (options.minimum_confidence or 0))
