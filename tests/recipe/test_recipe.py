"""What a recipe may say, and that every mistake in it is told at once, at its line, before anything is trained."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from hfcompress.data.tasks import TextClassification
from hfcompress.distillation.student import Student
from hfcompress.pruning.schedules import Iterative
from hfcompress.recipe.loader import Document, Loaded, find, find_shipped, load, validate
from hfcompress.recipe.plan import plan
from hfcompress.recipe.schema import Distill, Prune, Quantize, Recipe, spell_out
from hfcompress.recipe.validate import check
from hfcompress.recipe.yaml_text import dump_yaml
from hfcompress.utils.errors import HfcompressError, Problem
from tests import factories
from tests.soak import recipes

BERT_BASE = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
             "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512}  # fmt: skip
MINILM = BERT_BASE | {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}


def problems(path: Path, *overrides: str) -> list[Problem]:
    """What `load`, or else `check`, has against a recipe."""
    with pytest.raises(HfcompressError) as caught:
        check(load(path, list(overrides)))
    return caught.value.problems


def message(path: Path, *overrides: str) -> str:
    return "\n".join(map(str, problems(path, *overrides)))


def line_of(path: Path, text: str) -> int:
    """The one line that holds a text."""
    (number,) = [n for n, line in enumerate(path.read_text().splitlines(), start=1) if text in line]
    return number


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def config_only(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    write(path / "config.json", json.dumps(config))
    return path


def test_the_tiny_recipe_is_sound_and_nothing_is_said_of_it(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load(recipe)
    shapes = check(loaded)
    assert capfd.readouterr() == ("", "")
    assert [len(shape.layers) for shape in shapes] == [2, 1, 1, 1]
    assert loaded.recipe.stage_names() == ["01-distill", "02-prune", "03-quantize"]


def test_every_mistake_of_the_file_is_told_at_once_with_line_and_key(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.yaml",
        """\
name: bad name
model: m
taks: x
task:
  type: text-classification
  dataset: d
  text: sentence
  lable: y
stages:
  - kind: distill
    losses: [soft_label, {use: soft_labels, temprature: 2}]
    train:
      learning_rate: fast
      epochs: -1
      schedule: lineer
  - kind: prun
    heads: 0.5
  - kind: prune
    criterion: taylr
    heads: 1.0
  - kind: quantize
    backend: onnx_int5
  - heads: 0.1
