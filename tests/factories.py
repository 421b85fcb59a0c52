"""A tiny world, made from code: words, a data set that can be learnt, encoders of every supported family."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from hfcompress.recipe.yaml_text import dump_yaml

GOOD, BAD = ["good", "fine", "great", "lovely"], ["bad", "poor", "awful", "dull"]
NEUTRAL = ["the", "film", "was", "and", "story", "a", "plot", "cast", "very", "it"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *NEUTRAL]


def tokenizer(words: list[str] | None = None, **options: Any) -> Any:
    """A fast WordPiece tokenizer over `WORDS`, or over another list that starts with the same five."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(words or WORDS)}
    inner = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32, **options,
    )  # fmt: skip


def byte_level_tokenizer(folder: Path) -> Any:
    """A byte-level BPE tokenizer over `WORDS`, of RoBERTa's class, which puts no space before a first word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(  # pairs are merged in the order of their counts, and these differ
        special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([" ".join([word] * n) for n, word in enumerate(WORDS[5:], 2)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    inner.model.save(str(folder))
    return RobertaTokenizerFast.from_pretrained(folder, model_max_length=32)


PUBLISHED: dict[str, dict[str, Any]] = {
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 8, "pos_att_type": "p2c|c2p", "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "max_relative_positions": -1,
    },
    "modernbert": {"local_attention": 8, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3},
}  # fmt: skip
"""What the configs of the published models say apart from sizes, made small."""


def model(family: str = "bert", layers: int = 2, hidden: int = 32, heads: int = 4, ffn: int = 64, labels: int = 2,
          seed: int = 0, head: str = "sequence", **config: Any) -> Any:  # fmt: skip
    """A random model of a family with a head, in eval mode; every bias and norm is random too, so that none is idle."""
    import torch
    import transformers as t

    from hfcompress.models.architectures import ARCHITECTURES, TASK_HEADS

    spec = ARCHITECTURES[family]
    keys = spec.keys
    sizes = {keys.layers: layers, keys.hidden: hidden, keys.heads: heads, keys.ffn: ffn}
    if spec.decoder:
        sizes |= {keys.kv_heads: heads // 2 if heads % 2 == 0 else 1, keys.head_dim: hidden // heads}
    common = {"vocab_size": len(WORDS), "num_labels": labels, "max_position_embeddings": 40, "pad_token_id": 0}
    made = t.AutoConfig.for_model(family, **{**common, **sizes, **PUBLISHED.get(family, {}), **config})
    torch.manual_seed(seed)
    built = getattr(t, "AutoModel" + TASK_HEADS[head]).from_config(made)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval()


def headed() -> list[tuple[str, str]]:
    """Every family with each kind of head that it can have."""
    from hfcompress.models.architectures import ARCHITECTURES

    return [(family, head) for family, spec in sorted(ARCHITECTURES.items()) for head in spec.task_head_kinds]


def batch(rows: int = 4, length: int = 12, seed: int = 0) -> dict[str, Any]:
    """Random token ids and their mask; each row but the first is padded, the last to three tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(length, 3, rows).long() if rows > 1 else torch.tensor([length])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(5, len(WORDS), (rows, length), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def save(built: Any, path: Path, words: list[str] | None = None) -> Path:
    """A model directory with tokenizer."""
    built.save_pretrained(path)
    tokenizer(words).save_pretrained(path)
    return path


def copy_directory(source: Path, target: Path, *left_out: str) -> Path:
    """Copies a directory without the files of some patterns; the copy."""
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns(*left_out)))


