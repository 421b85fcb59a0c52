"""Padding changes no answer: one token pads, for the config and for the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hfcompress.data.tasks import TextClassification
from hfcompress.distillation.teacher_checks import same_inputs
from hfcompress.distillation.teachers import Member, TeacherEnsemble, Teachers
from hfcompress.measure.quality import require_padding_unread
from hfcompress.measure.rows import Rows
from hfcompress.models.artifact import label_ids, load_model, load_tokenizer, open_artifact, pad_token_of, read_config
from hfcompress.models.forward import observe
from hfcompress.training.batches import make_batches
from hfcompress.utils.errors import HfcompressError
from tests import factories
from tests.in_process import InThisProcess

CLASSIFIER = "AutoModelForSequenceClassification"
UNSAID: Any = object()


def saved(path: Path, family: str = "llama", pad: Any = UNSAID, token: Any = UNSAID, ends: bool = False) -> Path:
    """A model whose config says `pad_token_id: pad` and whose tokenizer `pad_token: token`, both 0 where not given.

    Args:
        path: Where it goes.
        family: Its architecture.
        pad, token: What the two files say; None takes the entry out.
        ends: Whether the tokenizer puts `[SEP]` after a text, as it does for encoders, or nothing.
    """
    factories.save(factories.model(family, seed=3), path)
    config, settings = read_config(path), json.loads((path / "tokenizer_config.json").read_text())
    config["pad_token_id"] = 0 if pad is UNSAID else pad
    settings["pad_token"] = "[PAD]" if token is UNSAID else token
    if settings["pad_token"] is None:
        del settings["pad_token"]
    if not ends:
        state = json.loads((path / "tokenizer.json").read_text())
        state["post_processor"] = None
        (path / "tokenizer.json").write_text(json.dumps(state))
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def task(data: Path) -> TextClassification:
    return TextClassification(type="text-classification", dataset=str(data), text=["sentence"], max_length=16)


def alone_and_together(path: Path, task: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A model's logits for dev rows of many lengths, without padding and in one batch."""
    model, tokenizer = load_model(path, CLASSIFIER), load_tokenizer(path, task)
    rows = task.encode(task.read("dev"), tokenizer, {"0": 0, "1": 1})
    with torch.no_grad():
        alone = [observe(model, {"input_ids": torch.tensor([ids])}).logits for ids in rows["input_ids"]]
        together = observe(model, task.batch(rows.__getitems__(range(len(rows))), tokenizer)).logits
    return torch.cat(alone), together


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "modernbert", "llama"])
@pytest.mark.parametrize(
    ("pad", "token"), [(UNSAID, UNSAID), (3, None), (None, "[SEP]")], ids=["both", "config alone", "tokenizer alone"]
)
def test_a_text_has_one_answer_alone_and_padded(tmp_path: Path, task: Any, family: str, pad: Any, token: Any) -> None:
    path = saved(tmp_path / "model", family, pad, token)
    alone, together = alone_and_together(path, task)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    # What is saved names it in both places.
    model, tokenizer = load_model(path, CLASSIFIER), load_tokenizer(path, task)
    expected = 0 if pad is UNSAID else 3
    assert (model.config.pad_token_id, tokenizer.pad_token_id, pad_token_of(path)) == (expected,) * 3
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = alone_and_together(tmp_path / "saved", task)
    assert torch.equal(again[0], alone)


def test_texts_may_end_in_the_pad_token(tmp_path: Path, task: Any) -> None:
    """The pad token of many decoders is their end of text: the answer is read before it, alone and padded."""
    path = saved(tmp_path / "model", pad=3, token="[SEP]", ends=True)
    assert load_tokenizer(path, task)("the film")["input_ids"][-1] == 3
    alone, together = alone_and_together(path, task)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_tokenizer_that_pads_left_is_saved_padding_right(tmp_path: Path, task: Any) -> None:
    path = saved(tmp_path / "model", "bert")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    load_tokenizer(path, task).save_pretrained(tmp_path / "saved")
    found = load_tokenizer(tmp_path / "saved")
    assert found(["the", "the film was"], padding=True)["attention_mask"][0] == [1, 0, 0]