measure: {latency: {batch_sizes: []}}
seed: 1.5
""",
    )
    found = {(".".join(map(str, p.key)), p.where.rpartition(":")[2]): p.message for p in problems(path)}
    expected = {
        ("name", "1"): "pattern",
        ("taks", "3"): "did you mean 'task'?",
        ("task.text", "7"): "valid list",
        ("task.lable", "8"): "did you mean 'label'?",
        ("stages.0.losses.0", "11"): "unknown loss 'soft_label'; did you mean 'soft_labels'?",
        ("stages.0.losses.1.temprature", "11"): "did you mean 'temperature'?",
        ("stages.0.train.learning_rate", "13"): "valid number, not 'fast'",
        ("stages.0.train.epochs", "14"): "greater than or equal to 0, not -1",
        ("stages.0.train.schedule", "15"): "'linear', 'cosine' or 'constant', not 'lineer'",
        ("stages.1.kind", "16"): "unknown kind 'prun'; did you mean 'prune'?",
        ("stages.2.criterion", "19"): "unknown criterion 'taylr'; did you mean 'taylor'?",
        ("stages.2.heads", "20"): "less than 1, not 1.0",
        ("stages.3.backend", "22"): "unknown backend 'onnx_int5'; did you mean 'onnx_int8'?",
        ("stages.4", "23"): "'kind' is missing",
        ("measure.latency.batch_sizes", "24"): "at least 1 item",
        ("seed", "25"): "valid integer, not 1.5",
    }
    assert found.keys() == expected.keys()
    for place, part in expected.items():
        assert part in found[place]


def test_a_key_that_is_missing_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "name: a\ntask: {type: regression, text: [a]}\nstages: []\n")
    told = message(path)
    assert "r.yaml model: this key is required" in told.replace(":1", "")
    assert "r.yaml:2 task.dataset: this key is required" in told
    assert "r.yaml:3 stages: " in told


@pytest.mark.parametrize("sizes", ["[0]", "[-1]", "[1, 1000000000]"])
def test_a_batch_has_a_size_that_can_be_run(recipe: Path, sizes: str) -> None:
    assert "measure.latency.batch_sizes" in message(recipe, f"measure.latency.batch_sizes={sizes}")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "'1'", "true", "null", "[1]"])
def test_a_number_is_a_finite_number(recipe: Path, value: str) -> None:
    assert "stages.0.train.epochs" in message(recipe, f"stages.0.train.epochs={value}")


def test_a_mistake_in_an_override_is_placed_there(recipe: Path) -> None:
    (problem,) = problems(recipe, "stages.0.train.epoch=1")
    assert str(problem).startswith("--set stages.0.train.epoch stages.0.train.epoch: unknown key 'epoch'")
    assert "did you mean 'epochs'?" in problem.message


@pytest.mark.parametrize(
    ("overrides", "key", "why"),
    [
        (["task.metric=acuracy"], "task.metric", "has no metric 'acuracy'; did you mean 'accuracy'?"),
        (["task.metric=pearson"], "task.metric", "has no metric 'pearson'"),
        (["task.text=[sentense]"], "task.text.0", "train.tsv has no column 'sentense'\n    did you mean 'sentence'?"),
        (["task.label=lable"], "task.label", "dev.tsv has no column 'lable'\n    did you mean 'label'?"),
        (["task.splits.dev=heldout"], "task.dataset", "no dev file in"),
        (["task.dataset=./gone"], "task.dataset", "no such data directory: ./gone"),
        (["task.max_length=41"], "task.max_length", "position table allows (40)\n    set it to 40 or less"),
        (["model=./gone"], "model", "no such model directory: ./gone"),
        (["stages.0.student.heads=5"], "stages.0.student.heads", "5 heads do not divide the hidden width 32"),
        (["stages.0.student.hidden=30"], "stages.0.student.hidden", "4 heads do not divide the hidden width 30"),
        (["stages.0.student.positions=8"], "stages.0.student.positions", "the student's position table allows (8)"),
        (["stages.0.student.positions=50"], "stages.0.student.positions", "cannot copy 50"),
        (["stages.0.student.layers=3"], "stages.0.layer_map", "the student has 3 layers and the teacher 2"),
        (["stages.0.teacher=02-prune"], "stages.0.teacher", "02-prune is not made yet"),
        (["stages.0.teacher=01-distill"], "stages.0.teacher", "01-distill is not made yet"),
        (["stages.0.teacher=07-distill"], "stages.0.teacher", "the recipe has no stage 07-distill"),
        (["stages.0.teacher=./gone"], "stages.0.teacher", "no such teacher directory"),
        (["stages.1.recover.teacher=01-distil"], "stages.1.recover.teacher", "did you mean '01-distill'?"),
        (["stages.1.multiple_of=24"], "stages.1.multiple_of", "the FFN width 64 is not a multiple of 24"),
        (["stages.1.heads=0", "stages.1.ffn=0"], "stages.1.heads", "nothing is pruned"),
        (["stages.0={kind: quantize, backend: float16}"], "stages.1", "prune cannot follow quantize"),
        (["stages.1={kind: finetune}"], "stages.1", "finetune makes the source, so it must come first"),
        (["stages.0.augment={model: ./gone}"], "stages.0.augment.model", "no such model directory: ./gone"),
    ],
)
def test_what_cannot_work_is_found_by_check(recipe: Path, overrides: list[str], key: str, why: str) -> None:
    found = problems(recipe, *overrides)
    assert key in [".".join(map(str, p.key)) for p in found]
    told = next(str(p) for p in found if why in str(p))
    assert "--set" in told or "recipe.yaml:" in told


def test_the_texts_of_a_stage_with_a_task_of_its_own_fit_the_model(recipe: Path, tmp_path: Path) -> None:
    corpus = f"{{type: fill-mask, dataset: {factories.write_corpus(tmp_path / 'corpus')}, max_length: 41}}"
    (problem,) = problems(
        recipe,
        f"stages.0.task={corpus}",
        "stages.0.losses=[hidden_states]",
        "stages.1={kind: distill, losses: [soft_labels]}",
    )
    assert ".".join(map(str, problem.key)) == "stages.0.task.max_length"
    assert problem.fix == "set it to 40 or less"


def test_check_tells_all_that_it_finds(recipe: Path, tmp_path: Path) -> None:
    bare = config_only(tmp_path / "bare", factories.model().config.to_dict())
    told = message(
        recipe, f"model={bare}", "task.label=lable", "task.max_length=99", "stages.0.student.heads=5", "stages.1.ffn=0",
        "stages.1.heads=0", "stages.0.teacher=02-prune",
    )  # fmt: skip
    for part in ("no column 'lable'", "max_length is 99", "5 heads do not divide", "nothing is pruned", "not made yet",
                 "holds no weights"):  # fmt: skip
        assert part in told


def test_the_data_is_looked_at_even_where_the_recipe_is_not_valid(recipe: Path) -> None:
    told = message(recipe, "stages.0.train.epoch=1", "task.label=lable")
    assert "unknown key 'epoch'" in told
    assert "train.tsv has no column 'lable'" in told


def test_a_student_deeper_than_its_teacher_may_learn_from_its_answers(recipe: Path) -> None:
    loaded = load(recipe, ["stages.0.student.layers=3", "stages.0.losses=[soft_labels]"])
    assert len(check(loaded)[1].layers) == 3


def test_a_regression_needs_a_head_with_one_output(recipe: Path, data: Path) -> None:
    task = f"task={{type: regression, text: [sentence], label: label, max_length: 16, dataset: {data}}}"
    assert "the model's task head has 2 outputs, a regression task needs 1" in message(recipe, task)
    assert check(load(recipe, [task, "stages=[{kind: finetune}, {kind: quantize, backend: float16}]"]))[1].labels == 1


@pytest.mark.parametrize(
    ("module", "overrides", "key", "extra"),
    [
        ("onnxruntime", [], ("stages", 2, "backend"), "onnx"),
        ("bitsandbytes", ["stages.2.backend=bnb_8bit"], ("stages", 2, "backend"), "bitsandbytes"),
        ("codecarbon", ["measure.energy=true"], ("measure", "energy"), "energy"),
    ],
)
def test_an_extra_that_is_missing_names_its_installation(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, module: str, overrides: list[str], key: Any, extra: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else real(name, *a))
    (problem,) = problems(recipe, *overrides)
    assert problem.message == f"{module} is not installed"
    assert problem.fix == f"pip install 'hfcompress[{extra}]'"
    assert problem.key == key


def test_resolved_spells_out_a_recipe_that_means_the_same(recipe: Path, tmp_path: Path) -> None:
    loaded = load(recipe)
    full = spell_out(loaded.recipe)
    assert full["stages"][1]["criterion"] == {"use": "taylor", "rows": 32, "batch_size": 32, "seed": None}
    assert {"use": "onnx_int8", "mode": "dynamic", "rows": 512}.items() <= full["stages"][2]["backend"].items()
    again = load(write(tmp_path / "full.yaml", dump_yaml(full)))
    assert again.recipe == loaded.recipe


@pytest.mark.parametrize("name", sorted(find_shipped()))
def test_a_shipped_recipe_that_spells_out_its_defaults_is_the_same(name: str, tmp_path: Path) -> None:
    recipe = load(find_shipped()[name]).recipe
    assert load(write(tmp_path / "full.yaml", dump_yaml(spell_out(recipe)))).recipe == recipe


def test_a_recipe_is_found_by_path_before_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("tinybert") == find_shipped()["tinybert"]
    write(tmp_path / "tinybert", "name: mine")
    assert find("tinybert") == Path("tinybert")


# --- the plan


def test_the_plan_of_a_head_that_is_made_for_the_data_counts_its_labels(recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "three"
    data.mkdir()
    for split in ("train", "dev"):
        rows = "".join(f"good\t{label}\n" for label in "abc" * 4)
        write(data / f"{split}.tsv", "sentence\tlabel\n" + rows)
    stages = "stages=[{kind: finetune}, {kind: quantize, backend: float16}]"
    rows = plan(load(recipe, [f"task.dataset={data}", stages]))
    assert [row.shape.labels for row in rows] == [2, 3, 3]
    assert check(load(recipe, [f"task.dataset={data}", stages]))[-1].labels == 3


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ("{epochs: 2, batch_size: 16}", 12),
        ("{epochs: 0.5, batch_size: 32}", 2),
        ("{epochs: 1, batch_size: 10, gradient_accumulation: 3}", 4),
        ("{epochs: 9, max_steps: 7}", 7),
        ("{epochs: 0}", 0),
    ],
)
def test_the_plan_counts_steps(recipe: Path, train: str, steps: int) -> None:
    """The tiny train split has 96 rows."""
    assert plan(load(recipe, [f"stages.0.train={train}"]))[1].steps == steps


def test_the_plan_needs_no_weights_and_check_does(recipe: Path, tmp_path: Path, teacher: Path) -> None:
    bare = config_only(tmp_path / "bare", json.loads((teacher / "config.json").read_text()))
    with_weights, without = plan(load(recipe)), plan(load(recipe, [f"model={bare}"]))
    assert [row.shape for row in with_weights] == [row.shape for row in without]
    assert "holds no weights" in message(recipe, f"model={bare}")


# --- the recipes that ship


def planned_with(name: str, tmp_path: Path, config: dict[str, Any]) -> tuple[Loaded, list[Any]]:
    """The quickstart brings a model of its own; it is the others that are made for any BERT."""
    model = "builtin:quickstart" if name == "quickstart" else config_only(tmp_path / "model", config)
    loaded = load(find_shipped()[name], [f"model={model}"])
    return loaded, plan(loaded)


@pytest.mark.parametrize("name", find_shipped())
def test_every_shipped_recipe_loads_and_says_what_it_makes(name: str) -> None:
    loaded = load(find_shipped()[name])
    assert len(loaded.headline) > 20
    header = loaded.document.text.partition("\nname:")[0]
    for word in ("makes:", "needs:", "takes:", "check:", "run:"):
        assert word in header


SMALLER = ["bnb-nf4", "int8-dynamic", "prune-heads-ffn", "sst2-minilm", "stsb-distilbert", "tinybert"]
"""What these make is smaller than a MiniLM-L6 too; the students of the others are no smaller than that."""


@pytest.mark.parametrize(
    ("name", "config"), [*((name, BERT_BASE) for name in find_shipped()), *((name, MINILM) for name in SMALLER)]
)
def test_every_shipped_recipe_plans_offline(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    loaded, rows = planned_with(name, tmp_path, config)
    assert [row.stage for row in rows] == ["model", *loaded.recipe.stage_names()]
    zeros_or_words = name in ("prune-lottery", "prune-movement", "prune-2of4", "prune-vocab")
    assert rows[-1].shape.bytes < rows[0].shape.bytes or zeros_or_words
    sizes = [row.shape.bytes for row, stage in zip(rows[1:], loaded.recipe.stages, strict=True) if stage.compresses]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("name", "shape", "parameters"), [
    ("tinybert", (4, 312, 1200), 14_350_874), ("minilm", (6, 384, 1536), 22_713_986),
    ("distilbert", (6, 768, 3072), 66_956_546),
])  # fmt: skip
def test_a_recipe_makes_a_published_student_of_bert_base(
    name: str, shape: tuple[int, int, int], parameters: int, tmp_path: Path
) -> None:
    _, rows = planned_with(name, tmp_path, BERT_BASE)
    student = rows[-1].shape
    assert (len(student.layers), student.hidden, student.layers[0].ffn) == shape
    assert student.parameters == parameters


def test_a_regression_recipe_plans_a_head_with_one_output(tmp_path: Path) -> None:
    _, rows = planned_with("stsb-distilbert", tmp_path, BERT_BASE)
    assert [row.shape.labels for row in rows[:2]] == [2, 1]
    assert rows[0].shape.parameters - rows[1].shape.parameters == 768 + 1


# --- what the Hub takes


@pytest.mark.parametrize(
    ("override", "key", "why"),
    [
        ("hub.license=proprietary", "hub.license", "write `other` for a licence that is not on the Hub's list"),
        ("hub.license=apache2.0", "hub.license", "did you mean 'apache-2.0'?"),
        ("hub.license=MIT", "hub.license", "did you mean 'mit'?"),
        ("hub.license_name=my-licence", "hub.license_name", "use it only with `license: other`"),
        ("hub={license: other, license_name: My Licence}", "hub.license_name", "should match pattern"),
        ("hub={license: other, license_link: LICENSE}", "hub.license_link", "should match pattern"),
        ("hub.language=[no]", "hub.language.0", 'quote it: "no" is Norwegian'),
        ("hub.language=[en, english]", "hub.language.1", "'english' is no language code"),
        ("hub.language=[zh-CN]", "hub.language.0", "did you mean 'zh'?"),
        ("hub.language=[EN]", "hub.language.0", "did you mean 'en'?"),
        ("hub.language=[xx]", "hub.language.0", "'xx' is no language code"),
        ("hub.base_model=./my model", "hub.base_model", "is a place on this machine"),
        ("hub.base_model=/data/model", "hub.base_model", "is a place on this machine"),
        ("hub.dataset=./data", "hub.dataset", "is a place on this machine"),
        ("hub.dataset=a/b/c", "hub.dataset", "is no repository name"),
        ("hub.dataset=https://huggingface.co/a/b", "hub.dataset", "is no repository name"),
        ("hub.repo=../..", "hub.repo", "is a place on this machine"),
        ("hub.repo=user/..", "hub.repo", "is no repository name"),
        ("hub.repo=user/a--b", "hub.repo", "is no repository name"),
        ("hub.repo=user/x.git", "hub.repo", "is no repository name"),
        ("hub.repo=user/-x", "hub.repo", "is no repository name"),
        ("hub.repo=user/x.", "hub.repo", "is no repository name"),
        ("hub.repo=user/é", "hub.repo", "is no repository name"),
        ("hub.repo=user/" + "x" * 97, "hub.repo", "is no repository name"),
        ("hub.repo=name", "hub.repo", "write user/name"),
        ("name=tiny.", "name", "no directory can have this name"),
        ("name=CON", "name", "no directory can have this name"),
        ("name=a" + "漢" * 80, "name", "it has 241 bytes"),
    ],
)
def test_what_the_hub_or_a_file_system_does_not_take_is_told_at_its_line(
    recipe: Path, override: str, key: str, why: str
) -> None:
    with pytest.raises(HfcompressError) as caught:
        load(recipe, [override])
    (problem,) = caught.value.problems
    assert ".".join(map(str, problem.key)) == key
    assert why in problem.message
    assert problem.where.startswith("--set ")


@pytest.mark.parametrize(
    "hub",
    [
        "{language: [multilingual]}", "{language: [code]}", '{language: ["no", en, deu, ger, yue]}', "{language: []}",
        "{license: other, license_name: my-licence-1.0, license_link: 'https://example.org/licence'}",
        "{license: other}", "{license: cc-by-nc-sa-4.0}", "{base_model: bert-base-uncased, dataset: glue}",
        "{repo: User_1/a.b-c_d, base_model: a/b, dataset: c/d}",
    ],
)  # fmt: skip
def test_what_the_hub_takes_is_taken(recipe: Path, hub: str) -> None:
    check(load(recipe, [f"hub={hub}"]))


@pytest.mark.parametrize(
    ("stage", "key", "why"),
    [
        ("schedule={use: iterative, rounds: 1000000000000}", "stages.1.schedule", "less than or equal to 1000"),
        ("schedule={use: lottery, rounds: 1000000000000}", "stages.1.schedule", "less than or equal to 1000"),
        ("layers=99", "stages.1.layers", "99 of 1 layers would leave none"),
    ],
)
def test_a_number_beyond_all_models_is_told_at_once(recipe: Path, stage: str, key: str, why: str) -> None:
    budget = "stages.1={kind: prune, criterion: taylor, budget: {macs: 0.5}, recover: {epochs: 1}}"
    found = problems(recipe, budget, f"stages.1.{stage}")
    assert why in next(p.message for p in found if ".".join(map(str, p.key)).startswith(key))


# --- recipes at random: `python -m tests.soak.recipes` tries 100,000


def test_a_recipe_at_random_is_sound_or_refused() -> None:
    found: list[tuple[int, str]] = []
    assert recipes.run(range(250), lambda *what: found.append(what)) == 0, found


def test_a_recipe_in_python_spells_no_kinds_and_types() -> None:
    made = Recipe(
        name="a", model="m", task=TextClassification(dataset="d", text=["sentence"]),
        stages=[
            Distill(student=Student(layers=3, origin="source"), losses=["soft_labels"]),
            Prune(heads=0.25, schedule=Iterative(rounds=2)),
            Quantize(backend="onnx_int8"),
        ],
    )  # fmt: skip
    spelled = validate(Document(Path("a.yaml"), "", spell_out(made)))
    assert spelled.recipe == made
    assert spell_out(made)["stages"][0]["student"]["from"] == "source"


def test_a_recipe_file_has_one_spelling_for_each_key(recipe: Path) -> None:
    assert "unknown key 'origin'" in message(recipe, "stages.0.student.origin=source")
