"""Who loads a saved model and gives it plain text gets what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from hfcompress.context import StageContext
from hfcompress.data.fill_mask import FillMask
from hfcompress.data.sequence import Regression, TextClassification
from hfcompress.data.spans import QuestionAnswering
from hfcompress.data.tokens import TokenClassification
from hfcompress.measure.plain_texts import Reading, ReloadError, compare_plain_texts
from hfcompress.models.artifact import label_ids, load_tokenizer, open_artifact, read_config
from hfcompress.recipe.loader import load
from tests import factories
from tests.in_process import InThisProcess

TAGS = ["O", "B-GOOD", "I-GOOD", "B-BAD", "I-BAD"]


def rows_of(kind: str, folder: Path) -> dict[str, Any]:
    """A `task:` block and its data."""
    made: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
        "text-classification": (factories.write_data, {"text": ["sentence"]}),
        "pairs": (
            factories.write_inferences,
            {"text": ["premise", "hypothesis"], "splits": {"dev": "validation_matched"}},
        ),
        "regression": (factories.write_similarities, {"text": ["sentence1", "sentence2"], "label": "label"}),
        "token-classification": (factories.write_tags, {}),
        "question-answering": (factories.write_questions, {"stride": 4}),
        "fill-mask": (partial(factories.write_corpus, documents=900), {}),
    }
    write, options = made[kind]
    kind = "text-classification" if kind == "pairs" else kind
    return {"type": kind, "dataset": str(write(folder / "data")), "max_length": 24, **options}


KINDS = {"text-classification": TextClassification, "regression": Regression, "question-answering": QuestionAnswering,
         "token-classification": TokenClassification, "fill-mask": FillMask}  # fmt: skip


@dataclass
class Saved:
    """A model that a stage saved.

    Attributes:
        context: Where the stage ran.
        reading: How it read its texts.
    """

    context: StageContext
    reading: Reading

    @property
    def directory(self) -> Path:
        return self.context.model_directory


def saved(folder: Path, kind: str, tokens: str) -> Saved:
    """A random model for a task, as a stage saves it."""
    options = rows_of(kind, folder)
    task = KINDS[options["type"]].model_validate(options)
    origin, family = folder / "origin", "bert" if tokens == "wordpiece" else "roberta"
    tokenizer = factories.tokenizer() if tokens == "wordpiece" else factories.byte_level_tokenizer(folder / "bpe")
    names = {"pairs": ["0", "1", "2"], "token-classification": TAGS, "regression": ["score"]}.get(kind, ["0", "1"])
    labels = {name: index for index, name in enumerate(names)}
    extra = {} if tokens == "wordpiece" else {"pad_token_id": 1}
    model = factories.model(family, head=task.head, labels=len(names), vocab_size=len(tokenizer), label2id=labels,
                        id2label=dict(enumerate(names)), **extra)  # fmt: skip
    model.save_pretrained(origin)
    tokenizer.save_pretrained(origin)
    context = StageContext(task, 0, open_artifact(origin), {}, folder / "stage")
    result = context.finish(model, load_tokenizer(origin, task), {})
    assert result.reading is not None
    return Saved(context, result.reading)


def checked(made: Saved) -> dict[str, float]:
    with InThisProcess(open_artifact(made.directory), made.context.task.auto_class, threads=1) as process:
        return compare_plain_texts(process, made.reading)


@pytest.mark.parametrize("tokens", ["wordpiece", "byte level"])
@pytest.mark.parametrize("kind", sorted([*KINDS, "pairs"]))
def test_a_saved_model_answers_plain_texts_as_it_was_measured(tmp_path: Path, kind: str, tokens: str) -> None:
    made = saved(tmp_path, kind, tokens)
    texts = made.reading.texts()
    assert len(texts) == 8
    lengths = [len(text.features["input_ids"]) for text in texts]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] or kind in ("regression", "fill-mask")  # whose texts are all as long
    found = checked(made)
    name = {"pairs": "text-classification", "regression": "text-classification"}.get(kind, kind)
    way = "plain texts" if kind == "question-answering" else f"{name} pipeline"
    assert list(found) == [way, "padding"]
    assert max(found.values()) < 1e-4


def edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_a_tagger_that_is_saved_with_another_tokenizer_is_caught(tmp_path: Path) -> None:
    """As it was: the space before a first word was put there by a copy, and the copy was not saved."""
    made = saved(tmp_path, "token-classification", "byte level")
    load_tokenizer(made.context.source.path).save_pretrained(made.directory)
    with pytest.raises(ReloadError, match=r"its saved tokenizer reads row \d+ of the dev split as .* it was measured"):
        checked(made)


@pytest.mark.parametrize(
    ("kind", "file", "changes", "said"),
    [
        ("text-classification", "config.json", {"id2label": {"0": "1", "1": "0"}}, "a pipeline answers row"),
        ("text-classification", "config.json", {"id2label": {"0": "no", "1": "yes"}}, "no 0.* nan was measured"),
        ("token-classification", "config.json", {"id2label": dict(enumerate(TAGS[::-1]))}, "a pipeline answers row"),
        ("regression", "config.json", {"problem_type": None}, "score .* was measured"),
        ("pairs", "tokenizer_config.json", {"model_input_names": ["input_ids", "token_type_ids"]}, "token_type_ids"),
        ("text-classification", "tokenizer_config.json", {"truncation_side": "left"}, "saved tokenizer reads"),
    ],
)
def test_what_a_pipeline_would_do_otherwise_is_caught(
    tmp_path: Path, kind: str, file: str, changes: dict[str, Any], said: str
) -> None:
    made = saved(tmp_path, kind, "wordpiece")
    if "truncation_side" in changes:
        context = made.context
        context.task = context.task.model_copy(update={"max_length": 6})
        again = context.finish(*_again(context), {}).reading
        assert again is not None
        made = Saved(context, again)
    edit(made.directory / file, **changes)
    with pytest.raises(ReloadError, match=said):
        checked(made)


def _again(context: StageContext) -> tuple[Any, Any]:
    from hfcompress.models.artifact import load_model

    path = context.source.path
    return load_model(path, context.task.auto_class), load_tokenizer(path, context.task)


def test_rows_that_are_no_plain_text_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"tokens": words, "ner_tags": ["O"] * len(words)} for words in (["the", "film"], ["a plot", "was"], ["bad."])
    ]
    folder = tmp_path / "data"
    factories.write_rows(folder, lambda _, number: rows[number], {"train": 3, "dev": 3})
    task = TokenClassification(type="token-classification", dataset=str(folder), metric="accuracy")
    tokenizer = factories.byte_level_tokenizer(tmp_path / "bpe")
    assert task.prepare_tokenizer(tokenizer)
    reading = Reading(task, tokenizer, {"O": 0}, task.read("dev"))
    assert sorted(text.texts for text in reading.texts()) == [("a plot was",), ("bad.",), ("the film",)]
    pieces = factories.tokenizer()  # one that marks where a word goes on, and a word with a space begins anew
    reading = Reading(task, pieces, {"O": 0}, task.read("dev"))
    assert len(reading.texts()) == 3


@pytest.mark.parametrize(
    ("kind", "tokens"), [("text-classification", "wordpiece"), ("token-classification", "byte level")]
)
def test_a_stock_pipeline_scores_what_the_stage_noted(tmp_path: Path, kind: str, tokens: str) -> None:
    """A stage, its directory, and transformers alone on the texts of the dev split."""
    source = saved(tmp_path, kind, tokens).context.source.path
    stage = {"kind": "finetune", "train": {"max_steps": 40, "batch_size": 16, "learning_rate": 5e-3}}
    task = rows_of(kind, tmp_path)
    recipe = load(factories.recipe(tmp_path / "r.yaml", source, tmp_path, task=task, stages=[stage])).recipe
    context = StageContext(recipe.task, 0, open_artifact(source), {}, tmp_path / "fine-tuned")
    result = recipe.stages[0].run(open_artifact(source), context)
    pipe = transformers.pipeline(kind, model=str(context.model_directory), device="cpu")
    rows = recipe.task.read("dev")
    if kind == "text-classification":
        names = label_ids(read_config(context.model_directory))
        predictions = np.array([names[pipe(text)[0]["label"]] for text in rows["sentence"]])
        references = np.array(recipe.task.targets(rows, names))
    else:
        texts = [" ".join(words) for words in rows["tokens"]]
        predictions, references = np.empty(len(rows), dtype=object), np.empty(len(rows), dtype=object)
        for number, text in enumerate(texts):
            by_start = {answer["start"]: answer["entity"] for answer in pipe(text, ignore_labels=[])}
            starts = np.cumsum([0, *(len(word) + 1 for word in text.split())])[:-1]
            predictions[number] = [by_start[start] for start in starts]
            references[number] = list(rows["ner_tags"][number])
    assert recipe.task.score(predictions, references) == pytest.approx(result.facts["dev"])
    assert result.facts["dev"] > 0.5


@pytest.mark.slow
def test_a_byte_level_tagger_goes_through_a_whole_run(tmp_path: Path) -> None:
    source = saved(tmp_path, "token-classification", "byte level").context.source.path
    train = {"max_steps": 60, "batch_size": 16, "learning_rate": 5e-3}
    stages = [
        {"kind": "finetune", "train": train},
        {
            "kind": "distill",
            "student": {"layers": 1, "vocabulary": "corpus"},
            "losses": ["soft_labels"],
            "train": train,
        },
        {"kind": "prune", "heads": 0.25, "criterion": "magnitude", "multiple_of": 1},
        {"kind": "quantize", "backend": "onnx_int8"},
    ]
    recipe = factories.recipe(
        tmp_path / "r.yaml", source, tmp_path, stages=stages, task=rows_of("token-classification", tmp_path)
    )
    assert factories.run_cli("run", recipe, "--output", tmp_path / "run") == 0
    ways = [list(json.loads(file.read_text())["reload"]) for file in sorted((tmp_path / "run").glob("0*/stage.json"))]
    piped = ["transformers", "token-classification pipeline", "padding"]
    assert ways == [piped, piped, [*piped, "hfcompress", "onnx"], ["onnx", "plain texts"]]
