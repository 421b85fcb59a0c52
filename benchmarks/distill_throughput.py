"""Samples per second of a step on hidden states and attention, teacher included: hfcompress against TinyBERT's loop.

The reference re-implements TinyBERT's `task_distill.py`: rows padded to the maximum length when they
are tokenized, float32, eager attention, the teacher with an autograd graph, hidden states and score maps of all layers
of both, one shared projection with bias, losses read back each step. Both sides: the same two models, rows, batch
size, threads, losses and optimizer, in turns, ten steps each.

`--quick` takes smaller models; `--device cuda` runs on a GPU, with hfcompress in bfloat16 and BERT-base on 128 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, BertConfig, BertForSequenceClassification
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from hfcompress.data.sequence import TextClassification
from hfcompress.distillation.layer_map import pairs_of
from hfcompress.distillation.losses.base import LOSSES
from hfcompress.distillation.teachers import Member, TeacherEnsemble, Teachers
from hfcompress.models.shape import shape_of
from hfcompress.training import trainer as training
from hfcompress.training.arguments import make_arguments
from hfcompress.training.objective import Objective
from hfcompress.training.options import Train

# WordPiece lengths of SST-2's train split, at each twentieth: the median text has 10 tokens, the mean 13.3.
SST2 = [3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 11, 13, 14, 16, 18, 20, 23, 27, 33, 64]
TURN = 10
SIZES = {
    "quick": ((6, 384, 12, 1536), (3, 384, 12, 1536)),
    "full": ((12, 768, 12, 3072), (4, 312, 12, 1200)),
}


def bert(layers: int, hidden: int, heads: int, ffn: int) -> Any:
    """Builds a BERT of random weights: only speed is measured."""
    config = BertConfig(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=ffn)
    return BertForSequenceClassification(config)


def rows(count: int, longest: int) -> datasets.Dataset:
    """Makes encoded rows with the distribution of SST-2's lengths, stretched to `longest`."""
    draw = np.random.default_rng(0)
    lengths = np.interp(draw.uniform(0, 20, count), range(21), SST2).round().astype(int) * longest // 64
    lengths = np.maximum(lengths, 3)
    return datasets.Dataset.from_dict(
        {
            "input_ids": [draw.integers(1000, 30000, n).tolist() for n in lengths],
            "attention_mask": [[1] * n for n in lengths],
            "token_type_ids": [[0] * n for n in lengths],
            "length": lengths.tolist(),
            "labels": draw.integers(0, 2, count).tolist(),
            "index": list(range(count)),
        }
    )


