"""Finds what cannot work from the configs, tokenizers and first rows that are on this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hfcompress.data.local_models import LocalModel, LocalModels
from hfcompress.data.source import is_local, model_config, model_directory
from hfcompress.models.adapters import is_adapter
from hfcompress.models.artifact import label_ids, load_tokenizer
from hfcompress.models.padding import have_same_pad_token, reads_last_token
from hfcompress.training.task_heads import has_task_head
from hfcompress.utils.errors import HfcompressError, Key, Problem

if TYPE_CHECKING:
    from hfcompress.data.task import Task
    from hfcompress.recipe.schema import Recipe


def find_local_problems(recipe: Recipe, readable: bool, download: bool) -> list[Problem]:
    """Asks each stage for its problems with the models and rows on this machine.

    Args:
        recipe: The recipe, in which no other problem was found.
        readable: True if the rows of the recipe's task can be read.
        download: True if the rows of a data set on the Hub may be read, too.
    """
    problems = list[Problem]()
    model = _find_model(recipe.model, recipe.task)
    known = {"model": model, "source": model} if model else {}
    parent = model
    for index, (name, stage) in enumerate(zip(recipe.stage_names(), recipe.stages, strict=True)):
        task = stage.task_of(recipe.task)
        named = {spec: found for spec in stage.specs().values() if (found := _find_model(spec, task))}
        models = LocalModels(
            task,
            {**named, **known, **({"parent": parent} if parent else {})},
            readable and (download or is_local(task.dataset)),
            model.directory if model and task is recipe.task else None,
        )
        problems += [replace(p, key=("stages", index, *p.key)) for p in stage.local_problems(models)]
        start = models.named.get(stage.starts_from)
        parent = LocalModel(start.directory, stage.find_labels(start, models)) if start else None
        made = {name: parent} | ({} if stage.compresses else {"source": parent})
        known = {spec: found for spec, found in {**known, **made}.items() if found}
    return problems


def _find_model(spec: str, task: Task) -> LocalModel | None:
    """Finds the model that a name stands for; None if it is not on this machine, or is an adapter."""
    if not is_local(spec) or not (model_directory(spec) / "config.json").is_file():
        return None
    config = model_config(spec)
    return LocalModel(model_directory(spec), label_ids(config) if has_task_head(config, task) else None, config)


def find_padding_problems(recipe: Recipe, download: bool) -> list[Problem]:
    """Finds models whose config and tokenizer name different pad tokens, if an answer may depend on the pad token.

    Args:
        recipe: The recipe.
        download: True if the tokenizer of a model on the Hub may be downloaded.
    """
    named: dict[str, Key] = {recipe.model: ("model",)}
    inside = {"source", "parent", "model", *recipe.stage_names()}
    for index, stage in enumerate(recipe.stages):
        specs = {spec: ("stages", index, *key) for key, spec in stage.specs().items() if spec not in inside}
        named = specs | named
    problems: list[Problem] = []
    for spec, key in named.items():
        try:
            path = model_directory(spec) if download or is_local(spec) else None
            if path is None or is_adapter(path):
                continue
            config = model_config(spec)
            if reads_last_token(config) and not have_same_pad_token(path, config):
                load_tokenizer(path)
        except HfcompressError as error:
            problems += [replace(p, key=key) for p in error.problems]
    return problems
