"""The Python API: recipes without a file; models, tokenizers and data sets as objects.

`Recipe(...).run()` does the same as `hfcompress run` with a YAML file. `distill`, `prune` and `quantize` run one stage
and return its model. `evaluate` measures models side by side.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.objects import save_dataset, save_model_object
from hfcompress.data.sequence import Regression, TextClassification
from hfcompress.models.architectures import TASK_HEADS, class_name_of, task_head_of
from hfcompress.models.artifact import Artifact, load_model, load_tokenizer
from hfcompress.models.shape import Shape, count_labels, shape_of
from hfcompress.recipe import loader, schema
from hfcompress.recipe.validate import check
from hfcompress.recipe.yaml_text import dump_yaml
from hfcompress.report.notebook import Report
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from hfcompress.context import Stage
    from hfcompress.data.task import Task

_BUDGETS = ("parameters", "macs", "bytes", "latency")
_SHAPE = ("preset", "layers", "hidden", "heads", "ffn")
_TRAIN = ("epochs", "max_steps", "learning_rate", "batch_size")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: The run directory: one directory for each stage, `final/`, the report and the plots.
        report: The measurements; a notebook shows them as a table.
        auto_class: The class of transformers that loads the models, such as `AutoModelForSequenceClassification`.
    """

    directory: Path
    report: Report
    auto_class: str

    @property
    def model_directory(self) -> Path:
        """The directory of the last stage's model and its card, which `push` uploads."""
        return self.directory / "final"

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Loads the last stage's model and tokenizer.

        Raises:
            HfcompressError: if the model is an ONNX or OpenVINO graph.
        """
        from hfcompress.models.artifact import open_artifact

        model = _load_torch(open_artifact(self.model_directory), self.auto_class)
        return model, load_tokenizer(self.model_directory)


class Recipe:
    """A recipe as Python objects: a model, its task, and the stages that make it smaller."""

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        task: Task,
        stages: Sequence[Stage],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "model",
        measure: Any = None,
        hub: Any = None,
        seed: int = 42,
    ) -> None:
        """Validates the recipe; nothing is downloaded or trained.

        Args:
            model: A Hub id, a directory, or a model in memory together with its `tokenizer`.
            task: A task, such as `TextClassification(dataset=…, text=["sentence"])`. Its `dataset` is a Hub id, a
                directory, or a `Dataset` or `DatasetDict` of the `datasets` library.
            stages: Objects of `Finetune`, `Distill`, `Prune` and `Quantize`, in the order in which they run.
            tokenizer: The tokenizer of a model in memory.
            name: The name of the run directory, and of the model in its card.
            measure: A `Measure`; the default measures as a recipe file without `measure:` does.
            hub: A `Hub`, with metadata for the card and the repository for `push`.
            seed: The seed of everything random.

        Raises:
            pydantic.ValidationError: for an option that does not exist or has a wrong value.
            HfcompressError: for a model in memory without its tokenizer.
        """
        content: dict[str, Any] = {
            "name": name,
            "model": name_model(model, tokenizer),
            "task": task,
            "stages": list(stages),
            "seed": seed,
            **({"measure": measure} if measure is not None else {}),
            **({"hub": hub} if hub is not None else {}),
        }
        self.loaded = loader.load_objects(content)

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Recipe:
        """Reads a recipe file, or a shipped recipe by its name.

        Args:
            path: The file or the name.
            *overrides: `KEY.PATH=VALUE` assignments, as after `--set`.

        Raises:
            HfcompressError: with every mistake in the recipe.
        """
        recipe = cls.__new__(cls)
        recipe.loaded = loader.load(loader.find(str(path)), list(overrides))
        return recipe

    def to_yaml(self) -> str:
        """Writes the recipe as YAML, with every default."""
        return dump_yaml(schema.spell_out(self.loaded.recipe))

    def check(self) -> None:
        """Checks for everything that cannot work, before anything is trained.

        Raises:
            HfcompressError: with all problems at once.
        """
        check(self.loaded)

    def plan(self) -> list[Shape]:
        """Computes the shape of the model and the shape after each stage, without loading weights."""
        return check(self.loaded, weights=False)

    def run(
        self,
        directory: str | Path | None = None,
        *,
        fresh: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Run:
        """Runs the stages, measures every model, and writes the report and the card. The same call again resumes.

        Args:
            directory: The run directory, by default `runs/<name>`.
            fresh: True to start over instead of resuming.
            callbacks: `transformers` callbacks for every training.

        Raises:
            HfcompressError: for everything that the user can fix.
        """
        from hfcompress.run.runner import run

        place = Path(directory) if directory is not None else Path("runs") / self.loaded.recipe.name
        finished = run(self.loaded, place, fresh=fresh, callbacks=callbacks)
        if finished is None:  # not the first process of a distributed run
            return Run(place, Report({"rows": []}), self.loaded.recipe.task.auto_class)
        if finished.push_problem:
            log.error(str(finished.push_problem))
        return Run(finished.directory, Report(finished.report), self.loaded.recipe.task.auto_class)


# The three functions below repeat their arguments: editors and notebooks complete and explain only what a signature
# spells out.


def distill(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    *,
    task: Task | None = None,
    output: str | Path | None = None,
    seed: int = 42,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> PreTrainedModel:
    """Distils a model into a smaller one.

    Args:
        model: The teacher: a model in memory, a directory or a Hub id.
        tokenizer: The tokenizer of a model in memory; None for a directory or a Hub id.
        dataset: A Hub id, a directory, or a `Dataset` or `DatasetDict`.
        task: The task; needed if the model and the columns of the data leave a choice.
        output: A directory for the model, its tokenizer and `stage.json`; it must not exist yet.
        seed: The seed of everything random.
        callbacks: `transformers` callbacks for the training.
        **options: Options of `Distill` (`losses`, `layer_map`, …); of `Student`: `layers`, `hidden`, `heads`, `ffn`,
            `preset`; of `Train`: `epochs`, `max_steps`, `learning_rate`, `batch_size`.

    Returns:
        The student, in eval mode.
    """
    from hfcompress.distillation.stage import Distill

    student, train = _pop_options(options, _SHAPE), _pop_options(options, _TRAIN)
    options = {"losses": ["soft_labels"], **options}
    options |= {"student": student} if student else {}
    options |= {"train": train} if train else {}
    stage = Distill(**options)
    return _run_stage(stage, model, tokenizer, dataset, task, output, seed, callbacks)


def prune(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    *,
    task: Task | None = None,
    output: str | Path | None = None,
    seed: int = 42,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> PreTrainedModel:
    """Prunes a model.

    Args:
        model: A model in memory, a directory or a Hub id.
        tokenizer: The tokenizer of a model in memory; None for a directory or a Hub id.
        dataset: A Hub id, a directory, or a `Dataset` or `DatasetDict`.
        task: The task; needed if the model and the columns of the data leave a choice.
        output: A directory for the model, its tokenizer and `stage.json`; it must not exist yet.
        seed: The seed of everything random.
        callbacks: `transformers` callbacks for the training.
        **options: Options of `Prune` (`criterion`, `heads`, `ffn`, `recover`, …); of its `Budget`, the share that may
            stay: `macs`, `parameters`, `bytes`, `latency`.

    Returns:
        The pruned model, in eval mode.
    """
    from hfcompress.pruning.stage import Prune

    budget = _pop_options(options, _BUDGETS)
    options |= {"budget": budget} if budget else {}
    if options.get("vocabulary", "keep") != "keep" and output is None:
        raise HfcompressError(
            "`vocabulary` also changes the tokenizer",
            "give `output`, a directory, and load model and tokenizer from it",
        )
    stage = Prune(**options)
    return _run_stage(stage, model, tokenizer, dataset, task, output, seed, callbacks)


def quantize(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    *,
    backend: Any = "torch_int8",
    task: Task | None = None,
    output: str | Path | None = None,
    seed: int = 42,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> PreTrainedModel | Path:
    """Quantizes a model.

    Args:
        model: A model in memory, a directory or a Hub id.
        tokenizer: The tokenizer of a model in memory; None for a directory or a Hub id.
        dataset: A Hub id, a directory, or a `Dataset` or `DatasetDict`; calibration rows come from it.
        backend: A backend's name, `{"use": NAME, …}`, or a backend.
        task: The task; needed if the model and the columns of the data leave a choice.
        output: A directory for the model, its tokenizer and `stage.json`; it must not exist yet.
        seed: The seed of everything random.
        callbacks: `transformers` callbacks for a training.
        **options: Options of `Quantize` (`train`, `max_drop`, `rows`).

    Returns:
        The quantized model, in eval mode; for a backend that writes an ONNX or OpenVINO graph, the path `output`.

    Raises:
        HfcompressError: if a backend writes a graph and there is no `output`.
    """
    from hfcompress.quantization.stage import Quantize

    stage = Quantize(backend=backend, **options)
    return _run_stage(stage, model, tokenizer, dataset, task, output, seed, callbacks)


def evaluate(
    models: Sequence[str | Path | PreTrainedModel],
    dataset: Any = None,
    *,
    task: Task | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    measure: Any = None,
    seed: int = 42,
) -> Report:
    """Measures models side by side, on the same rows: quality, size, speed, memory.

    Args:
        models: Directories, Hub ids, or models in memory. The others are compared with the first.
        dataset: A Hub id, a directory, or a `Dataset` or `DatasetDict`; not needed beside `task`.
        task: The task; needed if the first model and the columns of the data leave a choice.
        tokenizer: The tokenizer of the models in memory.
        measure: A `Measure`; by default that of a recipe file without `measure:`.
        seed: The seed of everything random.
    """
    from hfcompress.quantization.backends.base import BACKENDS
    from hfcompress.quantization.stage import Quantize
    from hfcompress.run.compare import compare

    if not models:
        raise HfcompressError("there is no model to measure", "name at least one")
    names = [name_model(model, tokenizer) for model in models]
    task = task if task is not None else infer_task(models[0], dataset)
    stages = [Quantize(backend=BACKENDS.parse("float16"))]  # a recipe needs a stage; this one does not run
    recipe = Recipe(names[0], task, stages, measure=measure, seed=seed)
    return Report(compare(names, recipe.loaded)[0])


@dataclass(frozen=True)
class SearchResult:
    """The result of `search`.

    Attributes:
        run: The run of the chosen model.
        found: True if the model keeps to all limits; false if it is the nearest attempt.
        recipe: The plain recipe that makes it, as YAML.
        trials: The content of `search/search.json`: all candidates, with what was measured of each.
    """

    run: Run
    found: bool
    recipe: str
    trials: Mapping[str, Any]


def search(
    model: str | Path | PreTrainedModel,
    dataset: Any = None,
    *,
    max_drop: str | float = "1%",
    goal: str = "latency",
    hours: float = 1.0,
    min_speedup: float | None = None,
    max_mb: float | None = None,
    task: Task | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str = "search",
    output: str | Path | None = None,
    measure: Any = None,
    seed: int = 42,
) -> SearchResult:
    """Finds the fastest, or smallest, model within a limit on the loss of quality. The same call again goes on.

    Args:
        model: A model in memory, a directory or a Hub id.
        dataset: A Hub id, a directory, or a `Dataset` or `DatasetDict`; not needed beside `task`.
        max_drop: The largest loss of quality: `"1%"` of the source's score, or 0.01 of the metric.
        goal: `latency` or `size`.
        hours: Time for the whole search.
        min_speedup: How many times faster than the source the model must be.
        max_mb: The largest size of its weight files, in MB.
        task: The task; needed if the model and the columns of the data leave a choice.
        tokenizer: The tokenizer of a model in memory.
        name: The name of the run.
        output: The run directory, by default `runs/<name>`.
        measure: A `Measure`; by default that of a recipe file without `measure:`.
        seed: The seed of everything random.

    Raises:
        HfcompressError: for everything that the user can fix, and if every trial fails.
    """
    import json

    from hfcompress.searching.run import FOLDER, find_model

    task = task if task is not None else infer_task(model, dataset)
    limits = {"max_drop": max_drop, "goal": goal, "hours": hours, "min_speedup": min_speedup, "max_mb": max_mb}
    content: dict[str, Any] = {
        "name": name,
        "model": name_model(model, tokenizer),
        "task": task,
        "search": {key: value for key, value in limits.items() if value is not None},
        "seed": seed,
        **({"measure": measure} if measure is not None else {}),
    }
    directory = Path(output) if output is not None else Path("runs") / name
    found = find_model(loader.load_objects(content), directory)
    if found.run is None or found.loaded is None:
        raise HfcompressError("every trial failed", f"see {directory / FOLDER / 'search.json'}")
    return SearchResult(
        Run(found.run.directory, Report(found.run.report), task.auto_class),
        found.ending.best is not None,
        found.loaded.document.text,
        json.loads((directory / FOLDER / "search.json").read_text(encoding="utf-8")),
    )


def push(run: str | Path | Run, repo: str | None = None, *, private: bool = False, stage: int | None = None) -> str:
    """Publishes a finished run on the Hub: model, tokenizer, card and pictures, in one commit.

    Args:
        run: A run, or its directory.
        repo: `user/name`; by default `hub.repo` of the recipe.
        private: True to create the repository as a private one.
        stage: The number of the stage whose model is published, from 1; by default the last model.

    Returns:
        The address of the commit.
    """
    from hfcompress.run.push import push

    return push(run.directory if isinstance(run, Run) else Path(run), repo, private, stage=stage)


def name_model(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Returns the path or Hub id of a model; a model in memory is first saved to a directory.

    Raises:
        HfcompressError: for a model in memory without its tokenizer.
    """
    if isinstance(model, (str, Path)):
        return str(model)
    if tokenizer is None:
        raise HfcompressError("a model in memory needs its tokenizer", "give `tokenizer=`, or a directory with both")
    return save_model_object(model, tokenizer)


