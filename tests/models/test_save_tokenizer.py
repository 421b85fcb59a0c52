"""A saved tokenizer loads in transformers 4 and 5, and reads texts alike."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from hfcompress.models.artifact import load_tokenizer
from hfcompress.models.save_tokenizer import save_tokenizer
from tests import factories


def test_a_tokenizer_without_a_class_of_its_own_is_saved_for_older_transformers(tmp_path: Path) -> None:
    factories.tokenizer().save_pretrained(tmp_path / "before")
    tokenizer = load_tokenizer(tmp_path / "before")
    save_tokenizer(tokenizer, tmp_path / "saved")
    told = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & set(told)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(again) is type(tokenizer)
    pair = ("the film was great", "a dull story")
    assert dict(again(*pair)) == dict(tokenizer(*pair))


def test_a_tokenizer_of_a_class_keeps_it(tmp_path: Path) -> None:
    tokenizer = factories.byte_level_tokenizer(tmp_path / "bpe")
    save_tokenizer(tokenizer, tmp_path / "saved")
    told = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"].startswith("RobertaTokenizer")
    assert "model_input_names" not in told or told["model_input_names"] == tokenizer.model_input_names
