"""LoRA students, and teachers that peft saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification

from hfcompress.models.adapters import is_adapter, merge_adapter
from hfcompress.models.architectures import ARCHITECTURES, layers_of, spec_of
from hfcompress.models.artifact import load_model, load_tokenizer, save_model
from hfcompress.models.forward import observe
from hfcompress.training import lora
from hfcompress.training.lora import Lora, add_lora, merge_adapters
from hfcompress.utils.errors import HfcompressError
from tests import factories

CLASSIFIER = "AutoModelForSequenceClassification"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return observe(model.eval(), factories.batch()).logits


def move(model: Any) -> Any:
    """Adapters as if they had learnt something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize(("family", "head"), [pair for pair in factories.headed() if pair[1] not in ("token", "span")])
def test_a_merged_student_answers_as_its_adapters_did(family: str, head: str) -> None:
    student = factories.model(family, head=head, seed=1)
    before, weights = logits(student), {name: t.clone() for name, t in student.state_dict().items()}
    adapted = add_lora(student, Lora(r=4, targets=["query", "value", "attention_output", "ffn_in", "ffn_out"]))
    assert adapted is student
    assert torch.allclose(logits(adapted), before, atol=1e-6)
    moved = logits(move(adapted))
    assert not torch.allclose(moved, before, atol=1e-2)
    stock = merge_adapters(adapted)
    assert torch.allclose(logits(stock), moved, atol=1e-5)
    assert stock.state_dict().keys() == weights.keys()
    assert all(parameter.requires_grad for parameter in stock.parameters())
    assert not hasattr(stock, "peft_config")


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_only_adapters_and_head_are_trained(family: str) -> None:
    student = add_lora(factories.model(family).train(), Lora(r=2))
    before = {name: t.clone() for name, t in student.named_parameters()}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        observe(student, factories.batch()).logits.pow(2).sum().backward()
        optimizer.step()
    changed = {name for name, t in student.named_parameters() if not torch.equal(t, before[name])}
    head = {name for name in changed if "lora_" not in name}
    assert head
    assert all(not name.startswith(f"{student.base_model_prefix}.") or ".pooler." in name for name in head)
    paths = {getattr(spec_of(student).modules, name) for name in ("query", "value")}
    layers = len(layers_of(student))
    assert len(changed - head) == 2 * layers * len(paths)
    assert all(any(f".{path}.lora_" in name for path in paths) for name in changed - head)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_the_words_of_a_mask_head_are_embeddings_and_stay(family: str) -> None:
    student = add_lora(factories.model(family, head="mask"), Lora())
    assert not student.get_input_embeddings().weight.requires_grad
    assert student.get_output_embeddings().bias.requires_grad


def test_the_update_is_scaled_by_alpha_over_r() -> None:
    student = factories.model(layers=1)
    query = student.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    adapted = move(add_lora(student, Lora(r=4, alpha=6.0, targets=["query"])))
    layer = adapted.bert.encoder.layer[0].attention.self.query
    expected = query + 6.0 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(
        merge_adapters(adapted).bert.encoder.layer[0].attention.self.query.weight, expected, atol=1e-6
    )


def test_a_target_is_one_layer_and_not_its_namesake() -> None:
    adapted = add_lora(factories.model(layers=1), Lora(targets=["ffn_out"]))
    assert [name for name, _ in adapted.named_parameters() if "lora_A" in name] == [
        "bert.encoder.layer.0.output.dense.lora_A.default.weight"
    ]


def test_adapters_drop_out_in_training_alone() -> None:
    adapted = move(
        add_lora(factories.model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), Lora(dropout=0.5))
    )
    one, other = (observe(adapted.train(), factories.batch()).logits for _ in range(2))
    assert not torch.allclose(one, other, atol=1e-4)
    assert torch.equal(logits(adapted), logits(adapted))


def test_a_merged_student_is_a_stock_checkpoint(tmp_path: Path) -> None:
    student = merge_adapters(move(add_lora(factories.model(), Lora())))
    factories.save(student, tmp_path)
    assert not is_adapter(tmp_path)
    assert torch.allclose(logits(load_model(tmp_path, CLASSIFIER)), logits(student), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": 0}, "greater than or equal to 1"), ({"targets": ["querry"]}, "'query'"), ({"targets": []}, "at least 1")],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Lora(**options)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hfcompress.models.adapters.missing_modules", lambda: ["peft"])
    for act in (
        lambda: add_lora(factories.model(), Lora()),
        lambda: merge_adapter(tmp_path, tmp_path / "out", CLASSIFIER, Path),
    ):
        with pytest.raises(HfcompressError, match="peft is not installed") as refused:
            act()
        assert "hfcompress[peft]" in refused.value.problems[0].fix


