"""A recipe from end to end: what is written, what is done again, what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hfcompress.measure.answers import Answer, Answers, align
from hfcompress.measure.plain_runtime import BFLOAT16, NAME
from hfcompress.models.artifact import open_artifact
from hfcompress.recipe.loader import Loaded, load
from hfcompress.recipe.plan import plan
from hfcompress.report import card, tables
from hfcompress.report.hub_metadata import validate
from hfcompress.report.snippet import write_snippets
from hfcompress.run import directory as run_directory
from hfcompress.run import finish, runner
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.wording import format_ratio, significant
from tests import factories

STAGES = ["01-distill", "02-prune", "03-quantize"]


@dataclass
class Finished:
    loaded: Loaded
    directory: Path
    report: dict[str, Any]

    @property
    def card(self) -> str:
        return (self.directory / "final" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Finished:
    folder = tmp_path_factory.mktemp("run")
    loaded = load(factories.recipe(folder / "recipe.yaml", teacher, data, hub={"license": "apache-2.0"}))
    with factories.machine_state():
        done = runner.run(loaded, folder / "tiny")
    assert done is not None
    return Finished(loaded, done.directory, done.report)


def test_the_report_and_the_card_say_how_long_each_stage_took(finished: Finished) -> None:
    made = finished.report["made"]
    assert list(made) == STAGES
    assert all(effort["hours"] > 0 and effort["attempts"] == 1 for effort in made.values())
    assert made["01-distill"]["hardware"]
    assert "energy_wh" not in made["01-distill"]
    assert "Making it took" in finished.card


def test_the_run_directory_is_laid_out_as_promised(finished: Finished) -> None:
    files = [
        "recipe.yaml",
        "recipe.lock.json",
        "report.json",
        "report.csv",
        "report.md",
        "report.html",
        "predictions.parquet",
    ]
    assert {p.name for p in finished.directory.iterdir()} == {*files, *STAGES, "final", "plots"}
    assert (finished.directory / "plots" / "tradeoff.png").is_file()
    assert all((finished.directory / stage / "stage.json").is_file() for stage in STAGES)
    final = finished.directory / "final"
    assert {
        "README.md",
        "config.json",
        "onnx/model_quantized.onnx",
        "recipe.yaml",
        "tradeoff.png",
        "tokenizer.json",
    } <= {p.relative_to(final).as_posix() for p in final.rglob("*")}
    assert not (finished.directory / "final" / "stage.json").exists()


def test_the_recipe_is_kept_verbatim(finished: Finished) -> None:
    original = finished.loaded.document.path.read_bytes()
    assert (finished.directory / "recipe.yaml").read_bytes() == original


def test_what_is_published_names_no_place_on_this_machine(finished: Finished) -> None:
    recipe = finished.loaded.recipe
    places = {str(Path(place).parent) for place in (recipe.model, recipe.task.dataset, finished.directory)}
    places |= {str(Path.home()), str(Path(card.__file__).parent), sys.prefix}
    files = [path for path in (finished.directory / "final").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [(f.name, p) for f in files for p in places if f"{p}/".encode() in f.read_bytes()]


def test_the_published_recipe_differs_from_the_recipe_in_its_places_alone(finished: Finished) -> None:
    recipe = finished.loaded.recipe
    told = finished.loaded.document.text
    for place in (recipe.model, recipe.task.dataset):
        told = told.replace(place, Path(place).name)
    assert (finished.directory / "final" / "recipe.yaml").read_text() == told


def test_the_lock_resolves_defaults_and_names_versions_seed_and_hardware(finished: Finished) -> None:
    import torch

    lock = json.loads((finished.directory / "recipe.lock.json").read_text())
    assert lock["recipe"]["seed"] == 42
    assert lock["recipe"]["stages"][0]["train"]["weight_decay"] == 0.01
    assert lock["recipe"]["stages"][1]["recover"]["losses"][0]["use"] == "soft_labels"
    assert lock["environment"]["versions"]["torch"] == torch.__version__
    assert lock["environment"]["cpu"]
    assert lock["environment"]["cores"] >= 1


def test_a_stage_tells_what_it_did_and_that_it_reloads(finished: Finished) -> None:
    records = [json.loads((finished.directory / stage / "stage.json").read_text()) for stage in STAGES]
    assert len({record["key"] for record in records}) == 3
    texts = ["text-classification pipeline", "padding"]
    ways = [["transformers", *texts], ["transformers", *texts, "hfcompress", "onnx"], ["onnx", "plain texts"]]
    assert [list(record["reload"]) for record in records] == ways
    assert all(record["reload"].get(way, 0) <= 1e-5 for record in records for way in ("transformers", "hfcompress"))
    assert records[1]["reload"]["onnx"] <= 1e-4
    assert records[0]["student"]["layer 1"] == "copied from layer 2"
    assert records[0]["teacher"]["stage"] == "source"
    assert records[1]["teacher"]["stage"] == "01-distill"
    assert records[1]["kept"] == {
        "heads": [[3, 4]], "ffn": [[48, 64]], "hidden": [32, 32], "layers": {"kept": [1], "of": 1},
    }  # fmt: skip


def test_the_report_has_every_key_of_its_contract(finished: Finished) -> None:
    report = json.loads((finished.directory / "report.json").read_text())
    assert report == finished.report
    assert report["schema"] == 2
    assert report["name"] == "tiny"
    assert report["environment"]["cpu"]
    assert [row["stage"] for row in report["rows"]] == ["source", *STAGES]
    assert [row["kind"] for row in report["rows"]] == ["source", "distill", "prune", "quantize"]
    compared = {"against_source"}
    for number, row in enumerate(report["rows"]):
        assert set(row) - (compared if number else set()) == {
            "stage", "kind", "quality", "quality_interval", "parameters", "encoder_parameters", "disk_bytes",
            "embedding_bytes", "bytes_by_part", "macs", "latency", "latency_grid", "cold_start", "sustained",
            "peak_memory_bytes", "device_memory_bytes", "energy_wh_per_1k", "speedup", "compression", "confidence",
            "batch_sensitivity",
        }  # fmt: skip
        assert row["quality"]["n"] == 48
        low, high = row["quality_interval"]
        assert 0 <= low <= row["quality"]["accuracy"] <= high <= 1
        assert [entry["batch_size"] for entry in row["latency"]] == [1, 8]
        for entry in row["latency"]:
            assert {
                "device", "runtime", "dtype", "threads", "batch_size", "sequence_length", "p50_ms", "p95_ms",
                "samples_per_s",
            } <= set(entry)  # fmt: skip
            assert 0 < entry["p50_ms"] <= entry["p95_ms"]
    assert (report["rows"][0]["speedup"], report["rows"][0]["compression"]) == (1, 1)
    assert [row["latency"][0]["runtime"] for row in report["rows"]] == ["torch", "torch", "torch", "onnxruntime"]


def test_every_row_is_judged_on_the_same_lengths_and_threads(finished: Finished) -> None:
    conditions = [
        [(entry["batch_size"], entry["sequence_length"], entry["threads"], entry["device"]) for entry in row["latency"]]
        for row in finished.report["rows"]
    ]
    assert all(row == conditions[0] for row in conditions)


def test_the_plan_is_what_the_run_built(finished: Finished) -> None:
    from safetensors import safe_open

    planned = plan(finished.loaded)
    for row, expected in zip(finished.report["rows"], planned, strict=True):
        assert (row["parameters"], row["encoder_parameters"], row["macs"]) == (
            expected.shape.parameters,
            expected.shape.encoder_parameters,
            expected.shape.macs(finished.loaded.recipe.task.max_length),
        )
    for stage, expected in zip(STAGES[:2], planned[1:], strict=False):
        with safe_open(finished.directory / stage / "model.safetensors", "pt") as tensors:
            sizes = [tensors.get_tensor(name).numel() for name in tensors.keys()]  # noqa: SIM118  not a mapping
        assert sum(sizes) == expected.shape.parameters


def test_no_pickle_and_no_checkpoint_is_left(finished: Finished) -> None:
    left = [p for p in finished.directory.rglob("*") if p.suffix in (".bin", ".pt", ".pth") or "checkpoint" in p.name]
    assert left == []
    assert [p for p in finished.directory.rglob("*") if "partial" in p.name] == []


def _python(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _test_rows(data: Path) -> tuple[list[str], list[int]]:
    lines = [line.split("\t") for line in (data / "test.tsv").read_text().splitlines()[1:]]
    return [text for text, _ in lines], [int(label) for _, label in lines]


def test_final_answers_in_a_bare_onnxruntime_script(finished: Finished, data: Path) -> None:
    texts, labels = _test_rows(data)
    script = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/onnx/model_quantized.onnx")
for ids in json.loads(sys.argv[2]):
    known = {"input_ids": numpy.array([ids]), "attention_mask": numpy.ones((1, len(ids)), "int64")}
    feed = {node.name: known.get(node.name, 0 * known["input_ids"]) for node in session.get_inputs()}
    print(session.run(["logits"], feed)[0].argmax())
assert not {"torch", "transformers", "hfcompress"} & set(sys.modules)
"""
    ids = factories.tokenizer()(texts)["input_ids"]
    answers = [int(line) for line in _python(script, str(finished.directory / "final"), json.dumps(ids)).split()]
    assert sum(a == b for a, b in zip(answers, labels, strict=True)) / 48 == pytest.approx(
        finished.report["rows"][-1]["quality"]["accuracy"]
    )