def write_data(path: Path, sizes: dict[str, int] | None = None, seed: int = 0) -> Path:
    """train, dev and test .tsv files: a sentence is positive where it holds more good words than bad ones."""
    draw = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    for split, count in (sizes or {"train": 96, "dev": 48, "test": 48}).items():
        lines = ["sentence\tlabel"]
        for index in range(count):
            label = index % 2
            words = [draw.choice(NEUTRAL) for _ in range(draw.randint(2, 8))]
            words.insert(draw.randrange(len(words)), draw.choice(GOOD if label else BAD))
            lines.append(f"{' '.join(words)}\t{label}")
        (path / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def fine_tuned(path: Path, data: Path, family: str = "bert", steps: int = 60, words: list[str] | None = None,
               **shape: Any) -> Path:  # fmt: skip
    """A teacher that has learnt the data; `words` are those of its tokenizer."""
    built = model(family, **shape)
    teach(built, tokenizer(words), data, steps)
    return save(built, path, words)


def teach(built: Any, splitter: Any, data: Path, steps: int = 60) -> None:
    """Trains a model on the data, all of it in each step."""
    import torch

    from hfcompress.models.forward import select_inputs

    lines = [line.split("\t") for line in (data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    batch = splitter([text for text, _ in lines], padding=True, return_tensors="pt")
    labels = torch.tensor([int(label) for _, label in lines])
    batch = select_inputs(built, batch)
    optimizer = torch.optim.AdamW(built.train().parameters(), lr=5e-3)
    for _ in range(steps):
        loss = built(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    built.eval()


def recipe(path: Path, teacher: Path, data: Path, **changes: Any) -> Path:
    """A recipe file: distil to one layer, prune, store in half precision; `changes` replace its top-level keys."""
    content: dict[str, Any] = {
        "name": "tiny",
        "model": str(teacher),
        "task": {"type": "text-classification", "dataset": str(data), "text": ["sentence"], "max_length": 16},
        "stages": [
            {"kind": "distill", "student": {"layers": 1}, "losses": ["hidden_states", "soft_labels"],
             "train": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3}},
            {"kind": "prune", "heads": 0.25, "ffn": 0.25, "criterion": {"use": "taylor", "rows": 32},
             "recover": {"epochs": 1, "batch_size": 16}},
            {"kind": "quantize", "backend": "onnx_int8"},
        ],
        "measure": {"latency": {"batch_sizes": [1, 8], "rounds": 1, "rows": 8, "threads": 1, "cold_starts": 0},
                    "bootstrap": 100},
    }  # fmt: skip
    path.write_text(dump_yaml(content | changes), encoding="utf-8")
    return path


def report_row(stage: str, kind: str = "distill", quality: float = 0.9, p50: float = 10.0, disk: int = 2_000_000,
               speedup: float | None = 1.0, interval: tuple[float, float] | None = None,
               **changes: Any) -> dict[str, Any]:  # fmt: skip
    """A row of a report that nobody measured; without an `interval` as earlier versions wrote it."""
    entry = {"device": "cpu", "runtime": "torch", "dtype": "float32", "threads": 1, "sequence_length": 12}
    latency = [
        {**entry, "batch_size": size, "p50_ms": p50 * size, "p95_ms": p50 * size * 1.5, "samples_per_s": 1000 / p50,
         "speedup": speedup}
        for size in (1, 8)
    ]  # fmt: skip
    if interval is not None and speedup is not None:
        narrow = (interval[1] - interval[0]) / 2 <= 0.05 * speedup
        latency = [{**e, "rounds": 6, "speedup_interval": list(interval), "narrow": narrow} for e in latency]
    made: dict[str, Any] = {
        "stage": stage, "kind": kind, "quality": {"accuracy": quality, "n": 48},
        "quality_interval": [quality - 0.05, quality + 0.05], "parameters": 1_234_567, "encoder_parameters": 7_654,
        "disk_bytes": disk, "macs": 1_000, "latency": latency, "peak_memory_bytes": 300_000_000,
        "energy_wh_per_1k": None, "speedup": speedup, "compression": 1.0,
    }  # fmt: skip
    return made | changes


QUIET = {
    "busy": False, "why": [], "wait_share": 0.01, "other_share": 0.01, "stolen_share": 0.0, "throttled_share": 0.0,
    "involuntary_per_s": 10.0, "load": 0.5,
}  # fmt: skip
BUSY = QUIET | {"busy": True, "why": ["other work took 50% of the processors' time"], "other_share": 0.5}
"""What a report says of a machine."""


@contextmanager
def machine_state(state: dict[str, Any] = QUIET) -> Iterator[None]:
    """A machine that is quiet, or busy, whatever this one is."""
    with mock.patch("hfcompress.measure.machine.state", return_value=state):
        yield


def run_cli(*arguments: object) -> int:
    """The exit code of `hfcompress ARGUMENTS…`, run in this process."""
    import sys

    from hfcompress import cli

    with mock.patch.object(sys, "argv", ["hfcompress", *map(str, arguments)]):
        try:
            cli.main()
        except SystemExit as finished:
            return int(finished.code or 0)
    return 0


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes, to see that nothing was touched."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_rows(path: Path, rows: Any, sizes: dict[str, int], seed: int = 0) -> Path:
    """A .jsonl file for each split, filled with what `rows` makes of a random generator and a row's number."""
    import json

    draw = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    for split, count in sizes.items():
        lines = [json.dumps(rows(draw, number)) for number in range(count)]
        (path / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_tags(path: Path) -> Path:
    """Words and tags: the first two good words begin a GOOD entity, the others go on with one; bad words likewise."""

    def row(draw: random.Random, _: int) -> dict[str, Any]:
        words, tags = [], []
        for kind, choice in draw.choices([("GOOD", GOOD), ("BAD", BAD)], k=3):
            count = draw.randint(1, 2)
            words += [draw.choice(NEUTRAL), draw.choice(choice[:2]), draw.choice(choice[2:])][: count + 1]
            tags += ["O", f"B-{kind}", f"I-{kind}"][: count + 1]
        return {"tokens": words, "ner_tags": tags}

    return write_rows(path, row, {"train": 96, "validation": 32, "test": 32})


def write_questions(path: Path) -> Path:
    """SQuAD's form: the answer is the one word of the context that is not neutral; some contexts need two windows."""

    def row(draw: random.Random, number: int) -> dict[str, Any]:
        words = draw.choices(NEUTRAL, k=26 if number % 4 == 0 else draw.randint(4, 10))
        place = draw.randrange(len(words))
        words[place] = draw.choice([*GOOD, *BAD])
        answer = {"text": [words[place]], "answer_start": [len(" ".join([*words[:place], ""]))]}
        return {"question": "was it", "context": " ".join(words), "answers": answer}

    return write_rows(path, row, {"train": 96, "validation": 32})


def write_inferences(path: Path) -> Path:
    """MNLI's form, with its names of splits: the hypothesis says good, neutral or bad things."""

    def row(draw: random.Random, number: int) -> dict[str, Any]:
        label = number % 3
        premise, hypothesis = (" ".join(draw.choices(NEUTRAL, k=draw.randint(2, 5))) for _ in range(2))
        return {"premise": premise, "hypothesis": f"{hypothesis} {draw.choice((GOOD, NEUTRAL, BAD)[label])}",
                "label": label}  # fmt: skip

    return write_rows(path, row, {"train": 96, "validation_matched": 33, "validation_mismatched": 36})


def write_similarities(path: Path) -> Path:
    """STS-B's form: two texts and a score, which is high where both are good and low where both are bad."""

    def row(draw: random.Random, _: int) -> dict[str, Any]:
        sides = [draw.random() < 0.5 for _ in range(2)]
        texts = [" ".join([*draw.choices(NEUTRAL, k=3), draw.choice(GOOD if side else BAD)]) for side in sides]
        return {"sentence1": texts[0], "sentence2": texts[1], "label": 2.5 * sum(sides)}

    return write_rows(path, row, {"train": 96, "validation": 32})


def write_corpus(path: Path, documents: int = 200, seed: int = 0) -> Path:
    """A text file, one document a line."""
    draw = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(draw.choices(WORDS[5:], k=draw.randint(5, 20))) for _ in range(documents)]
    (path / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
