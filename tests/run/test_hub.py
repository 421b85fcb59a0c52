"""Hub ids in a recipe, and `push`, against a Hub on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import ModelCard, constants

from hfcompress import cli
from hfcompress.data import hub as hub_client
from hfcompress.data import source
from hfcompress.data.fill_mask import FillMask
from hfcompress.data.license import License, UnknownLicenseError, read_license
from hfcompress.data.sequence import TextClassification
from hfcompress.recipe.loader import load
from hfcompress.recipe.proposal import propose
from hfcompress.recipe.yaml_text import dump_yaml
from hfcompress.run import push as push_
from hfcompress.utils.errors import HfcompressError
from tests import loopback_hub
from tests.loopback_hub import LoopbackHub
from tests.soak import push as soak

TOKEN = "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"
TASK = {"type": "text-classification", "dataset": "user/tiny-data", "text": ["sentence"], "max_length": 16}
MEASURE = {"latency": {"batch_sizes": [1], "rounds": 1, "rows": 4, "threads": 1, "cold_starts": 0}, "bootstrap": 100}
TEACHER_CARD = b"---\nlicense: cc-by-nc-4.0\n---\n# tiny\n"
DATA_CARD = """---
dataset_info:
  features:
  - name: sentence
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': gloomy
          '1': sunny
---
"""


def model_files(folder: Path, **others: bytes) -> dict[str, bytes]:
    """A repository as they are: the model, and its weights again in other formats and folders."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    copies = ["onnx/model.onnx", "openvino/openvino_model.bin", "model.onnx", "pytorch_model.bin", "tf_model.h5"]
    return files | {"README.md": TEACHER_CARD} | dict.fromkeys(copies, b"x" * 99) | others


def data_files(folder: Path) -> dict[str, bytes]:
    """A data set repository of csv files; its card names the classes."""
    files = {"README.md": DATA_CARD.encode()}
    for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
        files[f"{name}.csv"] = (folder / f"{split}.tsv").read_text().replace("\t", ",").encode()
    return files


def write_recipe(path: Path, **changes: Any) -> Path:
    content = {"name": "tiny-half", "model": "user/tiny-teacher", "task": TASK, "measure": MEASURE,
               "stages": [{"kind": "quantize", "backend": "float16"}]}  # fmt: skip
    path.write_text(dump_yaml(content | changes))
    return path


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hfcompress", *arguments]
    everything = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(command, env=everything | environment, capture_output=True, text=True, check=False)


@dataclass
class FromHub:
    """A run whose model and data came from the Hub."""

    hub: LoopbackHub
    directory: Path
    recipe: Path
    home: Path
    commits: dict[str, str]
    fetched: list[str]
    output: str


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Iterator[FromHub]:
    folder = tmp_path_factory.mktemp("from_hub")
    recipe, directory, home = write_recipe(folder / "recipe.yaml"), folder / "run", folder / "home"
    with loopback_hub.running() as hub:
        repo = hub.add("user/tiny-teacher", model_files(teacher))
        rows = hub.add("user/tiny-data", data_files(data), kind="dataset")
        commits = {"user/tiny-teacher": repo.refs["main"], "datasets/user/tiny-data": rows.refs["main"]}
        done = run_cli("run", str(recipe), "-o", str(directory), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN,
                       HF_HOME=str(home), HF_DATASETS_CACHE=str(home / "datasets"))  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        output = done.stdout + done.stderr
        yield FromHub(hub, directory, recipe, home, commits, hub.fetched(), output)


@pytest.fixture
def finished(from_hub: FromHub, tmp_path: Path) -> Path:
    """The run directory, with what `push` has to leave where it is."""
    run = Path(shutil.copytree(from_hub.directory, tmp_path / "tiny-half"))
    inner = ["checkpoints/model.safetensors", "__pycache__/modeling.py"]
    for name in ["stage.json", "training_args.bin", "optimizer.pt", ".env", ".cache.json", *inner]:
        place = run / "final" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text("not to be sent")
    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub, which this process asks, with an empty cache."""
    with loopback_hub.running() as running:
        point_at(running.url, tmp_path / "cache", monkeypatch)
        yield running


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the clients wait between their attempts
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source._hub_splits.cache_clear()


Main = Callable[..., tuple[int, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """The command line in this process: its exit status, and all it printed on one line."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hfcompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((printed.out + printed.err).split())

    return call


def refused(main: Main, *arguments: object) -> str:
    """What a command says; it ends with 2, without a traceback and without the token."""
    status, printed = main(*arguments)
    assert status == 2, printed
    assert "Traceback" not in printed
    assert TOKEN not in printed
    return printed


