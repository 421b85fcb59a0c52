"""Augmentation: the words that could stand in a word's place, the new rows, and the data set that they become."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

from hfcompress.context import StageContext
from hfcompress.data.sequence import Regression, TextClassification
from hfcompress.data.source import cache_home
from hfcompress.data.tokens import TokenClassification
from hfcompress.distillation.augmentation import augment as module
from hfcompress.distillation.augmentation.augment import ORIGIN, augment, read_augmented, rewrite
from hfcompress.distillation.augmentation.options import Augment, augment_rows, computes_in_bfloat16, make_label_filter
from hfcompress.distillation.augmentation.replacements import MaskedWords, Slots, find_words, list_whole_words, propose
from hfcompress.models.artifact import open_artifact
from hfcompress.utils.errors import HfcompressError
from tests import factories

PIECES = [*factories.WORDS, "##ly", "##ing", "!", ",", "7", "won", "'", "t"]
FAMILIES = ["bert", "distilbert", "roberta", "electra", "mpnet", "albert", "deberta-v2", "modernbert"]
TEXTS = ["a great film", "the plot was good and the cast fine", "awful", "a dull story", "the very film"]


def masked_words(path: Path, family: str = "bert", favourites: tuple[str, ...] = ()) -> Path:
    """A directory with a random masked-language model; `favourites` are what it expects everywhere."""
    built = factories.model(family, head="mask", vocab_size=len(PIECES))
    if favourites:
        with torch.no_grad():
            built.get_output_embeddings().bias[[PIECES.index(word) for word in favourites]] += 100
    built.save_pretrained(path)
    factories.tokenizer(PIECES).save_pretrained(path)
    if reads_types(built):
        file = path / "tokenizer_config.json"
        names = ["input_ids", "token_type_ids", "attention_mask"]
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": names}))
    return path


def reads_types(built: Any) -> bool:
    return int(getattr(built.config, "type_vocab_size", 0) or 0) > 1


@pytest.fixture(scope="module")
def mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return masked_words(tmp_path_factory.mktemp("mlm"))


def words_of(text: str) -> list[str]:
    return [text[slice(*span)] for span in find_words(text)]


def one_at_a_time(path: Path, text: str, span: tuple[int, int], top_k: int) -> set[str]:
    """Algorithm 1, literally: mask one word of [sentence, sentence], and read the whole logits."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForMaskedLM.from_pretrained(path).eval()
    before, word = text[: span[0]], text[slice(*span)]
    tokens = tokenizer.tokenize(text)
    position = len(tokenizer.tokenize(before))
    tokens[position] = "[MASK]"
    row = ["[CLS]", *tokens, "[SEP]", *tokenizer.tokenize(text), "[SEP]"]
    inputs = {"input_ids": torch.tensor([tokenizer.convert_tokens_to_ids(row)])}
    if reads_types(model):
        inputs["token_type_ids"] = torch.tensor([[0] * (len(tokens) + 2) + [1] * (len(tokens) + 1)])
    with torch.no_grad():
        order = model(**inputs).logits[0, position + 1].argsort(descending=True).tolist()
    likeliest = [PIECES[index] for index in order]
    good = [x for x in likeliest if x.isalpha() and x != word]
    return set(good[:top_k])


@pytest.mark.parametrize("family", FAMILIES)
def test_many_words_at_once_have_the_candidates_that_each_has_alone(family: str, tmp_path: Path) -> None:
    path = masked_words(tmp_path, family)
    found = propose(TEXTS, MaskedWords(path, 3), None, batch_size=5)
    assert found.keys() == set(TEXTS)
    for text, slots in found.items():
        assert slots.keys() == set(find_words(text))
        for span, candidates in slots.items():
            assert len(candidates) == 3
            assert set(candidates) == one_at_a_time(path, text, span, 3), (text, span)


def test_candidates_depend_on_what_is_around_the_word(mlm: Path) -> None:
    # Without this the test above could pass on a model that answers alike everywhere.
    found = propose(TEXTS, MaskedWords(mlm, 3), None, 4)
    assert len({candidates for slots in found.values() for candidates in slots.values()}) > 2


