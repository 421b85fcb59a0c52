"""A tiny world, made from code: words, a data set that can be learnt, encoders of every supported family."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

GOOD, BAD = ["good", "fine", "great", "lovely"], ["bad", "poor", "awful", "dull"]
NEUTRAL = ["the", "film", "was", "and", "story", "a", "plot", "cast", "very", "it"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *NEUTRAL]


def tokenizer() -> Any:
    """A fast WordPiece tokenizer over `WORDS`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip


def model(family: str = "bert", layers: int = 2, hidden: int = 32, heads: int = 4, ffn: int = 64, labels: int = 2,
          seed: int = 0, **config: Any) -> Any:  # fmt: skip
    """A random classifier of a family, in eval mode; every bias and layer norm is random too, so that none is idle."""
    import torch
    import transformers as t

    sizes: dict[str, Any] = {"vocab_size": len(WORDS), "num_labels": labels, "max_position_embeddings": 40}
    if family == "distilbert":
        sizes |= {"n_layers": layers, "dim": hidden, "n_heads": heads, "hidden_dim": ffn}
        made, cls = t.DistilBertConfig(**sizes, **config), t.DistilBertForSequenceClassification
    else:
        sizes |= {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
                  "intermediate_size": ffn}  # fmt: skip
        if family == "roberta":
            sizes |= {"pad_token_id": 0, "type_vocab_size": 1}
        made = (t.RobertaConfig if family == "roberta" else t.BertConfig)(**sizes, **config)
        cls = t.RobertaForSequenceClassification if family == "roberta" else t.BertForSequenceClassification
    torch.manual_seed(seed)
    built = cls(made)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval()


def save(built: Any, path: Path) -> Path:
    """A model directory with tokenizer."""
    built.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


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


def fine_tuned(path: Path, data: Path, family: str = "bert", steps: int = 60, **shape: Any) -> Path:
    """A teacher that has learnt the data."""
    import torch

    built, words = model(family, **shape).train(), tokenizer()
    lines = [line.split("\t") for line in (data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    batch = words([text for text, _ in lines], padding=True, return_tensors="pt")
    labels = torch.tensor([int(label) for _, label in lines])
    if family == "distilbert":
        batch.pop("token_type_ids", None)
    optimizer = torch.optim.AdamW(built.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = built(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save(built.eval(), path)


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
        "measure": {"latency": {"batch_sizes": [1, 8], "rounds": 1, "rows": 8, "threads": 1}, "bootstrap": 100},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False), encoding="utf-8")
    return path
