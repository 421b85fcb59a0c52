"""What `check` finds before hours are spent: all that configs, tokenizers and the first rows tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfcompress.models.artifact import load_model
from hfcompress.recipe.loader import load
from hfcompress.recipe.validate import check
from hfcompress.training.options import Train
from hfcompress.utils.errors import HfcompressError
from tests import factories

TRAIN = {"max_steps": 2, "batch_size": 16}
DISTIL = {"kind": "distill", "student": {"layers": 1}, "losses": ["soft_labels"], "train": TRAIN}
AUTO = "AutoModelForSequenceClassification"


def found(tmp_path: Path, model: Path, data: Path, *stages: Any, **changes: Any) -> list[tuple[str, str]]:
    """Each problem that `check` finds: its key, and what it says."""
    loaded = load(factories.recipe(tmp_path / "r.yaml", model, data, stages=list(stages), **changes))
    try:
        check(loaded)
    except HfcompressError as error:
        return [(".".join(map(str, p.key)), f"{p.message}\n{p.fix}") for p in error.problems]
    return []


def only(problems: list[tuple[str, str]], key: str, why: str) -> None:
    assert [(where, why in what) for where, what in problems] == [(key, True)], problems


# ---- trackers


def test_trackers_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    monkeypatch.setattr(integration_utils, "is_mlflow_available", lambda: False)
    told = Train(report_to=["wandb", "wanb", "mlflow"]).trackers_missing(("train",))
    assert [(p.key, p.message) for p in told] == [
        (("train", "report_to", 1), "transformers knows no tracker 'wanb'"),
        (("train", "report_to", 2), "the tracker 'mlflow' is not installed"),
    ]
    assert told[0].fix == "did you mean 'wandb'?"
    assert Train(report_to=["all"]).trackers_missing() == Train(report_to=["none"]).trackers_missing() == []
    assert "name it alone" in Train(report_to=["all", "wandb"]).trackers_missing()[0].fix


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ({"kind": "finetune", "train": {"report_to": ["wanb"]}}, "train"),
        ({**DISTIL, "train": {"report_to": ["wanb"]}}, "train"),
        ({"kind": "prune", "ffn": 0.5, "recover": {"report_to": ["wanb"]}}, "recover"),
        ({"kind": "prune", "ffn": 0.5, "schedule": "gradual", "train": {"report_to": ["wanb"]}}, "train"),
        ({"kind": "quantize", "backend": "onnx_int4", "train": {"report_to": ["wanb"]}}, "train"),
    ],
)
def test_a_misspelt_tracker_is_told_in_every_stage(
    tmp_path: Path, teacher: Path, data: Path, stage: dict[str, Any], key: str
) -> None:
    only(found(tmp_path, teacher, data, stage), f"stages.0.{key}.report_to.0", "did you mean 'wandb'?")


# ---- teachers


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ({**DISTIL, "losses": ["hard_labels"], "teacher": "model"}, "teacher"),
        ({"kind": "prune", "ffn": 0.5, "recover": {"losses": ["hard_labels"], "teacher": "source"}}, "recover.teacher"),
    ],
)
def test_a_teacher_that_nothing_asks_is_told(
    tmp_path: Path, teacher: Path, data: Path, stage: dict[str, Any], key: str
) -> None:
    only(found(tmp_path, teacher, data, stage), f"stages.0.{key}", "no loss needs a teacher, so `teacher: ")


def test_the_teacher_that_is_the_default_may_be_spelled_out(tmp_path: Path, teacher: Path, data: Path) -> None:
    assert found(tmp_path, teacher, data, {**DISTIL, "losses": ["hard_labels"], "teacher": "source"}) == []


def named(path: Path, teacher: Path, labels: dict[int, str]) -> Path:
    model = load_model(teacher, AUTO)
    model.config.id2label, model.config.label2id = labels, {name: i for i, name in labels.items()}
    return factories.save(model, path)


def test_a_teacher_of_another_label_order_is_told(tmp_path: Path, teacher: Path, data: Path) -> None:
    source, other = (named(tmp_path / n, teacher, {0: n[0], 1: n[1]}) for n in ("ab", "ba"))
    why = "gives 'a' the id 1, the student 0"
    only(found(tmp_path, source, data, {**DISTIL, "teacher": str(other)}), "stages.0.teacher", why)
    ensemble = {**DISTIL, "teacher": ["source", str(other)]}
    only(found(tmp_path, source, data, ensemble), "stages.0.teacher.models.1", why)
    recover = {"kind": "prune", "ffn": 0.5, "recover": {"teacher": str(other)}}
    only(found(tmp_path, source, data, recover), "stages.0.recover.teacher", why)


def test_a_fine_tuned_source_has_the_labels_of_the_data(tmp_path: Path, teacher: Path) -> None:
    data = tmp_path / "named"
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"{split}.tsv").write_text("sentence\tlabel\n" + "good\tbest\ndull\tworst\n" * 8)
    other = named(tmp_path / "other", teacher, {0: "worst", 1: "best"})
    problems = found(tmp_path, teacher, data, {"kind": "finetune"}, {**DISTIL, "teacher": str(other)})
    only(problems, "stages.1.teacher", "gives 'best' the id 1, the student 0")


def test_a_teacher_without_the_head_is_told(tmp_path: Path, teacher: Path, data: Path) -> None:
    base = factories.save(factories.model(head="mask"), tmp_path / "base")
    only(found(tmp_path, teacher, data, {**DISTIL, "teacher": str(base)}), "stages.0.teacher", "is a BertForMaskedLM")
    only(
        found(tmp_path, base, data, DISTIL),
        "model",
        "is a BertForMaskedLM, which has no task head for text-classification",
    )
    assert found(tmp_path, base, data, {"kind": "finetune"}, DISTIL) == []


def test_layers_of_a_teacher_that_splits_texts_otherwise_are_told(tmp_path: Path, teacher: Path, data: Path) -> None:
    words = [w for w in factories.WORDS if w not in ("film", "story")] + ["cinema", "tale"]
    other = tmp_path / "other"
    load_model(teacher, AUTO).save_pretrained(other)
    factories.tokenizer(words).save_pretrained(other)
    stage = {**DISTIL, "teacher": str(other), "losses": ["hidden_states"]}
    only(found(tmp_path, teacher, data, stage), "stages.0.teacher", "their layers see other tokens")
    assert found(tmp_path, teacher, data, {**DISTIL, "teacher": str(other)}) == []


def test_a_teacher_or_student_with_too_few_positions_is_told(tmp_path: Path, teacher: Path, data: Path) -> None:
    short = str(factories.save(factories.model(max_position_embeddings=12), tmp_path / "short"))
    only(found(tmp_path, teacher, data, {**DISTIL, "teacher": short}), "stages.0.teacher", "reads at most 12 tokens")
    student = {**DISTIL, "student": {"from": short}}
    only(found(tmp_path, teacher, data, student), "task.max_length", "more than the model's position table allows (12)")


def corpus(tmp_path: Path) -> dict[str, Any]:
    return {"type": "fill-mask", "dataset": str(factories.write_corpus(tmp_path / "corpus", 40)), "max_length": 16}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_teacher_of_raw_text_with_another_vocabulary_is_told(tmp_path: Path, data: Path, streaming: bool) -> None:
    own = factories.save(factories.model(head="mask"), tmp_path / "own")
    other = factories.save(
        factories.model(head="mask"), tmp_path / "other", [*factories.WORDS[:5], *reversed(factories.WORDS[5:])]
    )
    same = factories.save(factories.model(head="mask", seed=1), tmp_path / "same")
    factories.tokenizer(model_input_names=["input_ids"]).save_pretrained(same)
    task = {**corpus(tmp_path), "streaming": streaming, "dev_rows": 4}
    for teacher, expected in ((other, 1), (same, 0)):
        problems = found(tmp_path, own, data, {**DISTIL, "teacher": str(teacher)}, task=task)
        assert len(problems) == expected
        assert all("has another vocabulary than the student" in why for _, why in problems)


# ---- tokenizers, modules, sizes


def unmasked(path: Path) -> Path:
    """A model whose tokenizer has no mask, and a vocabulary of a kind that cannot be cut."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(factories.WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    factories.model().save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    return path


