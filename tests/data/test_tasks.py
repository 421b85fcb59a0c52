"""What each task makes of rows, batches, logits and answers, with values worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hfcompress.data import fill_mask
from hfcompress.data import task as task_module
from hfcompress.data.fill_mask import FillMask, draw_uniforms, mask_tokens, pack_documents
from hfcompress.data.sequence import Regression, TextClassification
from hfcompress.data.spans import QuestionAnswering, find_best_span
from hfcompress.data.tokens import TokenClassification, put_spaces_before_words
from hfcompress.measure.worker import reduce_logits
from hfcompress.models.artifact import load_tokenizer
from hfcompress.quantization.backends.base import QuantizationJob
from hfcompress.utils.errors import HfcompressError
from tests import factories

TAGS = {"O": 0, "B-PER": 1, "I-PER": 2, "B-LOC": 3}


def write(path: Path, **splits: list[dict[str, Any]]) -> str:
    """A directory of jsonl files; dev is train, where it is left out."""
    path.mkdir(parents=True, exist_ok=True)
    for split, rows in {"dev": splits["train"], **splits}.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(task: Any, head: dict[str, int] | None = None) -> str:
    """What `check` says of the data."""
    return "\n".join(f"{p.message}\n{p.fix}" for p in [*task.problems(), *task.label_problems(head)])


def outputs_of(task: Any, features: Any, logits: list[Any]) -> Any:
    """What `judge` is given, of one array of logits a feature."""
    mask = np.ones((1, 1))
    batches = [{"attention_mask": mask if task.head == "sequence" else np.ones((1, len(row)))} for row in logits]
    return np.concatenate(
        [reduce_logits(np.array(row)[None], batch, task.head) for row, batch in zip(logits, batches, strict=True)]
    )


# --- sequence


@pytest.fixture
def classes(data: Path) -> TextClassification:
    return TextClassification(type="text-classification", dataset=str(data), text=["sentence"], max_length=8)


def test_features_are_numbered_and_a_batch_is_padded(classes: TextClassification) -> None:
    encoded = classes.encode(classes.read("dev"), factories.tokenizer(), {"0": 0, "1": 1})
    assert encoded["index"][:] == list(range(48))
    assert encoded["length"][:] == [len(ids) for ids in encoded["input_ids"]]
    assert max(encoded["length"]) == 8
    features = [encoded[i] for i in (5, 0)]
    batch = classes.batch(features, factories.tokenizer(), multiple=16)
    assert batch["index"].tolist() == [5, 0]
    assert batch["labels"].tolist() == [1, 0]
    for row, mask, feature in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), features, strict=True):
        ids = feature["input_ids"]
        assert row == ids + [0] * (16 - len(ids))
        assert mask == [1] * len(ids) + [0] * (16 - len(ids))
    assert classes.batch(features, factories.tokenizer())["input_ids"].shape[1] == max(f["length"] for f in features)


def test_a_batch_pads_as_the_tokenizer_does(classes: TextClassification) -> None:
    tokenizer = factories.tokenizer()
    tokenizer.pad_token = "film"
    features = [
        {"input_ids": [7], "token_type_ids": [1], "attention_mask": [1], "labels": 0, "index": 0},
        {"input_ids": [7, 8], "token_type_ids": [1, 1], "attention_mask": [1, 1], "labels": 0, "index": 1},
    ]
    batch = classes.batch(features, tokenizer)
    assert batch["input_ids"].tolist() == [[7, factories.WORDS.index("film")], [7, 8]]
    assert batch["token_type_ids"].tolist() == [[1, 0], [1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_tokens_of_many_texts_lie_on_disk_and_are_the_same(
    classes: TextClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = classes.read("train"), {"0": 0, "1": 1}
    inside = classes.encode(rows, factories.tokenizer(), labels)
    monkeypatch.setattr(task_module, "IN_MEMORY", 0)
    outside = classes.encode(rows, factories.tokenizer(), labels)
    assert not inside.cache_files
    assert outside.cache_files
    assert outside[:] == inside[:]


def test_classes_are_judged_in_the_order_of_the_features(classes: TextClassification) -> None:
    encoded = classes.encode(classes.read("dev"), factories.tokenizer(), {"0": 0, "1": 1}).select([1, 0, 3])
    predictions, references = classes.judge(np.array([[0.0, 1], [0, 1], [0, 1]]), encoded)
    assert (predictions.tolist(), references.tolist()) == ([1, 1, 1], [1, 0, 1])
    assert classes.score(predictions, references) == pytest.approx(2 / 3)
    assert classes.score(classes.answer_blindly(references, encoded), references) == pytest.approx(2 / 3)
    low, high = classes.interval(predictions, references, 100, 0)
    assert 0 <= low < 2 / 3 < high <= 1


def test_a_score_is_judged_against_the_mean(tmp_path: Path) -> None:
    rows = [{"sentence": "good", "score": score} for score in (0.0, 1.0, 5.0)]
    task = Regression(type="regression", dataset=write(tmp_path, train=rows), text=["sentence"], metric="mse")
    encoded = task.encode(task.read("dev"), factories.tokenizer(), None)
    predictions, references = task.judge(np.array([[1.0], [1], [2]]), encoded)
    assert task.score(predictions, references) == pytest.approx((1 + 0 + 9) / 3)
    assert task.score(task.answer_blindly(references, encoded), references) == pytest.approx((4 + 1 + 9) / 3)


# --- tokens


def tagged(path: Path, *rows: tuple[str, list[Any]], **options: Any) -> TokenClassification:
    data = [{"tokens": words.split(), "ner_tags": tags} for words, tags in rows]
    return TokenClassification(type="token-classification", dataset=write(path, train=data), **options)


def test_a_word_s_tag_stands_at_its_first_token(tmp_path: Path) -> None:
    tokenizer = factories.tokenizer([*factories.WORDS, "##ly", "##er"])
    task = tagged(tmp_path, ("the goodlyer film", ["O", "B-PER", "I-PER"]))
    (feature,) = task.encode(task.read("train"), tokenizer, TAGS)
    assert tokenizer.convert_ids_to_tokens(feature["input_ids"]) == [
        "[CLS]", "the", "good", "##ly", "##er", "film", "[SEP]",
    ]  # fmt: skip
    assert feature["labels"] == [-100, 0, 1, -100, -100, 2, -100]
    batch = task.batch([feature], tokenizer, multiple=8)
    assert batch["labels"].tolist() == [[-100, 0, 1, -100, -100, 2, -100, -100]]
    assert set(feature) == {"input_ids", "length", "labels", "index"}


def test_tags_are_judged_by_word_and_a_word_cut_off_is_missed(tmp_path: Path) -> None:
    tags = ["B-PER", "O", "B-LOC", "O", "B-PER"]
    task = tagged(tmp_path, ("the film was a story", tags), ("good film", ["O", "O"]), max_length=6)
    features = task.encode(task.read("train"), factories.tokenizer(), TAGS)
    assert features["length"][:] == [6, 4]
    eye = np.eye(4)
    first = eye[[2, 1, 0, 3, 0, 2]]  # [CLS] the film was a [SEP]: what stands at specials is not asked for
    second = eye[[0, 0, 1, 0]]
    predictions, references = task.judge(outputs_of(task, features, [first, second]), features)
    assert predictions.tolist() == [["B-PER", "O", "B-LOC", "O", ""], ["O", "B-PER"]]
    assert references.tolist() == [tags, ["O", "O"]]
    assert task.score(predictions, references) == pytest.approx(2 * 2 / (3 + 3))
    accuracy = task.model_copy(update={"metric": "accuracy"})
    assert accuracy.score(predictions, references) == pytest.approx(5 / 7)


def test_cutting_words_off_cannot_raise_the_score(tmp_path: Path) -> None:
    """Words that are outside of every entity would be right for nothing."""
    rows = ("film was a story and a plot", ["B-PER", *["O"] * 6])
    for metric in ("accuracy", "f1", "recall"):
        scores = []
        for length in (16, 5):
            task = tagged(tmp_path, rows, max_length=length, metric=metric)
            features = task.encode(task.read("train"), factories.tokenizer(), TAGS)
            right = [0, 1, *[0] * 14][: features["length"][0]]
            scores.append(task.score(*task.judge(np.eye(4)[right], features)))
        assert scores[0] == 1 >= scores[1]
        assert metric != "accuracy" or scores[1] == pytest.approx(3 / 7)


def test_a_word_that_gives_no_token_moves_no_other_s_tag(tmp_path: Path) -> None:
    data = [{"tokens": ["film", "", "good"], "ner_tags": ["O", "O", "B-PER"]}]
    task = TokenClassification(type="token-classification", dataset=write(tmp_path, train=data))
    features = task.encode(task.read("train"), factories.tokenizer(), TAGS)
    predictions, _ = task.judge(np.eye(4)[[0, 0, 1, 0]], features)
    assert predictions.tolist() == [["O", "", "B-PER"]]


def test_the_best_blind_tagging_is_the_baseline(tmp_path: Path) -> None:
    task = tagged(tmp_path, ("the good film", ["O", "B-PER", "O"]), ("film", ["B-LOC"]))
    features = task.encode(task.read("train"), factories.tokenizer(), TAGS)
    _, references = task.judge(np.zeros((sum(features["length"][:]), 4)), features)
    blind = task.answer_blindly(references, features)
    assert task.score(blind, references) == 0
    assert task.model_copy(update={"metric": "accuracy"}).score(blind, references) == 0.5


def test_the_token_loss_is_the_mean_over_words_whatever_is_padded(tmp_path: Path) -> None:
    task = tagged(tmp_path, ("the good film", ["O", "B-PER", "O"]), ("film", ["B-LOC"]))
    features = list(task.encode(task.read("train"), factories.tokenizer(), TAGS))
    torch.manual_seed(0)
    logits = torch.randn(2, 16, 4)
    words = torch.stack([logits[0, 1], logits[0, 2], logits[0, 3], logits[1, 1]])
    expected = F.cross_entropy(words, torch.tensor([0, 1, 0, 3]))
    for multiple, length in ((None, 5), (16, 16)):
        labels = task.batch(features, factories.tokenizer(), multiple)["labels"]
        assert float(task.loss(logits[:, :length], labels)) == pytest.approx(float(expected))
    nothing = torch.full((1, 3), -100)
    assert float(task.loss(logits[:1, :3], nothing)) == 0
    assert float(task.row_loss(logits[:1, :3], nothing)) == 0


@pytest.mark.parametrize("head", ["token", "span"])
def test_what_a_criterion_sees_of_a_row_does_not_depend_on_its_batch(tmp_path: Path, head: str) -> None:
    """Rows of one, two and three words: a mean over the batch's words would count the long rows' words for less."""
    from hfcompress.pruning.gradients import unit_gradients

    if head == "token":
        rows = [(" ".join(["good", "film", "was"][:n]), ["B-PER", "O", "O"][:n]) for n in (1, 2, 3)]
        task: Any = tagged(tmp_path, *rows)
        labels = torch.tensor([[-100, 1, -100, -100, -100], [-100, 1, 0, -100, -100], [-100, 1, 0, 0, -100]])
    else:
        task = squad(tmp_path, ("was it", CONTEXT, ["very bad"], [START]))
        labels = torch.tensor([[1, 1], [1, 2], [2, 3]])
    model = factories.model(head=head, labels=4 if head == "token" else 2)
    mask = (torch.arange(5) < torch.tensor([3, 4, 5])[:, None]).long()
    batch = {"input_ids": torch.randint(5, 20, (3, 5)) * mask, "attention_mask": mask, "labels": labels}
    alone = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(3)]
    (together,) = unit_gradients(model, [batch], task.row_loss)
    apart = list(unit_gradients(model, alone, task.row_loss))
    for part in (0, 1):
        for layer, whole in enumerate(together[part]):
            torch.testing.assert_close(torch.cat([row[part][layer] for row in apart]), whole, atol=1e-5, rtol=1e-3)


def test_tag_names_come_from_the_train_split_with_o_first(tmp_path: Path) -> None:
    task = tagged(tmp_path, ("the good film", ["I-PER", "O", "B-PER"]))
    assert task.label_names() == ["O", "B-PER", "I-PER"]
    assert task.head_labels() == 3
    numbers = tagged(tmp_path / "n", ("a b", [10, 0]), ("a", [2]), metric="accuracy")
    assert numbers.label_names() == ["0", "2", "10"]


def test_tags_may_be_ids_of_the_head(tmp_path: Path) -> None:
    """Those of the data, which have names, are in test_labels.py."""
    task = tagged(tmp_path, ("the good", [3, 1]))
    assert task.targets(task.read("train"), TAGS) == [[3, 1]]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([("good film", ["O"])], "row 0 has 2 words in column 'tokens' and 1 tags in column 'ner_tags'"),
        ([("good", ["O"]), ("film", ["B-ORG"])], "row 1 has the label 'B-ORG' in column 'ner_tags', outside the model"),
        ([("good", [7])], "row 0 has the label 7"),
    ],
)
def test_tags_that_cannot_be_used(tmp_path: Path, rows: list[tuple[str, list[Any]]], why: str) -> None:
    assert f"train: {why}" in refusal(tagged(tmp_path, *rows), TAGS)


def test_rows_without_lists_of_words_are_told(tmp_path: Path) -> None:
    data = write(tmp_path, train=[{"tokens": "good film", "ner_tags": ["O", "O"]}])
    task = TokenClassification(type="token-classification", dataset=data)
    said = refusal(task, TAGS)
    assert "row 0 has 'good film' in column 'tokens', where a list is needed" in said
    assert "jsonl or parquet" in said


def test_entities_need_named_tags(tmp_path: Path) -> None:
    task = tagged(tmp_path, ("good film", [0, 1]))
    assert "no tag is called O" in refusal(task, {"LABEL_0": 0, "LABEL_1": 1})
    assert refusal(task.model_copy(update={"metric": "accuracy"}), {"LABEL_0": 0, "LABEL_1": 1}) == ""


def byte_level(spaces: bool) -> Any:
    """A byte-level tokenizer that knows `film` with a space before it and `f`, `i`, `l`, `m`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "Ġ", "f", "i", "l", "m", "Ġf", "Ġfi",
                                                      "Ġfil", "Ġfilm"])}  # fmt: skip
    inner = Tokenizer(models.BPE(vocabulary, [("Ġ", "f"), ("Ġf", "i"), ("Ġfi", "l"), ("Ġfil", "m")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaces)
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=spaces)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", cls_token="<s>", sep_token="</s>", model_max_length=32
    )


