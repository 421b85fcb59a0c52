"""The Python API: objects in, objects out."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

import hfcompress as hfc
from hfcompress.data.objects import save_dataset
from tests import factories, loopback_hub

pytestmark = pytest.mark.usefixtures("in_process")

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK: dict[str, Any] = {
    "latency": {"batch_sizes": [1], "rounds": 1, "rows": 4, "threads": 1, "cold_starts": 0},
    "bootstrap": 100,
}


@pytest.fixture(scope="module")
def loaded(teacher: Path, data: Path) -> Any:
    """A model, its tokenizer and rows, in memory."""
    splits = {name: datasets.Dataset.from_csv(str(data / f"{name}.tsv"), sep="\t") for name in ("train", "dev", "test")}
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    rows = datasets.DatasetDict({name: rows for name, rows in splits.items() if isinstance(rows, datasets.Dataset)})
    return SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(teacher), rows=rows)


def accuracy(model: Any, tokenizer: Any, rows: datasets.Dataset) -> float:
    with torch.no_grad():
        logits = model(**tokenizer(rows["sentence"][:], padding=True, return_tensors="pt")).logits
    return float((logits.argmax(-1) == torch.tensor(rows["label"][:])).float().mean())


def test_every_name_is_there_and_importing_the_package_needs_no_torch() -> None:
    program = (
        "import sys, hfcompress; assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules; "
        "assert all(getattr(hfcompress, name) is not None for name in hfcompress.__all__)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Recipee'"):
        _ = hfc.Recipee


def test_a_model_in_memory_is_pruned(loaded: Any) -> None:
    small = hfc.prune(loaded.model, loaded.tokenizer, loaded.rows, macs=0.5)
    assert small.num_parameters() < loaded.model.num_parameters()
    assert not small.training
    assert accuracy(small, loaded.tokenizer, loaded.rows["dev"]) > 0.8


def test_a_model_in_memory_is_distilled(loaded: Any) -> None:
    student = hfc.distill(loaded.model, loaded.tokenizer, loaded.rows, layers=1, epochs=6, learning_rate=3e-3)
    assert student.config.num_hidden_layers == 1
    assert accuracy(student, loaded.tokenizer, loaded.rows["dev"]) > 0.8


def test_a_model_in_memory_is_quantized(loaded: Any, tmp_path: Path) -> None:
    small = hfc.quantize(loaded.model, loaded.tokenizer, loaded.rows)
    assert small.config.quantization_config.quant_method == "hfcompress_int8"  # type: ignore[union-attr]
    made = hfc.quantize(loaded.model, loaded.tokenizer, loaded.rows, backend="onnx_int8", output=tmp_path / "int8")
    assert isinstance(made, Path)
    assert (made / "onnx" / "model_quantized.onnx").is_file()


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x, _: hfc.prune(x.model, None, x.rows, macs=0.5), "a model in memory needs its tokenizer"),
        (lambda x, _: hfc.quantize(x.model, x.tokenizer, x.rows, backend="onnx_int8"), "give `output`"),
        (lambda x, folder: hfc.prune(x.model, x.tokenizer, x.rows, macs=0.5, output=folder), "exists"),
        (lambda x, _: hfc.prune(x.model, x.tokenizer, x.rows, vocabulary="corpus"), "changes the tokenizer"),
        (lambda x, _: hfc.prune(x.model, x.tokenizer, [1, 2], macs=0.5), "not list"),
        (lambda x, _: hfc.prune(x.model, x.tokenizer, {"trian": x.rows["train"]}, macs=0.5), "a split 'trian'"),
        (lambda x, _: hfc.prune(x.model, x.tokenizer, x.rows.rename_column("label", "y"), macs=0.5), "sentence, y"),
        (lambda x, _: hfc.prune(x.model, x.tokenizer, "somewhere", macs=0.5), "give `task=`"),
        (lambda x, _: hfc.evaluate([x.model], tokenizer=x.tokenizer), "give `dataset=` or `task=`"),
        (lambda x, _: hfc.evaluate([], x.rows), "at least one"),
    ],
)
def test_what_is_missing_is_said(loaded: Any, tmp_path: Path, call: Callable[[Any, Path], Any], why: str) -> None:
    with pytest.raises(hfc.HfcompressError) as caught:
        call(loaded, tmp_path)
    assert why in str(caught.value)


def test_a_task_that_cannot_be_told_is_asked_for(loaded: Any) -> None:
    tagger = AutoModelForTokenClassification.from_config(loaded.model.config)
    with pytest.raises(hfc.HfcompressError, match="ForTokenClassification"):
        hfc.prune(tagger, loaded.tokenizer, loaded.rows, macs=0.5)


def test_a_recipe_of_objects_runs_resumes_and_shows_its_report(loaded: Any, tmp_path: Path) -> None:
    def run() -> hfc.Run:
        task = hfc.TextClassification(dataset=loaded.rows, text=["sentence"], max_length=16)
        stages = [hfc.Distill(student=hfc.Student(layers=1), losses=["soft_labels"], train=hfc.Train(epochs=1))]
        recipe = hfc.Recipe(loaded.model, task, stages, tokenizer=loaded.tokenizer, measure=QUICK)
        assert [len(shape.layers) for shape in recipe.plan()] == [2, 1]
        return recipe.run(tmp_path / "run")

    first = run()
    made = (first.directory / "01-distill" / "model.safetensors").stat().st_mtime_ns
    again = run()
    assert (first.directory / "01-distill" / "model.safetensors").stat().st_mtime_ns == made
    assert dict(again.report) == dict(first.report)
    assert [row["stage"] for row in first.report.rows] == ["source", "01-distill"]
    assert "01-distill" in first.report._repr_html_()
    assert list(first.report.to_pandas()["model"]) == ["source", "01-distill"]
    model, tokenizer = first.load()
    assert model(**tokenizer("a good film", return_tensors="pt")).logits.shape == (1, 2)
    assert (
        hfc.Recipe.load(first.directory / "recipe.yaml").plan()
        == hfc.Recipe.load(first.directory / "recipe.yaml", "seed=42").plan()
    )


def test_a_component_of_ones_own_is_trained_with(teacher: Path, data: Path, tmp_path: Path) -> None:
    class Halved(hfc.Loss):
        """Half of the squared difference of the logits."""

        needs_logits: ClassVar[bool] = True

        def compute(self, step: Any, learned: Any) -> torch.Tensor:
            return (step.student.logits - step.require_teacher().logits).pow(2).mean() / 2

    task = hfc.TextClassification(dataset=str(data), text=["sentence"], max_length=16)
    stage = hfc.Distill(student=hfc.Student(layers=1), losses=[Halved()], train=hfc.Train(epochs=1))
    run = hfc.Recipe(teacher, task, [stage], measure=QUICK).run(tmp_path / "run")
    assert [row["stage"] for row in run.report.rows] == ["source", "01-distill"]
    assert run.load()[0].config.num_hidden_layers == 1


def test_a_data_set_is_written_once_by_its_content_with_the_names_of_its_labels() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"] * 20, "label": [0, 1] * 20})
    named = rows.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    first, again, other = save_dataset(rows), save_dataset(rows.map(lambda row: row)), save_dataset(named)
    assert first == again != other
    task = hfc.TextClassification(dataset=named, text=["text"])
    assert task.dataset == other
    assert task.label_names() == ["no", "yes"]
    assert {len(task.read("train")), len(task.read("dev"))} == {36, 4}


@pytest.fixture
def csv(data: Path, tmp_path: Path) -> str:
    """The rows as .csv files."""
    (tmp_path / "csv").mkdir()
    for split in ("train", "dev", "test"):
        text = (data / f"{split}.tsv").read_text(encoding="utf-8").replace("\t", ",")
        (tmp_path / "csv" / f"{split}.csv").write_text(text, encoding="utf-8")
    return str(tmp_path / "csv")


def example(name: str) -> Any:
    """The `main` of a script in `examples/`."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_the_examples_are_short() -> None:
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 30 for path in EXAMPLES.glob("*.py"))