def infer_task(model: Any, dataset: Any) -> Task:
    """Infers the task from the class of a model and the columns of its data.

    Raises:
        HfcompressError: if they leave a choice; it says what to give.
    """
    from hfcompress.data.source import model_config

    if dataset is None:
        raise HfcompressError("there is no data", "give `dataset=` or `task=`")
    config = model_config(str(model)) if isinstance(model, (str, Path)) else _make_config(model)
    name = class_name_of(config)
    head = task_head_of(name)
    if head != "sequence":
        reason = f"{name} ends in {TASK_HEADS[head]}" if head else f"{name} has no task head"
        fix = "give `task=`, such as TokenClassification(dataset=…)"
        raise HfcompressError(f"the task cannot be inferred: {reason}", fix)
    kind = Regression if count_labels(config) == 1 else TextClassification
    path = dataset if isinstance(dataset, (str, Path)) else save_dataset(dataset)
    positions = shape_of(config).usable_positions
    default = kind.model_fields["max_length"].default
    return kind.model_validate(
        {
            "dataset": str(path),
            "text": _find_text_columns(dataset, kind.model_fields["label"].default),
            "max_length": min(default, positions),
        }
    )


def _make_config(model: PreTrainedModel) -> dict[str, Any]:
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def _find_text_columns(dataset: Any, label: str) -> list[str]:
    """Finds the columns with text of a data set in memory, without the label's."""
    fix = 'give `task=`, such as TextClassification(dataset=…, text=["sentence"], label="label")'
    if isinstance(dataset, (str, Path)):
        raise HfcompressError("the text columns of a data set on disk or on the Hub cannot be inferred", fix)
    features = (next(iter(dataset.values())) if isinstance(dataset, Mapping) else dataset).features
    kinds = {name: getattr(feature, "dtype", "") for name, feature in features.items() if name != label}
    texts = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if label not in features or not 1 <= len(texts) <= 2:
        raise HfcompressError(f"the task cannot be inferred from the columns {', '.join(features)}", fix)
    return texts