def test_a_byte_level_tokenizer_reads_words_as_in_a_text(tmp_path: Path) -> None:
    task = tagged(tmp_path, ("film film", ["O", "B-PER"]))
    tokenizer = byte_level(spaces=False)
    assert len(tokenizer(["film", "film"], is_split_into_words=True)["input_ids"]) == 10
    tokenizer.save_pretrained(tmp_path / "model")
    read = load_tokenizer(tmp_path / "model", task)
    (feature,) = task.encode(task.read("train"), read, TAGS)
    assert feature["input_ids"] == [0, 11, 11, 2]
    assert feature["labels"] == [-100, 0, 1, -100]
    # A user's own AutoTokenizer reads the text as the task read the words, once it is saved.
    read.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")("film film")["input_ids"] == [0, 11, 11, 2]
    assert load_tokenizer(tmp_path / "model")("film")["input_ids"] == [0, 4, 5, 6, 7, 2]  # no other task's is changed
    assert not put_spaces_before_words(byte_level(spaces=True))


# --- spans

CONTEXT = "the film was good . a plot was very bad and the story was great"
START = CONTEXT.index("very bad")


def squad(path: Path, *rows: tuple[str, str, list[str], list[int]], **options: Any) -> QuestionAnswering:
    data = [
        {"question": question, "context": context, "answers": {"text": texts, "answer_start": starts}}
        for question, context, texts, starts in rows
    ]
    return QuestionAnswering(type="question-answering", dataset=write(path, train=data), **options)


