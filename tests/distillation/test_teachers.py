"""Teachers: several, cached, adapted, with other tokenizers, and what is looked at before any epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from hfcompress.context import StageContext
from hfcompress.data.sequence import TextClassification
from hfcompress.data.tokenizer_state import split_alike
from hfcompress.distillation.fill_cache import fill_teacher_cache
from hfcompress.distillation.losses.base import LOSSES
from hfcompress.distillation.teacher_checks import same_behaviour, same_inputs
from hfcompress.distillation.teachers import AnyTeachers, Member, TeacherEnsemble, Teachers, combine_logits
from hfcompress.models.artifact import load_model, load_tokenizer, open_artifact
from hfcompress.models.forward import observe
from hfcompress.models.shape import shape_of
from hfcompress.recipe.loader import load
from hfcompress.recipe.validate import check
from hfcompress.training import trainer as training
from hfcompress.training.batches import TEACHERS, Collator, make_batches
from hfcompress.training.evaluate import score
from hfcompress.training.objective import Objective
from hfcompress.utils.errors import HfcompressError
from tests import factories

TRAIN = {"max_steps": 4, "batch_size": 16, "learning_rate": 1e-3}
CLASSIFIER = "AutoModelForSequenceClassification"
REORDERED = [*factories.WORDS[:5], *reversed(factories.WORDS[5:])]


def one_stage(path: Path, model: Path, data: Path, **stage: Any) -> Path:
    """A recipe that only distils."""
    whole = {"kind": "distill", "student": {"layers": 1}, "losses": ["soft_labels"], "train": TRAIN, **stage}
    return factories.recipe(path, model, data, stages=[whole])


def ran(recipe: Path, directory: Path) -> dict[str, Any]:
    """Runs the stages of a recipe without measuring; the facts about the last one."""
    loaded = load(recipe)
    check(loaded)
    directory.mkdir()
    parent = source = open_artifact(Path(loaded.recipe.model))
    made = {"model": source}
    for name, stage in zip(loaded.recipe.stage_names(), loaded.recipe.stages, strict=True):
        context = StageContext(stage.task_of(loaded.recipe.task), 0, source, made, directory / f"{name}.partial")
        result = stage.run(parent, context)
        context.model_directory.rename(directory / name)
        parent = made[name] = open_artifact(directory / name, name)
    return dict(result.facts)


def weights(directory: Path, stage: str = "01-distill") -> dict[str, torch.Tensor]:
    return load_file(directory / stage / "model.safetensors")


def assert_alike(one: Path, other: Path, atol: float = 1e-5, apart_from: str = "no tensor") -> None:
    """Two runs ended with the same weights."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert apart_from in name or torch.allclose(ours[name], theirs[name], atol=atol), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    """A run that distils from the one teacher."""
    folder = tmp_path_factory.mktemp("alone")
    ran(one_stage(folder / "r.yaml", teacher, data), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """The teacher, whose labels have names."""
    return with_labels(tmp_path_factory.mktemp("named"), teacher, ["bad", "good"])


def with_labels(path: Path, teacher: Path, names: list[str]) -> Path:
    model = load_model(teacher, CLASSIFIER)
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    return factories.save(model, path)


def task_of(data: Path) -> TextClassification:
    return TextClassification(type="text-classification", dataset=str(data), text=["sentence"], max_length=16)


def encoded(data: Path, directory: Path) -> Any:
    task = task_of(data)
    return task.encode(task.read("train"), load_tokenizer(directory), {"LABEL_0": 0, "LABEL_1": 1})


# ---- who teaches


@pytest.mark.parametrize(
    ("value", "models"), [("source", ["source"]), (["a", "b"], ["a", "b"]), ({"models": ["a"]}, ["a"])]
)
def test_a_teacher_is_a_name_a_list_or_a_mapping(value: Any, models: list[str]) -> None:
    assert TypeAdapter(AnyTeachers).validate_python(value).models == models


def test_each_teacher_has_one_weight() -> None:
    with pytest.raises(ValidationError, match="2 teachers have 1 weights"):
        Teachers(models=["a", "b"], weights=[1.0])


def test_the_mean_of_two_teachers_logits() -> None:
    one, two = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.allclose(combine_logits([one, two], Teachers(models=["a", "b"]), "sequence"), (one + two) / 2)
    weighed = combine_logits([one, two], Teachers(models=["a", "b"], weights=[3.0, 1.0]), "sequence")
    assert torch.allclose(weighed, (3 * one + two) / 4)


@pytest.mark.parametrize(("head", "axis"), [("sequence", -1), ("token", -1), ("span", -2)])
def test_the_surer_teacher_weighs_more_row_by_row(head: str, axis: int) -> None:
    shape = (3, 4) if head == "sequence" else (3, 5, 2)
    logits = [torch.randn(shape), 3 * torch.randn(shape)]
    found = combine_logits(logits, Teachers(models=["a", "b"], combine="confidence"), head)
    expected, weight = torch.zeros(shape), torch.zeros(shape)
    for z in logits:
        p = z.softmax(axis)
        h = -(p * p.log()).sum(axis, keepdim=True)
        expected, weight = expected + z / h, weight + 1 / h
    assert torch.allclose(found, expected / weight, atol=1e-6)


def test_a_sure_teacher_does_not_divide_by_nothing() -> None:
    sure = torch.tensor([[1000.0, -1000.0]])
    found = combine_logits([sure, torch.zeros(1, 2)], Teachers(models=["a", "b"], combine="confidence"), "sequence")
    assert found.isfinite().all()
    assert found[0, 0] > 990


def test_an_ensemble_teaches_what_its_mean_says(tmp_path: Path, teacher: Path, data: Path, alone: Path) -> None:
    """Two teachers that are the same one teach what it teaches."""
    both = ran(one_stage(tmp_path / "b.yaml", teacher, data, teacher=["source", str(teacher)]), tmp_path / "b")
    assert [note["stage"] for note in both["teacher"]] == ["source", str(teacher)]
    assert_alike(alone, tmp_path / "b")


def test_a_student_can_teach_the_next(tmp_path: Path, teacher: Path, data: Path) -> None:
    stages = [
        {"kind": "distill", "student": {"layers": 1}, "losses": ["soft_labels"], "train": TRAIN},
        {"kind": "distill", "student": {"ffn": 32}, "teacher": "01-distill", "losses": ["soft_labels"], "train": TRAIN},
    ]
    record = ran(factories.recipe(tmp_path / "r.yaml", teacher, data, stages=stages), tmp_path / "run")
    assert record["teacher"]["stage"] == "01-distill"


# ---- the cache


def test_cached_answers_are_those_of_the_live_model_bit_for_bit(teacher: Path, data: Path) -> None:
    rows, model, words = encoded(data, teacher), load_model(teacher, task_of(data).auto_class), load_tokenizer(teacher)
    for content in ("logits", "cls", "hidden_states"):
        answers = fill_teacher_cache(model, words, rows, task_of(data), content, weights="w", fingerprint="f")  # type: ignore[arg-type]
        cached = TeacherEnsemble([Member("t", None, words, answers=answers)], Teachers(models=["t"]), task_of(data))
        live = TeacherEnsemble([Member("t", model, words)], Teachers(models=["t"]), task_of(data))
        for batch in make_batches(rows, words, task_of(data), 64):
            index, length = batch["index"], batch["input_ids"].shape[1]
            seen = cached.ask(batch, cached.prepare(index, length))
            expected = live.ask(batch, needs=frozenset({"hidden_states"}))
            assert torch.equal(seen.logits, expected.logits)
            real = batch["attention_mask"].bool()
            for own, other in zip(seen.hidden_states, expected.hidden_states, strict=content != "logits"):
                if content == "cls":
                    assert torch.equal(own[:, 0], other[:, 0])
                elif content == "hidden_states":
                    assert torch.equal(own[real], other[real])


def test_a_student_learns_the_same_from_the_cache(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Batches of all rows, in the order in which the cache was filled, leave rounding no room."""
    train = {**TRAIN, "batch_size": 96}
    for name in ("off", "auto"):
        ran(one_stage(tmp_path / f"{name}.yaml", teacher, data, train=train, teacher_cache=name), tmp_path / name)
    assert_alike(tmp_path / "off", tmp_path / "auto")