@pytest.fixture
def down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that does not answer any more."""
    with loopback_hub.running() as hub:
        url = hub.url
    point_at(url, tmp_path / "cache", monkeypatch)


@pytest.fixture
def local_data_recipe(tmp_path: Path, data: Path) -> Path:
    return write_recipe(tmp_path / "r.yaml", task={**TASK, "dataset": str(data)})


# A run from Hub ids.


def test_a_run_from_hub_ids_fetches_one_format_of_the_weights(from_hub: FromHub) -> None:
    fetched = set(from_hub.fetched)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "train.csv"} <= fetched
    assert not [name for name in fetched if name.endswith((".onnx", ".bin", ".h5"))]


def test_a_run_records_the_commits_of_its_model_and_data(from_hub: FromHub) -> None:
    lock = json.loads((from_hub.directory / "recipe.lock.json").read_text())
    assert lock["revisions"] == from_hub.commits


def test_the_card_names_hub_model_and_data_set(from_hub: FromHub) -> None:
    card = ModelCard.load(from_hub.directory / "final" / "README.md").data
    assert (card.base_model, card.datasets) == ("user/tiny-teacher", ["user/tiny-data"])
    (result,) = card.eval_results
    assert (result.dataset_type, result.dataset_split) == ("user/tiny-data", "test")
    assert result.dataset_revision == from_hub.commits["datasets/user/tiny-data"]


def test_the_card_takes_the_licence_of_the_source(from_hub: FromHub) -> None:
    assert ModelCard.load(from_hub.directory / "final" / "README.md").data.license == "cc-by-nc-4.0"
    lock = json.loads((from_hub.directory / "recipe.lock.json").read_text())
    assert lock["license"] == {"license": "cc-by-nc-4.0", "license_name": None, "license_link": None}


def test_the_measured_rows_are_the_data_sets_test_split(from_hub: FromHub) -> None:
    report = json.loads((from_hub.directory / "report.json").read_text())
    assert report["task"]["split"] == "test"
    assert [row["quality"]["n"] for row in report["rows"]] == [48, 48]


def test_the_token_is_sent_and_stands_nowhere(from_hub: FromHub) -> None:
    assert any(TOKEN in request.headers.get("authorization", "") for request in from_hub.hub.requests)
    assert TOKEN not in from_hub.output
    written = [path for path in from_hub.directory.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_a_finished_run_needs_no_hub_to_run_again(from_hub: FromHub) -> None:
    asked = len(from_hub.hub.requests)
    again = run_cli("run", str(from_hub.recipe), "-o", str(from_hub.directory), HF_ENDPOINT=from_hub.hub.url,
                    HF_HOME=str(from_hub.home), HF_DATASETS_CACHE=str(from_hub.home / "datasets"),
                    HF_HUB_OFFLINE="1")  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert "01-quantize: done before" in again.stdout + again.stderr
    assert len(from_hub.hub.requests) == asked


# Models by Hub id.


@pytest.mark.parametrize("command", ["plan", "check"])
def test_a_look_at_a_recipe_fetches_the_config_only(
    hub: LoopbackHub, main: Main, local_data_recipe: Path, teacher: Path, command: str
) -> None:
    hub.add("user/tiny-teacher", model_files(teacher))
    assert main(command, local_data_recipe)[0] == 0
    card = ["README.md"] if command == "check" else []  # for the licence
    assert hub.fetched() == [*card, "config.json"]
    assert command == "check" or not hub.asked("safetensors")


@pytest.mark.parametrize("revision", ["v2", "refs/pr/7"])
def test_a_revision_is_the_part_after_the_at_sign(hub: LoopbackHub, teacher: Path, revision: str) -> None:
    repo = hub.add("user/tiny-teacher", model_files(teacher))
    config = json.loads((teacher / "config.json").read_text()) | {"marked": True}
    other = repo.commit(model_files(teacher, **{"config.json": json.dumps(config).encode()}), revision)
    spec = f"user/tiny-teacher@{revision}"
    assert source.model_config(spec)["marked"]
    assert source.revision_of(source.model_directory(spec)) == other
    assert source.revision_of(source.model_directory("user/tiny-teacher")) == repo.refs["main"]


def test_a_folder_that_is_no_snapshot_has_no_revision(teacher: Path) -> None:
    assert source.revision_of(teacher) is None


def test_tokenizer_files_of_every_kind_come_along(hub: LoopbackHub, teacher: Path) -> None:
    kinds = {"vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
             "special_tokens_map.json", "added_tokens.json", "bpe.codes"}  # fmt: skip
    hub.add("user/words", model_files(teacher, **dict.fromkeys(kinds, b"x")))
    assert kinds <= {path.name for path in source.model_directory("user/words").iterdir()}


def test_sharded_weights_come_along_and_their_variants_do_not(hub: LoopbackHub, teacher: Path) -> None:
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    variants = {"model.fp16.safetensors", "adapter_model.safetensors", "onnx/model.safetensors"}
    files = {"config.json": (teacher / "config.json").read_bytes()} | dict.fromkeys(shards | variants, b"x")
    hub.add("user/large", files)
    folder = source.model_directory("user/large")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == shards | {"config.json"}


def test_a_repository_of_onnx_weights_is_fetched(hub: LoopbackHub, teacher: Path) -> None:
    config = (teacher / "config.json").read_bytes()
    hub.add("user/int8", {"config.json": config, "model.onnx": b"x", "onnx/model.onnx": b"x"})
    assert {path.name for path in source.model_directory("user/int8").iterdir()} == {"config.json", "model.onnx"}


def test_a_graph_of_a_repository_is_named_or_found_in_its_folder(
    hub: LoopbackHub, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.models.test_foreign_models import graph, outside

    small, large = graph(tmp_path / "small"), outside(tmp_path / "large")
    config = (small / "config.json").read_bytes()
    content, inside = (small / "model.onnx").read_bytes(), (large / "model.onnx").read_bytes()
    beside = {"config.json": config, "onnx/model_quantized.onnx": content}
    hub.add("user/graphs", {**beside, "onnx/model.onnx": inside, "model.safetensors": b"x",
                            "onnx/model.onnx_data": (large / "model.onnx_data").read_bytes()})  # fmt: skip
    hub.add("user/one", beside)
    named = source.open_model("user/graphs:onnx/model_quantized.onnx")
    assert [path.name for path in named.weight_files] == ["model_quantized.onnx"]
    assert not (named.path / "model.safetensors").exists()
    with_data = source.open_model("user/graphs@main:onnx/model.onnx")
    assert [path.name for path in with_data.weight_files] == ["model.onnx", "model.onnx_data"]
    found = source.open_model("user/one")
    assert found.choice.file == "onnx/model_quantized.onnx"
    with pytest.raises(HfcompressError, match=r"holds no graph 'onnx/model_int8.onnx'"):
        source.open_model("user/graphs:onnx/model_int8.onnx")
    with pytest.raises(HfcompressError, match="can be measured, but not trained"):
        source.require_weights("user/one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert source.open_model("user/one").path == found.path
    assert source.open_model("user/graphs:onnx/model.onnx").path == with_data.path


def test_a_cached_model_needs_no_hub(hub: LoopbackHub, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("user/tiny-teacher", model_files(teacher))
    online, asked = source.model_directory("user/tiny-teacher"), len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert source.model_directory("user/tiny-teacher") == online
    assert source.model_config("user/tiny-teacher")["model_type"] == "bert"
    source.require_weights("user/tiny-teacher")
    assert len(hub.requests) == asked


def test_a_model_of_which_only_the_config_is_cached_is_refused_offline(
    hub: LoopbackHub, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("user/tiny-teacher", model_files(teacher))
    source.model_config("user/tiny-teacher")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HfcompressError, match="HF_HUB_OFFLINE"):
        source.model_directory("user/tiny-teacher")


# Data sets by Hub id.


@pytest.fixture
def task() -> TextClassification:
    return TextClassification(**TASK)


def test_a_data_set_is_read_with_its_class_names(hub: LoopbackHub, task: TextClassification, data: Path) -> None:
    hub.add("user/tiny-data", data_files(data), kind="dataset")
    assert task.label_names() == ["gloomy", "sunny"]
    assert [len(task.read(split)) for split in ("train", "dev", "test")] == [96, 48, 48]
    assert set(task.read("dev")["label"]) == {0, 1}
    assert task.judged_split() == "test"


def test_a_data_set_at_a_revision(hub: LoopbackHub, data: Path) -> None:
    repo = hub.add("user/tiny-data", data_files(data), kind="dataset")
    old = repo.refs["main"]
    repo.commit({"train.csv": b"sentence,label\na good film,1\na bad film,0\n"})
    assert len(TextClassification(**TASK).read("train")) == 2
    assert len(TextClassification(**TASK | {"dataset": f"user/tiny-data@{old}"}).read("train")) == 96
    assert source.data_revision("user/tiny-data", None) == repo.refs["main"]
    assert source.data_revision(f"user/tiny-data@{old}", None) == old


def test_splits_rename_those_of_a_data_set(hub: LoopbackHub, data: Path) -> None:
    files = data_files(data)
    hub.add("user/tiny-data", {"train.csv": files["train.csv"], "test.csv": files["test.csv"]}, kind="dataset")
    assert len(TextClassification(**TASK, splits={"dev": "test"}).read("dev")) == 48
    with pytest.raises(HfcompressError, match="the data set user/tiny-data has no dev split"):
        TextClassification(**TASK).read("dev")


def test_the_name_of_a_split_is_the_hubs(hub: LoopbackHub, data: Path) -> None:
    files = {name: content for name, content in data_files(data).items() if name != "test.csv"}
    hub.add("user/tiny-data", files, kind="dataset")
    task = TextClassification(dataset="user/tiny-data", text=["sentence"])
    assert task.judged_split() == "dev"
    assert task.table.find_hub_split("dev") == "validation"
    assert task.table.find_hub_split("test") is None


def test_a_data_set_of_parquet_files(hub: LoopbackHub, task: TextClassification, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"sentence": ["a good film", "a bad film"], "label": [1, 0]})
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet")
    hub.add("user/tiny-data", tmp_path / "repo", kind="dataset")
    assert task.read("dev")["sentence"][:] == ["a good film", "a bad film"]
    assert task.judged_split() == "dev"


def test_a_data_set_s_own_types_are_read_as_their_spelling_or_refused(
    hub: LoopbackHub, task: TextClassification, tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_dict({"sentence": [7, 8], "label": [True, False], "seen": [1.5, 2.5]})
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet")
    hub.add("user/tiny-data", tmp_path / "repo", kind="dataset")
    assert task.read("train")[:] == {"sentence": ["7", "8"], "label": ["true", "false"]}
    assert task.targets(task.read("train"), {"False": 0, "True": 1}) == [1, 0]
    why = r"row 0 has 1\.5 in column 'seen', a float .*the dev split of user/tiny-data, .* the type float64"
    with pytest.raises(HfcompressError, match=why):
        TextClassification(**TASK | {"text": ["seen"]}).read("dev")


def test_a_corpus_streams_from_the_hub(hub: LoopbackHub) -> None:
    documents = [f"film {number}" for number in range(20)]
    repo = hub.add("user/corpus", {"train.txt": "\n".join(documents).encode()}, kind="dataset")
    task = FillMask(type="fill-mask", dataset="user/corpus", streaming=True, dev_rows=3)
    assert task.read("dev")["text"][:] == documents[:3]
    assert [row["text"] for row in task.read("train")] == documents[3:]
    assert source.data_revision("user/corpus", None, streaming=True) == repo.refs["main"]
    before = task.fingerprint()
    repo.commit({"train.txt": "\n".join([*documents, "one more"]).encode()})
    assert task.fingerprint() != before


def test_plan_reads_no_data_set(hub: LoopbackHub, main: Main, teacher: Path, data: Path, tmp_path: Path) -> None:
    hub.add("user/tiny-teacher", model_files(teacher))
    hub.add("user/tiny-data", data_files(data), kind="dataset")
    assert main("plan", write_recipe(tmp_path / "r.yaml"))[0] == 0
    assert not hub.asked("datasets")


def test_init_writes_a_recipe_for_data_of_the_hub(
    hub: LoopbackHub, main: Main, teacher: Path, data: Path, tmp_path: Path
) -> None:
    hub.add("user/tiny-data", data_files(data), kind="dataset")
    status, said = main(
        "init", "--model", teacher, "--data", "user/tiny-data", "--config", "default", "-o", tmp_path / "r.yaml"
    )
    assert status == 0, said
    assert "rows: 96 in train, 48 in dev, 48 in test" in said
    recipe = load(tmp_path / "r.yaml").recipe
    assert (recipe.task.dataset, recipe.task.config, recipe.task.label) == ("user/tiny-data", "default", "label")
    assert [path.name for path in tmp_path.glob("r*")] == ["r.yaml"]
    assert "2 classes: 'gloomy'" in said
    status, said = main("check", tmp_path / "r.yaml")
    assert status == 0, said


def test_init_splits_data_of_the_hub_that_has_no_dev_split(
    hub: LoopbackHub, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = data_files(data)
    hub.add("user/tiny-data", {name: files[name] for name in ("README.md", "train.csv", "test.csv")}, kind="dataset")
    monkeypatch.chdir(tmp_path)

    made = propose(str(teacher), "user/tiny-data")

    assert (made.path, made.split) == (Path("tiny-data.yaml"), Path("tiny-data-data"))
    assert made.profile.rows["train"] + made.profile.rows["dev"] == 96
    assert made.profile.rows["test"] == 48
    assert set(made.profile.classes) == {"gloomy", "sunny"}
    assert load(made.path).recipe.hub.dataset == "user/tiny-data"


def test_init_tells_what_is_neither_here_nor_on_the_hub(hub: LoopbackHub, main: Main, teacher: Path) -> None:
    said = refused(main, "init", "--model", teacher, "--data", "user/no-such-data")
    assert "user/no-such-data is no file or directory here; data set 'user/no-such-data'" in said
    said = refused(main, "init", "--model", teacher, "--data", "nowhere.csv", "--config", "sst2")
    assert "--config names a part of a data set on the Hub" in said


def test_a_data_set_without_the_column(hub: LoopbackHub, data: Path) -> None:
    hub.add("user/tiny-data", data_files(data), kind="dataset")
    with pytest.raises(HfcompressError, match=r"no column 'sentense'\n.*did you mean 'sentence'"):
        TextClassification(**TASK | {"text": ["sentense"]}).read("train")


def test_an_unknown_data_set(hub: LoopbackHub, task: TextClassification) -> None:
    with pytest.raises(HfcompressError, match=r"data set 'user/tiny-data': .*doesn't exist on the Hub"):
        task.read("train")


def test_a_configuration_that_a_data_set_lacks(hub: LoopbackHub, data: Path) -> None:
    hub.add("user/tiny-data", data_files(data), kind="dataset")
    with pytest.raises(HfcompressError, match=r"BuilderConfig 'sst3' not found(?s:.*)set `task.config`"):
        TextClassification(**TASK, config="sst3").read("train")


def test_a_data_set_that_is_a_script(hub: LoopbackHub, task: TextClassification) -> None:
    hub.add("user/tiny-data", {"README.md": b"", "tiny-data.py": b"raise SystemExit"}, kind="dataset")
    with pytest.raises(HfcompressError, match="is a script; it could run any code, so it is not loaded"):
        task.read("train")


def test_a_gated_data_set(hub: LoopbackHub, task: TextClassification, data: Path) -> None:
    hub.add("user/tiny-data", data_files(data), kind="dataset", gated=True)
    with pytest.raises(HfcompressError, match="gated dataset"):
        task.read("train")


@pytest.mark.usefixtures("down")
def test_a_data_set_of_a_hub_that_is_down(task: TextClassification) -> None:
    with pytest.raises(HfcompressError, match="data set 'user/tiny-data': the Hub cannot be reached"):
        task.read("train")


# What the Hub refuses: one line that says it, exit 2.


def test_pickled_weights_are_refused_before_anything_large_is_fetched(
    hub: LoopbackHub, main: Main, local_data_recipe: Path, teacher: Path
) -> None:
    files = model_files(teacher)
    hub.add("user/tiny-teacher", {name: files[name] for name in ("config.json", "tokenizer.json", "pytorch_model.bin")})
    printed = refused(main, "check", local_data_recipe)
    assert "user/tiny-teacher holds pickled weights only (pytorch_model.bin)" in printed
    assert "refs/pr/N" in printed
    assert hub.fetched() == ["config.json"]
    with pytest.raises(HfcompressError, match="holds pickled weights only"):
        source.model_directory("user/tiny-teacher")


@pytest.mark.parametrize("command", ["plan", "check", "run"])
def test_an_unknown_repository(hub: LoopbackHub, main: Main, local_data_recipe: Path, command: str) -> None:
    message = "model 'user/tiny-teacher': it is neither a local directory nor a repository that you can read"
    assert message in refused(main, command, local_data_recipe)


def test_an_unknown_revision(hub: LoopbackHub, main: Main, tmp_path: Path, teacher: Path, data: Path) -> None:
    hub.add("user/tiny-teacher", model_files(teacher))
    recipe = write_recipe(tmp_path / "r.yaml", model="user/tiny-teacher@v9", task={**TASK, "dataset": str(data)})
    assert "it has no such revision" in refused(main, "check", recipe)


@pytest.mark.parametrize(
    ("file", "gated", "refusals", "said"),
    [
        ("README.md", False, {}, ["the repository lacks a file that is needed"]),
        ("config.json", False, {}, ["user/tiny-teacher holds no weights"]),
        ("config.json", True, {}, ["it is gated", "accept its terms"]),
        ("config.json", False, {"/user/tiny-teacher": 403}, ["the Hub refuses access (403)", "hf auth login"]),
        ("config.json", False, {"/resolve/": 500}, ["the Hub answered 500"]),
    ],
)
def test_a_model_that_the_hub_does_not_give(
    hub: LoopbackHub, main: Main, local_data_recipe: Path, teacher: Path, file: str, gated: bool,
    refusals: dict[str, int], said: list[str],
) -> None:  # fmt: skip
    hub.add("user/tiny-teacher", {file: model_files(teacher)[file]}, gated=gated)
    hub.refusals = refusals
    printed = refused(main, "check", local_data_recipe)
    assert all(part in printed for part in said)


@pytest.mark.usefixtures("down")
def test_a_hub_that_is_down(main: Main, local_data_recipe: Path) -> None:
    assert "the Hub cannot be reached" in refused(main, "check", local_data_recipe)
    with pytest.raises(HfcompressError, match="the Hub cannot be reached"):
        source.model_directory("user/tiny-teacher")


def test_an_unknown_teacher_is_found_before_the_run_directory_is_made(
    hub: LoopbackHub, main: Main, tmp_path: Path, teacher: Path, data: Path
) -> None:
    stage = {"kind": "distill", "teacher": "user/nobody", "losses": ["soft_labels"], "train": {"epochs": 1}}
    changes = {"model": str(teacher), "task": {**TASK, "dataset": str(data)}, "stages": [stage]}
    printed = refused(main, "run", write_recipe(tmp_path / "r.yaml", **changes), "-o", tmp_path / "run")
    assert "model 'user/nobody'" in printed
    assert not (tmp_path / "run").exists()


# The licence of a Hub model.


def test_the_licence_is_that_of_the_revision(hub: LoopbackHub) -> None:
    repo = hub.add("user/tiny-teacher", {"README.md": TEACHER_CARD})
    first = repo.refs["main"]
    repo.commit({"README.md": b"---\nlicense: mit\n---\n"})
    assert read_license("user/tiny-teacher") == License("mit")
    assert read_license(f"user/tiny-teacher@{first}") == License("cc-by-nc-4.0")
    assert read_license("user/tiny-teacher", first) == License("cc-by-nc-4.0")


def test_a_licence_that_the_hub_does_not_list_links_to_its_file(hub: LoopbackHub) -> None:
    card = b"---\nlicense: other\nlicense_name: tiny-terms\nlicense_link: LICENSE.md\n---\n"
    repo = hub.add("user/tiny-teacher", {"README.md": card})
    link = f"https://huggingface.co/user/tiny-teacher/blob/{repo.refs['main']}/LICENSE.md"
    assert read_license("user/tiny-teacher", repo.refs["main"]) == License("other", "tiny-terms", link)


@pytest.mark.parametrize(
    "files", [{"config.json": b"{}"}, {"README.md": b"# tiny"}, {"README.md": b"---\n{: [\n---\n"}]
)
def test_a_hub_model_that_does_not_tell_its_licence(hub: LoopbackHub, files: dict[str, bytes]) -> None:
    hub.add("user/tiny-teacher", files)
    with pytest.raises(UnknownLicenseError):
        read_license("user/tiny-teacher")


def test_a_run_that_would_push_without_a_licence_is_refused_before_it_begins(
    hub: LoopbackHub, main: Main, teacher: Path, data: Path, tmp_path: Path
) -> None:
    hub.add("user/tiny-teacher", model_files(teacher) | {"README.md": b"# tiny"})
    changes = {"task": {**TASK, "dataset": str(data)}, "hub": {"repo": "user/tiny", "push": True}}
    recipe = write_recipe(tmp_path / "r.yaml", **changes)
    for command in (["check", recipe], ["run", recipe, "-o", tmp_path / "run"]):
        status, printed = main(*command)
        assert status == 2
        assert "hub.license: the licence of user/tiny-teacher is not known: its card names no licence" in printed
        assert "say `hub: {license: …}`" in printed
    assert not (tmp_path / "run").exists()


# `push`.


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_card_without_a_licence_is_not_pushed(hub: LoopbackHub, main: Main, finished: Path, dry: list[str]) -> None:
    card = finished / "final" / "README.md"
    card.write_text(card.read_text().replace("license: cc-by-nc-4.0\n", ""))
    status, printed = main("push", finished, "--repo", "user/tiny", *dry)
    assert status == 2
    assert "names no licence" in printed
    assert "say `hub: {license: …}` in the recipe" in printed
    assert hub.requests == []


def test_only_model_card_recipe_and_plot_are_sent(finished: Path) -> None:
    names = {file.name for file in push_.list_uploads(finished)}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} < names
    assert {"README.md", "recipe.yaml", "tradeoff.png"} < names
    assert not names & {"stage.json", "training_args.bin", "optimizer.pt", ".env", ".cache.json", "modeling.py"}
    assert all("/" not in name for name in names)


def test_a_dry_run_sends_nothing(hub: LoopbackHub, main: Main, finished: Path) -> None:
    status, printed = main("push", finished, "--repo", "user/tiny", "--dry-run")
    assert status == 0
    assert "model.safetensors" in printed
    assert "to user/tiny" in printed
    assert hub.requests == []


def test_push_makes_the_repository_and_sends_all_in_one_commit(hub: LoopbackHub, main: Main, finished: Path) -> None:
    hub.token = TOKEN
    status, printed = main("push", finished, "--repo", "user/tiny")
    assert status == 0, printed
    repo = hub.repositories["model", "user/tiny"]
    assert f"{hub.url}/user/tiny/commit/{repo.refs['main']}" in printed
    assert not repo.private
    sent = repo.commits[repo.refs["main"]]
    files = {file.name: file.path.read_bytes() for file in push_.list_uploads(finished)}
    card = files["README.md"].replace(b"PATH_OR_REPO", b"user/tiny")
    assert b'path = "user/tiny"' in card, "the snippet names the repository that the card now stands in"
    assert sent == files | {"README.md": card}
    assert len(hub.asked("/commit/")) == 1
    assert len(hub.asked("PUT /lfs/")) == len([name for name in sent if name.endswith((".safetensors", ".png"))]) == 2


def test_the_token_of_a_push_is_a_header_and_nothing_else(hub: LoopbackHub, main: Main, finished: Path) -> None:
    hub.token = TOKEN
    _, printed = main("push", finished, "--repo", "user/tiny")
    assert TOKEN not in printed
    assert not [request for request in hub.requests if TOKEN.encode() in request.body or TOKEN in request.path]
    assert not [path for path in finished.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_private_push_makes_a_private_repository(hub: LoopbackHub, main: Main, finished: Path) -> None:
    assert main("push", finished, "--repo", "user/tiny", "--private")[0] == 0
    assert hub.repositories["model", "user/tiny"].private


def test_the_recipe_names_the_repository_where_the_command_does_not(
    hub: LoopbackHub, main: Main, finished: Path
) -> None:
    lock = finished / "recipe.lock.json"
    content = json.loads(lock.read_text())
    content["recipe"]["hub"] |= {"repo": "user/from-recipe", "private": True}
    lock.write_text(json.dumps(content))
    assert main("push", finished)[0] == 0
    assert hub.repositories["model", "user/from-recipe"].private
    assert main("push", finished, "--repo", "user/other")[0] == 0
    assert ("model", "user/other") in hub.repositories


def test_pushing_twice_commits_what_changed(hub: LoopbackHub, main: Main, finished: Path) -> None:
    assert main("push", finished, "--repo", "user/tiny")[0] == 0
    assert main("push", finished, "--repo", "user/tiny")[0] == 0
    repo = hub.repositories["model", "user/tiny"]
    assert len(repo.commits) == 1
    card = finished / "final" / "README.md"
    card.write_text(card.read_text() + "\nmore\n")
    assert main("push", finished, "--repo", "user/tiny")[0] == 0
    assert len(repo.commits) == 2
    assert repo.commits[repo.refs["main"]]["README.md"].endswith(b"more\n")


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        ("/api/repos/create", 401, "log in with `hf auth login`"),
        ("/api/repos/create", 403, "log in with `hf auth login`"),
        ("/commit/", 403, "the Hub refuses access (403)"),
        ("/preupload/", 404, "the Hub answered 404"),
        ("/lfs/", 403, "the Hub refuses access (403)"),
        ("/api/repos/create", 500, "the Hub answered 500"),
    ],
)
def test_a_push_that_is_refused(
    hub: LoopbackHub, main: Main, finished: Path, pattern: str, status: int, message: str
) -> None:
    hub.refusals[pattern] = status
    printed = refused(main, "push", finished, "--repo", "user/tiny")
    assert "the push to user/tiny" in printed
    assert message in printed
    assert not hub.repositories.get(("model", "user/tiny"), loopback_hub.Repository("model", "")).commits


def test_a_push_without_a_token(
    hub: LoopbackHub, main: Main, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in refused(main, "push", finished, "--repo", "user/tiny")


@pytest.mark.usefixtures("down")
def test_a_push_to_a_hub_that_is_down(main: Main, finished: Path) -> None:
    assert "the Hub cannot be reached" in refused(main, "push", finished, "--repo", "user/tiny")


def test_a_push_while_offline(hub: LoopbackHub, main: Main, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(main, "push", finished, "--repo", "user/tiny")


def test_a_name_that_is_no_repository(hub: LoopbackHub, main: Main, finished: Path) -> None:
    for name in ("user/na me", "a/b/c", "user/-x", "https://hub/user/x", "user/" + "x" * 99):
        for how in ("--dry-run", "--private"):
            assert "is no repository name" in refused(main, "push", finished, "--repo", name, how)
    assert "--repo user/tiny" in refused(main, "push", finished, "--repo", "tiny")
    assert "give --repo user/name, or set `hub.repo`" in refused(main, "push", finished)
    assert hub.requests == []


def test_a_pushed_model_is_fetched_again(hub: LoopbackHub, finished: Path) -> None:
    push_.push(finished, "user/tiny")
    folder = source.model_directory("user/tiny")
    assert (folder / "model.safetensors").read_bytes() == (finished / "final" / "model.safetensors").read_bytes()


# A Hub that fails: `python -m tests.soak.push` tries every fault at every request.


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("create", "silent"),
        ("create", "conflict without a word"),
        ("create", "conflict for ever"),
        ("create", "html"),
        ("create", "redirect (302)"),
        ("card", "bad card"),
        ("card", "huge"),
        ("preupload", "drip of headers"),
        ("preupload", "a list"),
        ("batch", "wait for a day"),
        ("upload", "silent"),
        ("upload", "413"),
        ("commit", "drip"),
        ("commit", "half"),
        ("commit", "controls"),
        ("everything", "reflect"),
        ("everything", "cut"),
    ],
)
def test_a_push_to_a_hub_that_fails_ends_in_one_error(tmp_path: Path, place: str, fault: str) -> None:
    assert soak.try_case(soak.finished_run(tmp_path), place, fault) == []


def test_a_conflict_says_to_try_again(hub: LoopbackHub, main: Main, finished: Path) -> None:
    hub.faults["/commit/"] = "conflict without a word"
    assert "try again" in refused(main, "push", finished, "--repo", "user/tiny")


def test_the_causes_of_an_error_hold_no_token(hub: LoopbackHub, finished: Path) -> None:
    hub.faults["/api/"] = "reflect"
    with pytest.raises(HfcompressError) as caught:
        push_.push(finished, "user/tiny")
    error: BaseException | None = caught.value
    while error is not None:
        assert TOKEN not in f"{error!s}{error!r}{vars(error)}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("fault", ["silent", "drip", "drip of headers", "html", "redirect"])
@pytest.mark.parametrize("place", ["/api/models", "/resolve/"])
def test_a_model_of_a_hub_that_fails(
    hub: LoopbackHub, teacher: Path, fault: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFCOMPRESS_HUB_TIMEOUT", "0.3")
    hub.add("user/tiny-teacher", model_files(teacher))
    with loopback_hub.running() as elsewhere:
        hub.elsewhere, hub.faults[place] = elsewhere.url, fault
        with pytest.raises(HfcompressError, match="model 'user/tiny-teacher'"):
            source.model_directory("user/tiny-teacher")
        assert not [request for request in elsewhere.requests if TOKEN in str(request.headers)]


def test_a_data_set_of_a_hub_that_drips(
    hub: LoopbackHub, task: TextClassification, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFCOMPRESS_HUB_TIMEOUT", "0.3")
    hub.add("user/tiny-data", data_files(data), kind="dataset")
    hub.faults["train.csv"] = "drip"
    with pytest.raises(HfcompressError, match="the Hub"):
        task.read("train")


def test_a_transfer_that_goes_on_is_not_cut_off() -> None:
    now = [0.0]
    meter = hub_client._Meter(10.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now[0])
        for _ in range(1000):
            with meter.count_waiting():
                now[0] += 5.0
            meter.earn(5 * hub_client.BYTES_PER_SECOND)
        assert meter.seconds_left() == 10.0
        with meter.count_waiting():
            now[0] += 10.0
        with pytest.raises(hub_client.HubTimeoutError):
            meter.seconds_left()


def test_a_limit_that_is_no_number_of_seconds(
    hub: LoopbackHub, main: Main, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("soon", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("HFCOMPRESS_HUB_TIMEOUT", text)
        assert "not a number of seconds" in refused(main, "push", finished, "--repo", "user/tiny")


# Files of a push.


def test_weights_beside_a_graph_are_sent(finished: Path) -> None:
    (finished / "final" / "onnx").mkdir()
    names = {"model.onnx", "model.onnx_data", "model.onnx.data", "model.onnx_data_1", "bpe.codes",
             "onnx/model_q4.onnx", "onnx/model_q4.onnx_data"}  # fmt: skip
    for name in names | {"notes.onnx_database", "model.data", "onnx/notes.log"}:
        (finished / "final" / name).write_bytes(b"x")
    sent = {file.name for file in push_.list_uploads(finished)}
    assert names < sent
    assert not {"notes.onnx_database", "model.data", "onnx/notes.log"} & sent


@pytest.mark.parametrize("what", ["changed", "vanished"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_not_the_one_that_was_listed(
    hub: LoopbackHub, finished: Path, monkeypatch: pytest.MonkeyPatch, what: str, name: str
) -> None:
    file = finished / "final" / name

    def meddle(*_: Any) -> None:
        if what == "changed":
            file.write_bytes(file.read_bytes() + b" ")
        else:
            file.unlink()

    monkeypatch.setattr(push_, "SMALL", 2000)
    monkeypatch.setattr(push_, "_require_repository", lambda *a: (hub.add("user/tiny", {}), meddle()))
    with pytest.raises(HfcompressError, match=rf"{name} {what} while it was sent, so nothing was committed"):
        push_.push(finished, "user/tiny")
    assert len(hub.repositories["model", "user/tiny"].commits) == 1


def test_a_file_that_vanishes_before_it_is_read(hub: LoopbackHub, finished: Path) -> None:
    files = push_.list_uploads(finished)
    (finished / "final" / "model.safetensors").unlink()
    with pytest.raises(HfcompressError, match="vanished"):
        push_._make_operations(files, "user/tiny")
