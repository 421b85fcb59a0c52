"""Pruned models must load anywhere, and be the same ones compiled, exported and quantized."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from hfcompress.measure import verify as verifying
from hfcompress.measure.process import ModelProcess, WorkerError
from hfcompress.measure.verify import ReloadError, verify
from hfcompress.models.architectures import ARCHITECTURES, TASK_HEADS
from hfcompress.models.artifact import (
    MODELING_FILE,
    load_model,
    load_tokenizer,
    open_artifact,
    save_model,
    weights_hash,
)
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.forward import select_inputs
from hfcompress.models.surgery import Keep, cut
from hfcompress.onnx.export import export, quiet
from hfcompress.onnx.graph_io import run_onnx
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from tests import factories

ENCODERS = tuple(name for name, spec in ARCHITECTURES.items() if not spec.decoder)
AUTO = "AutoModelForSequenceClassification"
ALL_HEADS, ALL_NEURONS, HALF = (0, 1, 2, 3), tuple(range(64)), tuple(range(1, 64, 2))
EMPTY = "nothing left of a layer"
LAYOUTS = {
    "stock": [Keep(ALL_HEADS, HALF), Keep(ALL_HEADS, tuple(range(32)))],
    "uneven": [Keep((3,), tuple(range(48))), Keep((0, 1, 3), (5, 6, 7, 60))],
    EMPTY: [Keep((1, 2), ALL_NEURONS), Keep((), ())],
}


cases = pytest.mark.parametrize(
    ("family", "layout"),
    [*((family, "uneven") for family in ENCODERS), *((family, EMPTY) for family in ("bert", "albert", "modernbert"))],
)


def build(family: str, layout: str, **config: Any) -> Any:
    """A pruned model; ALBERT's layers have the weights of one."""
    return cut(factories.model(family, **config), LAYOUTS[layout][-1:] if family == "albert" else LAYOUTS[layout])


# Saved models


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A directory for each family and layout."""
    root = tmp_path_factory.mktemp("saved")
    made = {(family, layout): root / family / layout for family in ENCODERS for layout in LAYOUTS}
    for (family, layout), path in made.items():
        save_model(build(family, layout), factories.tokenizer(), path)
    return made


LOAD = """
import sys
import numpy as np
{first}
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
failed = 0
for path in sys.argv[2:]:
    try:
        model = AutoModelForSequenceClassification.from_pretrained(path, {flag}).eval()
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}", file=sys.stderr)
        failed += 1
        continue
    assert AutoTokenizer.from_pretrained(path, {flag})("the film was good")["input_ids"][0] == 2
    with np.load(sys.argv[1]) as probe, torch.no_grad():
        inputs = {{k: torch.from_numpy(v) for k, v in probe.items() if k != "token_type_ids"}}
        np.save(path + "/seen.npy", model(**inputs).logits.numpy())
    print(type(model).__module__)
