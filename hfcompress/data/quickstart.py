"""The built-in data set: sentiment of short English sentences, made by a weighted grammar.

Counting words is not enough to label them. Negation flips, intensity weighs, contrast overrules, and a verdict may come
after the opinion it overturns, so a model has to compose: `critics hated the plot ; i did not .` is positive.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory
from hfcompress.utils.lock import shared_directory

SIZES: dict[str, int] = {"train": 10000, "dev": 1000, "test": 1000}
LABELS = ("negative", "positive")
LONGEST = 24  # words of a sentence, punctuation included

# symbol -> pattern -> how often. `{slot:w}` adds w times the slot's score to the pattern's; `{slot}` adds nothing.
# A word list scores 1 (see WORDS), a sum of zero is drawn again, and the sign of `sentence` is the label.
GRAMMAR: dict[str, dict[str, int]] = {
    "sentence": {
        "{clause:1} .": 18,
        "{when} , {clause:1} .": 4,
        "{reported:1} .": 4,
        "{claim:0} , but {claim:1} .": 4,
        "although {clause:0} , {clause:1} .": 3,
        "{clause:1} , even though {clause:0} .": 3,
        "{clause:1} and {clause:1} .": 3,
        "{echo:1} .": 4,
    },
    "claim": {"{clause:1}": 9, "{reported:1}": 1},
    "reported": {"{yes} {clause:1}": 1, "{no} {clause:-1}": 1},
    "echo": {
        "{people} {loved:1} the {aspect} ; so did {self}": 1,
        "{people} {loved:-1} the {aspect} ; {self} did not": 1,
        "{people} said that {clause:1} ; they were {right}": 1,
        "{people} said that {clause:-1} ; they were {wrong}": 1,
        "{self} expected the {aspect} to be {graded:1} , and it was": 1,
        "{self} expected the {aspect} to be {graded:-1} , but it was not": 1,
    },
    "clause": {
        "{subject} was {state:1}": 10,
        "{person} {loved:2} {subject}": 4,
        "{person} did not {love:-2} {subject}": 1,
        "{subject} {pleased:2} {person}": 3,
        "{subject} did not {please:-2} {person}": 1,
        "{subject} failed to {please:-2} {person}": 1,
        "{subject} never failed to {please:3} {person}": 1,
    },
    "subject": {
        "the {aspect}": 6,
        "the {neutral} {aspect}": 2,
        "the {aspect} of the {neutral} {thing}": 1,
        "this {thing}": 2,
    },
    "state": {
        "{graded:1}": 12,
        "{flipped:1}": 4,
        "{adjective:1} and {adjective:1}": 1,
        "not only {adjective:1} but also {adjective:1}": 1,
        "neither {adjective:-1} nor {adjective:-1}": 1,
    },
    "graded": {"{adjective:2}": 3, "{slightly} {adjective:1}": 2, "{very} {adjective:3}": 2},
    "flipped": {
        "not {adjective:-2}": 3,
        "not {very} {adjective:-1}": 1,
        "{barely} {adjective:-2}": 2,
        "{far_from} {adjective:-3}": 2,
    },
    "adjective": {"{good:1}": 1, "{bad:-1}": 1},
    "loved": {"{liked:1}": 1, "{disliked:-1}": 1},
    "love": {"{like:1}": 1, "{dislike:-1}": 1},
    "pleased": {"{charmed:1}": 1, "{annoyed:-1}": 1},
    "please": {"{charm:1}": 1, "{annoy:-1}": 1},
}

# word list -> its entries, separated by commas or, if every entry is one word, by spaces.
WORDS: dict[str, str] = {
    "good": "good great fine lovely superb brilliant excellent wonderful perfect delightful pleasant charming"
    " impressive remarkable outstanding marvellous splendid terrific fantastic admirable satisfying solid decent",
    "bad": "bad awful poor terrible horrible dreadful weak disappointing mediocre lousy annoying irritating pathetic"
    " appalling miserable shabby inferior hopeless tedious unpleasant ugly shoddy atrocious",
    "liked": "loved, liked, enjoyed, admired, adored, praised, recommended, cherished, treasured, appreciated",
    "disliked": "hated, disliked, loathed, despised, detested, regretted, criticised, resented, condemned, mocked",
    "like": "love, like, enjoy, admire, adore, praise, recommend, cherish, treasure, appreciate",
    "dislike": "hate, dislike, loathe, despise, detest, regret, criticise, resent, condemn, mock",
    "charmed": "charmed pleased delighted thrilled amazed impressed",
    "annoyed": "annoyed bored irritated angered disgusted disappointed",
    "charm": "charm please delight thrill amaze impress",
    "annoy": "annoy bore irritate anger disgust disappoint",
    "very": "very truly really extremely incredibly absolutely thoroughly deeply",
    "slightly": "slightly, somewhat, a bit, a little, fairly, rather, mildly",
    "barely": "hardly barely scarcely never",
    "far_from": "far from, anything but, by no means, not at all",
    "yes": "i think that, everyone agrees that, it is true that, nobody denies that, i do not doubt that",
    "no": "i do not think that, nobody thinks that, it is not true that, i can not say that, i doubt that",
    "right": "right correct",
    "wrong": "wrong, mistaken, not right",
    "self": "i we",
    "people": "critics, experts, my friends, the reporters, my colleagues, the neighbours, most people, the bloggers,"
    " her cousins, his parents, some strangers, the judges",
    "person": "my sister, my brother, my wife, my husband, the children, our guests, the family, my uncle, my aunt,"
    " my boss, the teacher, our daughter, his son, her mother, my grandfather, everyone, the students, our group",
    "when": "last week, last month, this time, on monday, on friday, in april, in october, last winter, that summer,"
    " yesterday, in the end, after a while, for once, at first sight, one evening, on sunday morning, last night",
    "neutral": "new, old, first, second, third, french, german, italian, spanish, local, recent, famous, small, large,"
    " red, blue, green, other, whole, usual, young, modern, northern, southern, ordinary, original",
}

# domain -> the things one reviews in it, their aspects, and the adjectives that only that domain uses.
DOMAINS: dict[str, dict[str, str]] = {
    "film": {
        "thing": "film movie sequel documentary thriller comedy drama remake musical",
        "aspect": "plot acting cast script soundtrack ending dialogue camerawork pacing direction scenery hero villain",
        "good": "gripping moving witty hilarious inspired suspenseful",
        "bad": "predictable clumsy wooden corny overacted plodding",
    },
    "food": {
        "thing": "restaurant cafe bistro diner bakery pizzeria canteen steakhouse tavern",
        "aspect": "soup bread salad pasta curry dessert coffee steak sauce pudding breakfast waiter menu",
        "good": "tasty delicious fresh crispy juicy flavourful",
        "bad": "bland soggy stale greasy burnt rancid",
    },
    "hotel": {
        "thing": "hotel hostel resort inn motel guesthouse lodge apartment villa",
        "aspect": "room lobby bed pool bathroom shower reception view balcony location carpet garden elevator",
        "good": "clean cosy comfortable spotless spacious quiet",
        "bad": "dirty noisy cramped smelly mouldy damp",
    },
    "phone": {
        "thing": "phone tablet laptop camera smartwatch headset printer speaker console",
        "aspect": "screen battery keyboard design software interface charger sound cable microphone button case",
        "good": "fast sturdy reliable sleek responsive durable",
        "bad": "slow flimsy unreliable buggy fragile laggy",
    },
    "book": {
        "thing": "book novel biography memoir anthology textbook diary paperback trilogy",
        "aspect": "story prose chapter preface cover translation style narrator character opening theme argument",
        "good": "captivating insightful poetic thoughtful eloquent vivid",
        "bad": "boring shallow confusing pretentious rambling verbose",
    },
}

_SLOT = re.compile(r"\{(\w+)(?::(-?\d+))?\}")


def _split_entries(words: str) -> list[str]:
    """Splits a word list: at its commas or, without one, at its spaces."""
    return [entry.strip() for entry in words.split(",")] if "," in words else words.split()


def _lexicon(domain: str) -> dict[str, list[str]]:
    """Returns the word lists of one domain; `good` and `bad` hold the general adjectives and the domain's own."""
    lists = {symbol: _split_entries(words) for symbol, words in WORDS.items()}
    for symbol, words in DOMAINS[domain].items():
        lists[symbol] = lists.get(symbol, []) + 2 * _split_entries(words)
    return lists


