"""Two processes make what one makes."""

from __future__ import annotations

import json
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from hfcompress.context import StageContext
from hfcompress.data.tasks import AnyTask
from hfcompress.models.artifact import label_ids, load_model, load_tokenizer, open_artifact, read_config
from hfcompress.recipe.loader import load
from hfcompress.training import evaluate
from hfcompress.utils.distributed import process_state
from hfcompress.utils.errors import HfcompressError
from tests import factories
from tests.two_processes import ACCELERATE, END, RUN_STAGES, TORCHRUN, launch, run_two_processes

SCRIPTS = Path(__file__).parents[2] / "scripts"

SCORES = """
import numpy as np
from pydantic import TypeAdapter
from hfcompress.data.tasks import AnyTask
from hfcompress.models.artifact import label_ids, load_model, load_tokenizer, read_config
from hfcompress.training import evaluate
evaluate.BATCH = 21
for path in sorted((target / "heads").iterdir()):
    task = TypeAdapter(AnyTask).validate_json((path / "task.json").read_text())
    tokenizer, model = load_tokenizer(path, task), load_model(path, task.auto_class).train()
    rows = task.encode(task.read("train"), tokenizer, label_ids(read_config(path)))
    outputs, order = evaluate.predict(model, rows, tokenizer, task, shared=True)
    assert model.training
    score = evaluate.score(model, rows, tokenizer, task, shared=True)
    np.savez(path / f"{os.environ['RANK']}.npz", outputs=outputs, order=order, score=score)
"""


def _stages(batch_size: int) -> list[dict[str, Any]]:
    # Means over rows and over tokens, of which two half batches have different numbers.
    train = {"epochs": 2, "learning_rate": 1e-3, "batch_size": batch_size, "logging_steps": 1, "keep_best": True}
    return [
        {"kind": "distill", "student": {"hidden": 16, "ffn": 32}, "losses": ["soft_labels", "hard_labels"],
         "train": train},
        {"kind": "prune", "heads": 0.25, "ffn": 0.25, "criterion": {"use": "taylor", "rows": 32}, "multiple_of": 1,
         "recover": {"epochs": 1, "batch_size": batch_size, "losses": ["hidden_states", "soft_labels"]}},
        # Three batches: one process has two of them.
        {"kind": "prune", "criterion": {"use": "fisher", "rows": 48, "batch_size": 16}, "budget": {"macs": 0.7},
         "multiple_of": 1, "rearrange": True, "tune": "scales"},
        {"kind": "prune", "criterion": {"use": "obs", "rows": 16, "batch_size": 16}, "ffn": 0.25, "multiple_of": 1},
        {"kind": "prune", "criterion": {"use": "wanda", "rows": 48}, "weights": {"share": 0.25}},
    ]  # fmt: skip


@dataclass
class Both:
    """Folders of the stages that one and that two processes made, and what each of the two printed."""

    one: Path
    two: Path
    printed: list[str]

    def compare(self, file: str) -> None:
        one, two = (load_file(path / file) for path in (self.one, self.two))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            # A key's bias adds the same to every score of a query: its gradient is rounding, which Adam blows up.
            if not name.endswith("attention.self.key.bias"):
                torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


HEADS = {
    "sequence": ({"type": "text-classification", "text": ["sentence"]}, ["0", "1"], None),
    "token": ({"type": "token-classification"}, ["O", "B-GOOD", "I-GOOD", "B-BAD", "I-BAD"], factories.write_tags),
    "span": ({"type": "question-answering", "stride": 8}, ["0", "1"], factories.write_questions),
    "mask": ({"type": "fill-mask"}, ["0", "1"], factories.write_corpus),
}
"""By the kind of task head: the task, its labels and what writes its rows."""


def _write_head(path: Path, rows: Path, head: str, data: Path) -> None:
    """A random model with a task head, and the task that it is scored on."""
    task, labels, write = HEADS[head]
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    factories.save(factories.model(head=head, labels=len(labels), **names), path)
    place = write(rows / head) if write else data
    (path / "task.json").write_text(json.dumps({**task, "dataset": str(place), "max_length": 24}))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Both:
    folder = tmp_path_factory.mktemp("distributed")
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # processes draw other dropout masks
    teacher = factories.fine_tuned(folder / "teacher", data, **calm)
    recipe = load(factories.recipe(folder / "one.yaml", teacher, data, stages=_stages(16))).recipe
    source = parent = open_artifact(teacher)
    for name, stage in zip(recipe.stage_names(), recipe.stages, strict=True):
        context = StageContext(recipe.task, recipe.seed, source, {}, folder / "one" / name)
        result = stage.run(parent, context)
        parent = open_artifact(result.directory, name)
        (folder / "one" / name / "facts.json").write_text(json.dumps(dict(result.facts)))
    (folder / "script.py").write_text(RUN_STAGES + SCORES + END)
    for head in HEADS:
        _write_head(folder / "two" / "heads" / head, folder / "rows", head, data)
    recipe_file = factories.recipe(folder / "two.yaml", teacher, data, stages=_stages(8))
    printed = run_two_processes(folder / "script.py", folder / "home", recipe_file, folder / "two")
    return Both(folder / "one", folder / "two", printed)


