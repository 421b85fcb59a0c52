"""Input that cannot be used: each says what is wrong, ends with 2, and leaves every file as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from hfcompress.recipe.loader import Loaded, load
from hfcompress.run import directory as run_directory
from hfcompress.run import runner
from hfcompress.utils.errors import HfcompressError, disk_problem
from tests import factories
from tests.factories import copy_directory, run_cli, snapshot

Refused = Callable[..., str]


def opened(loaded: Loaded, directory: Path, fresh: bool = False, largest: int = 0) -> None:
    """Takes a run directory and gives it back."""
    with ExitStack() as stack:
        run_directory.open_run(stack, loaded, directory, fresh, largest)


@pytest.fixture
def runs(tmp_path: Path, recipe: Path) -> Path:
    """A run directory of the recipe, with something in it that took long to make."""
    directory = tmp_path / "runs"
    opened(load(recipe), directory)
    (directory / "01-distill").mkdir()
    (directory / "01-distill" / "model.safetensors").write_bytes(b"hours of work")
    return directory


@pytest.fixture
def refused(runs: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What `run` says; it ends with 2 and touches nothing, even where it was told to start over."""

    def run(*arguments: object, recipe_file: Path = recipe, output: Path = runs, fresh: bool = True) -> str:
        before = snapshot(output if output.is_dir() else output.parent)
        started = ["--fresh"] if fresh else []
        assert run_cli("run", recipe_file, "--output", output, *started, *arguments) == 2
        assert snapshot(output if output.is_dir() else output.parent) == before
        said = capsys.readouterr().err
        assert said.startswith("error: ") or "\nerror: " in said
        assert "Traceback" not in said
        return said

    return run


# --- the recipe


def test_a_recipe_that_is_none(refused: Refused, tmp_path: Path) -> None:
    """Each reason is in test_loader.py."""
    path = tmp_path / "bad.yaml"
    path.write_text("name: a: b\n")
    assert "not YAML" in refused(recipe_file=path)


# --- the model


def test_a_model_directory_without_weights(refused: Refused, teacher: Path, tmp_path: Path) -> None:
    model = copy_directory(teacher, tmp_path / "model", "*.safetensors")
    said = refused("--set", f"model={model}")
    assert f"{model} holds no weights" in said
    assert "model.safetensors" in said


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_model_directory_with_pickled_weights_only(
    refused: Refused, teacher: Path, tmp_path: Path, name: str
) -> None:
    model = copy_directory(teacher, tmp_path / "model", "*.safetensors")
    (model / name).write_bytes(b"cos\nsystem\n(S'echo unpickled'\ntR.")
    said = refused("--set", f"model={model}")
    assert f"pickled weights only ({name})" in said
    assert f"`hfcompress convert {model} NEW --allow-pickle` reads its tensors and no code" in said


def test_a_model_directory_without_a_config(refused: Refused, teacher: Path, tmp_path: Path) -> None:
    model = copy_directory(teacher, tmp_path / "model", "config.json")
    assert f"{model} holds no config.json" in refused("--set", f"model={model}")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json is not a JSON object"),
        ('{"model_type": "t5"}', "the architecture 't5' is not supported\n    choose from: albert, bert, deberta-v2"),
        ('{"model_type": "bert", "num_hidden_layers": 0}', "no number above 0 for num_hidden_layers"),
        ('{"model_type": "bert", "hidden_size": 8}', "has 12 heads, which do not divide 8"),
    ],
)
def test_a_config_that_cannot_be_used(refused: Refused, teacher: Path, tmp_path: Path, config: str, why: str) -> None:
    model = copy_directory(teacher, tmp_path / "model")
    (model / "config.json").write_text(config)
    assert why in refused("--set", f"model={model}")


# --- the data


def data_with(path: Path, **files: str) -> Path:
    """The tiny data with some files replaced: `train_tsv="…"`."""
    factories.write_data(path, {"train": 8, "dev": 8, "test": 8})
    for name, text in files.items():
        split, _, suffix = name.partition("_")
        (path / f"{split}.tsv").unlink()
        (path / f"{split}.{suffix}").write_text(text, encoding="utf-8")
    return path