def words(feature: dict[str, Any]) -> list[str]:
    return [factories.WORDS[i] for i in feature["input_ids"]]


def test_the_labels_are_the_tokens_of_the_answer(tmp_path: Path) -> None:
    task = squad(tmp_path, ("the plot", CONTEXT, ["very bad"], [START]))
    (feature,) = task.encode(task.read("train"), factories.tokenizer(), None)
    start, end = feature["labels"]
    assert words(feature)[start : end + 1] == ["very", "bad"]
    assert words(feature)[:4] == ["[CLS]", "the", "plot", "[SEP]"]
    batch = task.batch([feature], factories.tokenizer())
    assert batch["labels"].tolist() == [[start, end]]
    assert set(feature) == {"input_ids", "length", "labels", "index"}


@pytest.fixture
def windows(tmp_path: Path) -> tuple[QuestionAnswering, Any]:
    """A context of 15 tokens in windows of 16, with a question of two: 11 of them fit, 4 are shared."""
    task = squad(
        tmp_path,
        ("the plot", CONTEXT, ["very bad", "bad"], [START, START + 5]),
        ("film", "the film was good", ["good"], [13]),
        max_length=16,
        stride=4,
    )
    return task, task.encode(task.read("train"), factories.tokenizer(), None)


def test_a_long_context_gives_windows_that_overlap(windows: tuple[QuestionAnswering, Any]) -> None:
    _, features = windows
    contexts = [words(feature)[4:-1] for feature in features.select([0, 1])]
    everything = CONTEXT.replace(".", "[UNK]").split()
    assert contexts[0] == everything[:11]
    assert contexts[1] == everything[7:]
    assert features["index"][:] == [0, 1, 2]
    assert features["length"][:] == [16, 13, 8]


