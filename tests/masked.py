"""Short trainings of tiny models under masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hfcompress.distillation.losses.hard_labels import HardLabels
from hfcompress.pruning.costs import Costs, Target
from hfcompress.recipe.loader import load
from hfcompress.training import trainer as training
from hfcompress.training.objective import Objective
from hfcompress.training.options import Train
from hfcompress.training.overlay import TrainingOverlay
from tests import factories
from tests.two_processes import run_two_processes

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


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def assert_an_interruption_changes_nothing(
    lay: Callable[[Any], TrainingOverlay], data: Path, folder: Path, stop: int, every: int
) -> None:
    """Six steps under masks end where six steps do that stopped after one and went on from a checkpoint."""

    def run(name: str, callbacks: Any = ()) -> dict[str, torch.Tensor]:
        model = factories.model()
        masks = lay(model)
        before = {name: tensor.clone() for name, tensor in masks.state_dict().items()}
        trained(model, masks, data, folder / name, callbacks, epochs=1.0, checkpoint_steps=every)
        after = masks.state_dict()
        assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())
        return {**model.state_dict(), **{f"masks.{name}": tensor for name, tensor in after.items()}}

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", [Interrupt(stop)])
    resumed = run("parts")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


SCRIPT = """
import importlib, sys
from pathlib import Path
root, module, kind, data, folder, epochs = sys.argv[1:]
sys.path.insert(0, root)
from safetensors.torch import save_file
from hfcompress.utils.distributed import process_state
from tests import factories, masked

process_state()
model = factories.model(**masked.CALM)
masks = importlib.import_module(module).KINDS[kind](model)
rank = process_state().process_index
masked.trained(model, masks, Path(data), Path(folder) / str(rank), epochs=float(epochs), batch_size=8)
save_file(masks.state_dict() | model.state_dict(), Path(folder) / f"{rank}.safetensors")
process_state().wait_for_everyone()
process_state().destroy_process_group()
"""


def assert_two_processes_train_as_one(
    module: str, kind: str, lay: Callable[[Any], TrainingOverlay], data: Path, folder: Path, epochs: float, atol: float
) -> None:
    """The masks `KINDS[kind]` of a test module, trained by one process and by two, without dropout."""
    model = factories.model(**CALM)
    masks = lay(model)
    trained(model, masks, data, folder / "one", epochs=epochs)
    (folder / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[1]
    run_two_processes(folder / "script.py", folder / "home", root, module, kind, data, folder, epochs)
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in (0, 1))
    for name, tensor in (masks.state_dict() | model.state_dict()).items():
        torch.testing.assert_close(second[name], first[name], atol=0, rtol=0)
        if not name.endswith("attention.self.key.bias"):
            torch.testing.assert_close(
                first[name], tensor, atol=atol, rtol=10 * atol, msg=lambda m, n=name: f"{n}: {m}"
            )