def test_what_a_later_tokenizer_cannot_do_is_told(tmp_path: Path, teacher: Path, data: Path) -> None:
    plain = unmasked(tmp_path / "plain")
    student = {**DISTIL, "student": {"from": str(plain), "vocabulary": "corpus"}}
    only(found(tmp_path, teacher, data, student), "stages.0.student.vocabulary", "cannot be cut")
    prune = {"kind": "prune", "vocabulary": "corpus"}
    only(found(tmp_path, plain, data, prune), "stages.0.vocabulary", "cannot be cut")
    task = corpus(tmp_path)
    general = {**DISTIL, "task": task, "student": {"from": str(plain)}, "teacher": str(plain)}
    told = found(tmp_path, teacher, data, {**general, "losses": ["hidden_states"]}, DISTIL)
    only(told, "stages.0", "has no mask token")


def test_an_augmenting_model_that_fills_no_masks_is_told(tmp_path: Path, teacher: Path, data: Path) -> None:
    problems = found(tmp_path, teacher, data, {**DISTIL, "augment": {"model": str(unmasked(tmp_path / "plain"))}})
    assert [key for key, _ in problems] == ["stages.0.augment.model"] * 2
    assert "has no mask token" in problems[0][1]
    assert "which cannot fill in masks" in problems[1][1]
    masks = factories.save(factories.model(head="mask"), tmp_path / "masks")
    assert found(tmp_path, teacher, data, {**DISTIL, "augment": {"model": str(masks)}}) == []