def test_each_window_that_holds_the_answer_teaches_it(windows: tuple[QuestionAnswering, Any]) -> None:
    _, features = windows
    spans = [words(f)[f["labels"][0] : f["labels"][1] + 1] for f in features]
    assert spans == [["very", "bad"], ["very", "bad"], ["good"]]


def test_an_answer_outside_of_a_window_is_asked_of_cls(tmp_path: Path) -> None:
    last, across = "great", "plot was very bad and"
    task = squad(
        tmp_path,
        ("the plot", CONTEXT, [last], [CONTEXT.index(last)]),
        ("the plot", CONTEXT, [across], [CONTEXT.index(across)]),
        max_length=16,
        stride=4,
    )
    features = task.encode(task.read("train"), factories.tokenizer(), None)
    assert features[0]["labels"] == [0, 0]
    assert words(features[1])[features[1]["labels"][0]] == "great"
    assert words(features[2])[features[2]["labels"][0] :][:5] == ["plot", "was", "very", "bad", "and"]
    assert features[3]["labels"] == [0, 0]  # it begins before the window


def scores(features: Any, number: int, start: int, end: int, value: float) -> Any:
    """Logits of a window that prefer one span."""
    logits = np.zeros((features[number]["length"], 2))
    logits[start, 0] = logits[end, 1] = value
    return logits


def test_the_best_span_of_all_windows_answers_the_question(windows: tuple[QuestionAnswering, Any]) -> None:
    task, features = windows
    first = scores(features, 0, 5, 5, 2.0)  # film
    second = scores(features, 1, 5, 6, 3.0)  # very bad
    third = scores(features, 2, 1, 2, 9.0)  # the question is no place to find an answer
    third[5, 0] = third[6, 1] = 1.0  # was good
    predictions, references = task.judge(outputs_of(task, features, [first, second, third]), features)
    assert predictions.tolist() == ["very bad", "was good"]
    assert references.tolist() == [["very bad", "bad"], ["good"]]
    assert task.model_copy(update={"metric": "exact_match"}).score(predictions, references) == 0.5
    order = [2, 1, 0]
    shuffled = task.judge(outputs_of(task, features, [third, second, first]), features.select(order))
    assert sorted(shuffled[0].tolist()) == sorted(predictions.tolist())


def test_no_answer_is_given_where_cls_scores_more(windows: tuple[QuestionAnswering, Any]) -> None:
    task, features = windows
    logits = [scores(features, 0, 5, 5, 2.0), scores(features, 1, 0, 0, 3.0), scores(features, 2, 0, 0, 3.0)]
    outputs = outputs_of(task, features, logits)
    predictions, _ = task.judge(outputs, features)
    assert predictions[0] == "film"  # where each question has an answer, one is given
    assert predictions[1] != ""
    may_be_none = task.model_copy(update={"unanswerable": True})
    # The first window of question 0 does not say that there is none: its null score, 0, is the question's.
    assert may_be_none.judge(outputs, features)[0].tolist() == ["film", ""]


def test_unanswerable_questions_teach_cls_and_are_right_without_an_answer(tmp_path: Path) -> None:
    task = squad(tmp_path, ("film", CONTEXT, [], []), ("film", CONTEXT, ["bad"], [START + 5]), unanswerable=True)
    features = task.encode(task.read("train"), factories.tokenizer(), None)
    assert features[0]["labels"] == [0, 0]
    _, references = task.judge(np.zeros((sum(features["length"][:]), 2)), features)
    assert task.score(task.answer_blindly(references, features), references) == 0.5
    assert refusal(task) == ""
    strict = task.model_copy(update={"unanswerable": False})
    assert "train: row 0 has no answer in column 'answers'\nleave it out, or set `unanswerable: true`" in refusal(
        strict
    )


