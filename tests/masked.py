"""Short trainings of tiny models under masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfcompress.distillation.losses.hard_labels import HardLabels
from hfcompress.pruning.costs import Costs, Target
from hfcompress.recipe.loader import load
from hfcompress.training import trainer as training
from hfcompress.training.objective import Objective
from hfcompress.training.options import Train
from tests import factories

LABELS = {"LABEL_0": 0, "LABEL_1": 1}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def target(share: float = 0.5, heads: tuple[int, ...] = (4, 4), neurons: tuple[int, ...] = (64, 64), group: int = 1,
           least: tuple[int, int] = (1, 1), fixed: float = 100.0) -> Target:  # fmt: skip
    """Heads that cost 1,024 and neurons that cost 64, of which a share may stay."""
    costs = Costs(
        tuple(tuple(1024.0 * k for k in range(n + 1)) for n in heads),
        tuple(tuple(64.0 * group * k for k in range(n // group + 1)) for n in neurons),
        group,
        fixed,
    )
    return Target(costs, fixed + share * (costs.whole - fixed), *least)


def cost_of(costs: Costs, heads: Sequence[int], neurons: Sequence[int]) -> float:
    """The cost of keeping so many head groups and so many neurons of each layer."""
    kept = [block[count] for block, count in zip(costs.heads, heads, strict=True)]
    kept += [block[count // costs.group] for block, count in zip(costs.neurons, neurons, strict=True)]
    return costs.fixed + sum(kept)


def cost(target: Target, keep: Any) -> float:
    """The cost of the units that stay."""
    return cost_of(target.costs, [len(k.heads) for k in keep], [len(k.neurons) for k in keep])


def task_of(folder: Path, data: Path) -> Any:
    """The tiny world's task."""
    return load(factories.recipe(folder / "task.yaml", folder, data)).recipe.task


def rows_of(task: Any) -> dict[str, Any]:
    """Its encoded rows."""
    return {split: task.encode(task.read(split), factories.tokenizer(), LABELS) for split in ("train", "dev")}


def trained(model: Any, masks: Any, data: Path, folder: Path, callbacks: Any = (), **options: Any) -> float:
    """Trains a model under masks; its dev score under them."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    task = task_of(folder, data)
    train = Train(**({"epochs": 3.0, "batch_size": 16, "learning_rate": 1e-3, "logging_steps": 1} | options))
    return training.train(
        Objective(model, [HardLabels()], task, masks=masks), train, rows=rows_of(task),
        tokenizer=factories.tokenizer(), checkpoints=folder / "checkpoints", seed=7, callbacks=callbacks,
    )  # fmt: skip