@pytest.mark.parametrize(("loss", "content"), [("pkd", "cls"), ("hidden_states", "hidden_states")])
def test_layers_are_learnt_from_the_cache(tmp_path: Path, teacher: Path, data: Path, loss: str, content: str) -> None:
    losses = [loss, "soft_labels"]
    for name in ("off", content):
        recipe = one_stage(tmp_path / f"{name}.yaml", teacher, data, teacher_cache=name, losses=losses)
        ran(recipe, tmp_path / name)
    assert_alike(tmp_path / "off", tmp_path / content, atol=1e-4)


@pytest.mark.parametrize(
    ("losses", "cache", "why"),
    [
        (["attention_scores"], "hidden_states", "a loss uses keys, queries, which are never kept"),
        (["hidden_states"], "logits", "a loss uses hidden states, but only logits are kept"),
        (["hidden_states"], "cls", "hidden_states uses every token, but only the first is kept"),
    ],
)
def test_what_the_cache_does_not_hold_is_refused(
    tmp_path: Path, teacher: Path, data: Path, losses: list[str], cache: str, why: str
) -> None:
    recipe = one_stage(tmp_path / "r.yaml", teacher, data, losses=losses, teacher_cache=cache)
    with pytest.raises(HfcompressError, match=why) as error:
        check(load(recipe))
    assert error.value.problems[0].key == ("stages", 0, "teacher_cache")