HEADER = "sentence\tlabel\n"
BOTH = "good film\t1\nbad film\t0\n"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"train_tsv": ""}, "train.tsv is empty\n    a data file has a header line and at least one row"),
        ({"train_tsv": HEADER}, "the train split of"),
        ({"train_tsv": HEADER}, "has no rows"),
        ({"dev_tsv": HEADER}, "dev: the dev split of"),
        ({"train_tsv": HEADER + "good\t1\nfine\t1\n"}, "the train split has one class only (1 in column 'label')"),
        (
            {"train_tsv": HEADER + BOTH + "odd\t2\n"},
            "train: row 2 has the label 2 in column 'label', outside the model",
        ),
        ({"dev_tsv": HEADER + BOTH + "odd\tGREAT\n"}, "dev: row 2 has the label 'GREAT' in column 'label'"),
        ({"test_tsv": HEADER + BOTH + "odd\t-1\n"}, "test: row 2 has the label -1"),
        ({"train_csv": 'sentence,label\n"never closed,1\n'}, "train.csv cannot be read: "),
        ({"train_tsv": "text\tlabel\n" + BOTH}, "train.tsv has no column 'sentence'"),
        ({"dev_jsonl": '{"sentence": "a", "label": 1}\n{"sentence": "b"}\n'}, "row 1 of the dev split of"),
    ],
)
def test_a_data_file_that_cannot_be_used(
    refused: Refused, recipe: Path, tmp_path: Path, files: dict[str, str], why: str
) -> None:
    data = data_with(tmp_path / "bad", **files)
    assert why in refused("--set", f"task.dataset={data}")
    assert run_cli("check", recipe, "--set", f"task.dataset={data}") == 2


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_data_file_that_is_missing(refused: Refused, tmp_path: Path, split: str) -> None:
    data = data_with(tmp_path / "bad")
    (data / f"{split}.tsv").unlink()
    assert f"no {split} file in {data}" in refused("--set", f"task.dataset={data}")


def test_a_label_that_only_the_dev_split_has_is_outside_a_head_made_for_train(refused: Refused, tmp_path: Path) -> None:
    data = data_with(tmp_path / "bad", dev_tsv=HEADER + BOTH + "odd\t2\n")
    stages = "stages=[{kind: finetune}, {kind: quantize, backend: float16}]"
    assert "dev: row 2 has the label 2" in refused("--set", f"task.dataset={data}", "--set", stages)


@pytest.mark.parametrize("value", ["inf", "nan", "high", ""])
def test_a_regression_label_that_is_no_finite_number(refused: Refused, tmp_path: Path, value: str) -> None:
    data = data_with(tmp_path / "bad", dev_tsv=f"sentence\tscore\na\t0.5\nb\t{value}\n")
    for split in ("train", "test"):
        (data / f"{split}.tsv").write_text("sentence\tscore\na\t0.5\nb\t1\n")
    said = refused(
        "--set", f"task={{type: regression, text: [sentence], dataset: {data}}}",
        "--set", "stages=[{kind: finetune}, {kind: quantize, backend: float16}]",
    )  # fmt: skip
    assert "dev: row 1 " in said
    assert "column 'score'" in said


# --- the output directory


def test_a_directory_that_hfcompress_did_not_make(refused: Refused, tmp_path: Path) -> None:
    output = tmp_path / "theirs"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        assert "is not empty and was not made by hfcompress" in refused(output=output, fresh=fresh)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_is_a_file(refused: Refused, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file, not a directory" in refused(output=tmp_path / place)


def test_a_run_of_a_recipe_with_another_name(refused: Refused) -> None:
    for fresh in (False, True):
        said = refused("--set", "name=other", fresh=fresh)
        assert "belongs to another recipe (its name differs)" in said
        assert "--output" in said


def test_a_run_of_the_same_name_on_another_model(refused: Refused, teacher: Path, tmp_path: Path) -> None:
    model = copy_directory(teacher, tmp_path / "model")
    said = refused("--set", f"model={model}", "--set", "task.max_length=12", fresh=False)
    assert "belongs to another recipe (its model, task differs)" in said
    assert "--fresh" in said


def test_fresh_takes_over_a_run_of_the_same_name(runs: Path, recipe: Path, teacher: Path, tmp_path: Path) -> None:
    model = copy_directory(teacher, tmp_path / "model")
    opened(load(recipe, [f"model={model}"]), runs, fresh=True)
    assert set(snapshot(runs)) == {"recipe.yaml", "recipe.lock.json"}
    assert json.loads((runs / "recipe.lock.json").read_text())["recipe"]["model"] == str(model)


def test_the_same_recipe_keeps_what_was_made(runs: Path, recipe: Path) -> None:
    opened(load(recipe, ["stages.0.train.epochs=9"]), runs)
    assert (runs / "01-distill" / "model.safetensors").read_bytes() == b"hours of work"


def test_a_run_that_was_begun_before_an_option_was_added_goes_on(runs: Path, recipe: Path) -> None:
    lock = runs / "recipe.lock.json"
    content = json.loads(lock.read_text())
    del content["recipe"]["task"]["encoding"]
    lock.write_text(json.dumps(content))
    run_directory.require_ours(load(recipe), runs, fresh=False)
    with pytest.raises(HfcompressError, match="its task differs"):
        run_directory.require_ours(load(recipe, ["task.encoding=latin-1"]), runs, fresh=False)


@pytest.mark.parametrize(("text", "why"), [("{", "is not JSON"), ("[]", "was not written by hfcompress")])
def test_a_lock_that_cannot_be_read_is_refused_to_other_recipes_and_written_anew_by_the_same(
    refused: Refused, runs: Path, recipe: Path, tmp_path: Path, text: str, why: str
) -> None:
    (runs / "recipe.lock.json").write_text(text)
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text() + "seed: 7\n")
    said = refused(recipe_file=other)
    assert why in said
    assert "the same `hfcompress run` as before writes it again" in said
    opened(load(recipe), runs)
    assert (runs / "01-distill" / "model.safetensors").read_bytes() == b"hours of work"
    assert json.loads((runs / "recipe.lock.json").read_text())["recipe"]["name"] == "tiny"