def test_the_stage_before_answers_in_stock_transformers(finished: Finished, data: Path) -> None:
    texts, labels = _test_rows(data)
    place = finished.directory / "02-prune"
    _, snippet = write_snippets(finished.loaded.recipe.task, open_artifact(place, "02-prune"), str(place))
    assert "trust_remote_code=True" in snippet.code
    script = f"""{snippet.code}
import json, sys
for text in json.loads(sys.argv[1]):
    print(int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()))
assert "hfcompress" not in sys.modules
"""
    first, second, *answers = _python(script, json.dumps(texts)).splitlines()
    assert {line.split(" | ")[0] for line in (first, second)} <= {"LABEL_0", "LABEL_1"}
    assert sum(int(a) == b for a, b in zip(answers, labels, strict=True)) / 48 == pytest.approx(
        finished.report["rows"][2]["quality"]["accuracy"]
    )


def test_the_cards_snippet_runs_once_its_path_is_filled_in(finished: Finished) -> None:
    snippet = re.search(r"```python\n(.*?)```", finished.card, re.DOTALL)
    assert snippet is not None
    assert snippet[1].count("PATH_OR_REPO") == 1
    printed = _python(snippet[1].replace("PATH_OR_REPO", str(finished.directory / "final"))).splitlines()
    assert {line.split(" | ")[0] for line in printed} <= {"LABEL_0", "LABEL_1"}
    assert len(printed) == 2