assert "hfcompress" {known} sys.modules
sys.exit(failed)
"""


def load_elsewhere(folder: Path, paths: list[Path], first: str = "", flag: str = "") -> Any:
    """Loads directories in one fresh process; its exit code says how many failed."""
    probe = folder / "probe.npz"
    np.savez(probe, **make_dummy_inputs(paths[0]))  # type: ignore[arg-type]
    script = LOAD.format(first=first, flag=flag, known="in" if first else "not in")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-P", "-c", script, str(probe), *map(str, paths)]
    for path in paths:
        (path / "seen.npy").unlink(missing_ok=True)
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def answers_are_those_of_the_cut(saved: dict[tuple[str, str], Path], layout: str) -> list[str]:
    """The families whose reloaded model answered another thing than the one that was saved."""
    probe = make_dummy_inputs(saved["bert", layout])
    return [
        family
        for family in ENCODERS
        if not np.allclose(
            np.load(saved[family, layout] / "seen.npy"), logits_of(build(family, layout), probe), atol=1e-5
        )
    ]


def test_with_transformers_alone_a_stock_shape_loads_and_an_uneven_one_says_what_it_needs(
    saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    stock, uneven = ([saved[family, layout] for family in ENCODERS] for layout in ("stock", "uneven"))
    done = load_elsewhere(tmp_path, [*stock, *uneven])
    assert answers_are_those_of_the_cut(saved, "stock") == []
    assert not any((path / MODELING_FILE).exists() for path in stock)
    assert done.returncode == len(uneven), done.stderr
    assert done.stderr.count("trust_remote_code=True") >= len(uneven)


@pytest.mark.parametrize(
    ("first", "flag", "package"),
    [("import hfcompress", "", "hfcompress"), ("", "trust_remote_code=True", "transformers_modules")],
    ids=["import", "flag"],
)
def test_an_uneven_shape_loads_after_the_import_and_with_the_flag(
    saved: dict[tuple[str, str], Path], tmp_path: Path, first: str, flag: str, package: str
) -> None:
    paths = [saved[family, layout] for layout in ("uneven", EMPTY) for family in ENCODERS]
    done = load_elsewhere(tmp_path, paths, first, flag)
    assert done.returncode == 0, done.stderr
    assert answers_are_those_of_the_cut(saved, "uneven") == []
    assert answers_are_those_of_the_cut(saved, EMPTY) == []
    assert {line.partition(".")[0] for line in done.stdout.splitlines()} == {package}


@pytest.mark.parametrize(("family", "head"), [pair for pair in factories.headed() if pair[0] in ENCODERS])
def test_what_is_saved_again_is_the_same(family: str, head: str, tmp_path: Path) -> None:
    auto, small = "AutoModel" + TASK_HEADS[head], build(family, "uneven", head=head)
    save_model(small, factories.tokenizer(), tmp_path / "once")
    again = load_model(tmp_path / "once", auto)
    save_model(again, load_tokenizer(tmp_path / "once"), tmp_path / "twice")
    assert weights_hash(tmp_path / "once") == weights_hash(tmp_path / "twice")
    assert (tmp_path / "twice" / MODELING_FILE).is_file()
    assert again.config.auto_map[auto].endswith(f".{type(small).__name__}")
    probe = make_dummy_inputs(tmp_path / "once")
    assert np.allclose(logits_of(again, probe), logits_of(small, probe), atol=1e-5)


# The proof


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A directory whose layers read columns of their own, and what it answers."""
    path, small = tmp_path_factory.mktemp("proven") / "mpnet", build("mpnet", "uneven")
    save_model(small, factories.tokenizer(), path)
    return path, logits_of(small, make_dummy_inputs(path))


def test_a_pruned_model_is_proven_by_each_way_that_it_loads(uneven: tuple[Path, Any]) -> None:
    path, expected = uneven
    differences = verify(open_artifact(path, kind="prune"), expected, AUTO)
    assert list(differences) == ["transformers", "hfcompress", "onnx"]
    assert max(differences.values()) <= 1e-5


