"""`attention_scores` from Gram matrices against the same loss from attention maps: forward and backward of one layer.

Both sides: 8 x 512 tokens (every fourth row half padded), 12 heads of 64, student and teacher. Memory is the peak of a
fresh process less its memory before, with a malloc that returns freed memory at once. Times are taken in one process,
in turns. `--quick` runs fewer rounds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor

from hfcompress.distillation.losses.attention_scores import AttentionScores
from hfcompress.measure.worker import resident_peak
from hfcompress.models.forward import Observation
from hfcompress.training.loss import Step

ROWS, HEADS, LENGTH, WIDTH = 8, 12, 512, 64
TIME_TARGET, MEMORY_TARGET = 0.60, 0.25


def step(length: int = LENGTH) -> Step:
    """Makes random queries and keys with a model's strides; those of the student have gradients."""
    generator = torch.Generator().manual_seed(0)

    def heads(student: bool) -> dict[int, Tensor]:
        flat = torch.randn(ROWS, length, HEADS * WIDTH, generator=generator, requires_grad=student)
        return {1: flat.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)}

    mask = torch.ones(ROWS, length, dtype=torch.bool)
    mask[::4, length // 2 :] = False
    logits = torch.zeros(ROWS, 2)
    student, teacher = (Observation(logits, (), heads(own), heads(own)) for own in (True, False))
    task: Any = SimpleNamespace(head="sequence")
    return Step(student, teacher, mask, None, ((1, 1),), task)


def gram(seen: Step) -> Tensor:
    """Computes the loss from Gram matrices, as hfcompress does."""
    return AttentionScores().compute(seen, None)


def maps(seen: Step) -> Tensor:
    """Computes the loss by its formula, over pairs of real tokens."""
    student, teacher = (
        observed.queries[1] @ observed.keys[1].transpose(-1, -2) / WIDTH**0.5
        for observed in (seen.student, seen.require_teacher())
    )
    pairs = (seen.mask.unsqueeze(2) & seen.mask.unsqueeze(1)).unsqueeze(1)
    return ((student - teacher) * pairs).pow(2).sum() / (pairs.sum() * HEADS)


SIDES = {"gram": gram, "maps": maps}


def seconds(side: str, seen: Step) -> float:
    """Times one forward and backward pass."""
    start = time.perf_counter()
    SIDES[side](seen).backward()
    return time.perf_counter() - start


def peak(side: str) -> int:
    """Measures the peak memory of a side in this process, in bytes."""
    seconds(side, step(16))  # the first step also allocates what the libraries keep
    seen = step()
    before = psutil.Process().memory_info().rss
    seconds(side, seen)
    return resident_peak() - before


def peak_of_its_own(side: str) -> int:
    """Runs `peak` in a fresh process."""
    command, giving_back = [sys.executable, __file__, "--peak", side], {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | giving_back)
    return int(done.stdout)


def main() -> None:
    """Prints both sides, and the ratios of their times and peaks."""
    if "--peak" in sys.argv:
        print(peak(sys.argv[-1]))
        return
    rounds = 5 if "--quick" in sys.argv else 20
    seen = step()
    values = {side: function(seen).item() for side, function in SIDES.items()}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            times[side].append(seconds(side, seen))
    medians = {side: statistics.median(taken) for side, taken in times.items()}
    peaks = {side: peak_of_its_own(side) for side in SIDES}
    for side in SIDES:
        print(f"{side}: loss {values[side]:.6f}, {medians[side] * 1e3:.1f} ms, {peaks[side] / 1e6:.0f} MB")
    print(f"time ratio: {medians['gram'] / medians['maps']:.2f} (target at most {TIME_TARGET:.2f})")
    print(f"ratio: {peaks['gram'] / peaks['maps']:.2f} (target at most {MEMORY_TARGET:.2f})")


if __name__ == "__main__":
    main()