def test_example_csv_to_int8(teacher: Path, csv: str, tmp_path: Path) -> None:
    example("csv_to_int8")(str(teacher), csv, str(tmp_path / "run"))
    assert (tmp_path / "run" / "final" / "onnx" / "model_quantized.onnx").is_file()


def test_example_prune_in_memory(teacher: Path, csv: str, capsys: pytest.CaptureFixture[str]) -> None:
    example("prune_in_memory")(str(teacher), csv)
    assert "parameters before" in capsys.readouterr().out


def test_example_custom_loss(teacher: Path, csv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("custom_loss")(str(teacher), csv, str(tmp_path / "run"))
    assert "01-distill" in capsys.readouterr().out


def test_example_judge_three(teacher: Path, csv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [str(factories.save(factories.model(seed=seed), tmp_path / f"other-{seed}")) for seed in (1, 2)]
    example("judge_three")(csv, str(teacher), *others)
    assert f"the most accurate: {'/'.join(teacher.parts[-2:])}" in capsys.readouterr().out


def test_example_publish(teacher: Path, csv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = hfc.TextClassification(dataset=csv, text=["sentence"], max_length=16)
    run = hfc.Recipe(teacher, task, [hfc.Quantize(backend="float16")], measure=QUICK, hub={"license": "mit"}).run(
        tmp_path / "run"
    )
    with loopback_hub.running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for name, value in {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, value)
        command = [sys.executable, str(EXAMPLES / "publish.py"), str(run.directory), "user/tiny"]
        subprocess.run(command, check=True, timeout=120)
        assert ("model", "user/tiny") in hub.repositories