def _expand(symbol: str, lexicon: Mapping[str, list[str]], rng: random.Random) -> tuple[str, int]:
    """Draws a phrase for a symbol.

    Returns:
        The phrase and its score: positive, negative or, for a phrase whose parts cancel out, zero.
    """
    if symbol in lexicon:
        return rng.choice(lexicon[symbol]), 1
    patterns = GRAMMAR[symbol]
    pattern = rng.choices(list(patterns), list(patterns.values()))[0]
    score = 0

    def fill(slot: re.Match[str]) -> str:
        nonlocal score
        phrase, value = _expand(slot[1], lexicon, rng)
        score += int(slot[2] or 0) * value
        return phrase

    return _SLOT.sub(fill, pattern), score


def _sentences(rng: random.Random) -> Iterator[tuple[str, int]]:
    """Yields distinct sentences with their labels, negative and positive in turn, without end."""
    lexicons = [_lexicon(domain) for domain in DOMAINS]
    seen: set[str] = set()
    while True:
        sentence, score = _expand("sentence", rng.choice(lexicons), rng)
        label = int(score > 0)
        if score and label == len(seen) % 2 and sentence not in seen and len(sentence.split()) <= LONGEST:
            seen.add(sentence)
            yield sentence, label


def vocabulary() -> list[str]:
    """Lists every word and punctuation mark that a sentence can hold, sorted."""
    patterns = [_SLOT.sub(" ", pattern) for patterns in GRAMMAR.values() for pattern in patterns]
    entries = [entry for domain in DOMAINS for words in _lexicon(domain).values() for entry in words]
    return sorted({word for text in patterns + entries for word in text.split()})