def test_the_cards_metadata_is_the_reports(finished: Finished) -> None:
    from huggingface_hub import ModelCard

    row = finished.report["rows"][-1]
    found = ModelCard(finished.card).data
    (result,) = found.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", round(row["quality"]["accuracy"], 6))
    assert (result.task_type, result.dataset_split) == ("text-classification", "test")
    assert (found.model_name, found.license, found.language, found.library_name) == (
        "tiny",
        "apache-2.0",
        "en",
        "transformers",
    )
    assert {"distilled", "pruned", "quantized"} <= set(found.tags)
    assert str(finished.loaded.recipe.model) not in str(found.to_dict())  # a local path is no base model


def test_the_card_embeds_the_published_recipe(finished: Finished) -> None:
    blocks = re.findall(r"```yaml\n(.*?)\n```", finished.card, re.DOTALL)
    assert blocks == [(finished.directory / "final" / "recipe.yaml").read_text().rstrip("\n")]


def _read_table(lines: str) -> list[list[str]]:
    """The cells of a table in Markdown, without its head."""
    rows = re.findall(r"^\|(.*)\|$", lines, re.MULTILINE)[2:]
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def test_every_figure_of_the_card_is_in_the_report(finished: Finished) -> None:
    first, _, rest = finished.card.partition("\n## How to use it\n")
    stages = rest.partition("each step that was measured:\n")[2].partition("\n## ")[0]
    assert _read_table(stages) == tables.format_cells(finished.report, wide=False)
    source, row = finished.report["rows"][0], finished.report["rows"][-1]
    shown = {name: cells for name, *cells in _read_table(first)}
    assert shown["weights on disk"][:2] == [f"{significant(each['disk_bytes'] / 1e6)} MB" for each in (source, row)]
    assert shown["parameters"][:2] == [f"{each['parameters']:,}" for each in (source, row)]
    assert shown["peak memory of the process"][1] == f"{row['peak_memory_bytes'] / 1e6:.0f} MB"
    for before, after in zip(source["latency"], row["latency"], strict=True):
        cells = shown[f"latency, batch {after['batch_size']}: median (p95)"]
        assert cells[:2] == [f"{each['p50_ms']:.2f} ({each['p95_ms']:.2f}) ms" for each in (before, after)]
        assert cells[2].startswith(
            (f"{format_ratio(after['speedup'])}x faster", f"{format_ratio(1 / after['speedup'])}x slower")
        )
    share = row["quality"]["accuracy"] / source["quality"]["accuracy"]
    assert shown["Accuracy (95% interval)"][2] == f"{share:.1%} of the source's"
    found = row["against_source"]
    assert shown[f"loss of more than {found['margin']}"][1:2] == [
        {"shown": "ruled out", "worse": "shown", "not shown": "not ruled out"}[found["verdict"]]
    ]