@pytest.mark.parametrize(
    ("pad", "token", "ends", "said"),
    [
        (3, "[UNK]", False, r"pads with the id 3 \('\[SEP\]'\), its tokenizer with 1 \('\[UNK\]'\)"),
        (None, None, False, "neither the config nor the tokenizer of .* names a pad token"),
        (None, "[SEP]", True, r"'\[SEP\]' is also the token at the end of its texts"),
        (9, None, False, "an ordinary token there, 'bad'"),
        (900, None, False, "no token of that id"),
        (-1, None, False, "neither the config nor the tokenizer"),
    ],
)
def test_what_nobody_can_tell_is_refused_before_anything_runs(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], pad: Any, token: Any, ends: bool, said: str
) -> None:
    path = saved(tmp_path / "model", "llama", pad, token, ends)
    with pytest.raises(HfcompressError, match=said):
        load_tokenizer(path)
    teacher = factories.save(factories.model(), tmp_path / "teacher")
    stage = {"kind": "distill", "losses": ["soft_labels"], "student": {"layers": 1}}
    for model, stages in ((path, [{"kind": "finetune"}, stage]), (teacher, [stage | {"teacher": str(path)}])):
        recipe = factories.recipe(tmp_path / "r.yaml", model, data, stages=stages)
        assert factories.run_cli("check", recipe) == 2
        told = capsys.readouterr().err
        assert "pad_token" in told
        assert ("model" if model == path else "teacher") in told.partition("the config")[0].partition("neither")[0]


def test_files_that_agree_are_not_loaded_by_check(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hfcompress.recipe.local_checks.load_tokenizer", lambda *_: pytest.fail("a look at the files was enough")
    )
    recipe = factories.recipe(tmp_path / "r.yaml", saved(tmp_path / "model"), data, stages=[{"kind": "finetune"}])
    assert factories.run_cli("check", recipe) == 0


def test_a_teacher_is_padded_as_its_own_config_says(tmp_path: Path, task: Any) -> None:
    """Both read the same ids; a decoder of another pad token would read its answer off the student's padding."""
    path = saved(tmp_path / "teacher", pad=3, token="[SEP]")
    alone, _ = alone_and_together(path, task)
    ours, theirs = load_tokenizer(saved(tmp_path / "student"), task), load_tokenizer(path, task)
    own, other = ({"train": task.encode(task.read("dev"), words, {"0": 0, "1": 1})} for words in (ours, theirs))
    assert own["train"]["input_ids"][:] == other["train"]["input_ids"][:]
    assert not same_inputs(ours, theirs, own, other)
    member = Member("teacher", load_model(path, CLASSIFIER), theirs, rows=other["train"])
    teachers = TeacherEnsemble([member], Teachers(models=["teacher"]), task)
    batch = task.batch(own["train"].__getitems__(range(48)), ours)
    index, length = batch.pop("index"), batch["input_ids"].shape[1]
    found = teachers.ask(batch, teachers.prepare(index, length))
    torch.testing.assert_close(found.logits, alone, atol=1e-4, rtol=1e-4)


def test_a_model_is_measured_with_its_tokenizers_pad_token_and_not_off_padding(tmp_path: Path, task: Any) -> None:
    """Stock transformers refuses a batch where the config of a decoder names no pad token."""
    path = saved(tmp_path / "model", pad=None, token="[SEP]")
    alone, _ = alone_and_together(path, task)
    tokenizer, labels = load_tokenizer(path, task), label_ids(read_config(path))
    with InThisProcess(open_artifact(path), CLASSIFIER) as process:
        rows = Rows(task, tokenizer, task.read("dev"), labels)
        assert np.abs(process.logits(rows.batches([range(48)])) - alone.numpy()).max() < 1e-4
        require_padding_unread(process, rows)
        tokenizer.pad_token = "film"
        with pytest.raises(HfcompressError, match="once a row is padded to the length of another"):
            require_padding_unread(process, Rows(task, tokenizer, task.read("dev"), labels))


def test_rows_are_padded_with_nothing_made_up(task: Any) -> None:
    tokenizer = factories.tokenizer()
    tokenizer.pad_token = None
    rows = task.encode(task.read("dev"), tokenizer, {"0": 0, "1": 1})
    with pytest.raises(HfcompressError, match="has no pad token"):
        list(make_batches(rows, tokenizer, task))
