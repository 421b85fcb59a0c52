"""The embedded data set: same seed, same bytes; labels its grammar explains; a task beyond counting words."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from hfcompress.data import quickstart
from hfcompress.utils.errors import HfcompressError

SIZES = {"train": 4000, "dev": 500, "test": 1000}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quickstart.write_dataset(tmp_path_factory.mktemp("quickstart") / "data", sizes=SIZES)


def rows(directory: Path, split: str) -> list[tuple[str, int]]:
    with (directory / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        return [(r["sentence"], int(r["label"])) for r in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def readings(sentence: str) -> set[bool]:
    """The labels that the grammar allows a sentence, by parsing it: an independent check of the generator."""
    words = tuple(sentence.split())
    return {score > 0 for lexicon in lexicons() for score in Parser(words, lexicon).scores("sentence") if score}


@cache
def lexicons() -> list[dict[str, set[tuple[str, ...]]]]:
    return [
        {symbol: {tuple(entry.split()) for entry in entries} for symbol, entries in quickstart._lexicon(domain).items()}
        for domain in quickstart.DOMAINS
    ]


@cache
def parts(pattern: str) -> list[tuple[str, str, int]]:
    """A pattern as `(literal word, "", 0)` and `("", slot, weight)`."""
    slots = (quickstart._SLOT.fullmatch(part) for part in pattern.split())
    return [
        ("", slot[1], int(slot[2] or 0)) if slot else (part, "", 0)
        for part, slot in zip(pattern.split(), slots, strict=True)
    ]


class Parser:
    """Every derivation of `words`, as spans and scores."""

    def __init__(self, words: tuple[str, ...], lexicon: dict[str, set[tuple[str, ...]]]) -> None:
        self.words, self.lexicon, self.spans = words, lexicon, {}

    def scores(self, symbol: str) -> set[int]:
        return {score for end, score in self.phrases(symbol, 0) if end == len(self.words)}

    def phrases(self, symbol: str, start: int) -> set[tuple[int, int]]:
        """The `(end, score)` of each phrase of this symbol that begins at `start`."""
        if (symbol, start) not in self.spans:
            if symbol in self.lexicon:
                found = {(start + len(e), 1) for e in self.lexicon[symbol] if self.words[start : start + len(e)] == e}
            else:
                found = {end for pattern in quickstart.GRAMMAR[symbol] for end in self.match(parts(pattern), start)}
            self.spans[symbol, start] = found
        return self.spans[symbol, start]

    def match(self, pattern: list[tuple[str, str, int]], start: int) -> Iterator[tuple[int, int]]:
        if not pattern:
            yield start, 0
            return
        (word, slot, weight), *rest = pattern
        literal = {(start + 1, 0)} if self.words[start : start + 1] == (word,) else set()
        for middle, value in self.phrases(slot, start) if slot else literal:
            for end, score in self.match(rest, middle):
                yield end, weight * value + score


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    sizes = {"train": 400, "dev": 50, "test": 100}
    first, again, other = (
        files(quickstart.write_dataset(tmp_path / name, seed=seed, sizes=sizes))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again != other
    assert {path.name for path in tmp_path.iterdir()} == {"first", "again", "other"}


def test_files_hold_what_was_asked(data: Path) -> None:
    assert set(files(data)) == {"train.tsv", "dev.tsv", "test.tsv"}
    assert {split: len(rows(data, split)) for split in SIZES} == SIZES
    assert all(b"\r" not in content and content.startswith(b"sentence\tlabel\n") for content in files(data).values())


def test_existing_files_are_left(tmp_path: Path) -> None:
    sizes = {"train": 10, "dev": 4, "test": 4}
    before = files(quickstart.write_dataset(tmp_path / "data", sizes=sizes))
    assert files(quickstart.write_dataset(tmp_path / "data", seed=1, sizes=sizes)) == before


def test_other_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HfcompressError, match="empty directory"):
        quickstart.write_dataset(tmp_path, sizes={"train": 2, "dev": 2, "test": 2})
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_labels_are_balanced(data: Path) -> None:
    for split in SIZES:
        labels = [label for _, label in rows(data, split)]
        assert abs(sum(labels) / len(labels) - 0.5) <= 0.03


def test_no_sentence_comes_twice(data: Path) -> None:
    sentences = [sentence for split in SIZES for sentence, _ in rows(data, split)]
    assert len(sentences) == len(set(sentences))


def test_sentences_are_short(data: Path) -> None:
    lengths = [len(sentence.split()) for split in SIZES for sentence, _ in rows(data, split)]
    assert min(lengths) >= 5
    assert max(lengths) <= quickstart.LONGEST


def test_vocabulary_is_what_the_generator_emits(data: Path) -> None:
    words = quickstart.vocabulary()
    emitted = {word for split in SIZES for sentence, _ in rows(data, split) for word in sentence.split()}
    assert words == sorted(set(words))
    assert 400 <= len(words) <= 600
    assert emitted <= set(words)
    assert len(emitted) >= 0.98 * len(words)


def test_every_sentence_has_one_reading(data: Path) -> None:
    for sentence, label in rows(data, "dev"):
        assert readings(sentence) == {bool(label)}, sentence


@pytest.mark.parametrize(
    ("sentence", "positive"),
    [
        ("the plot was gripping .", True),
        ("the plot was not gripping .", False),
        ("the room was hardly dirty .", True),
        ("the room was anything but clean .", False),
        ("the screen was neither slow nor flimsy .", True),
        ("the screen was not only slow but also flimsy .", False),
        ("the soup never failed to impress my sister .", True),
        ("the soup failed to annoy my sister .", True),
        ("my sister did not regret this book .", True),
        ("the cast was slightly weak and the plot was truly brilliant .", True),
        ("the cast was truly weak and the plot was slightly brilliant .", False),
        ("the room was lovely , but the lobby was awful .", False),
        ("although the room was lovely , the lobby was awful .", False),
        ("the room was lovely , even though the lobby was awful .", True),
        ("nobody thinks that the story was boring .", True),
        ("nobody thinks that the story was not boring .", False),
        ("i can not say that the story was good .", False),
        ("nobody denies that the story was good .", True),
        ("critics hated the plot ; i did not .", True),
        ("critics hated the plot ; so did i .", False),
        ("experts said that the battery was superb ; they were wrong .", False),
        ("experts said that the battery was not superb ; they were wrong .", True),
        ("we expected the bread to be stale , but it was not .", True),
        ("we expected the bread to be stale , and it was .", False),
    ],
)
def test_rules_compose(sentence: str, positive: bool) -> None:
    assert readings(sentence) == {positive}


def test_equal_parts_have_no_label() -> None:
    assert readings("the room was lovely and the lobby was awful .") == set()


def bag_of_words_accuracy(data: Path) -> float:
    """Test accuracy of logistic regression over the words of a sentence."""
    import torch

    index = {word: i for i, word in enumerate(quickstart.vocabulary())}

    def tensors(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        examples = rows(data, split)
        bags = torch.zeros(len(examples), len(index))
        for bag, (sentence, _) in zip(bags, examples, strict=True):
            bag[[index[word] for word in sentence.split()]] = 1
        return bags, torch.tensor([float(label) for _, label in examples])

    bags, labels = tensors("train")
    weights = torch.zeros(len(index) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=50)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = bags @ weights[1:] + weights[0]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels) + 5e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    bags, labels = tensors("test")
    return float(((bags @ weights[1:] + weights[0] > 0) == (labels > 0)).float().mean())


def test_counting_words_is_not_enough(data: Path) -> None:
    assert 0.5 < bag_of_words_accuracy(data) < 0.8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quickstart.write_model(tmp_path_factory.mktemp("quickstart") / "model")


def test_model_and_tokenizer_load(model: Path, data: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    assert (model / "model.safetensors").is_file()
    assert classifier.config.id2label == {0: "negative", 1: "positive"}
    assert classifier.config.max_position_embeddings == 64
    assert tokenizer.is_fast
    sentences = [sentence for sentence, _ in rows(data, "test")]
    for sentence, ids in zip(sentences, tokenizer(sentences)["input_ids"], strict=True):
        assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", *sentence.split(), "[SEP]"]
    with torch.no_grad():
        logits = classifier(**tokenizer(sentences[:4], padding=True, return_tensors="pt")).logits
    assert logits.shape == (4, 2)


def test_model_follows_its_seed(model: Path, tmp_path: Path) -> None:
    import torch

    state = torch.random.get_rng_state()
    again, other = quickstart.write_model(tmp_path / "again"), quickstart.write_model(tmp_path / "other", seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    weights = (model / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == weights
    assert (other / "model.safetensors").read_bytes() != weights


@pytest.mark.slow
def test_transformer_beats_counting_words(model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    data = quickstart.write_dataset(tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    train, rng, batch_size, epochs = rows(data, "train"), random.Random(0), 32, 2
    steps = epochs * len(train) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=5e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-4, total_steps=steps, pct_start=0.1)

    def forward(batch: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = tokenizer([sentence for sentence, _ in batch], padding=True, return_tensors="pt")
        return classifier(**inputs).logits, torch.tensor([label for _, label in batch])

    torch.manual_seed(0)
    classifier.train()
    order = itertools.chain.from_iterable(rng.sample(train, len(train)) for _ in range(epochs))
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(*forward(list(itertools.islice(order, batch_size)))).backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        logits, labels = forward(rows(data, "test"))
    accuracy = float((logits.argmax(-1) == labels).float().mean())
    assert accuracy >= bag_of_words_accuracy(data) + 0.1