def test_the_card_says_when_and_from_what_the_model_was_made(finished: Finished) -> None:
    history = finished.report["history"]
    assert list(history) == STAGES
    (weights,) = (file for file in history["03-quantize"]["sha256"])
    digest = hashlib.sha256((finished.directory / "final" / weights).read_bytes()).hexdigest()
    assert f"- **weights**: `{weights}`, SHA-256 `{digest}`" in finished.card
    assert finished.report["data_hash"] == finished.loaded.recipe.task.fingerprint(judged=True)
    assert finished.report["data_hash"] in finished.card


def rendered(finished: Finished, state: dict[str, Any], *speeds: tuple[float, float, float]) -> str:
    """The card of the run on a machine in such a state, with such a ratio and interval at each batch size."""
    content = json.loads(json.dumps(finished.report))
    content["machine"] |= state
    for entry, (ratio, low, high) in zip(content["rows"][-1]["latency"], speeds, strict=True):
        narrow = (high - low) / 2 <= 0.05 * ratio
        entry |= {"speedup": ratio, "speedup_interval": [low, high], "narrow": narrow, "speedup_plain": ratio / 2}
        entry["plain"] = NAME
    return card.render(finished.loaded, content, open_artifact(finished.directory / "final", STAGES[-1]))


def test_the_headline_tells_a_ratio_that_is_not_well_known_with_its_interval(finished: Finished) -> None:
    text = rendered(finished, factories.QUIET, (3.94, 3.8, 4.1), (0.5, 0.4, 0.8)).partition("\n|")[0]
    assert "**3.9x faster** at batch 1 and **2.0x slower** (1.25-2.50) at batch 8." in text
    assert "against the source in ONNX Runtime, it is 2.0x faster at batch 1 and 4.0x slower at batch 8." in text
    assert "busy" not in text


def test_a_card_of_a_busy_machine_has_no_speedup(finished: Finished) -> None:
    text = rendered(finished, factories.BUSY, (201.0, 190.0, 212.0), (447.0, 440.0, 460.0))
    headline, *rest = text.partition("\n|")
    assert "MB)" in headline
    assert "**busy**" in headline
    assert "`hfcompress report RUN --measure`" in headline
    assert not re.search(r"faster|slower", text.partition("## How to use it")[0])
    assert not re.search(r"\b(201|447|190|440|212|460)\b", text)
    assert "the machine was busy" in "".join(rest)


def test_a_report_of_an_earlier_version_still_makes_a_card(finished: Finished) -> None:
    content = json.loads(json.dumps(finished.report))
    for key in ("machine", "weights", "history", "data_hash", "plain_runtime", "labels"):
        content.pop(key, None)
    for row in content["rows"]:
        for entry in row["latency"]:
            for key in ("rounds", "speedup_interval", "narrow", "speedup_plain", "speedup_plain_interval", "p99_ms"):
                entry.pop(key, None)
    text = card.render(finished.loaded, content, open_artifact(finished.directory / "final", STAGES[-1]))
    assert re.search(r"\*\*(\d+\.\dx (faster|slower)|as fast)\*\* at batch 1 and", text)


def test_what_was_cut_is_in_the_report_drawn_and_shown_in_the_card(finished: Finished) -> None:
    from hfcompress.run.push import list_uploads

    record = json.loads((finished.directory / "02-prune" / "stage.json").read_text())
    assert finished.report["cuts"] == {"02-prune": {"kept": record["kept"]}}
    assert {p.name for p in (finished.directory / "plots").iterdir()} == {"tradeoff.png", "02-prune-kept.png"}
    assert {"tradeoff.png", "02-prune-kept.png"} <= {file.name for file in list_uploads(finished.directory)}
    section = finished.card.partition("## What was cut\n")[2]
    assert "It keeps 3 of 4 attention heads and 48 of 64 FFN neurons." in section
    assert "(02-prune-kept.png)" in section