def scores_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    """Eager attention that also returns its scores, as the published modeling file does."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask[..., : key.shape[-2]].clamp(min=-10000)
    probabilities = nn.functional.dropout(scores.softmax(-1), options.get("dropout", 0.0), module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), scores


class Reference:
    """The training loop of TinyBERT."""

    def __init__(
        self, teacher: Any, student: Any, data: datasets.Dataset, longest: int, batch: int, device: str
    ) -> None:
        AttentionInterface.register("scores", scores_attention)
        AttentionMaskInterface.register("scores", eager_mask)
        self.teacher, self.student = teacher.to(device), student.to(device).train()  # the teacher is in eval mode here
        for model in (self.teacher, self.student):
            model.set_attn_implementation("scores")
        self.project = nn.Linear(student.config.hidden_size, teacher.config.hidden_size).to(device)
        self.optimizer = torch.optim.AdamW([*self.student.parameters(), *self.project.parameters()], lr=5e-5)
        padded = {
            name: torch.tensor([row + [0] * (longest - len(row)) for row in data[name]], device=device)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        self.batches = self._batches(padded, batch)

    def _batches(self, padded: dict[str, Tensor], batch: int) -> Iterator[dict[str, Tensor]]:
        while True:
            for index in torch.randperm(len(padded["input_ids"])).split(batch):
                if len(index) == batch:
                    yield {name: value[index.to(value.device)] for name, value in padded.items()}

    def step(self) -> float:
        """Takes one step and returns its loss."""
        batch = next(self.batches)
        show = {"output_hidden_states": True, "output_attentions": True}
        student, teacher = self.student(**batch, **show), self.teacher(**batch, **show)
        block = len(teacher.attentions) // len(student.attentions)
        loss = torch.zeros((), device=student.logits.device)
        for index, scores in enumerate(student.attentions):
            taught = teacher.attentions[index * block + block - 1].detach()
            own = torch.where(scores <= -1e2, torch.zeros_like(scores), scores)
            loss = loss + nn.functional.mse_loss(own, torch.where(taught <= -1e2, torch.zeros_like(taught), taught))
        for index, states in enumerate(student.hidden_states):
            loss = loss + nn.functional.mse_loss(self.project(states), teacher.hidden_states[index * block].detach())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Ours:
    """The training path of hfcompress, one step at a time."""

    def __init__(
        self,
        student: Any,
        teacher: Member,
        shape: Any,
        losses: list[str],
        data: datasets.Dataset,
        longest: int,
        batch: int,
        device: str = "cpu",
    ) -> None:
        task = TextClassification(type="text-classification", dataset=".", text=["text"], max_length=longest)
        own = shape_of(student.config.to_dict())
        pairs = pairs_of("uniform", len(own.layers), len(shape.layers))
        self.objective = Objective(student, [LOSSES.parse(name) for name in losses], task, shape, pairs)
        train = Train(batch_size=batch, logging_steps=10**6, precision="auto" if device == "cuda" else "float32")
        with TemporaryDirectory() as folder:
            arguments = make_arguments(train, Path(folder), 0, len(data), "accuracy")
        self.trainer = training.CompressionTrainer(
            self.objective.to(device),
            arguments,
            options=train,
            rows={"train": data, "dev": data},
            tokenizer=padding_tokenizer(),
            teachers=TeacherEnsemble([teacher], Teachers(models=["source"]), task),
            callbacks=[],
        )
        self.trainer.current_gradient_accumulation_steps = 1  # what Trainer.train sets before its first step
        self.optimizer = self.trainer.create_optimizer()
        self.batches = self._batches()

    def _batches(self) -> Iterator[Any]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def step(self) -> None:
        """Takes one step as the Trainer does."""
        self.trainer.training_step(self.objective, next(self.batches))
        nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def in_turns(sides: list[Any], turns: int, device: str = "cpu") -> list[float]:
    """Times `TURN` steps of each side in turns; returns the median seconds. The first turn warms up."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(turns):
        for side, kept in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            for _ in range(TURN):
                side.step()
            if device == "cuda":
                torch.cuda.synchronize()
            kept.append(time.perf_counter() - start)
    return [statistics.median(kept[1:]) for kept in seconds]


def main() -> None:
    """Prints both sides and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    longest, turns = (128, 12) if options.device == "cuda" else (64, 4 if options.quick else 6)
    shapes = SIZES["quick" if options.quick else "full"]
    torch.manual_seed(0)
    data, teacher = rows(4096, longest), bert(*shapes[0]).eval()
    sides = [
        Ours(
            bert(*shapes[1]),
            Member("teacher", teacher, padding_tokenizer()),
            shape_of(teacher.config.to_dict()),
            ["embeddings", "hidden_states", "attention_scores"],
            data,
            longest,
            options.batch,
            options.device,
        ),
        Reference(bert(*shapes[0]).eval(), bert(*shapes[1]), data, longest, options.batch, options.device),
    ]
    ours, theirs = (options.batch * TURN / seconds for seconds in in_turns(sides, turns, options.device))
    print(f"{torch.get_num_threads()} threads, batch {options.batch}, teacher {shapes[0]}, student {shapes[1]}")
    print(f"the reference loop: {theirs:8.1f} samples/s")
    print(f"hfcompress:         {ours:8.1f} samples/s")
    print(f"ratio: {ours / theirs:.2f} (target {6 if options.device == 'cuda' else 4}.00)")


def padding_tokenizer() -> Any:
    """Makes a tokenizer that only pads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0}, "[PAD]")), pad_token="[PAD]"
    )


if __name__ == "__main__":
    main()