@pytest.mark.parametrize(
    ("stage", "key", "why"),
    [
        ({"layer_map": "top"}, "layer_map", "no loss compares layers pair by pair"),
        ({"losses": ["hard_labels"], "teacher_cache": "logits"}, "teacher_cache", "no loss needs a teacher"),
        ({"losses": ["hidden_states"], "teacher": ["source", "model"]}, "teacher", "no loss uses logits"),
    ],
)
def test_an_option_that_would_change_nothing_is_told(
    tmp_path: Path, teacher: Path, data: Path, stage: dict[str, Any], key: str, why: str
) -> None:
    with pytest.raises(HfcompressError, match=why) as error:
        check(load(one_stage(tmp_path / "r.yaml", teacher, data, **stage)))
    assert [problem.key for problem in error.value.problems] == [("stages", 0, key)]


def raw_text(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.txt").write_text("the film was good\nthe plot was dull and the cast was poor\n" * 8)
    return folder


def test_a_narrow_student_of_a_stream_is_ranked_on_its_first_documents(tmp_path: Path) -> None:
    corpus = raw_text(tmp_path / "corpus")
    factories.save(factories.model(head="mask"), tmp_path / "own")
    task = {"type": "fill-mask", "dataset": str(corpus), "text": ["text"], "max_length": 16, "streaming": True,
            "mask_probability": 0.0}  # fmt: skip
    stage = {"kind": "distill", "losses": ["hidden_states"], "train": {"max_steps": 2, "batch_size": 4}}
    narrow = {**stage, "student": {"hidden": 16, "width": "activation", "rows": 4}}
    record = ran(
        factories.recipe(tmp_path / "r.yaml", tmp_path / "own", corpus, task=task, stages=[narrow]), tmp_path / "run"
    )
    assert "by activation" in record["student"]["embeddings"]
    cut = {**stage, "student": {"vocabulary": "corpus"}}
    with pytest.raises(HfcompressError, match="a streamed corpus is not read in advance"):
        check(load(factories.recipe(tmp_path / "v.yaml", tmp_path / "own", corpus, task=task, stages=[cut])))


def test_a_second_run_reads_what_the_first_one_kept(
    tmp_path: Path, teacher: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFCOMPRESS_HOME", str(tmp_path / "home"))
    twice = TRAIN | {"max_steps": 12}
    ran(one_stage(tmp_path / "a.yaml", teacher, data, train=twice), tmp_path / "a")
    assert "96 answers kept in" in capsys.readouterr().err
    ran(one_stage(tmp_path / "b.yaml", teacher, data, train=twice | {"learning_rate": 2e-3}), tmp_path / "b")
    assert "96 answers read from" in capsys.readouterr().err
    other = factories.write_data(tmp_path / "other", seed=5)
    ran(one_stage(tmp_path / "c.yaml", teacher, other, train=twice), tmp_path / "c")
    assert "96 answers kept in" in capsys.readouterr().err


# ---- another tokenizer


def reordered(path: Path, teacher: Path) -> Path:
    """The teacher over a vocabulary in another order: it answers the same to the same text."""
    model, old = load_model(teacher, CLASSIFIER), load_tokenizer(teacher).get_vocab()
    table = model.get_input_embeddings()
    with torch.no_grad():
        table.weight.copy_(table.weight[[old[word] for word in REORDERED]])
    return factories.save(model, path, REORDERED)


def test_a_teacher_with_another_vocabulary_gives_its_answers(
    tmp_path: Path, teacher: Path, data: Path, alone: Path
) -> None:
    other = reordered(tmp_path / "other", teacher)
    assert not same_behaviour(load_tokenizer(other), load_tokenizer(teacher))
    ran(one_stage(tmp_path / "b.yaml", teacher, data, teacher=str(other)), tmp_path / "b")
    assert_alike(alone, tmp_path / "b", atol=1e-4)


def test_its_layers_are_looked_at_where_it_splits_texts_alike(teacher: Path, data: Path, tmp_path: Path) -> None:
    other = reordered(tmp_path / "other", teacher)
    own, theirs = encoded(data, teacher), encoded(data, other)
    assert split_alike(load_tokenizer(teacher), load_tokenizer(other), own, theirs)
    model = load_model(other, CLASSIFIER)
    member = Member("t", model, load_tokenizer(other), rows=theirs)
    batch = task_of(data).batch([own[i] for i in range(8)], load_tokenizer(teacher))
    teaching = TeacherEnsemble([member], Teachers(models=["t"]), task_of(data))
    own_tokens = teaching.prepare(batch["index"], batch["input_ids"].shape[1])
    seen = teaching.ask(batch, own_tokens, frozenset({"hidden_states"}))
    expected = observe(load_model(teacher, CLASSIFIER), batch, frozenset({"hidden_states"}))
    assert torch.allclose(seen.hidden_states[-1], expected.hidden_states[-1], atol=1e-5)


def test_texts_that_are_split_otherwise_are_told(teacher: Path, data: Path) -> None:
    fewer = [word for word in factories.WORDS if word not in ("film", "story")]
    smaller, whole = factories.tokenizer(fewer), load_tokenizer(teacher)
    task = task_of(data)
    own = task.encode(task.read("train"), smaller, {"LABEL_0": 0, "LABEL_1": 1})
    assert not split_alike(smaller, whole, own, encoded(data, teacher))
    assert not split_alike(whole, smaller, encoded(data, teacher), own)


def test_a_difference_outside_of_any_sample_is_seen_in_the_rows(data: Path) -> None:
    """The same vocabulary, and one of the two gives a word of the data to another normalizer."""
    from tokenizers import normalizers

    plain, changed = factories.tokenizer(), factories.tokenizer()
    inner = changed.backend_tokenizer
    inner.normalizer = normalizers.Sequence([normalizers.BertNormalizer(), normalizers.Replace("film", "story")])
    task, labels = task_of(data), {"LABEL_0": 0, "LABEL_1": 1}
    rows, others = ({s: task.encode(task.read(s), t, labels) for s in ("train", "dev")} for t in (plain, changed))
    assert not same_behaviour(plain, changed)
    assert not same_inputs(plain, changed, rows, others)
    assert same_inputs(plain, factories.tokenizer(), rows, rows)


# ---- other inputs


def reader(*inputs: str) -> Any:
    """The tiny tokenizer, for a model that takes these inputs."""
    return factories.tokenizer(model_input_names=list(inputs))


def labelled_by(teacher: Any, folder: Path) -> Path:
    """Pairs of texts whose labels are what a teacher says of them, asked as its own tokenizer says."""
    import json
    import random

    from hfcompress.models.forward import select_inputs

    draw, splitter = random.Random(0), reader("input_ids", "token_type_ids", "attention_mask")
    pairs = [tuple(" ".join(draw.choices(factories.WORDS[5:], k=draw.randint(2, 5))) for _ in "ab") for _ in range(160)]
    batch = splitter([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        teacher.bert.embeddings.token_type_embeddings.weight.mul_(8)
        logits = teacher(**select_inputs(teacher, batch)).logits
        teacher.classifier.bias[1] -= (logits[:, 1] - logits[:, 0]).median()
        labels = teacher(**select_inputs(teacher, batch)).logits.argmax(-1).tolist()
    folder.mkdir()
    for split, rows in (("train", range(96)), ("dev", range(96, 160))):
        lines = [json.dumps({"a": pairs[i][0], "b": pairs[i][1], "label": labels[i]}) for i in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def segments(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A BERT that looks at token types, pairs of texts that it labels, and a DistilBERT that has no token types."""
    teacher = factories.model("bert", hidden=32, seed=3)
    pairs = labelled_by(teacher, tmp_path / "pairs")
    student = tmp_path / "student"
    factories.model("distilbert", seed=4).save_pretrained(student)
    reader("input_ids", "attention_mask").save_pretrained(student)
    typed = factories.save(teacher, tmp_path / "typed")
    reader("input_ids", "token_type_ids", "attention_mask").save_pretrained(typed)
    return typed, pairs, student


@pytest.mark.parametrize("cache", ["off", "logits", "cls"])
@pytest.mark.parametrize("ensemble", [False, True])
def test_a_teacher_is_asked_as_its_own_tokenizer_says(
    tmp_path: Path, segments: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, cache: str, ensemble: bool
) -> None:
    """The student's tokenizer gives the same ids and no token types."""
    typed, pairs, student = segments
    monkeypatch.setenv("HFCOMPRESS_HOME", str(tmp_path / "home"))
    met: dict[str, Any] = {}
    train = training.train
    monkeypatch.setattr(
        training, "train", lambda objective, options, **k: met.update(k) or train(objective, options, **k)
    )
    task = {"type": "text-classification", "dataset": str(pairs), "text": ["a", "b"], "max_length": 24}
    losses = [*(["pkd"] if cache == "cls" else []), "soft_labels"]
    stage = {"kind": "distill", "student": {"from": str(student), "layers": 1}, "losses": losses, "train": TRAIN,
             "teacher": ["source", str(typed)] if ensemble else "source", "teacher_cache": cache}  # fmt: skip
    record = ran(factories.recipe(tmp_path / "r.yaml", typed, pairs, task=task, stages=[stage]), tmp_path / "run")
    notes = record["teacher"] if ensemble else [record["teacher"]]
    assert [note["dev"] for note in notes] == [1.0] * len(notes)
    found = TypeAdapter(TextClassification).validate_python(task)
    collate = Collator(found, met["tokenizer"], met["teachers"], on_gpu=False)
    batch = collate([met["rows"]["train"][i] for i in range(16)])
    assert "token_type_ids" not in batch
    raw = found.read("train").select(range(16))
    own = load_tokenizer(typed)(raw["a"][:], raw["b"][:], padding=True, return_tensors="pt")
    assert "token_type_ids" in own
    expected = observe(load_model(typed, found.auto_class), own)
    assert torch.allclose(met["teachers"].ask(batch, batch.get(TEACHERS, ())).logits, expected.logits, atol=1e-5)


def test_layers_of_a_teacher_with_token_types_are_compared_token_by_token(
    tmp_path: Path, segments: tuple[Path, Path, Path]
) -> None:
    typed, pairs, student = segments
    task = {"type": "text-classification", "dataset": str(pairs), "text": ["a", "b"], "max_length": 24}
    stage = {"kind": "distill", "student": {"from": str(student)}, "losses": ["hidden_states"], "train": TRAIN}
    record = ran(factories.recipe(tmp_path / "r.yaml", typed, pairs, task=task, stages=[stage]), tmp_path / "run")
    assert record["teacher"]["dev"] == 1.0


def test_answers_to_other_inputs_are_another_cache(segments: tuple[Path, Path, Path], tmp_path: Path) -> None:
    typed, pairs, student = segments
    task = TextClassification(type="text-classification", dataset=str(pairs), text=["a", "b"], max_length=24)
    model, labels = load_model(typed, task.auto_class), {"LABEL_0": 0, "LABEL_1": 1}
    asked = []
    for words in (load_tokenizer(student), load_tokenizer(typed)):
        rows = task.encode(task.read("train"), words, labels)
        asked.append(fill_teacher_cache(model, words, rows, task, "logits", weights="w", fingerprint="f").logits)
    assert not torch.allclose(*(torch.from_numpy(logits.copy()) for logits in asked), atol=1e-2)


def test_a_teacher_with_too_few_positions_is_told(tmp_path: Path, teacher: Path, data: Path) -> None:
    factories.save(factories.model(max_position_embeddings=12), tmp_path / "short")
    recipe = one_stage(tmp_path / "r.yaml", teacher, data, teacher=str(tmp_path / "short"))
    with pytest.raises(HfcompressError, match="reads at most 12 tokens, and max_length is 16"):
        ran(recipe, tmp_path / "run")


def test_layers_of_a_teacher_that_reads_other_tokens_are_refused(tmp_path: Path, teacher: Path, data: Path) -> None:
    words = [w for w in factories.WORDS if w not in ("film", "story")] + ["cinema", "tale"]
    other = factories.save(load_model(teacher, CLASSIFIER), tmp_path / "other", words)
    recipe = one_stage(tmp_path / "r.yaml", teacher, data, teacher=str(other), losses=["hidden_states"])
    with pytest.raises(HfcompressError, match="has another tokenizer than the student") as error:
        ran(recipe, tmp_path / "run")
    assert "only losses on logits" in str(error.value)


def test_raw_text_is_read_with_one_vocabulary(tmp_path: Path, teacher: Path) -> None:
    corpus = raw_text(tmp_path / "corpus")
    for name, words in (("own", factories.WORDS), ("other", REORDERED)):
        factories.save(factories.model(head="mask"), tmp_path / name, words)
    task = {"type": "fill-mask", "dataset": str(corpus), "text": ["text"], "max_length": 16}
    recipe = factories.recipe(
        tmp_path / "r.yaml", tmp_path / "own", corpus, task=task,
        stages=[{"kind": "distill", "student": {"layers": 1}, "losses": ["soft_labels"], "train": TRAIN,
                 "teacher": str(tmp_path / "other")}],
    )  # fmt: skip
    with pytest.raises(HfcompressError, match="has another vocabulary than the student"):
        ran(recipe, tmp_path / "run")


# ---- an adapter


def adapter(path: Path, teacher: Path) -> Path:
    """A LoRA adapter on the teacher, with weights that matter."""
    from peft import LoraConfig, get_peft_model

    base = load_model(teacher, CLASSIFIER)
    base.config.name_or_path = base.name_or_path = str(teacher)
    config = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], modules_to_save=["pooler", "classifier"]
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return path


def test_an_adapter_teaches_as_the_merged_model_does(tmp_path: Path, teacher: Path, data: Path) -> None:
    from peft import PeftModel

    place = adapter(tmp_path / "adapter", teacher)
    record = ran(one_stage(tmp_path / "r.yaml", teacher, data, teacher=str(place)), tmp_path / "run")
    base = load_model(teacher, CLASSIFIER)
    merged = PeftModel.from_pretrained(base, str(place)).merge_and_unload().eval()
    task = task_of(data)
    rows = task.encode(task.read("dev"), load_tokenizer(teacher), {"LABEL_0": 0, "LABEL_1": 1})
    assert record["teacher"]["dev"] == score(merged, rows, load_tokenizer(teacher), task)


# ---- before any epoch


def test_labels_with_other_ids_are_told(tmp_path: Path, teacher: Path, data: Path, named: Path) -> None:
    other = with_labels(tmp_path / "other", teacher, ["good", "bad"])
    recipe = one_stage(tmp_path / "r.yaml", named, data, teacher=str(other))
    with pytest.raises(HfcompressError, match="gives 'bad' the id 1, the student 0"):
        ran(recipe, tmp_path / "run")


def test_a_teacher_with_more_labels_is_told(tmp_path: Path, teacher: Path, data: Path) -> None:
    factories.save(factories.model(labels=3), tmp_path / "three")
    recipe = one_stage(tmp_path / "r.yaml", teacher, data, teacher=["source", str(tmp_path / "three")])
    with pytest.raises(HfcompressError, match="the student has 2 labels and the teacher 3"):
        check(load(recipe))


def test_a_loss_that_is_not_finite_stops_before_any_epoch(tmp_path: Path, teacher: Path, data: Path) -> None:
    broken = tmp_path / "broken"
    factories.save(load_model(teacher, CLASSIFIER), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["bert.encoder.layer.0.output.dense.bias"][:] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    model = load_model(broken, CLASSIFIER)
    task = task_of(data)
    shape = shape_of(model.config.to_dict())
    loss = [LOSSES.parse("hidden_states")]
    objective = Objective(load_model(teacher, task.auto_class), loss, task, shape, ((1, 1), (2, 2)))
    teaching = TeacherEnsemble([Member("t", model, load_tokenizer(teacher))], Teachers(models=["t"]), task_of(data))
    with pytest.raises(HfcompressError, match="hidden_states is not finite on the first rows"):
        training.check_first_step(objective, teaching, encoded(data, teacher), load_tokenizer(teacher))


def test_a_projection_that_nothing_trains_is_told(tmp_path: Path, teacher: Path, data: Path) -> None:
    losses = [{"use": "hidden_states", "projection": "per_layer"}, "soft_labels"]
    recipe = one_stage(tmp_path / "r.yaml", teacher, data, student={"hidden": 16}, losses=losses, layer_map=[[1, 2]])
    with pytest.raises(HfcompressError, match="nothing would train the projection of layer 2"):
        ran(recipe, tmp_path / "run")


def test_steps_and_memory_are_told_before_they_are_taken(
    tmp_path: Path, teacher: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(one_stage(tmp_path / "r.yaml", teacher, data), tmp_path / "run")
    assert "training: 4 steps of 16 rows on each process, up to" in capsys.readouterr().err


# ---- students


def test_a_lora_student_is_stock_once_saved(tmp_path: Path, teacher: Path, data: Path) -> None:
    recipe = one_stage(tmp_path / "r.yaml", teacher, data, student={"layers": 1, "lora": {"r": 2}})
    ran(recipe, tmp_path / "run")
    saved, taught = weights(tmp_path / "run"), load_file(teacher / "model.safetensors")
    assert not [name for name in saved if "lora" in name]
    changed = {
        name for name, value in saved.items() if "layer.0" in name and not torch.equal(value, _start(taught, name))
    }
    assert changed == {f"bert.encoder.layer.0.attention.self.{part}.weight" for part in ("query", "value")}


def _start(teacher: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return teacher[name.replace("layer.0.", "layer.1.")]


def test_a_student_of_a_smaller_vocabulary_learns_from_layers(tmp_path: Path, teacher: Path, data: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*(x for x in letters if x not in factories.WORDS), *(f"##{x}" for x in letters)]
    words = [*factories.WORDS, "unheard", *pieces]
    model = load_model(teacher, CLASSIFIER)
    model.resize_token_embeddings(len(words))
    factories.save(model, tmp_path / "wordy", words)
    student = {"layers": 1, "vocabulary": "corpus"}
    recipe = one_stage(tmp_path / "r.yaml", tmp_path / "wordy", data, student=student, losses=["hidden_states"])
    record = ran(recipe, tmp_path / "run")
    assert record["student"]["vocabulary"] == f"{len(words) - 1} of {len(words)} tokens"
    assert "unheard" not in load_tokenizer(tmp_path / "run" / "01-distill").get_vocab()
    whole = ran(one_stage(tmp_path / "w.yaml", tmp_path / "wordy", data, losses=["hidden_states"]), tmp_path / "whole")
    assert whole["dev"] == record["dev"]
    assert_alike(tmp_path / "whole", tmp_path / "run", apart_from="word_embeddings")


BYTES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def general(path: Path, kind: str) -> Path:
    """A checkpoint as it was pre-trained: with a mask head, or with none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if kind == "bert without a head":
        factories.save(factories.model("bert", layers=3).bert, path)
        return path
    factories.save(factories.model(kind, layers=3, head="mask", pad_token_id=1 if kind == "roberta" else 0), path)
    if kind == "roberta":
        ids = {word: index for index, word in enumerate([*BYTES, *(f"Ġ{w}" for w in factories.WORDS[5:])])}
        inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>",
            mask_token="<mask>",
        ).save_pretrained(path)  # fmt: skip
    return path


@pytest.mark.parametrize("kind", ["bert", "bert without a head", "distilbert", "roberta"])
@pytest.mark.parametrize(("layers", "losses"), [(3, ["soft_labels"]), (1, ["soft_labels", "hard_labels"])])
def test_a_student_from_a_general_checkpoint_gets_the_teachers_head(
    tmp_path: Path, named: Path, data: Path, kind: str, layers: int, losses: list[str]
) -> None:
    """Its config still names the class of the head that it was pre-trained with."""
    student = {"from": str(general(tmp_path / "general", kind)), "layers": layers}
    recipe = one_stage(tmp_path / "r.yaml", named, data, student=student, losses=losses)
    record = ran(recipe, tmp_path / "run")
    assert record["student"]["head"] == "random"
    made = load_model(tmp_path / "run" / "01-distill", CLASSIFIER)
    assert made.config.label2id == {"bad": 0, "good": 1}
    assert made.config.architectures == [type(made).__name__]
    shape = check(load(recipe))[-1]
    assert shape.parameters == sum(p.numel() for p in made.parameters())


def test_a_new_head_has_the_labels_of_a_teacher_where_the_source_has_none(
    tmp_path: Path, named: Path, data: Path
) -> None:
    base = general(tmp_path / "base", "bert")
    (stage,) = load(one_stage(tmp_path / "r.yaml", base, data, teacher=str(named))).recipe.stages
    source = open_artifact(base)
    context = StageContext(task_of(data), 0, source, {"model": source}, tmp_path / "run")
    stage.run(source, context)
    assert open_artifact(context.model_directory).shape is not None
    assert load_model(context.model_directory, CLASSIFIER).config.label2id["good"] == 1