def test_a_word_is_never_its_own_replacement_nor_a_piece(tmp_path: Path) -> None:
    path = masked_words(tmp_path, favourites=("good", "fine", "##ly", "[SEP]", "7", "!"))
    slots = propose(["good cast"], MaskedWords(path, 2), None, 4)["good cast"]
    assert "fine" in slots[(0, 4)]
    assert "good" not in slots[(0, 4)]
    assert set(slots[(5, 9)]) == {"good", "fine"}
    assert propose(["GOOD cast"], MaskedWords(path, 2), None, 4)["GOOD cast"][(0, 4)] == slots[(0, 4)]


def test_equal_texts_are_asked_once(mlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = MaskedWords(mlm, 2), []
    top = model._predict_words
    monkeypatch.setattr(model, "_predict_words", lambda e, numbers, p: asked.extend(numbers) or top(e, numbers, p))
    propose(["a great film"] * 7 + ["a dull film"], model, None, 4)
    assert len(asked) == len(find_words("a great film")) + len(find_words("a dull film"))


def test_the_head_sees_the_masked_tokens_alone(mlm: Path) -> None:
    model, seen = MaskedWords(mlm, 2), []
    model.model.get_output_embeddings().register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))
    propose(["the plot was good", "a great film"], model, None, 16)
    model.model.base_model.encoder.layer[1].intermediate.register_forward_hook(lambda m, i, o: seen.append(o.shape[:2]))
    propose(["the plot was good", "a great film"], model, None, 16)
    assert seen == [(4, 1, len(PIECES)), (4, 1), (4, 1, len(PIECES))]


def test_the_head_stays_in_float32_where_the_rest_is_in_bfloat16(mlm: Path) -> None:
    model, seen = MaskedWords(mlm, 2, bfloat16=True), []
    model.model.get_output_embeddings().register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    model.model.base_model.encoder.layer[0].output.dense.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    propose(["a great film"], model, None, 16)
    assert seen == [torch.bfloat16, torch.float32]


def test_what_is_too_long_for_the_model_stays(mlm: Path) -> None:
    text = " ".join(["good"] * 30)
    candidates = list(propose([text], MaskedWords(mlm, 2), None, 16)[text].values())
    # 32 tokens are read: [CLS], 14 words, [SEP], 15 words, [SEP].
    assert [bool(words) for words in candidates] == [True] * 14 + [False] * 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The film was great!", ["film", "great"]),
        ("it won't matter, she isn't Bob's friend", ["matter", "Bob", "friend"]),
        ("wo n't it 's fine", ["wo", "fine"]),
        ("7 films in 3d, the 90s", ["films"]),
        ("well-made at six o'clock", ["well", "made", "six"]),
        ("don’t snake_case e2e", []),
        ("Crème brûlée", ["Crème", "brûlée"]),
        ("", []),
    ],
)
def test_words_that_may_be_replaced(text: str, expected: list[str]) -> None:
    assert words_of(text) == expected


def test_whole_words_of_each_kind_of_tokenizer() -> None:
    def fake(tokens: list[str]) -> Any:
        clean = [token.replace("Ġ", " ").replace("▁", " ").replace("##", "") for token in tokens]
        return SimpleNamespace(
            get_vocab=lambda: {token: index for index, token in enumerate(tokens)},
            all_special_ids=[0],
            batch_decode=lambda rows: [clean[index] for (index,) in rows],
        )

    assert list_whole_words(fake(["PAD", "film", "##s", "▁odd", "7", "a"])) == {1: "film", 5: "a", 3: "odd"}
    assert list_whole_words(fake(["PAD", "Ġfilm", "s", "Ġ7", "Ġa"])) == {1: "film", 4: "a"}
    assert list_whole_words(fake(["PAD", "▁film", "s", "▁,"])) == {1: "film"}


GLOVE = "badly 1 0 0\npoorly 0.9 0.1 0\nsoon 2 1 0\nfar -1 0 0\nnever 0 0 1\n, 1 0 0\nBadly 0 0 9\n"


