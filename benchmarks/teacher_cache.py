"""Steps on the teacher's logits from the cache against steps with a live teacher, 12 to 4 layers.

Both sides are the training path of hfcompress on the same rows, in turns of ten steps. It also prints the time to fill
the cache once. `--quick` takes fewer turns.
"""

from __future__ import annotations

import os
import sys
import time
from tempfile import TemporaryDirectory

import torch
from distill_throughput import SIZES, Ours, bert, in_turns, padding_tokenizer, rows

from hfcompress.data.sequence import TextClassification
from hfcompress.distillation.fill_cache import fill_teacher_cache
from hfcompress.distillation.teachers import Member
from hfcompress.models.shape import shape_of

BATCH, LENGTH, TARGET = 32, 64, 5.0


def main() -> None:
    """Prints both sides and their ratio."""
    quick = "--quick" in sys.argv
    torch.manual_seed(0)
    data, tokenizer = rows(512 if quick else 2048, LENGTH), padding_tokenizer()
    task = TextClassification(type="text-classification", dataset=".", text=["text"], max_length=LENGTH)
    teacher, students = bert(*SIZES["full"][0]).eval(), [bert(*SIZES["full"][1]) for _ in range(2)]
    with TemporaryDirectory() as home:
        os.environ["HFCOMPRESS_HOME"] = home
        start = time.perf_counter()
        answers = fill_teacher_cache(teacher, tokenizer, data, task, "logits", weights="random", fingerprint="random")
        fill = time.perf_counter() - start
        members = [Member("cached", None, tokenizer, answers=answers), Member("live", teacher, tokenizer)]
        shape = shape_of(teacher.config.to_dict())
        sides = [
            Ours(student, member, shape, ["soft_labels"], data, LENGTH, BATCH)
            for student, member in zip(students, members, strict=True)
        ]
        cached, live = in_turns(sides, 3 if quick else 8)
    print(f"{torch.get_num_threads()} threads, batch {BATCH}, teacher {SIZES['full'][0]}, student {SIZES['full'][1]}")
    print(f"filling the cache: {fill:.1f} s for {len(data):,} rows, once")
    print(f"live teacher:      {live * 100:8.1f} ms a step")
    print(f"cached answers:    {cached * 100:8.1f} ms a step")
    print(f"ratio: {live / cached:.2f} (target {TARGET:.2f})")


if __name__ == "__main__":
    main()
