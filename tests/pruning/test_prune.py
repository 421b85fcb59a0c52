"""The prune stage: what a recipe may say, and what each granularity and schedule makes of a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hfcompress.models.artifact import load_model, load_tokenizer, open_artifact, read_config
from hfcompress.models.shape import Shape, shape_of
from hfcompress.pruning.schedules import Iterative, Lottery, share_done
from hfcompress.pruning.stage import Prune
from hfcompress.recipe.loader import load
from hfcompress.run import runner
from tests import factories

AUTO = "AutoModelForSequenceClassification"
TRAIN = {"max_steps": 6, "batch_size": 16, "learning_rate": 1e-3}


class Rows:
    """A task of which only the number of rows matters."""

    is_streamed, head, max_length, metric = False, "sequence", 16, "accuracy"

    def count_rows(self) -> int:
        return 96


def shape(family: str = "bert", **sizes: Any) -> Shape:
    return shape_of(factories.model(family, **sizes).config.to_dict())


def problems(options: dict[str, Any], of: Shape | None = None) -> list[str]:
    stage = Prune.model_validate({"kind": "prune", **options})
    return [f"{'.'.join(map(str, p.key))}: {p.message}" for p in stage.problems(of or shape(), {}, Rows())]


# What a recipe may say


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing is pruned"),
        ({"criterion": "cosine", "heads": 0.5}, "the criterion cosine does not score heads and neurons"),
        ({"layers": 1}, "the criterion taylor does not score whole layers"),
        ({"criterion": "l0", "heads": 0.5, "train": {}}, "l0 learns its masks under a budget"),
        ({"criterion": "cosine", "layers": 2}, "2 of 2 layers would leave none"),
        ({"attention_blocks": 2}, "2 of 2 layers would leave none"),
        ({"ffn": 0.5, "multiple_of": 7}, "the FFN width 64 is not a multiple of 7"),
        ({"hidden": 0.5, "multiple_of": 7}, "the hidden width 32 is not a multiple of 7"),
        ({"budget": {"macs": 0.5}, "heads": 0.5}, "`budget` and `heads` decide the same thing"),
        ({"budget": {"macs": 0.5}, "allocation": "uneven"}, "so `allocation` changes nothing"),
        ({"criterion": "random", "budget": {"latency": 0.5}, "hidden": 0.25}, "and `hidden` changes these"),
        ({"vocabulary": "corpus", "allocation": "uneven"}, "no share of heads or neurons is cut"),
        ({"criterion": "movement", "budget": {"macs": 0.5}, "weights": {"share": 0.5}, "train": {}}, "not on both"),
        ({"heads": 0.5, "weights": {"share": 0.5}, "schedule": "gradual", "train": {}}, "not on both"),
        ({"heads": 0.5, "empty_blocks": True}, "`empty_blocks` is only for a `budget`"),
        ({"vocabulary": "corpus", "tune": "scales"}, "`tune` is only for heads and neurons, and none are cut"),
        ({"heads": 0.5, "train": {}}, "`train` is only for learned masks, `gradual` and `lottery`"),
        ({"heads": 0.5, "schedule": "iterative"}, "there is no `recover`"),
        ({"heads": 0.5, "schedule": "gradual"}, "there is no `train`"),
        ({"heads": 0.5, "schedule": "lottery", "train": {}, "recover": {}}, "and `recover` would be ignored"),
        ({"criterion": "l0", "budget": {"macs": 0.5}, "train": {}, "schedule": {"use": "gradual"}},
         "l0 has a schedule of its own"),
        ({"heads": 0.5, "schedule": "gradual", "train": {"keep_best": True}},
         "the best model while masks close is one of the first"),
        ({"heads": 0.5, "schedule": "gradual", "train": {}, "sensitivity": {}}, "nothing is scored before"),
        ({"heads": 0.5, "schedule": "gradual", "train": {"lora": {}}}, "so `lora` cannot be used here"),
        ({"hidden": 0.5, "schedule": "gradual", "train": {}}, "`hidden` cannot be cut while the model trains"),
        ({"heads": 0.5, "criterion": "obs", "schedule": "gradual", "train": {}},
         "only the schedules one_shot and iterative can use"),
        ({"heads": 0.5, "tune": "scales", "schedule": "lottery", "train": {}},
         "only the schedules one_shot and iterative can use"),
        ({"heads": 0.5, "recover": {"lora": {}, "losses": ["hard_labels"], "layer_map": "last"}},
         "so `layer_map` changes nothing"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_at_its_key(options: dict[str, Any], said: str) -> None:
    found = problems(options)

    assert any(said in line for line in found), found
    assert all(line.partition(":")[0] for line in found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule": "cubic"}, "cubic"),
        ({"schedule": {"use": "gradual", "begin": 0.8}}, "must come before `end`"),
        ({"weights": {}}, "say either `share` or `n_of_m`"),
        ({"weights": {"n_of_m": [4, 4]}}, "keeps everything"),
        ({"weights": {"n_of_m": [2, 4], "block": [2, 2]}}, "leave `scope` and `block` out"),
        ({"budget": {}}, "a budget is one of"),
        ({"budget": {"macs": 0.5, "bytes": 0.5}}, "a budget is one of"),
    ],
)
def test_options_that_contradict_one_another_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        Prune.model_validate({"kind": "prune", "heads": 0.5, **options})

    assert said in str(error.value)


def test_albert_s_layers_are_one_and_cannot_be_dropped() -> None:
    assert any("all layers share the same weights" in p for p in problems({"criterion": "cosine", "layers": 1},
                                                                         shape("albert")))  # fmt: skip


def test_a_hidden_width_that_no_config_can_say_is_refused() -> None:
    assert any("which no config can express" in p for p in problems({"hidden": 0.5}, shape("electra")))


@pytest.mark.parametrize("family", ["bert", "mpnet", "deberta-v2", "albert", "modernbert", "electra", "llama"])
def test_every_architecture_can_lose_heads_and_neurons(family: str) -> None:
    assert problems({"heads": 0.5, "ffn": 0.5}, shape(family)) == []


# What a plan says


def test_a_plan_counts_layers_blocks_and_hidden_dimensions() -> None:
    stage = Prune.model_validate({"kind": "prune", "layers": 1, "attention_blocks": 1, "hidden": 0.25, "heads": 0.5})

    planned = stage.plan(shape(layers=4))

    assert len(planned.layers) == 3
    assert sum(x.heads for x in planned.layers) == 2 * 2
    assert planned.hidden == 24
    assert planned.head_dim == 8


def test_a_plan_marks_what_a_budget_or_a_corpus_decides() -> None:
    def estimated(**options: Any) -> bool:
        return Prune.model_validate({"kind": "prune", **options}).plan(shape()).estimated

    assert estimated(budget={"macs": 0.5})
    assert estimated(vocabulary="corpus")
    assert not estimated(heads=0.5, allocation="uneven")


def test_a_curve_starts_at_nothing_and_ends_with_everything() -> None:
    for curve in ("linear", "cubic"):
        assert share_done(curve, 0.0) == 0.0  # type: ignore[arg-type]
        assert share_done(curve, 1.0) == 1.0  # type: ignore[arg-type]
    assert share_done("cubic", 0.5) == 1 - 0.5**3
    assert Iterative(use="iterative", rounds=4, curve="linear").shares == [0.25, 0.5, 0.75, 1.0]
    assert Lottery(use="lottery", rounds=2).shares == [0.5, 1.0]


def test_steps_count_every_training() -> None:
    train = {"epochs": 1, "batch_size": 32}

    def steps(**options: Any) -> Any:
        return Prune.model_validate({"kind": "prune", "heads": 0.5, **options}).steps(Rows())

    assert steps(recover=train) == 3
    assert steps(recover=train, schedule={"use": "iterative", "rounds": 4}) == 12
    assert steps(train=train, schedule={"use": "lottery", "rounds": 2, "rewind_steps": 5}) == 3 * 3 + 5
    assert steps(train=train, recover=train, schedule="gradual") == 6


# What a run makes


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("prune")
    data = factories.write_data(folder / "data")
    return factories.fine_tuned(folder / "teacher", data, layers=3), data


def pruned(things: tuple[Path, Path], folder: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    """The directory that a prune stage makes, and the facts about it; run without measuring, in this process."""
    from transformers import set_seed

    from hfcompress.context import StageContext

    teacher, data = things
    path = factories.recipe(folder / "recipe.yaml", teacher, data, stages=[{"kind": "prune", **options}])
    recipe = load(path).recipe
    source = open_artifact(teacher, "source", "source")
    context = StageContext(recipe.task, recipe.seed, source, {"model": source}, folder / "work")
    context.directory.mkdir(exist_ok=True)
    stage = recipe.stages[0]
    assert stage.problems(source.shape, {"parent": source.shape, "source": source.shape}, recipe.task) == []  # type: ignore[arg-type]
    set_seed(recipe.seed)
    result = stage.run(source, context)
    return result.directory, dict(result.facts)


def zeros(model: Any) -> float:
    from hfcompress.models.linears import layer_linears

    weights = [module.weight for module in layer_linears(model).values()]
    return float(sum((w == 0).sum() for w in weights) / sum(w.numel() for w in weights))


def test_layers_blocks_and_hidden_dimensions_go_in_one_stage(things: tuple[Path, Path], tmp_path: Path) -> None:
    made, notes = pruned(things, tmp_path, criterion="random", layers=1, hidden=0.25, ffn_blocks=1, heads=0.5)

    found = open_artifact(made).shape
    assert found is not None
    assert len(found.layers) == 2
    assert found.hidden == 24
    assert [x.heads for x in found.layers] == [2, 2]
    assert sorted(x.ffn for x in found.layers) == [0, 64]
    assert len(notes["kept"]["layers"]["kept"]) == 2
    assert notes["kept"]["layers"]["of"] == 3
    assert notes["kept"]["hidden"] == [24, 32]
    assert notes["kept"]["heads"] == [[2, 4], [2, 4]]


@pytest.mark.parametrize("cost", ["macs", "parameters"])
def test_a_budget_is_kept_and_nearly_used_up(things: tuple[Path, Path], tmp_path: Path, cost: str) -> None:
    made, _ = pruned(things, tmp_path, criterion={"use": "fisher", "rows": 32}, budget={cost: 0.5}, multiple_of=1)

    before, after = open_artifact(things[0]).shape, open_artifact(made).shape
    assert before is not None
    assert after is not None
    whole, left = (
        x.macs(16) if cost == "macs" else x.encoder_parameters for x in (before, after)
    )  # fmt: skip
    assert 0.45 < left / whole <= 0.51


def test_iterative_rounds_reach_what_one_cut_reaches(things: tuple[Path, Path], tmp_path: Path) -> None:
    made, notes = pruned(things, tmp_path, heads=0.5, ffn=0.5, criterion={"use": "taylor", "rows": 32},
                         schedule={"use": "iterative", "rounds": 3}, recover=TRAIN)  # fmt: skip

    found = open_artifact(made).shape
    assert found is not None
    assert {(x.heads, x.ffn) for x in found.layers} == {(2, 32)}
    assert notes["dev"] > 0.8


def test_an_interrupted_round_goes_on_where_it_stopped(things: tuple[Path, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"heads": 0.5, "criterion": {"use": "taylor", "rows": 32},
                               "schedule": {"use": "iterative", "rounds": 2}, "recover": TRAIN}  # fmt: skip
    whole, _ = pruned(things, tmp_path, **options)
    expected = load_model(whole, AUTO).state_dict()
    again = tmp_path / "again"
    (again / "work").mkdir(parents=True)
    (tmp_path / "work" / "round-1").rename(again / "work" / "round-1")

    made, _ = pruned(things, again, **options)

    found = load_model(made, AUTO).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not (again / "work" / "cut-1").exists()


def test_lottery_rewinds_the_weights_that_stay(things: tuple[Path, Path], tmp_path: Path) -> None:
    pruned(things, tmp_path, criterion="magnitude", weights={"share": 0.5},
           schedule={"use": "lottery", "rounds": 2, "rewind_steps": 2}, train=TRAIN)  # fmt: skip

    early = load_model(tmp_path / "work" / "ticket-0", AUTO).state_dict()
    ticket = load_model(tmp_path / "work" / "ticket-2", AUTO)
    assert zeros(ticket) == pytest.approx(0.5, abs=0.01)
    for name, weight in ticket.state_dict().items():
        stays = weight != 0
        assert torch.equal(weight[stays], early[name][stays])
    start = load_model(things[0], AUTO).state_dict()
    assert any(not torch.equal(start[name], early[name]) for name in start)


def test_lottery_cuts_units_out_of_early_weights(things: tuple[Path, Path], tmp_path: Path) -> None:
    made, notes = pruned(things, tmp_path, criterion={"use": "taylor", "rows": 32}, heads=0.5, ffn=0.5,
                         schedule={"use": "lottery", "rounds": 2}, train=TRAIN)  # fmt: skip

    found = open_artifact(made).shape
    assert found is not None
    assert {(x.heads, x.ffn) for x in found.layers} == {(2, 32)}
    assert notes["dev"] > 0.8


def test_gradual_closes_gates_in_training_and_cuts_them(things: tuple[Path, Path], tmp_path: Path) -> None:
    made, _ = pruned(things, tmp_path, criterion={"use": "taylor", "rows": 32}, heads=0.5, ffn=0.5,
                     schedule={"use": "gradual", "every": 2}, train=TRAIN)  # fmt: skip

    found = open_artifact(made).shape
    assert found is not None
    assert {(x.heads, x.ffn) for x in found.layers} == {(2, 32)}


@pytest.mark.parametrize("criterion", ["l0", "movement"])
def test_learned_masks_end_in_the_same_surgery(things: tuple[Path, Path], tmp_path: Path, criterion: str) -> None:
    made, _ = pruned(things, tmp_path, criterion=criterion, budget={"parameters": 0.5}, multiple_of=1,
                     train=TRAIN | {"max_steps": 12}, recover=TRAIN)  # fmt: skip

    before, after = open_artifact(things[0]).shape, open_artifact(made).shape
    assert before is not None
    assert after is not None
    assert 0.45 < after.encoder_parameters / before.encoder_parameters <= 0.51


@pytest.mark.parametrize(
    ("criterion", "weights", "share"),
    [("magnitude", {"share": 0.6, "scope": "global"}, 0.6), ("wanda", {"n_of_m": [2, 4]}, 0.5),
     ("obs", {"share": 0.5}, 0.5)],
)  # fmt: skip
def test_zeros_stay_zero_through_recovery(
    things: tuple[Path, Path], tmp_path: Path, criterion: str, weights: dict[str, Any], share: float
) -> None:
    made, notes = pruned(things, tmp_path, criterion=criterion, weights=weights, recover=TRAIN)

    assert zeros(load_model(made, AUTO)) == pytest.approx(share, abs=0.01)
    assert notes["sparsity"]["share"] == pytest.approx(share, abs=0.01)
    assert notes["sparsity"]["sparse_bytes"] < notes["sparsity"]["dense_bytes"]


def test_movement_learns_which_weights_stay(things: tuple[Path, Path], tmp_path: Path) -> None:
    made, _ = pruned(things, tmp_path, criterion="movement", weights={"share": 0.7}, train=TRAIN)

    assert zeros(load_model(made, AUTO)) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(("criterion", "tune"), [("fisher", "scales"), ("fisher", "weights"), ("obs", None)])
def test_post_training_tunes_what_stays_without_any_training(
    things: tuple[Path, Path], tmp_path: Path, criterion: str, tune: str | None
) -> None:
    made, notes = pruned(things, tmp_path, criterion={"use": criterion, "rows": 64}, budget={"macs": 0.5},
                         multiple_of=1, rearrange=criterion == "fisher", tune=tune)  # fmt: skip

    start, after = load_model(things[0], AUTO).state_dict(), load_model(made, AUTO).state_dict()
    assert "dev" not in notes
    assert ("tuned" in notes) == (tune == "scales")
    # What the masks do not reach is as it was.
    assert torch.equal(start["bert.embeddings.word_embeddings.weight"], after["bert.embeddings.word_embeddings.weight"])


def test_a_corpus_vocabulary_comes_with_its_tokenizer(things: tuple[Path, Path], tmp_path: Path) -> None:
    teacher = things[0]
    letters = "bcdefghijklmnopqrstuvwxyz"
    words = [*factories.WORDS, *letters, *(f"##{letter}" for letter in "a" + letters), "unheard", "words"]
    wide = factories.save(factories.model(vocab_size=len(words)), tmp_path / "wide", words)

    made, notes = pruned((wide, things[1]), tmp_path, vocabulary="corpus")

    tokenizer, config = load_tokenizer(made), read_config(made)
    assert config["vocab_size"] == len(tokenizer) < len(words)
    assert notes["vocabulary"] == [len(tokenizer), len(words)]
    assert tokenizer.decode(tokenizer("a good film")["input_ids"], skip_special_tokens=True) == "a good film"
    assert teacher.is_dir()


def test_recovery_by_lora_leaves_a_plain_model(things: tuple[Path, Path], tmp_path: Path) -> None:
    made, _ = pruned(things, tmp_path, criterion="magnitude", heads=0.5, recover=TRAIN | {"lora": {"r": 2}})

    assert not [name for name in load_model(made, AUTO).state_dict() if "lora" in name]


@pytest.mark.usefixtures("in_process")
def test_a_run_notes_what_stayed_and_reports_it(things: tuple[Path, Path], tmp_path: Path) -> None:
    stages = [{"kind": "prune", "heads": 0.5, "criterion": "magnitude", "recover": TRAIN}]
    path = factories.recipe(tmp_path / "recipe.yaml", *things, stages=stages)

    done_ = runner.run(load(path), tmp_path / "run")

    assert done_ is not None
    record = json.loads((tmp_path / "run" / "01-prune" / "stage.json").read_text())
    assert record["kept"]["heads"] == [[2, 4]] * 3
    assert re.search("prune", (tmp_path / "run" / "final" / "README.md").read_text())