def _pop_options(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Removes the named options from a mapping, and returns them."""
    return {name: options.pop(name) for name in names if name in options}


def _run_stage(
    stage: Stage,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    task: Task | None,
    output: str | Path | None,
    seed: int,
    callbacks: Sequence[TrainerCallback],
) -> Any:
    """Runs one stage without measuring, and loads its model."""
    from hfcompress.run.runner import make_models

    if output is not None and Path(output).exists():
        raise HfcompressError(f"{output} exists", "give a directory that does not exist yet")
    task = task if task is not None else infer_task(model, dataset)
    recipe = Recipe(model, task, [stage], tokenizer=tokenizer, seed=seed)
    with tempfile.TemporaryDirectory(prefix="hfcompress-") as directory:
        artifact = make_models(recipe.loaded, Path(directory) / "run", callbacks)[-1]
        if artifact.runtime != "torch" and output is None:
            raise HfcompressError(
                f"{artifact.path.name} is an {artifact.runtime} graph, not a PyTorch model",
                "give `output`, a directory for the graph",
            )
        if output is not None:
            shutil.copytree(artifact.path, output)
        if artifact.runtime != "torch":
            return Path(str(output))
        return _load_torch(artifact, recipe.loaded.recipe.task.auto_class)


def _load_torch(artifact: Artifact, auto_class: str) -> PreTrainedModel:
    if artifact.runtime != "torch":
        raise HfcompressError(
            f"{artifact.path} holds an {artifact.runtime} graph", "load it with onnxruntime or Optimum"
        )
    return load_model(artifact.path, auto_class).eval()
