"""Directories of other tools are measured as ours are, or refused with how to use them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hfcompress.measure.process import ModelProcess
from hfcompress.models.artifact import load_model, load_tokenizer, open_artifact
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.utils.errors import HfcompressError
from tests import factories

AUTO = "AutoModelForSequenceClassification"


def sentence_transformer(path: Path, folder: str) -> Path:
    """Writes a directory as sentence-transformers does, with its transformer in the directory itself or in a folder."""
    from transformers import AutoModel

    base = factories.save(factories.model(), path / "classifier")
    made = path / "embedder"
    AutoModel.from_pretrained(base).save_pretrained(made / folder)
    factories.tokenizer().save_pretrained(made / folder)
    modules = [
        {"idx": 0, "name": "0", "path": folder, "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (made / "modules.json").write_text(json.dumps(modules))
    return made


def test_a_sentence_transformer_has_no_task_head(tmp_path: Path) -> None:
    made = sentence_transformer(tmp_path, "")
    with pytest.raises(HfcompressError, match="gives embeddings and has no task head"):
        load_model(made, AUTO)
    assert load_model(made, AUTO, fresh_head=True).num_labels == 2


def test_the_transformer_of_a_sentence_transformer_is_named(tmp_path: Path) -> None:
    made = sentence_transformer(tmp_path, "0_Transformer")
    with pytest.raises(HfcompressError) as refused:
        open_artifact(made)
    assert f"is {made / '0_Transformer'}; name that" in str(refused.value)
    with pytest.raises(HfcompressError, match="gives embeddings and has no task head"):
        load_model(made / "0_Transformer", AUTO)


@pytest.mark.slow
def test_a_graph_of_transformers_exporters_is_measured_once_it_has_a_tokenizer(tmp_path: Path) -> None:
    exporters = pytest.importorskip("transformers.exporters")
    import torch

    source = factories.save(factories.model("distilbert", layers=1), tmp_path / "source")
    model, inputs = load_model(source, AUTO), make_dummy_inputs(source)
    batch = {name: torch.from_numpy(value) for name, value in inputs.items() if name != "token_type_ids"}
    exported = exporters.OnnxExporter().export(model, batch, exporters.OnnxConfig(dynamic=True))
    exported.save_pretrained(tmp_path / "exported")
    with pytest.raises(HfcompressError) as refused:
        load_tokenizer(tmp_path / "exported")
    assert "transformers.exporters writes none: save that of the exported model" in str(refused.value)
    factories.tokenizer().save_pretrained(tmp_path / "exported")
    artifact = open_artifact(tmp_path / "exported")
    assert [file.name for file in artifact.weight_files] == ["model.onnx", "model.onnx.data"]
    with ModelProcess(artifact, AUTO) as process:
        np.testing.assert_allclose(process.logits([inputs]), logits_of(model, inputs), atol=1e-4)