def adapter(path: Path, family: str = "bert", labels: int = 3, base: Path | None = None, **options: Any) -> Any:
    """A LoRA-adapted classifier, saved by peft; its base was saved without a head."""
    base = base or path.with_name("base")
    model = factories.model(family, labels=labels)
    if not base.exists():
        model.base_model.save_pretrained(base)
        factories.tokenizer().save_pretrained(base)
    paths = spec_of(model).modules
    options = {"target_modules": [paths.query, paths.value], "modules_to_save": ["pooler", "head"], **options}
    peft = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels),
        LoraConfig(task_type="SEQ_CLS", r=4, **options),
    )
    move(peft)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    peft.save_pretrained(path)
    return peft.eval()


def answer(peft: Any) -> torch.Tensor:
    """The adapted model's logits, through peft's own forward."""
    with torch.no_grad():
        return peft(**factories.batch()).logits


def edit(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "deberta-v2", "modernbert"])
def test_an_adapter_becomes_a_stock_model(family: str, tmp_path: Path) -> None:
    peft = adapter(tmp_path / "adapter", family)
    assert is_adapter(tmp_path / "adapter")
    asked: list[str] = []
    merge_adapter(
        tmp_path / "adapter", tmp_path / "out", CLASSIFIER, lambda name: asked.append(name) or tmp_path / "base"
    )
    assert asked == [str(tmp_path / "base")]
    model = load_model(tmp_path / "out", CLASSIFIER)
    assert model.config.num_labels == 3
    assert torch.allclose(logits(model), answer(peft), atol=1e-5)
    assert load_tokenizer(tmp_path / "out").get_vocab() == factories.tokenizer().get_vocab()
    assert not is_adapter(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_a_base_that_names_its_labels_keeps_the_names(tmp_path: Path) -> None:
    model = factories.model(labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    save_model(model, factories.tokenizer(), tmp_path / "base")
    adapter(tmp_path / "adapter", labels=2, base=tmp_path / "base")
    merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, Path)
    assert load_model(tmp_path / "out", CLASSIFIER).config.id2label == {0: "bad", 1: "good"}


def test_a_base_with_a_head_of_another_size_gets_the_saved_one(tmp_path: Path) -> None:
    factories.save(factories.model(labels=5), tmp_path / "other")
    peft = adapter(tmp_path / "adapter", labels=3)
    merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, lambda _: _with_body_of(tmp_path))
    assert torch.allclose(logits(load_model(tmp_path / "out", CLASSIFIER)), answer(peft), atol=1e-5)


def _with_body_of(folder: Path) -> Path:
    """The base's body under a head with five labels."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=5)
    return factories.save(model, folder / "five")


def test_an_adapter_s_own_tokenizer_comes_first(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    own = factories.tokenizer([*factories.WORDS[:-1], "its"])
    own.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, Path)
    assert "its" in load_tokenizer(tmp_path / "out").get_vocab()


def test_a_base_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")

    def resolve(name: str) -> Path:
        raise HfcompressError(f"no such model directory: {name}", "check the path")

    with pytest.raises(HfcompressError, match=r"was trained on '.*base', which cannot be found: no such") as refused:
        merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, resolve)
    assert "set base_model_name_or_path in" in refused.value.problems[0].fix
    assert not (tmp_path / "out").exists()
    edit(tmp_path / "adapter", base_model_name_or_path=None)
    with pytest.raises(HfcompressError, match="does not say which model it was trained on"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, resolve)


def test_pickled_adapters_are_not_loaded(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / lora.WEIGHTS).rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(HfcompressError, match=r"holds no adapter_model\.safetensors"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, Path)


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    model = factories.save(factories.model(), tmp_path / "base")
    other = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    get_peft_model(load_model(model, CLASSIFIER), other).save_pretrained(tmp_path / "adapter")
    with pytest.raises(HfcompressError, match="is a PROMPT_TUNING adapter"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, Path)


def test_an_adapter_for_another_base_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    wide = factories.save(factories.model(hidden=64, labels=3), tmp_path / "wide")
    with pytest.raises(HfcompressError, match="does not fit"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, lambda _: wide)
    assert not (tmp_path / "out").exists()


def test_what_a_killed_merge_left_is_written_anew(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("")
    merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, Path)
    assert not (tmp_path / "out" / "stale").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_head_that_nobody_trained_is_an_error(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    weights = tmp_path / "adapter" / lora.WEIGHTS
    from safetensors.torch import load_file, save_file

    kept = {name: t for name, t in load_file(weights).items() if "lora_" in name}
    save_file(kept, weights)
    edit(tmp_path / "adapter", modules_to_save=None, task_type=None)
    with pytest.raises(HfcompressError, match="its task head was never trained"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, Path)


def test_a_head_that_was_saved_in_part_is_an_error(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", "deberta-v2", modules_to_save=None)
    with pytest.raises(HfcompressError, match=r"holds pooler\.dense\.weight, pooler\.dense\.bias") as refused:
        merge_adapter(tmp_path / "adapter", tmp_path / "out", CLASSIFIER, Path)
    assert "modules_to_save=['pooler']" in refused.value.problems[0].fix