def test_modules_to_skip_are_looked_for(tmp_path: Path, teacher: Path, data: Path) -> None:
    pytest.importorskip("bitsandbytes")
    backend = {"use": "bnb_8bit", "skip": ["classifer"]}
    stage = {"kind": "quantize", "backend": backend}
    only(found(tmp_path, teacher, data, stage), "stages.0.backend.skip.0", "did you mean 'classifier'?")
    trained = {"kind": "quantize", "backend": {**backend, "skip": ["classifier"]}, "train": {"lora": {"r": 2}}}
    only(found(tmp_path, teacher, data, trained), "stages.0.backend.skip", "the task head's pooler is quantized")
    whole = {**trained, "backend": {**backend, "skip": ["classifier", "pooler"]}}
    assert found(tmp_path, teacher, data, whole) == []


def test_a_pattern_that_does_not_tile_is_told(tmp_path: Path, teacher: Path, data: Path) -> None:
    stage = {"kind": "prune", "criterion": "magnitude", "weights": {"n_of_m": [2, 5]}}
    only(found(tmp_path, teacher, data, stage), "stages.0.weights", "groups of 5 along the input do not divide")
    assert found(tmp_path, teacher, data, {**stage, "weights": {"n_of_m": [2, 4]}}) == []


def test_the_best_of_models_that_are_still_rounded_anew_is_none(tmp_path: Path, teacher: Path, data: Path) -> None:
    stage = {"kind": "quantize", "backend": {"use": "onnx_int8", "mode": "static"}, "train": {"keep_best": True}}
    only(found(tmp_path, teacher, data, stage), "stages.0.train.keep_best", "the best model while masks close")
    recover = {"keep_best": True, **TRAIN}
    zeros = {"kind": "prune", "criterion": "magnitude", "weights": {"share": 0.5}, "recover": recover}
    assert found(tmp_path, teacher, data, zeros) == []


def test_a_best_model_with_kept_zeros_is_kept(tmp_path: Path, teacher: Path, data: Path) -> None:
    """Its zeros are the same from the first step to the last, so the best epoch is as good as the last."""
    from hfcompress.pruning.sparsity import share_of_zeros
    from tests.distillation.test_teachers import ran

    recover = {"keep_best": True, "epochs": 2, "batch_size": 16}
    zeros = {"kind": "prune", "criterion": "magnitude", "weights": {"share": 0.5}, "recover": recover}
    ran(factories.recipe(tmp_path / "r.yaml", teacher, data, stages=[zeros]), tmp_path / "run")
    assert share_of_zeros(load_model(tmp_path / "run" / "01-prune", AUTO)) == pytest.approx(0.5, abs=1e-3)