@pytest.mark.parametrize(
    ("start", "end", "n_best", "longest", "expected"),
    [
        ([0, 5, 0], [0, 0, 4], 20, 30, (9, 1, 2)),
        ([0, 0, 5], [6, 0, 4], 20, 30, (9, 2, 2)),  # an end before the start is none
        ([5, 0, 0], [1, 0, 4], 20, 2, (6, 0, 0)),  # three tokens are too long
        ([5, 4, 0], [0, 0, 3], 1, 2, None),  # the one best start and the one best end are too far apart
        ([5, 4, 0], [0, 0, 3], 2, 2, (7, 1, 2)),
    ],
)
def test_spans(start: list[float], end: list[float], n_best: int, longest: int, expected: Any) -> None:
    assert find_best_span(np.array([start, end], dtype=float).T, n_best, longest) == expected


def test_the_span_loss_is_the_mean_of_start_and_end_whatever_is_padded(tmp_path: Path) -> None:
    task = squad(tmp_path, ("film", "the film", ["film"], [4]), ("film", CONTEXT, ["bad"], [START + 5]))
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 24, 2), torch.tensor([[4, 4], [10, 12]])
    mask = torch.arange(24)[None] < torch.tensor([[6], [19]])
    parts = [
        F.cross_entropy(logits[row, :length, side][None], labels[row, side][None])
        for row, length in ((0, 6), (1, 19))
        for side in (0, 1)
    ]
    expected = float(torch.stack(parts).mean())
    for length in (19, 24):
        assert float(task.loss(logits[:, :length], labels, mask[:, :length])) == pytest.approx(expected)
    assert float(task.loss(logits[1:, :19], labels[1:])) == pytest.approx(float(torch.stack(parts[2:]).mean()))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (
            {"text": ["bad"], "answer_start": [3]},
            "row 1 has the answer 'bad' at character 3, where the context has ' fi'\nfix answer_start",
        ),
        ({"text": ["bad"], "answer_start": [-3]}, "row 1 has the answer 'bad' at character -3"),
        ({"text": [""], "answer_start": [0]}, "row 1 has the answer '' at character 0"),
        ({"text": ["bad", "film"], "answer_start": [START + 5]}, "an answer is {text: [TEXT, …]"),
    ],
)
def test_answers_that_cannot_be_used(tmp_path: Path, given: dict[str, Any], why: str) -> None:
    good = {"text": ["film"], "answer_start": [4]}
    rows = [{"question": "q", "context": CONTEXT, "answers": answers} for answers in (good, given)]
    task = QuestionAnswering(type="question-answering", dataset=write(tmp_path, train=rows))
    assert why in refusal(task)


@pytest.mark.parametrize("given", ["bad", {"text": "bad", "answer_start": START + 5}, ["bad"]])
def test_answers_of_another_form(tmp_path: Path, given: Any) -> None:
    rows = [{"question": "q", "context": CONTEXT, "answers": given}]
    task = QuestionAnswering(type="question-answering", dataset=write(tmp_path, train=rows))
    assert f"train: row 0 has {given!r} in column 'answers'" in refusal(task)


def test_a_stride_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stride is 128, more than half of max_length \(128\)"):
        QuestionAnswering(type="question-answering", dataset="user/data", max_length=128)


def test_a_question_that_is_too_long_is_cut_so_that_windows_go_on(tmp_path: Path) -> None:
    task = squad(tmp_path, ("good " * 100, CONTEXT, ["great"], [CONTEXT.index("great")]), max_length=16, stride=4)
    features = task.encode(task.read("train"), factories.tokenizer(), None)
    assert max(features["length"]) == 16
    assert [feature["labels"] for feature in features][-1] != [0, 0]
    assert words(features[0]).count("good") - words(features[0])[6:].count("good") == 4  # half of 16 - 3 - 4


# --- masked tokens