@pytest.mark.slow
def test_no_way_is_proven_by_another(uneven: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = uneven
    assert list(verify(open_artifact(path, kind="distill"), expected, AUTO)) == ["transformers", "hfcompress"]
    artifact = open_artifact(path, kind="prune")
    with monkeypatch.context() as patched:
        patched.setattr(verifying, "OWN_CODE", {"trust": False, "register": None})
        with pytest.raises(WorkerError, match="trust_remote_code=True"):
            verify(artifact, expected, AUTO)
    monkeypatch.setattr(verifying, "load_model", lambda *_: build("mpnet", EMPTY))
    with pytest.raises(ReloadError, match="reloaded by onnxruntime in a fresh process, differs from the model in mem"):
        verify(artifact, expected, AUTO)


@pytest.mark.usefixtures("in_process")
def test_a_model_that_cannot_be_exported_is_said_to_be_unproven_there(
    uneven: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setattr(verifying, "export", fails)
    path, expected = uneven
    assert list(verify(open_artifact(path, kind="prune"), expected, AUTO)) == ["transformers", "hfcompress"]
    told = capsys.readouterr()
    assert "cannot be exported to ONNX: no such operator" in " ".join((told.out + told.err).split())


@pytest.mark.usefixtures("in_process")
def test_a_changed_weight_is_found_out(uneven: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path, expected = uneven
    save_model(load_model(path, AUTO), factories.tokenizer(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.out_proj.bias"][0] += 0.01
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReloadError, match="reloaded by transformers in a fresh process, differs from the model in mem"):
        verify(open_artifact(tmp_path), expected, AUTO)


def test_a_modeling_file_that_hfcompress_did_not_write_is_not_run(uneven: tuple[Path, Any], tmp_path: Path) -> None:
    path, expected = uneven
    save_model(load_model(path, AUTO), factories.tokenizer(), tmp_path / "model")
    witness, file = tmp_path / "witness", tmp_path / "model" / MODELING_FILE
    file.write_text(file.read_text() + f"\nopen({str(witness)!r}, 'w').close()\n")
    artifact = open_artifact(tmp_path / "model")
    with ModelProcess(artifact, AUTO) as process:
        found = process.logits([make_dummy_inputs(path)])
    assert np.allclose(found, expected, atol=1e-5), "it loads through hfcompress's own code"
    with pytest.raises(ReloadError, match="modeling file"):
        verify(artifact, expected, AUTO)
    assert not witness.exists()


# Compiled, exported, quantized


@pytest.mark.slow
@cases
def test_compiled_it_answers_the_same(family: str, layout: str) -> None:
    small = build(family, layout)
    batch = select_inputs(small, factories.batch())
    with torch.inference_mode():
        assert torch.allclose(torch.compile(small)(**batch).logits, small(**batch).logits, atol=1e-5)
    torch.compiler.reset()


@cases
def test_exported_it_answers_batches_and_lengths_never_seen(family: str, layout: str, tmp_path: Path) -> None:
    small, path = build(family, layout), tmp_path / "model.onnx"
    with quiet():
        export(small, path, arrays(2, 9))
    for rows, length in ((2, 9), (1, 5), (5, 21), (3, 1)):
        probe = arrays(rows, length)
        assert np.allclose(run_onnx(path, probe), logits_of(small, probe), atol=1e-5), (rows, length)


def arrays(rows: int, length: int) -> dict[str, Any]:
    return {name: value.numpy() for name, value in factories.batch(rows, length, seed=rows).items()}


@pytest.mark.parametrize(("backend", "near"), [("bnb_8bit", 0.1), ("onnx_int8", 0.15)])
@cases
def test_quantized_it_answers_nearly_the_same_and_reloads(
    family: str, layout: str, backend: str, near: float, saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = saved[family, layout]
    probe = make_dummy_inputs(source)
    expected = logits_of(build(family, layout), probe)
    found = BACKENDS.parse(backend).quantize(QuantizationJob(source, tmp_path, AUTO, probe)).logits
    assert 0 < np.abs(found - expected).max() <= near * np.abs(expected).max()
    if backend == "onnx_int8":
        assert np.array_equal(run_onnx(tmp_path / "onnx" / "model_quantized.onnx", probe), found)
    else:
        again = getattr(transformers, AUTO).from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
        assert np.allclose(logits_of(again, probe), found, atol=1e-5)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_without_any_attention_head_the_graph_reads_no_mask_and_is_the_same_model(family: str, tmp_path: Path) -> None:
    model = cut(factories.model(family), [Keep((), ALL_NEURONS)] * 2)
    save_model(model, factories.tokenizer(), tmp_path / "m")
    found = verify(
        open_artifact(tmp_path / "m", kind="prune"), logits_of(model, make_dummy_inputs(tmp_path / "m")), AUTO
    )
    assert set(found) == {"transformers", "hfcompress", "onnx"}