def test_words_of_several_tokens_have_their_vectors_neighbours(tmp_path: Path) -> None:
    model = MaskedWords(masked_words(tmp_path / "m", favourites=("good", "fine")), 2)
    text = "Badly great casting"
    slots = propose([text], model, None, 4)[text]
    assert slots[(0, 5)] == slots[(12, 19)] == ()
    (tmp_path / "glove.txt").write_text(GLOVE)
    slots = propose([text], model, tmp_path / "glove.txt", 4)[text]
    # cosines with (1, 0, 0): poorly 0.994, soon 0.894, never 0, far -1; the comma is no word, the last line no news
    assert slots[(0, 5)] == ("poorly", "soon")
    assert slots[(6, 11)] == ("fine", "good")
    assert slots[(12, 19)] == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("slowly 1 0\nsoon 1\n", "'soon' has 1 numbers, others 2"),
        ("slowly 1 0\nsoon one two\n", "the line of 'soon' is not a word and numbers"),
        ("", "holds no word vectors"),
        ("slowly\nsoon\n", "holds no word vectors"),
    ],
)
def test_a_file_that_holds_no_vectors_is_refused(content: str, message: str, mlm: Path, tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_text(content)
    with pytest.raises(HfcompressError, match=message):
        propose(["slowly"], MaskedWords(mlm, 2), tmp_path / "glove.txt", 4)


def test_a_model_that_fills_in_no_masks_is_refused(teacher: Path) -> None:
    with pytest.raises(HfcompressError, match=r"augment: .* lacks .*\n.*name a masked-language model"):
        MaskedWords(teacher, 2)


SLOTS: Slots = {(5, 9): ("bad", "poor"), (11, 17): ("story",), (19, 21): ()}


def test_a_text_keeps_its_spaces_punctuation_and_capitals() -> None:
    new = rewrite("It's Good,\tPLOTXX; UK", SLOTS, 9, 1.0, random.Random(0))
    assert sorted(new) == ["It's Bad,\tSTORY; UK", "It's Poor,\tSTORY; UK"]
    assert rewrite("so it was ok", {(10, 12): ("Paris",)}, 1, 1.0, random.Random(0)) == ["so it was Paris"]
    assert rewrite("I", {(0, 1): ("we",)}, 1, 1.0, random.Random(0)) == ["We"]


def test_probability_0_replaces_nothing_and_1_everything() -> None:
    assert rewrite("It's Good,\tPLOTXX; UK", SLOTS, 9, 0.0, random.Random(0)) == []
    words = {(i, i + 1): ("x", "y", "z") for i in range(0, 12, 2)}
    for new in rewrite("a b c d e f", words, 20, 1.0, random.Random(0)):
        assert set(new.split()) <= {"x", "y", "z"}


def test_words_are_replaced_as_often_as_asked() -> None:
    text = " ".join("a" * 200)
    words = {(i, i + 1): tuple("bcdefgh") for i in range(0, 400, 2)}
    new = rewrite(text, words, 50, 0.3, random.Random(0))
    share = sum(word != "a" for made in new for word in made.split()) / (50 * 200)
    assert len(set(new)) == 50
    assert share == pytest.approx(0.3, abs=0.02)
    assert {word for made in new for word in made.split()} == set("abcdefgh")


def test_duplicates_are_drawn_anew_until_nothing_is_left() -> None:
    new = rewrite("good", {(0, 4): tuple("abcdef")}, 6, 0.5, random.Random(0))
    assert set(new) == set("abcdef")
    assert len(rewrite("good", {(0, 4): ("bad",)}, 20, 0.5, random.Random(0))) == 1


def rows_of(texts: list[str], **others: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"id": list(range(len(texts))), "sentence": texts, **others})


def made(tmp_path: Path, rows: datasets.Dataset, mlm: Path, columns: tuple[str, ...] = ("sentence",), seed: int = 1,
         name: str = "out", identity: dict[str, Any] | None = None, keep: Any = None, **options: Any
         ) -> tuple[datasets.Dataset, dict[str, int]]:  # fmt: skip
    block = Augment.model_validate({"copies": 4, "top_k": 5, **options})
    counts = augment(rows, columns, block, seed=seed, directory=tmp_path / name, identity=identity or {"seed": seed},
                     mlm=mlm, keep=keep)  # fmt: skip
    return read_augmented(tmp_path / name), counts