def corpus(path: Path, documents: list[str], suffix: str = "txt", **options: Any) -> FillMask:
    path.mkdir(parents=True, exist_ok=True)
    lines = documents if suffix == "txt" else [json.dumps({"text": text}) for text in documents]
    (path / f"train.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return FillMask(type="fill-mask", dataset=str(path), **options)


def test_documents_are_joined_and_cut() -> None:
    documents = [[[11, 12, 13], [14]], [[]], [[15, 16]]]
    # 11 12 13 | 14 | 15 16, a separator (3) after each, four to a block
    assert list(pack_documents(documents, 6, cls=2, sep=3)) == [[2, 11, 12, 13, 3, 3], [2, 14, 3, 15, 16, 3]]
    assert list(pack_documents([[[11, 12, 13, 14]]], 6, cls=2, sep=3)) == [[2, 11, 12, 13, 14, 3]]
    assert list(pack_documents([[[11]]], 6, cls=2, sep=3)) == [[2, 11, 3]]
    assert list(pack_documents([[[]]], 6, cls=2, sep=3)) == []


def test_a_corpus_is_packed_over_all_its_documents(tmp_path: Path) -> None:
    task = corpus(tmp_path, ["the film", "", "  ", "was good", "a plot"] * 40, max_length=8)
    rows = task.read("train")
    features = task.encode(rows, factories.tokenizer(), None)
    tokens = [token for ids in features["input_ids"] for token in ids[1:-1]]
    texts = [text for text in rows["text"] if text.strip()]
    ids = factories.tokenizer()(texts, add_special_tokens=False)["input_ids"]
    assert tokens == [token for document in ids for token in [*document, 3]][: len(tokens)]
    assert len(tokens) >= sum(len(document) + 1 for document in ids) - 1
    assert set(features["length"][:-1]) == {8}
    assert features["index"][:] == list(range(len(features)))
    apart = task.model_copy(update={"packed": False}).encode(rows, factories.tokenizer(), None)
    assert apart["input_ids"][:] == factories.tokenizer()(texts)["input_ids"]


def test_a_stream_gives_the_rows_of_the_same_documents(tmp_path: Path) -> None:
    documents = [" ".join(factories.NEUTRAL[i % 9 : i % 9 + 3]) for i in range(50)]
    for suffix in ("txt", "jsonl"):
        task = corpus(tmp_path / suffix, documents, suffix, max_length=8, streaming=True, dev_rows=7)
        stream = task.encode(task.read("train"), factories.tokenizer(), None)
        held = task.read("dev")["text"][:]
        whole = corpus(tmp_path / "rest", documents[7:], max_length=8)
        write_dev = tmp_path / "rest" / "dev.txt"
        write_dev.write_text("film\n")
        expected = whole.encode(whole.read("train"), factories.tokenizer(), None)
        assert held == documents[:7]
        assert [row["input_ids"] for row in stream] == expected["input_ids"][:]
        assert [row["index"] for row in stream] == expected["index"][:]
        assert [row["length"] for row in stream] == expected["length"][:]
        assert task.is_streamed
        assert task.count_rows() is None


def test_without_a_dev_split_the_last_hundredth_is_held_out(tmp_path: Path) -> None:
    documents = [f"film {i}" for i in range(300)]
    task = corpus(tmp_path, documents, packed=False)
    assert task.problems() == []
    assert task.read("train")["text"][:] == documents[:297]
    assert task.read("dev")["text"][:] == documents[297:]
    assert task.count_rows() is None  # only tokens tell
    assert task.judged_split() == "dev"
    assert task.model_copy(update={"dev_rows": 2}).read("dev")["text"][:] == documents[298:]
    (tmp_path / "validation.txt").write_text("good\n")
    assert task.read("dev")["text"][:] == ["good"]
    assert len(task.read("train")) == 300


def test_masks_are_drawn_by_row_and_epoch_alone() -> None:
    ids = np.random.default_rng(0).integers(5, len(factories.WORDS), (6, 40))
    tokenizer, index = factories.tokenizer(), np.arange(6)

    def mask(rows: list[int], epoch: int | None, length: int = 40) -> Any:
        return mask_tokens(ids[rows][:, :length], index[rows], tokenizer, 0.15, epoch)

    every, labels = mask([0, 1, 2, 3, 4, 5], 0)
    for rows in ([4, 2], [5], [3, 0, 1]):  # other batches, and shorter ones
        assert (mask(rows, 0, 20)[0] == every[rows][:, :20]).all()
        assert (mask(rows, 0)[1] == labels[rows]).all()
    assert (mask([0, 1, 2, 3, 4, 5], 1)[1] != labels).any()
    assert (mask([0, 1, 2, 3, 4, 5], None)[1] != labels).any()
    same = ids.copy()
    same[1] = same[0]
    _, found = mask_tokens(same, index, tokenizer, 0.15, 0)
    assert (found[0] != found[1]).any()


def test_masks_follow_bert() -> None:
    size, specials = 400_000, [0, 1, 2, 3, 4]
    ids = np.random.default_rng(0).integers(0, len(factories.WORDS), (size // 400, 400))
    changed, labels = mask_tokens(ids, np.arange(len(ids)), factories.tokenizer(), 0.15, 3)
    asked = labels != -100
    assert not asked[np.isin(ids, specials)].any()
    assert (labels[asked] == ids[asked]).all()
    assert (changed[~asked] == ids[~asked]).all()
    assert asked[~np.isin(ids, specials)].mean() == pytest.approx(0.15, abs=0.003)
    new = changed[asked]
    assert (new == 4).mean() == pytest.approx(0.8 + 0.1 / len(factories.WORDS), abs=0.01)
    assert (new == ids[asked]).mean() == pytest.approx(0.1 + 0.1 / len(factories.WORDS), abs=0.01)
    others = np.bincount(new[new != 4], minlength=len(factories.WORDS))
    assert (others > 0).sum() == len(factories.WORDS) - 1  # any token may stand there


def test_draws_are_uniform_and_independent() -> None:
    found = draw_uniforms(np.arange(300), 300, 5)
    assert found.min() >= 0
    assert found.max() < 1
    histogram = np.histogram(found[0], bins=20, range=(0, 1))[0] / found[0].size
    assert histogram == pytest.approx(np.full(20, 0.05), abs=0.005)
    flat = found.reshape(3, -1)
    neighbours = [
        flat,
        np.stack([flat[0], np.roll(flat[0], 1), np.roll(flat[0], 300)]),
        draw_uniforms(np.arange(300), 300, 6).reshape(3, -1),
    ]
    for rows in neighbours[:2]:
        assert np.corrcoef(rows) == pytest.approx(np.eye(3), abs=0.02)
    assert np.corrcoef(flat[0], neighbours[2][0])[0, 1] == pytest.approx(0, abs=0.02)


def test_unmasked_text_is_masked_where_it_is_judged(tmp_path: Path) -> None:
    task = corpus(tmp_path, ["the film was good and the plot was bad"] * 50, max_length=32, mask_probability=0.0)
    features = list(task.encode(task.read("train"), factories.tokenizer(), None))
    trained = task.batch(features, factories.tokenizer(), epoch=0)
    assert (trained["labels"] == -100).all()
    assert trained["input_ids"].tolist()[0] == features[0]["input_ids"]
    assert float(task.loss(torch.randn(*trained["input_ids"].shape, 23), trained["labels"])) == 0
    judged = task.batch(features, factories.tokenizer())
    assert 0.05 < float((judged["labels"] != -100).float().mean()) < 0.25
    assert torch.equal(judged["labels"], task.batch(features, factories.tokenizer())["labels"])


def test_masked_rows_are_padded_without_changing_masks_or_loss(tmp_path: Path) -> None:
    task = corpus(tmp_path, ["the film was good", "a plot and the story was very bad"] * 10, packed=False)
    features = list(task.encode(task.read("train"), factories.tokenizer(), None))
    torch.manual_seed(0)
    logits, found = torch.randn(len(features), 64, len(factories.WORDS)), []
    for multiple in (None, 64):
        batch = task.batch(features, factories.tokenizer(), multiple, epoch=2)
        length = batch["input_ids"].shape[1]
        found.append(float(task.loss(logits[:, :length], batch["labels"])))
        assert batch["attention_mask"].sum(1).tolist() == [feature["length"] for feature in features]
        assert (batch["labels"] != -100).any()
    assert found[0] == pytest.approx(found[1])


def test_masked_tokens_are_judged_by_block(tmp_path: Path) -> None:
    task = corpus(tmp_path, ["the film was good and the plot was bad"] * 20, max_length=16)
    features = task.encode(task.read("train"), factories.tokenizer(), None)
    batch = {k: v.numpy() for k, v in task.batch(list(features), factories.tokenizer()).items()}
    rows, width = len(features), len(factories.WORDS)
    right = np.eye(width)[np.where(batch["labels"] == -100, 0, batch["labels"])] * 20
    predictions, references = task.judge(reduce_logits(right, batch, "mask"), features)
    assert len(predictions) == len(references) == rows
    assert references.sum() == (batch["labels"] != -100).sum() > 0
    assert task.score(predictions, references) == 1
    uniform = task.judge(reduce_logits(np.zeros((*batch["labels"].shape, width)), batch, "mask"), features)
    perplexity = task.model_copy(update={"metric": "perplexity"})
    assert perplexity.score(*uniform) == pytest.approx(width)


def test_the_frequencies_are_the_baseline(tmp_path: Path) -> None:
    task = corpus(tmp_path, ["the the film good"] * 100, max_length=32)
    features = task.encode(task.read("train"), factories.tokenizer(), None)
    references = np.array([3.0, 1, 2])
    blind = task.answer_blindly(references, features)
    assert task.score(blind, references) == pytest.approx(0.5, abs=0.01)
    perplexity = task.model_copy(update={"metric": "perplexity"}).score(blind, references)
    assert perplexity == pytest.approx(2**0.5 * 4**0.5, rel=0.02)  # 2^entropy of a half and two quarters


def test_a_corpus_that_cannot_be_used(tmp_path: Path) -> None:
    task = corpus(tmp_path, ["film"] * 3, streaming=True, dev_rows=10)
    assert "has nothing to stream\ngive it more than the 10 documents" in refusal(task)
    other = corpus(tmp_path / "json", ["film"] * 3, "jsonl", text=["content"])
    assert "train.jsonl has no column 'content'" in "\n".join(p.message for p in other.problems())
    (tmp_path / "json" / "train.jsonl").unlink()
    assert "no train file" in "\n".join(p.message for p in other.problems())
    blank = corpus(tmp_path / "blank", ["", " "] * 100)
    with pytest.raises(HfcompressError, match="are empty"):
        blank.encode(blank.read("train"), factories.tokenizer(), None)


# --- all of them


def some(task_type: str, path: Path, word: str = "film") -> Any:
    """A small task of a type; `word` stands in its rows."""
    if task_type == "token-classification":
        return tagged(path, (f"the {word} was good", ["O", "B-PER", "I-PER", "O"]), ("bad plot", ["O", "B-LOC"]))
    if task_type == "question-answering":
        return squad(path, (f"the {word}", CONTEXT, ["very bad"], [START]), ("film", "the film", ["film"], [4]))
    if task_type == "fill-mask":
        return corpus(path, [f"the {word} was good and the plot was bad"] * 20, max_length=16)
    label = "score" if task_type == "regression" else "label"
    data = write(path, train=[{"sentence": f"the {word}", label: i % 2} for i in range(4)])
    make: Any = Regression if task_type == "regression" else TextClassification
    return make(type=task_type, dataset=data, text=["sentence"])


TYPES = ["text-classification", "regression", "token-classification", "question-answering", "fill-mask"]


@pytest.mark.parametrize("kind", TYPES)
def test_the_fingerprint_is_the_datas(kind: str, tmp_path: Path) -> None:
    first, same, other = (
        some(kind, tmp_path / str(i), w).fingerprint() for i, w in enumerate(("film", "film", "plot"))
    )
    assert first == same != other


@pytest.mark.parametrize("change", ["label", "dev"])
def test_the_fingerprint_sees_labels_and_the_dev_split(tmp_path: Path, change: str) -> None:
    task = some("token-classification", tmp_path)
    before = task.fingerprint()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[0]["ner_tags"] = ["O", "O", "O", "O"]
    name = "dev" if change == "dev" else "train"
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert task.fingerprint() != before


def test_the_fingerprint_sees_how_masks_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = corpus(tmp_path, ["film"] * 300)
    before = [task.fingerprint(judged) for judged in (False, True)]
    monkeypatch.setattr(fill_mask, "MASKS", "splitmix64")
    assert all(task.fingerprint(judged) != known for judged, known in zip((False, True), before, strict=True))


def test_the_fingerprint_of_a_stream_sees_what_is_not_read(tmp_path: Path) -> None:
    """Far beyond the dev documents, in a file of the same size."""
    documents = ["film " * 1000] * 40
    task = corpus(tmp_path, documents, streaming=True, dev_rows=5)
    before = task.fingerprint()
    corpus(tmp_path, [*documents[:-1], "plot " * 1000])
    assert task.fingerprint() != before


def test_checking_needs_no_torch(tmp_path: Path) -> None:
    tasks = [some(kind, tmp_path / kind).model_dump() for kind in TYPES]
    script = f"""import sys
from pydantic import TypeAdapter
from hfcompress.data.tasks import AnyTask
for task in map(TypeAdapter(AnyTask).validate_python, {tasks!r}):
    assert task.problems() == [] and task.label_problems(None) == [], task.label_problems(None)
    task.count_rows(), task.head_labels()
    assert "torch" not in sys.modules, task.type
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", TYPES)
def test_an_unknown_metric_or_column_is_named(kind: str, tmp_path: Path) -> None:
    task = some(kind, tmp_path)
    with pytest.raises(ValueError, match="the task has no metric 'blue'"):
        type(task)(**task.model_dump() | {"metric": "blue"})
    moved = type(task)(**task.model_dump() | {"text": [f"{name}x" for name in task.text]})
    assert f"has no column '{task.text[0]}x'" in moved.problems()[0].message
    assert f"did you mean '{task.text[0]}'?" in moved.problems()[0].fix
    assert moved.problems()[0].key == ("task", "text", 0)


def headed(task: Any, path: Path) -> Path:
    """A random BERT with the task's head."""
    import transformers as t

    names = task.label_names()
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    config = t.BertConfig(
        vocab_size=len(factories.WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=512, **labels,
    )  # fmt: skip
    torch.manual_seed(0)
    return factories.save(getattr(t, task.auto_class.replace("AutoModel", "Bert"))(config).eval(), path)


@pytest.fixture(params=["token-classification", "question-answering", "fill-mask"])
def placed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A task, and a model for it."""
    task = some(request.param, tmp_path / "data")
    return task, headed(task, tmp_path / "model")


@pytest.mark.usefixtures("in_process")
def test_a_model_is_measured_as_it_is_scored_by_hand(placed: tuple[Any, Path]) -> None:
    """Through the worker and its padded batches, against one row at a time."""
    import transformers
    from transformers import AutoTokenizer

    from hfcompress.measure.measure import Latency, Measure, measure
    from hfcompress.models.artifact import label_ids, open_artifact, read_config
    from hfcompress.models.forward import observe

    task, path = placed
    options = Measure(latency=Latency(batch_sizes=[2], rounds=1, rows=4, threads=1, cold_starts=0), bootstrap=100)
    (row,) = measure([open_artifact(path)], task, options)[0]["rows"]
    model = getattr(transformers, task.auto_class).from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    features = task.encode(task.read(task.judged_split()), tokenizer, label_ids(read_config(path)))
    parts = []
    for feature in features:
        batch = task.batch([feature], tokenizer)
        with torch.inference_mode():
            logits = observe(model, {k: v for k, v in batch.items() if k != "labels"}).logits
        parts.append(reduce_logits(logits.numpy(), {k: v.numpy() for k, v in batch.items()}, task.head))
    predictions, references = task.judge(np.concatenate(parts), features)
    assert row["quality"] == {task.metric: pytest.approx(task.score(predictions, references)), "n": len(references)}
    low, high = row["quality_interval"]
    assert 0 <= low <= row["quality"][task.metric] <= high <= 1


@pytest.mark.usefixtures("in_process")
def test_a_saved_model_of_any_head_is_verified_and_exported(placed: tuple[Any, Path], tmp_path: Path) -> None:
    from hfcompress.measure.verify import verify
    from hfcompress.models.artifact import load_model, load_tokenizer, open_artifact
    from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
    from hfcompress.quantization.backends.onnx_int8 import OnnxInt8

    task, path = placed
    probe = make_dummy_inputs(path)
    expected = logits_of(load_model(path, task.auto_class), probe)
    assert expected.shape[:2] == probe["input_ids"].shape
    assert verify(open_artifact(path), expected, task.auto_class)["transformers"] < 1e-5
    target = tmp_path / "int8"
    target.mkdir()
    answered = OnnxInt8().quantize(QuantizationJob(path, target, task.auto_class, probe)).logits
    load_tokenizer(path).save_pretrained(target)
    assert answered.shape == expected.shape
    assert np.abs(answered - expected).max() < 0.2 * np.abs(expected).max()
    assert verify(open_artifact(target), answered, task.auto_class)["onnx"] < 1e-5
