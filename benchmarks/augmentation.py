"""Augmentation in batches against the reference, which takes one sentence and one word at a time.

The reference, re-implemented: for each word the sentence is tokenized again, a forward pass of batch 1 in float32
with autograd gives logits for every token, and the whole vocabulary is sorted. Both sides: the same random BERT (6
layers of 384, 30,522 words), the same sentences with SST-2's lengths (9.4 words on average, sd 8.1; all different), 20
copies each, interleaved: the reference gets a part at a time, the batches (32 on a processor, 256 on a GPU) are made
of all. The ratio is for the default `precision: auto`: bfloat16 if the hardware multiplies it. With one thread
processor time counts, so that a busy machine can measure too. `--quick` takes fewer sentences.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
from transformers.utils import logging

from hfcompress.distillation.augmentation.augment import rewrite
from hfcompress.distillation.augmentation.options import Augment, computes_in_bfloat16
from hfcompress.distillation.augmentation.replacements import MaskedWords, find_words, propose

TARGET = 8.0
VOCABULARY, PART = 30_522, 48
OPTIONS = Augment()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary() -> list[str]:
    """Makes special tokens, words, and pieces of words (every fifth token)."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(parts) for parts in itertools.islice(itertools.product(syllables, repeat=3), VOCABULARY)]
    pieces = VOCABULARY // 5
    return [*SPECIAL, *(f"##{word}" for word in words[:pieces]), *words[pieces : VOCABULARY - len(SPECIAL)]]


def sentences(count: int, known: list[str]) -> list[str]:
    """Makes sentences with SST-2's lengths."""
    draw = random.Random(0)
    words = [word for word in known if word.isalpha()]
    lengths = [min(1 + int(draw.gammavariate(1.1, 8.1)), 52) for _ in range(count)]
    return [" ".join(draw.choices(words, k=length)) for length in lengths]


def save_model(folder: Path, known: list[str]) -> None:
    """Saves a model of random weights: only speed is measured."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    BertForMaskedLM(config).save_pretrained(folder)
    inner = Tokenizer(models.WordPiece({word: index for index, word in enumerate(known)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **names).save_pretrained(folder)


def reference(folder: Path, device: str) -> Callable[[list[str]], None]:
    """Augments one sentence and one word at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").to(device).eval()

    def candidates(sentence: str, position: int) -> list[str]:
        tokens = ["[CLS]", *tokenizer.tokenize(sentence), "[SEP]"]
        types = [0] * len(tokens) + [1] * (len(tokens) - 1)
        row = [*tokens, *tokens[1:]]
        row[position + 1] = "[MASK]"
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(row)], device=device)
        seen = model(input_ids=ids, token_type_ids=torch.tensor([types], device=device))
        best = torch.argsort(seen.logits[0, position + 1], descending=True)[: OPTIONS.top_k].tolist()
        return [token for token in tokenizer.convert_ids_to_tokens(best) if not token.startswith("##")]

    def augment(texts: list[str]) -> None:
        draw = random.Random(0)
        for text in texts:
            words = text.split()
            others = [candidates(text, position) for position in range(len(words))]
            made = [text]
            for _ in range(OPTIONS.copies):
                pairs = zip(words, others, strict=True)
                new = [draw.choice(some) if draw.random() < OPTIONS.probability else word for word, some in pairs]
                if " ".join(new) not in made:
                    made.append(" ".join(new))

    return augment


def batched(folder: Path, device: str, bfloat16: bool) -> Callable[[list[str]], None]:
    """Augments in batches, as a recipe does."""
    model = MaskedWords(folder, OPTIONS.top_k, device, bfloat16)

    def augment(texts: list[str]) -> None:
        slots = propose(texts, model, None, OPTIONS.batch_size if device == "cuda" else 32)
        for text in texts:
            rewrite(text, slots[text], OPTIONS.copies, OPTIONS.probability, random.Random(0))

    return augment


def main() -> None:
    """Prints the words per second of each side, and the ratio."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rounds, device = 2 if "--quick" in sys.argv else 4, "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    with TemporaryDirectory() as name:
        known, folder = vocabulary(), Path(name)
        save_model(folder, known)
        sides = {"one at a time": reference(folder, device), "batched, float32": batched(folder, device, False)}
        if computes_in_bfloat16("auto", device):
            sides["batched, bfloat16"] = batched(folder, device, True)
        texts = sentences(PART * rounds, known)
        seconds: dict[str, list[float]] = {label: [] for label in sides}
        for side in sides.values():
            side(texts[:2])
        for part in (texts[start : start + PART] for start in range(0, len(texts), PART)):
            for label, side in sides.items():
                start = clock()
                side(part if label == "one at a time" else texts)
                seconds[label].append(clock() - start)
    words, ratio = sum(len(find_words(text)) for text in texts), 0.0
    spent = {label: statistics.median(times) for label, times in seconds.items()}
    spent["one at a time"] = sum(seconds["one at a time"])
    for label, time_spent in spent.items():
        ratio = spent["one at a time"] / time_spent
        print(f"{label}: {words:,} words in {time_spent:.1f} s, {words / time_spent:,.0f} a second, {ratio:.2f}x")
    print(f"ratio: {ratio:.2f} (target {TARGET:.2f})")


if __name__ == "__main__":
    main()