def test_the_data_set_starts_with_the_rows_as_they_were(mlm: Path, tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["bad", "good"])
    rows = rows_of(TEXTS, label=[1, 0, 1, 0, 1]).cast_column("label", label)
    got, counts = made(tmp_path, rows, mlm)
    assert got.features == rows.features
    assert got.select(range(5)).to_list() == rows.to_list()
    raw = datasets.Dataset.from_parquet(str(tmp_path / "out" / "train.parquet"))
    assert raw[ORIGIN][:5] == [None] * 5
    new = raw.select(range(5, len(raw)))
    assert len(new) == counts["generated"]
    assert new[ORIGIN][:] == sorted(new[ORIGIN][:])
    for row in new:
        old = rows[row[ORIGIN]]
        assert (row["id"], row["label"]) == (old["id"], old["label"])
        assert row["sentence"] != old["sentence"]
        assert len(row["sentence"].split()) == len(old["sentence"].split())
    assert len({(row["id"], row["sentence"]) for row in new}) == len(new)


def test_counts_add_up(mlm: Path, tmp_path: Path) -> None:
    _, counts = made(tmp_path, rows_of(["the", "a great film", "awful"]), mlm, copies=9, top_k=3, probability=1.0)
    # "the" has nothing to replace, "a great film" 9 ways, "awful" 3.
    assert counts["originals"] == 3
    assert counts["generated"] <= 12
    assert counts["generated"] + counts["duplicates"] == 27
    assert counts["duplicates"] >= 9 + 6


def test_each_side_of_a_pair_is_rewritten_while_the_other_stays(mlm: Path, tmp_path: Path) -> None:
    rows = rows_of(["a great film", "a dull story"], other=["the good plot", "the bad cast"])
    got, counts = made(tmp_path, rows, mlm, ("sentence", "other"), probability=0.8)
    new = got.select(range(2, len(got))).to_list()
    olds = [rows[row["id"]] for row in new]
    changed = [(a["sentence"] != b["sentence"], a["other"] != b["other"]) for a, b in zip(new, olds, strict=True)]
    assert set(changed) == {(True, False), (False, True)}
    assert changed.count((True, False)) == changed.count((False, True)) == 8
    assert counts == {"originals": 2, "generated": 16, "dropped": 0, "duplicates": 0}


def test_the_seed_alone_decides(mlm: Path, tmp_path: Path) -> None:
    rows = rows_of(TEXTS)
    first, _ = made(tmp_path, rows, mlm)
    assert made(tmp_path, rows, mlm, name="again", batch_size=1)[0].to_list() == first.to_list()
    assert made(tmp_path, rows, mlm, name="other", seed=2)[0].to_list() != first.to_list()
    bytes_of = [(tmp_path / name / "train.parquet").read_bytes() for name in ("out", "again")]
    assert bytes_of[0] == bytes_of[1]


def test_other_rows_change_nothing(mlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_rows, _ = made(tmp_path, rows_of(TEXTS), mlm)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 2)
    few, _ = made(tmp_path, rows_of(TEXTS[:3]), mlm, name="few")
    wanted = [row for row in all_rows.select(range(5, len(all_rows))) if row["id"] < 3]
    assert few.select(range(3, len(few))).to_list() == wanted


def test_texts_that_are_numbers_stay(mlm: Path, tmp_path: Path) -> None:
    rows = rows_of(["a great film", "a dull story"], year=[1999, 2001])
    got, _ = made(tmp_path, rows, mlm, ("sentence", "year"))
    assert got.features == rows.features
    assert len(got) == 2 + 8