@pytest.mark.parametrize(
    ("line", "wrong", "message"),
    [
        ("license: apache-2.0", "license: apache-3.0", "hub.license: 'apache-3.0' is no licence id"),
        ("language: en", "language: english", "hub.language: 'english' is no language code"),
        ("# tiny", "# tiny [More Information Needed]", "the card has an empty section"),
    ],
)
def test_a_card_that_the_hub_would_refuse_is_refused(finished: Finished, line: str, wrong: str, message: str) -> None:
    validate(finished.card)
    assert line in finished.card
    with pytest.raises(HfcompressError, match=re.escape(message)):
        validate(finished.card.replace(line, wrong, 1))


def _bytes(*folders: Path) -> dict[Path, tuple[str, int]]:
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    return {p: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def test_the_same_command_again_trains_and_measures_nothing(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("done before")

    monkeypatch.setattr(runner, "_run_stage", never)
    monkeypatch.setattr(finish, "measure", never)
    folders = [finished.directory / stage for stage in STAGES]
    before, card_before = _bytes(*folders), finished.card
    again = runner.run(finished.loaded, finished.directory)
    assert again is not None
    assert again.report == finished.report
    assert _bytes(*folders) == before
    assert finished.card == card_before


# Timing anew


@pytest.fixture
def again(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy of the run, and what times it anew: each time is `factor` times the old one, in a state of the machine."""
    from contextlib import nullcontext

    from hfcompress.measure import measure as measuring

    directory = tmp_path / "copy"
    shutil.copytree(finished.directory, directory)
    asked: list[Any] = []

    def process(artifact: Any, *_: Any, **__: Any) -> Any:
        asked.append(artifact)
        return nullcontext(SimpleNamespace(artifact=artifact, stage=artifact.stage, dtype=artifact.dtype))

    def times(processes: Any, *_: Any) -> Any:
        by_stage = {row["stage"]: row["latency"] for row in finished.report["rows"]}
        by_stage |= {plain["name"]: plain["latency"] for plain in finished.report["plain_runtime"]}
        new = {"p50_ms": 77.0, "speedup": 3.21, "speedup_interval": [3.2, 3.22], "narrow": True}
        return [[entry | new for entry in by_stage[p.stage]] for p in processes], again.state

    again = SimpleNamespace(directory=directory, state=factories.QUIET, asked=asked)
    monkeypatch.setattr(measuring, "ModelProcess", process)
    monkeypatch.setattr(measuring, "time_models", times)
    return again


def _without_times(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    del content["machine"], content["plain_runtime"]
    for row in content["rows"]:
        del row["latency"], row["latency_grid"], row["cold_start"], row["sustained"], row["speedup"]
    return content


def test_timing_anew_changes_times_alone(finished: Finished, again: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = factories.snapshot(again.directory)
    assert factories.run_cli("report", again.directory, "--measure", "--wide") == 0
    after = factories.snapshot(again.directory)
    changed = {name for name in before if before[name] != after.get(name)}
    assert set(after) == set(before)
    assert changed <= {"report.json", "report.csv", "report.md", "report.html", "plots/tradeoff.png",
                       "final/README.md", "final/tradeoff.png"}  # fmt: skip
    assert {"report.json", "report.csv", "report.md", "final/README.md"} <= changed
    places = [artifact.path for artifact in again.asked if artifact.stage not in (NAME, BFLOAT16)]
    assert places == [Path(finished.loaded.recipe.model), *(again.directory / stage for stage in STAGES)]
    assert _without_times(again.directory / "report.json") == _without_times(finished.directory / "report.json")
    assert list(json.loads(after["report.json"])) == list(json.loads(before["report.json"]))
    assert "**3.2x faster** at batch 1" in after["final/README.md"].decode()
    assert "3.21x (3.20-3.22)" in capsys.readouterr().out
    assert after["final/tradeoff.png"] == after["plots/tradeoff.png"]


def test_times_of_a_busy_machine_do_not_replace_those_of_a_quiet_one(
    again: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before, again.state = factories.snapshot(again.directory), factories.BUSY
    assert factories.run_cli("report", again.directory, "--measure") == 0
    assert factories.snapshot(again.directory) == before
    assert "busy now (other work took 50% of the processors' time)" in capsys.readouterr().err


def test_a_report_of_an_earlier_version_or_a_busy_machine_is_timed_anew(again: Any) -> None:
    path = again.directory / "report.json"
    content = json.loads(path.read_text())
    for key in ("machine", "weights", "history", "data_hash", "plain_runtime", "labels"):
        content.pop(key, None)
    path.write_text(json.dumps(content))
    again.state = factories.BUSY
    assert factories.run_cli("report", again.directory, "--measure") == 0
    assert json.loads(path.read_text())["machine"]["busy"] is True
    assert "**busy**" in (again.directory / "final" / "README.md").read_text()
    again.state = factories.QUIET
    assert factories.run_cli("report", again.directory, "--measure") == 0
    assert json.loads(path.read_text())["machine"]["busy"] is False


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: shutil.rmtree(run), "is not a run directory"),
        (lambda run: (run / "report.json").unlink(), "is not finished"),
        (lambda run: (run / "report.json").write_text("{"), "is not JSON"),
        (lambda run: shutil.rmtree(run / "final"), "holds no model"),
        (lambda run: shutil.rmtree(run / "02-prune"), "02-prune holds no model"),
        (
            lambda run: _append(run / "01-distill" / "config.json"),
            "01-distill is not the model that the report",
        ),
    ],
)
def test_what_is_no_finished_run_is_not_timed(
    again: Any, harm: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(again.directory)
    before = factories.snapshot(again.directory)
    assert factories.run_cli("report", again.directory, "--measure") == 2
    assert message in capsys.readouterr().err
    assert factories.snapshot(again.directory) == before
    assert again.asked == []


def _append(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


# From here on nothing is loaded in a fresh process: what a rerun does is asked, not what it measures.


@dataclass
class Swift:
    """Runs recipes and writes down what was trained, verified and measured."""

    folder: Path
    teacher: Path
    data: Path
    ran: list[str] = field(default_factory=list)
    measured: list[list[str]] = field(default_factory=list)

    def __call__(self, only: str | None = None, fresh: bool = False, **changes: Any) -> list[str]:
        """The stages that ran, in order."""
        self.ran.clear()
        self.measured.clear()
        recipe = factories.recipe(self.folder / "r.yaml", self.teacher, self.data, **changes)
        runner.run(load(recipe), self.run, only, fresh)
        return list(self.ran)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def stage(self, name: str) -> dict[str, Any]:
        return json.loads((self.run / name / "stage.json").read_text())


TRAIN = {"epochs": 1, "batch_size": 32, "learning_rate": 1e-3}
DISTILL = {"kind": "distill", "student": {"layers": 1}, "losses": ["soft_labels"], "train": TRAIN}
PRUNE = {"kind": "prune", "criterion": "magnitude", "ffn": 0.25}
FLOAT16 = {"kind": "quantize", "backend": "float16"}
CHAIN = [DISTILL, PRUNE, FLOAT16]
CHAIN_NAMES = ["01-distill", "02-prune", "03-quantize"]


@pytest.fixture
def swift(tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Swift:
    made = Swift(tmp_path, teacher, data)
    run_stage = runner._run_stage

    def noted(name: str, *arguments: Any) -> Any:
        made.ran.append(name)
        return run_stage(name, *arguments)

    def unmeasured(artifacts: list[Any], *_: Any) -> tuple[dict[str, Any], Answers]:
        made.measured.append([a.stage for a in artifacts])
        rows = [factories.report_row(a.stage, a.kind) for a in artifacts]
        answer = Answer(np.arange(48) % 2, np.arange(48) % 2)
        return {"machine": factories.QUIET, "rows": rows, "labels": ["0", "1"]}, align([answer] * len(artifacts))

    monkeypatch.setattr(runner, "_run_stage", noted)
    monkeypatch.setattr(finish, "measure", unmeasured)
    monkeypatch.setattr(runner, "verify", lambda *_: {"transformers": 0.0})
    monkeypatch.setattr("hfcompress.report.report.write", lambda content, directory: _json_only(content, directory))
    return made


def _json_only(content: dict[str, Any], directory: Path) -> None:
    (directory / "report.json").write_text(json.dumps(content))


def test_a_changed_option_runs_again_only_from_its_stage_on(swift: Swift) -> None:
    assert swift(stages=CHAIN) == CHAIN_NAMES
    kept = _bytes(swift.run / "01-distill")
    assert swift(stages=[DISTILL, PRUNE | {"ffn": 0.5}, FLOAT16]) == ["02-prune", "03-quantize"]
    assert swift.measured == [["source", *CHAIN_NAMES]]
    assert _bytes(swift.run / "01-distill") == kept
    assert swift(stages=[DISTILL, PRUNE | {"ffn": 0.5}, FLOAT16 | {"backend": "bfloat16"}]) == ["03-quantize"]


def test_another_seed_runs_everything_again(swift: Swift) -> None:
    swift(stages=CHAIN)
    assert swift(stages=CHAIN, seed=7) == CHAIN_NAMES
    assert swift(stages=CHAIN, seed=7) == []
    assert swift.measured == []


def test_a_way_to_measure_that_changed_measures_again_and_trains_nothing(swift: Swift) -> None:
    swift(stages=[DISTILL])
    assert swift(stages=[DISTILL], measure={"bootstrap": 200}) == []
    assert swift.measured == [["source", "01-distill"]]


def test_changed_data_run_again(swift: Swift, tmp_path: Path) -> None:
    swift.data = factories.write_data(tmp_path / "own")
    swift(stages=[DISTILL])
    factories.write_data(tmp_path / "own", seed=1)
    assert swift(stages=[DISTILL]) == ["01-distill"]


def test_fresh_starts_over(swift: Swift) -> None:
    swift(stages=CHAIN)
    (swift.run / "04-old").mkdir()
    assert swift(stages=CHAIN, fresh=True) == CHAIN_NAMES
    assert not (swift.run / "04-old").exists()


def test_only_runs_one_kind_and_the_rest_follows_later(swift: Swift) -> None:
    with pytest.raises(HfcompressError, match=r"01-distill comes first and is not done\n.*--only distill"):
        swift(only="prune", stages=CHAIN)
    assert swift(only="distill", stages=CHAIN) == ["01-distill"]
    assert swift.measured == [["source", "01-distill"]]
    assert swift(only="prune", stages=CHAIN) == ["02-prune"]
    assert swift(stages=CHAIN) == ["03-quantize"]
    with pytest.raises(HfcompressError, match="has no finetune stage"):
        swift(only="finetune", stages=CHAIN)


def test_the_card_of_a_part_of_the_chain_tells_of_that_part(swift: Swift) -> None:
    from huggingface_hub import ModelCard

    swift(only="distill", stages=CHAIN)
    made = ModelCard((swift.run / "final" / "README.md").read_text())
    assert "distilled" in made.data.tags
    assert not {"pruned", "quantized"} & set(made.data.tags)
    assert "**distill**" in made.content
    assert "**prune**" not in made.content
    assert "**quantize**" not in made.content


def test_a_failed_stage_looks_unfinished_and_is_done_again(swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("hfcompress.pruning.engine.cut_step", _fails)
        with pytest.raises(OSError, match="the disk went away"):
            swift(stages=CHAIN)
    assert (swift.run / "01-distill" / "stage.json").is_file()
    assert not (swift.run / "02-prune").exists()
    assert not (swift.run / "final").exists()
    with pytest.raises(HfcompressError, match="is not finished"):
        run_directory.open_finished(swift.run)
    assert swift(stages=CHAIN) == ["02-prune", "03-quantize"]


def _fails(*_: Any, **__: Any) -> None:
    raise OSError("the disk went away")


def test_a_model_that_reloads_as_another_fails_its_stage(swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfcompress.measure import verify

    def differs(*_: Any) -> float:
        raise verify.ReloadError("it differs")

    with monkeypatch.context() as patched:
        patched.setattr(runner, "verify", differs)
        with pytest.raises(verify.ReloadError):
            swift(stages=[DISTILL])
    assert not (swift.run / "01-distill").exists()
    assert swift(stages=[DISTILL]) == ["01-distill"]


def test_what_a_killed_writer_left_in_a_cache_is_removed_by_the_next_run(
    swift: Swift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFCOMPRESS_HOME", str(tmp_path / "home"))
    cache = tmp_path / "home" / "teachers"
    (cache / "whole").mkdir(parents=True)
    (cache / "whole.1f.partial.lock").write_text("")  # killed after the directory got its name
    (cache / "half.2e.partial").mkdir()
    swift()
    assert [path.name for path in cache.iterdir()] == ["whole"]


def test_an_old_report_is_not_taken_for_a_run_that_a_new_recipe_left_unfinished(
    swift: Swift, monkeypatch: pytest.MonkeyPatch
) -> None:
    swift(stages=CHAIN)
    run_directory.open_finished(swift.run)
    monkeypatch.setattr("hfcompress.pruning.engine.cut_step", _fails)
    with pytest.raises(OSError, match="the disk went away"):
        swift(stages=[DISTILL, PRUNE | {"ffn": 0.5}, FLOAT16])
    with pytest.raises(HfcompressError, match="is not finished"):
        run_directory.open_finished(swift.run)


# Sources that are made first


FINETUNE = {"kind": "finetune", "train": {"epochs": 15, "batch_size": 16, "learning_rate": 5e-3}}


def test_a_model_without_a_head_is_fine_tuned_into_the_source(swift: Swift, tmp_path: Path) -> None:
    swift.teacher = factories.save(factories.model().bert, tmp_path / "base")
    assert swift(stages=[FINETUNE, DISTILL]) == ["01-finetune", "02-distill"]
    assert swift.measured == [["source", "02-distill"]]
    assert swift.stage("01-finetune")["dev"] == 1.0
    assert swift.stage("02-distill")["teacher"] == {"stage": "source", "dev": 1.0}
    config = json.loads((swift.run / "01-finetune" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_zero_epochs_take_a_fine_tuned_model_as_it_is(swift: Swift, teacher: Path) -> None:
    from safetensors.torch import load_file

    swift(stages=[{"kind": "finetune", "train": {"epochs": 0}}])
    ours, theirs = (load_file(p / "model.safetensors") for p in (swift.run / "01-finetune", teacher))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert swift.measured == [["source"]]


def test_zero_epochs_of_a_model_without_a_head_are_refused(swift: Swift, tmp_path: Path) -> None:
    swift.teacher = factories.save(factories.model().bert, tmp_path / "base")
    with pytest.raises(
        HfcompressError, match="is a BertModel, which has no task head for text-classification"
    ) as error:
        swift(stages=[{"kind": "finetune", "train": {"epochs": 0}}])
    assert "train it in its `finetune` stage" in str(error.value)


def _pairs(folder: Path) -> Path:
    """Pairs of texts, scored by how many good words the first holds more than the second."""
    import random

    draw = random.Random(0)
    folder.mkdir()
    for split, count in (("train", 96), ("dev", 32)):
        lines = ["first\tsecond\tscore"]
        for _ in range(count):
            goods = draw.randint(0, 2), draw.randint(0, 2)
            texts = [
                " ".join([*draw.choices(factories.NEUTRAL, k=3), *draw.choices(factories.GOOD, k=n)]) for n in goods
            ]
            lines.append(f"{texts[0]}\t{texts[1]}\t{(goods[0] - goods[1]) / 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def _regression(swift: Swift, tmp_path: Path) -> None:
    swift.teacher = factories.save(factories.model().bert, tmp_path / "base")
    task = {"type": "regression", "dataset": str(_pairs(tmp_path / "pairs")), "text": ["first", "second"],
            "max_length": 24}  # fmt: skip
    swift(task=task, stages=[FINETUNE, DISTILL | {"train": TRAIN | {"epochs": 4}}, FLOAT16])


def test_a_regression_on_pairs_goes_through(swift: Swift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(artifacts: list[Any], *_: Any) -> tuple[dict[str, Any], Answers]:
        rows = [factories.report_row(a.stage, a.kind) | {"quality": {"pearson": 0.5, "n": 32}} for a in artifacts]
        answer = Answer(np.linspace(0, 1, 32), np.linspace(0, 1, 32))
        return {"machine": factories.QUIET, "rows": rows}, align([answer] * len(artifacts))

    monkeypatch.setattr(finish, "measure", scored)
    _regression(swift, tmp_path)
    config = json.loads((swift.run / "final" / "config.json").read_text())
    assert (config["problem_type"], config["dtype"], config["id2label"]) == ("regression", "float16", {"0": "score"})
    assert swift.stage("01-finetune")["dev"] > 0.7
    assert swift.stage("02-distill")["dev"] > 0.5
    card_text = (swift.run / "final" / "README.md").read_text()
    assert "print(float(score)" in card_text
    assert "Pearson" in card_text


@pytest.mark.slow
def test_a_regression_is_measured_and_its_card_runs(
    swift: Swift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfcompress.measure.measure import measure
    from hfcompress.measure.verify import verify

    monkeypatch.setattr(finish, "measure", measure)
    monkeypatch.setattr(runner, "verify", verify)
    _regression(swift, tmp_path)
    rows = json.loads((swift.run / "report.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == ["source", "02-distill", "03-quantize"]
    assert rows[0]["quality"]["pearson"] > 0.5
    assert rows[2]["compression"] == pytest.approx(2 * rows[1]["compression"], rel=0.2)
    snippet = re.search(r"```python\n(.*?)```", (swift.run / "final" / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    printed = _python(snippet[1].replace("PATH_OR_REPO", str(swift.run / "final"))).splitlines()
    assert [float(line.split(" | ")[0]) for line in printed]