def write_dataset(directory: Path, seed: int = 0, sizes: Mapping[str, int] | None = None) -> Path:
    """Writes `train.tsv`, `dev.tsv` and `test.tsv`: a header, then a sentence, a tab and its label on each line.

    The labels are balanced and no sentence comes twice. The same seed and sizes give the same bytes.

    Args:
        directory: The directory to write to. If it holds the files already, nothing is written.
        seed: Picks the sentences.
        sizes: Sentences per split; `SIZES` if not given.

    Returns:
        `directory`.

    Raises:
        HfcompressError: If `directory` holds other files, but not these.
    """
    sizes = SIZES if sizes is None else sizes
    if _is_complete(directory, sizes):
        return directory
    with shared_directory(directory) as built:
        rng = random.Random(seed)
        sentences = _sentences(rng)
        for split, size in sizes.items():
            rows = list(islice(sentences, size))
            rng.shuffle(rows)
            lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in rows)]
            (built / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    if not _is_complete(directory, sizes):
        raise HfcompressError(f"{directory} holds other files than the data set", "name an empty directory")
    return directory


def _is_complete(directory: Path, splits: Iterable[str]) -> bool:
    return all((directory / f"{split}.tsv").is_file() for split in splits)


def write_model(directory: Path, seed: int = 0) -> Path:
    """Writes a small BERT classifier with random weights, and the fast WordPiece tokenizer of `vocabulary`.

    Args:
        directory: The directory to save both in. If it holds a model already, nothing is written.
        seed: Picks the weights; the caller's random state does not change.

    Returns:
        `directory`.
    """
    if (directory / "config.json").is_file():
        return directory
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary()]
    with scratch_directory() as scratch:
        vocab_file = scratch / "vocab.txt"
        vocab_file.write_text("\n".join(tokens) + "\n", encoding="utf-8")
        tokenizer = BertTokenizerFast(str(vocab_file), model_max_length=64)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
    with shared_directory(directory) as built:
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
    if not (directory / "config.json").is_file():
        raise HfcompressError(f"{directory} holds other files than the model", "name an empty directory")
    return directory