# --- the disk


def test_a_full_disk_is_noticed_before_anything_is_written(
    refused: Refused, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, used=10, free=0))
    for output in (runs, tmp_path / "new" / "run"):
        said = refused(output=output)
        assert "the disk is full: 0 MB are free" in said
        assert "a stage needs about" in said
    assert not (tmp_path / "new").exists()


def test_starting_over_counts_what_the_old_run_frees(runs: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, used=10, free=0))
    with pytest.raises(HfcompressError, match="the disk is full"):
        opened(load(recipe), runs, largest=1)
    opened(load(recipe), runs, fresh=True, largest=1)
    assert not (runs / "01-distill").exists()


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.EROFS, "the file system is read-only"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "permission is denied"),
    ],
)
def test_a_disk_that_takes_nothing(refused: Refused, monkeypatch: pytest.MonkeyPatch, number: int, why: str) -> None:
    def refuses(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, "refused", str(self))

    monkeypatch.setattr(Path, "write_text", refuses)
    said = refused(fresh=False)
    assert f"\nerror: {why}: " in f"\n{said}"
    assert "--output" in said


def test_a_disk_that_fills_up_while_a_model_is_saved(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills_up(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(runner, "run", fills_up)
    assert refused().startswith("error: the disk is full\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (OSError(errno.ENOSPC, "x", "a/file"), "the disk is full: a/file"),
        (OSError(errno.EDQUOT, "x"), "the disk quota is used up"),
        (OSError(errno.EROFS, "x"), "the file system is read-only"),
        (PermissionError(errno.EACCES, "x"), "permission is denied"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (SafetensorError("I/O error: Read-only file system (os error 30)"), "the file system is read-only"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "the disk is full"),
        (OSError(errno.ENOENT, "x"), None),
        (SafetensorError("header too large"), None),
        (RuntimeError("No space left for jokes"), None),
        (ValueError("os error 28"), None),
    ],
    ids=repr,
)
def test_what_is_a_problem_of_the_disk(error: Exception, said: str | None) -> None:
    assert disk_problem(error) == said


def test_a_library_that_trips_over_a_file_that_was_cut_off_is_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime writes a graph, does not notice that there was no room for it, and cannot read it again."""
    from hfcompress.utils.files import scratch_directory

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def reads() -> None:
        with scratch_directory() as folder:
            assert folder.parent == tmp_path
            raise RuntimeError("Wire format was corrupt")

    with pytest.raises(RuntimeError, match="Wire format was corrupt"):
        reads()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, used=10, free=0))
    with pytest.raises(OSError, match="No space left") as error:
        reads()
    assert (disk_problem(error.value) or "").startswith(f"the disk is full: {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_for_which_there_is_no_room_is_not_one_that_cannot_be_exported(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfcompress.measure import verify
    from hfcompress.models.artifact import open_artifact

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(verify, "export", full)
    with pytest.raises(OSError, match="No space left"):
        verify._export_graph(
            open_artifact(teacher, "02-prune", "prune"), "AutoModelForSequenceClassification"
        ).__enter__()


def test_shutils_error_of_a_full_disk_is_told(tmp_path: Path) -> None:
    error = shutil.Error(
        [("a", "b", f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: 'final.partial/model.onnx'")]
    )
    assert disk_problem(error) == "the disk is full"


def test_a_full_disk_is_found_in_what_an_error_was_raised_from() -> None:
    wrapped, other = RuntimeError("cannot write"), RuntimeError("a bug")
    wrapped.__cause__ = OSError(errno.ENOSPC, "x", "a/file")
    other.__context__ = PermissionError(errno.EACCES, "x")  # was dealt with
    assert disk_problem(wrapped) == "the disk is full: a/file"
    assert disk_problem(other) is None