def test_what_the_filter_refuses_is_left_out_and_counted(mlm: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def keep(rows: datasets.Dataset) -> list[bool]:
        seen.extend(rows.to_list())
        return [row["id"] != 1 for row in rows]

    rows = rows_of(["a great film", "a dull story", "the good plot", "the"])
    got, counts = made(tmp_path, rows, mlm, keep=keep)
    assert len(seen) == 12
    assert set(seen[0]) == {"id", "sentence"}
    assert got.select(range(4)).to_list() == rows.to_list()
    assert got.select(range(4, len(got))).to_list() == [row for row in seen if row["id"] != 1]
    assert (counts["generated"], counts["dropped"], counts["duplicates"]) == (8, 4, 4)


def test_a_whole_data_set_is_read_and_not_made_again(mlm: Path, tmp_path: Path) -> None:
    first, counts = made(tmp_path, rows_of(TEXTS), mlm)
    again, same = made(tmp_path, rows_of(TEXTS), tmp_path / "nowhere")
    assert again.to_list() == first.to_list()
    assert same == counts
    record = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert record["identity"] == {"seed": 1}
    assert record["counts"] == counts


def damage_data(folder: Path) -> None:
    content = bytearray((folder / "train.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "train.parquet").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (damage_data, "train.parquet is damaged"),
        (lambda folder: (folder / "train.parquet").unlink(), "it is damaged"),
        (lambda folder: (folder / "lineage.json").write_text("{"), "it is damaged"),
        (lambda folder: (folder / "lineage.json").write_text("[]"), "it is damaged"),
        (lambda folder: (folder / "lineage.json").unlink(), "it is damaged"),
    ],
)
def test_a_damaged_data_set_is_made_anew(
    damage: Any, why: str, mlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = made(tmp_path, rows_of(TEXTS), mlm)
    damage(tmp_path / "out")
    again, _ = made(tmp_path, rows_of(TEXTS), mlm)
    assert again.to_list() == first.to_list()
    assert why in capsys.readouterr().err.replace("\n", " ")


def test_a_data_set_made_from_something_else_is_made_anew(mlm: Path, tmp_path: Path) -> None:
    first, _ = made(tmp_path, rows_of(TEXTS), mlm)
    other, _ = made(tmp_path, rows_of(TEXTS), mlm, seed=2)
    assert other.to_list() != first.to_list()
    with pytest.raises(HfcompressError):
        made(tmp_path, rows_of(TEXTS), tmp_path / "nowhere", identity={"seed": 1, "data": "x"})


def test_an_interrupted_attempt_leaves_nothing_that_looks_whole(mlm: Path, tmp_path: Path) -> None:
    def stopped(rows: datasets.Dataset) -> list[bool]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, rows_of(TEXTS), mlm, keep=stopped)
    assert not (tmp_path / "out").exists()
    got, _ = made(tmp_path, rows_of(TEXTS), mlm)
    assert len(got) > len(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_augmented_rows_are_not_augmented_again(mlm: Path, tmp_path: Path) -> None:
    with pytest.raises(HfcompressError, match="augmented already"):
        made(tmp_path, rows_of(TEXTS, **{ORIGIN: [0] * len(TEXTS)}), mlm)


CLASSES: dict[str, Any] = {"type": "text-classification", "dataset": "x", "text": ["sentence"], "max_length": 16}
SCORES: dict[str, Any] = {"type": "regression", "dataset": "x", "text": ["sentence"], "max_length": 16}


def problems(task: Any, options: dict[str, Any], **others: Any) -> list[tuple[str, str]]:
    block = Augment.model_validate({"model": ".", **options})
    return [(p.message, ".".join(map(str, p.key))) for p in block.problems(task, **others)]


def test_what_cannot_work_is_told_before_anything_runs(tmp_path: Path) -> None:
    classes, scores = TextClassification.model_validate(CLASSES), Regression.model_validate(SCORES)
    tokens = TokenClassification.model_validate({"type": "token-classification", "dataset": "x", "text": ["words"]})
    assert problems(classes, {"minimum_confidence": 0.5}) == problems(scores, {"tolerance": 0.5}) == []
    other = "augment rewrites texts for text-classification and regression, and the task is token-classification"
    assert problems(tokens, {}) == [(other, "augment")]
    assert problems(classes, {"glove": str(tmp_path / "no.txt")}) == [
        (f"no such file: {tmp_path / 'no.txt'}", "augment.glove")
    ]
    assert problems(scores, {"minimum_confidence": 0.5})[0][1] == "augment.minimum_confidence"
    assert problems(classes, {"tolerance": 0.5})[0][1] == "augment.tolerance"
    alone = ("there is no teacher to ask about the new rows", "augment.minimum_confidence")
    assert problems(classes, {"minimum_confidence": 0.5}, has_teacher=False) == [alone]
    assert problems(classes, {}, has_teacher=False) == []


def test_the_teacher_keeps_what_has_its_label_and_its_confidence(teacher: Path) -> None:
    import transformers

    task = TextClassification.model_validate(CLASSES)
    texts = [
        "a great film",
        "a dull story",
        "good plot bad cast",
        "film",
        "lovely and awful",
        "the poor film was fine",
    ]
    rows = datasets.Dataset.from_dict({"sentence": texts, "label": [1, 1, 1, 0, 1, 0]})
    model = transformers.AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    with torch.no_grad():
        logits = [model(**factories.tokenizer()(text, return_tensors="pt")).logits[0] for text in texts]
    chances = [torch.softmax(row, -1).tolist() for row in logits]
    agree = [max(p) == p[label] for p, label in zip(chances, rows["label"], strict=True)]
    least = sorted(max(p) for p, same in zip(chances, agree, strict=True) if same)
    between = (least[0] + least[1]) / 2
    for minimum in (0.0, between):
        wanted = [same and max(p) >= minimum for p, same in zip(chances, agree, strict=True)]
        options = Augment(minimum_confidence=minimum, batch_size=2)
        assert make_label_filter(options, open_artifact(teacher), task)(rows) == wanted
    assert 2 <= sum(agree) < len(texts)


def test_the_teachers_score_is_near_the_rows_score(tmp_path: Path) -> None:
    model = factories.model(labels=1)
    path = factories.save(model, tmp_path)
    texts = ["a great film", "a dull story"]
    with torch.no_grad():
        scores = [model(**factories.tokenizer()(text, return_tensors="pt")).logits.item() for text in texts]
    near = [scores[0] + 0.09, scores[0] + 0.11, scores[1] - 0.09, scores[1] - 0.11]
    rows = datasets.Dataset.from_dict({"sentence": [texts[0], texts[0], texts[1], texts[1]], "score": near})
    keep = make_label_filter(Augment(tolerance=0.1), open_artifact(path), Regression.model_validate(SCORES))
    assert keep(rows) == [True, False, True, False]


@pytest.mark.parametrize(("precision", "flags", "expected"), [
    ("float32", ["amx_bf16"], False), ("bfloat16", [], True), ("auto", ["avx2"], False), ("auto", ["amx_bf16"], True),
])  # fmt: skip
def test_bfloat16_where_the_processor_has_it(
    precision: str, flags: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfcompress.distillation.augmentation.options.cpu_flags", lambda: flags)
    assert computes_in_bfloat16(precision, "cpu") is expected


@pytest.fixture
def context(data: Path, teacher: Path, tmp_path: Path) -> StageContext:
    task = TextClassification.model_validate({**CLASSES, "dataset": str(data)})
    return StageContext(task, 3, open_artifact(teacher), {}, tmp_path)


def test_a_stage_gets_raw_rows_that_the_task_reads(
    context: StageContext, mlm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HFCOMPRESS_HOME", str(tmp_path / "home"))
    taught: Any = SimpleNamespace(teacher=SimpleNamespace(models=["source"]))
    options = Augment(model=str(mlm), copies=3)
    rows, facts = augment_rows(options, taught, context.source, context)
    train = context.rows("train")
    assert rows.select(range(len(train))).to_list() == train.to_list()
    assert len(rows) > 2 * len(train)
    assert facts["generated"] == len(rows) - len(train)
    assert len(context.encode("train", factories.tokenizer(), {"0": 0, "1": 1}, rows)) == len(rows)
    monkeypatch.setattr(
        "hfcompress.distillation.augmentation.augment.MaskedWords", None
    )  # a second run, of any batch size, makes nothing
    again, _ = augment_rows(Augment(model=str(mlm), copies=3, batch_size=7), taught, context.source, context)
    assert again.to_list() == rows.to_list()


def test_the_teachers_weights_belong_to_the_lineage_of_what_it_filtered(
    context: StageContext, mlm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HFCOMPRESS_HOME", str(tmp_path / "home"))
    context.made = {"01-distill": open_artifact(factories.save(factories.model(), tmp_path / "untaught"))}
    options = Augment(model=str(mlm), copies=3, probability=1.0, minimum_confidence=0.6)
    kept = []
    for name in ("source", "01-distill"):
        taught: Any = SimpleNamespace(teacher=SimpleNamespace(models=[name]))
        rows, facts = augment_rows(options, taught, context.source, context)
        kept.append(len(rows) - len(context.rows("train")))
        assert facts["dropped"] > 0
    assert kept[0] != kept[1]
    folders = list((cache_home() / "augmented").iterdir())
    identities = [json.loads((f / "lineage.json").read_text())["identity"] for f in folders]
    assert len({identity["teacher"] for identity in identities}) == 2
    assert {identity["seed"] for identity in identities} == {3}
    assert all({"options", "model", "data", "versions"} <= set(identity) for identity in identities)