def test_two_processes_with_half_the_batch_train_the_same_student(both: Both) -> None:
    both.compare("01-distill/model/model.safetensors")


def test_two_processes_score_a_teacher_as_one_does(both: Both) -> None:
    facts = [json.loads((both.two / "01-distill" / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert facts[0] == facts[1]
    assert facts[0]["teacher"] == json.loads((both.one / "01-distill" / "facts.json").read_text())["teacher"]


@pytest.mark.parametrize("head", HEADS)
def test_processes_that_share_rows_predict_and_score_what_one_does_to_the_bit(
    both: Both, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch is not full, and where their number is odd the first process has one more."""
    monkeypatch.setattr(evaluate, "BATCH", 21)
    path = both.two / "heads" / head
    task: Any = TypeAdapter(AnyTask).validate_json((path / "task.json").read_text())
    tokenizer, model = load_tokenizer(path, task), load_model(path, task.auto_class)
    rows = task.encode(task.read("train"), tokenizer, label_ids(read_config(path)))
    outputs, order = evaluate.predict(model, rows, tokenizer, task)
    assert sorted(order) == list(range(len(rows)))
    assert len(rows) % 21, "the last batch is full"
    for rank in (0, 1):
        found = np.load(path / f"{rank}.npz")
        assert found["order"].tolist() == order
        assert np.array_equal(found["outputs"], outputs)
        assert found["score"] == evaluate.score(model, rows, tokenizer, task)


@pytest.mark.parametrize("stage", ["03-prune", "04-prune", "05-prune"])
def test_two_processes_score_choose_and_update_the_same(both: Both, stage: str) -> None:
    one, two = (open_artifact(folder / stage / "model").shape for folder in (both.one, both.two))
    assert one == two
    both.compare(f"{stage}/model/model.safetensors")


def test_two_processes_keep_the_same_answers_of_the_teacher(both: Both) -> None:
    (theirs,) = (both.two.parent / "home" / "teachers").iterdir()
    ours = Path(os.environ["HFCOMPRESS_HOME"]) / "teachers" / theirs.name
    assert {file.name: file.read_bytes() for file in ours.iterdir()} == {
        file.name: file.read_bytes() for file in theirs.iterdir()
    }


def test_two_processes_cut_the_same_units_and_recover_alike(both: Both) -> None:
    both.compare("02-prune/cut/model.safetensors")
    both.compare("02-prune/model/model.safetensors")


def test_only_the_first_process_prints_and_saves(both: Both) -> None:
    first, second = both.printed
    assert first.count("said once") == 1
    assert first.count("teacher: source") == 1
    assert "step 1 of 12: loss" in first
    for word in ("said once", "teacher:", "step 1 of", "Writing model"):
        assert word not in second
    assert (both.two / "second.txt").read_text() == "None"  # the second never loaded what the first saved


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("distill", ["run", "--only", "distill"]),
        ("prune", ["run", "--only", "prune"]),
        ("quantize", ["run", "--only", "quantize"]),
        ("evaluate", ["evaluate"]),
        ("run", ["run"]),
    ],
)
def test_a_script_is_a_command_and_does_not_hide_the_library_evaluate(
    script: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("hfcompress.cli.main", lambda: called.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])  # as `python scripts/…` starts
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "my.yaml"])
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert called == [[*words, "my.yaml"]]
    assert str(SCRIPTS) not in sys.path


def test_a_launcher_that_starts_one_process_of_two_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # What `accelerate launch --cpu --num_processes 2` sets where there is no MPI.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(HfcompressError, match=r"several processes were asked for.*\n.*torchrun --nproc_per_node 2"):
        process_state()


@pytest.mark.slow
def test_a_script_under_accelerate_runs_its_stages_and_resumes(tmp_path: Path, teacher: Path, data: Path) -> None:
    recipe = factories.recipe(tmp_path / "recipe.yaml", teacher, data)
    done = launch(ACCELERATE, tmp_path, SCRIPTS / "distill.py", recipe)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "recipe.lock.json").read_text())["processes"] == 2
    assert [row["stage"] for row in json.loads((run / "report.json").read_text())["rows"]] == ["source", "01-distill"]
    assert done.stdout.count("card ") == 1

    done = launch(TORCHRUN, tmp_path, SCRIPTS / "prune.py", recipe)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("01-distill: done before") == 1
    assert [p.name for p in sorted(run.glob("0*"))] == ["01-distill", "02-prune"]


@pytest.mark.slow
def test_a_mistake_is_told_and_ends_both_processes(tmp_path: Path, data: Path) -> None:
    untrained = factories.save(factories.model(), tmp_path / "untrained")
    recipe = factories.recipe(tmp_path / "recipe.yaml", untrained, data)
    done = launch(TORCHRUN, tmp_path, SCRIPTS / "distill.py", recipe)
    assert done.returncode != 0
    assert "is at chance" in done.stderr
    assert "name a model that was fine-tuned for this task" in done.stderr
    assert "hfcompress/cli.py" not in done.stderr  # no traceback of ours
    assert not (tmp_path / "runs" / "tiny" / "01-distill").exists()
