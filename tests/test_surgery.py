"""Gates, surgery, what a forward pass shows, and the saved models that must load anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hfcompress.base.shape import shape_of
from hfcompress.measure.process import ModelProcess
from hfcompress.measure.verify import ReloadError, verify
from hfcompress.model.artifact import (
    MODELING_FILE,
    load_model,
    load_tokenizer,
    open_artifact,
    save_model,
    weights_hash,
)
from hfcompress.model.gates import gated, unit_counts
from hfcompress.model.observe import observe
from hfcompress.model.probe import logits_of, probe_inputs
from hfcompress.model.surgery import Keep, cut
from tests import world

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

FAMILIES = ("bert", "distilbert", "roberta")
AUTO = "AutoModelForSequenceClassification"
ALL_HEADS, ALL_NEURONS = (0, 1, 2, 3), tuple(range(64))
HALF = tuple(range(1, 64, 2))

LAYOUTS = {
    "stock": [Keep(ALL_HEADS, HALF), Keep(ALL_HEADS, tuple(range(32)))],
    "even": [Keep((0, 2, 3), HALF), Keep((1, 2, 3), tuple(range(32)))],
    "uneven": [Keep((3,), tuple(range(48))), Keep((0, 1), (5, 6, 7, 60))],
    "no heads in a layer": [Keep((), HALF), Keep((0, 3), ALL_NEURONS)],
    "no neurons in a layer": [Keep(ALL_HEADS, ()), Keep((1,), HALF)],
    "nothing left of a layer": [Keep(ALL_HEADS, ALL_NEURONS), Keep((), ())],
    "no neurons anywhere": [Keep(ALL_HEADS, ()), Keep(ALL_HEADS, ())],
}


def gates_of(keep: list[Keep], heads: int = 4, ffn: int = 64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ones where a unit stays, zeros where it goes."""
    return (
        [torch.zeros(heads).index_fill(0, torch.tensor(k.heads, dtype=torch.long), 1.0) for k in keep],
        [torch.zeros(ffn).index_fill(0, torch.tensor(k.neurons, dtype=torch.long), 1.0) for k in keep],
    )


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return observe(model, inputs).logits


def same(one: Any, other: Any) -> bool:
    """Whether two models have equal parameters."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_equals_gating(family: str, attention: str, layout: str) -> None:
    model, keep, batch = world.model(family, attn_implementation=attention), LAYOUTS[layout], world.batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    small = cut(model, keep)

    with gated(model, *gates_of(keep)):
        expected = logits(model, batch)
    assert torch.allclose(logits(small, batch), expected, atol=1e-5)
    assert not torch.allclose(logits(model, batch), expected, atol=1e-3)
    assert small.config._attn_implementation == attention
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_really_shrink_to_the_shape(family: str, layout: str) -> None:
    model, keep = world.model(family), LAYOUTS[layout]
    small = cut(model, keep)
    shape = shape_of(small.config.to_dict())
    count = sum(p.numel() for p in small.parameters())
    assert unit_counts(small) == ([len(k.heads) for k in keep], [len(k.neurons) for k in keep])
    assert [(x.heads, x.ffn) for x in shape.layers] == [(len(k.heads), len(k.neurons)) for k in keep]
    assert count == shape.parameters < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_twice_in_either_order_equals_cutting_once(family: str) -> None:
    model = world.model(family)
    once = cut(model, LAYOUTS["uneven"])
    first_heads = cut(cut(model, [Keep((3,), ALL_NEURONS), Keep((0, 1), ALL_NEURONS)]),
                      [Keep((0,), tuple(range(48))), Keep((0, 1), (5, 6, 7, 60))])  # fmt: skip
    first_neurons = cut(cut(model, [Keep(ALL_HEADS, tuple(range(48))), Keep(ALL_HEADS, (5, 6, 7, 60))]),
                        [Keep((3,), tuple(range(48))), Keep((0, 1), (0, 1, 2, 3))])  # fmt: skip
    assert same(once, first_heads)
    assert same(once, first_neurons)


def test_a_cut_that_evens_an_uneven_model_gives_the_stock_class_again() -> None:
    model = world.model()
    uneven = cut(model, [Keep(ALL_HEADS, tuple(range(48))), Keep(ALL_HEADS, HALF)])
    even = cut(uneven, [Keep(ALL_HEADS, tuple(range(32))), Keep(ALL_HEADS, tuple(range(32)))])
    assert type(uneven).__name__ == "PrunedBertForSequenceClassification"
    assert type(even) is type(model)
    assert same(even, cut(model, [Keep(ALL_HEADS, tuple(range(32))), Keep(ALL_HEADS, HALF)]))


def test_cutting_keeps_mode_and_settings() -> None:
    model = world.model(labels=3, hidden_act="relu", id2label={0: "no", 1: "yes", 2: "so"}).train()
    small = cut(model, LAYOUTS["uneven"])
    assert small.training
    assert (small.config.hidden_act, small.config.id2label[2], small.config.num_labels) == ("relu", "so", 3)


# Gates


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_a_gate_is_the_slope_of_the_loss(family: str) -> None:
    model, batch = world.model(family).double(), world.batch()
    labels = torch.tensor([0, 1, 1, 0])

    def loss(gates: list[list[torch.Tensor]]) -> torch.Tensor:
        with gated(model, *gates):
            return torch.nn.functional.cross_entropy(observe(model, batch).logits, labels)

    gates = [[torch.rand(n, dtype=torch.float64, requires_grad=True) for n in units] for units in unit_counts(model)]
    found = torch.autograd.grad(loss(gates), gates[0] + gates[1])
    for gate, gradient in zip(gates[0] + gates[1], found, strict=True):
        for unit in range(min(len(gate), 5)):
            step = torch.zeros_like(gate).index_fill(0, torch.tensor([unit]), 1e-5)
            moved = [[[g + sign * step if g is gate else g for g in u] for u in gates] for sign in (1, -1)]
            with torch.no_grad():
                slope = (loss(moved[0]) - loss(moved[1])) / 2e-5
            assert float(gradient[unit]) == pytest.approx(float(slope), abs=1e-8, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_can_have_gates_of_its_own(family: str) -> None:
    model, batch = world.model(family), world.batch()
    rows = len(batch["input_ids"])
    torch.manual_seed(0)
    heads, neurons = [[torch.rand(rows, n) for n in units] for units in unit_counts(model)]
    with gated(model, heads, neurons):
        together = logits(model, batch)
    for row in range(rows):
        with gated(model, [h[row] for h in heads], [n[row] for n in neurons]):
            assert torch.allclose(logits(model, batch)[row], together[row], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_change_nothing_and_leave_no_trace(family: str) -> None:
    model, batch = world.model(family), world.batch()
    ones = [[torch.ones(n) for n in units] for units in unit_counts(model)]
    closed = [[torch.zeros(n) for n in units] for units in unit_counts(model)]
    plain = logits(model, batch)
    with gated(model, *ones):
        assert torch.equal(logits(model, batch), plain)
    with pytest.raises(RuntimeError, match="inside"), gated(model, *closed):
        raise RuntimeError("inside")
    assert torch.equal(logits(model, batch), plain)


def test_a_gate_is_needed_for_every_layer() -> None:
    model = world.model()
    with pytest.raises(ValueError, match="argument 2 is shorter"), gated(model, [torch.ones(4)], [torch.ones(64)]):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


# What a forward pass shows


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_give_the_attention_that_eager_shows(family: str) -> None:
    batch = world.batch()
    seen = observe(world.model(family, attn_implementation="sdpa"), batch, frozenset({"queries", "keys"}))
    eager = world.model(family, attn_implementation="eager")
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True).attentions
    hidden_keys = batch["attention_mask"][:, None, None] == 0
    assert len(seen.queries) == len(seen.keys) == len(expected) == 2
    for queries, keys, attention in zip(seen.queries.values(), seen.keys.values(), expected, strict=True):
        scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
        assert torch.allclose(scores.masked_fill(hidden_keys, -torch.inf).softmax(-1), attention, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_embeddings_and_every_layer(family: str) -> None:
    model, batch = world.model(family, layers=3), world.batch()
    with torch.no_grad():
        seen = observe(model, batch, frozenset({"hidden_states"}))
        last = model.base_model(**batch).last_hidden_state
        embedded = model.base_model.embeddings(batch["input_ids"])
    assert len(seen.hidden_states) == 4
    assert torch.allclose(seen.hidden_states[0], embedded, atol=1e-6)
    assert torch.allclose(seen.hidden_states[-1], last, atol=1e-6)
    assert not seen.queries


def test_only_what_is_asked_for_is_kept_and_foreign_inputs_are_left_out() -> None:
    batch = {**world.batch(), "token_type_ids": torch.zeros(4, 12, dtype=torch.long)}
    seen = observe(world.model("distilbert"), batch)
    assert (seen.hidden_states, seen.queries, seen.keys, seen.values) == ((), {}, {}, {})


def test_hooks_go_even_when_the_pass_fails() -> None:
    model = world.model()
    with pytest.raises(ValueError, match="input_ids"):
        observe(model, {"attention_mask": torch.ones(1, 3)}, frozenset({"queries", "keys"}))
    assert not any(module._forward_hooks for module in model.modules())


# Saved models


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`family-stock` and `family-uneven` directories, and nothing but safetensors in them."""
    root, made = tmp_path_factory.mktemp("saved"), {}
    for family in FAMILIES:
        for layout in ("stock", "uneven"):
            made[f"{family}-{layout}"] = root / family / layout
            save_model(cut(world.model(family), LAYOUTS[layout]), world.tokenizer(), made[f"{family}-{layout}"])
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
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}", file=sys.stderr)
        failed += 1
        continue
    assert AutoTokenizer.from_pretrained(path)("the film was good")["input_ids"][0] == 2
    with np.load(sys.argv[1]) as probe, torch.no_grad():
        inputs = {{k: torch.from_numpy(v) for k, v in probe.items() if k != "token_type_ids"}}
        np.save(path + "/seen.npy", model(**inputs).logits.numpy())
assert "hfcompress" {known} sys.modules
sys.exit(failed)
"""


def load_elsewhere(folder: Path, paths: list[Path], first: str = "") -> subprocess.CompletedProcess[str]:
    """Loads directories in one fresh process without any flag; its exit code says how many failed."""
    probe = folder / "probe.npz"
    np.savez(probe, **probe_inputs(paths[0]))  # type: ignore[arg-type]
    script = LOAD.format(first=first, known="in" if first else "not in")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-P", "-c", script, str(probe), *map(str, paths)]
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def seen_equals_in_memory(path: Path) -> bool:
    return np.allclose(np.load(path / "seen.npy"), logits_of(load_model(path, AUTO), probe_inputs(path)), atol=1e-5)


def test_a_stock_shape_loads_with_stock_transformers_alone(saved: dict[str, Path], tmp_path: Path) -> None:
    paths = [saved[f"{family}-stock"] for family in FAMILIES]
    done = load_elsewhere(tmp_path, paths)
    assert done.returncode == 0, done.stderr
    assert all(seen_equals_in_memory(path) for path in paths)
    assert not any((path / MODELING_FILE).exists() for path in paths)


def test_an_uneven_shape_loads_with_no_flag_after_importing_hfcompress(saved: dict[str, Path], tmp_path: Path) -> None:
    paths = [saved[f"{family}-uneven"] for family in FAMILIES]
    done = load_elsewhere(tmp_path, paths, first="import hfcompress")
    assert done.returncode == 0, done.stderr
    assert all(seen_equals_in_memory(path) for path in paths)


def test_an_uneven_shape_without_flag_or_import_says_what_it_needs(saved: dict[str, Path], tmp_path: Path) -> None:
    done = load_elsewhere(tmp_path, [saved[f"{family}-uneven"] for family in FAMILIES])
    assert done.returncode == len(FAMILIES)
    assert done.stderr.count("trust_remote_code=True") >= len(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_uneven_shape_loads_from_its_own_modeling_file(family: str, saved: dict[str, Path]) -> None:
    path = saved[f"{family}-uneven"]
    expected = logits_of(cut(world.model(family), LAYOUTS["uneven"]), probe_inputs(path))
    assert verify(open_artifact(path), expected, AUTO) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_again_is_the_same(family: str, saved: dict[str, Path], tmp_path: Path) -> None:
    path = saved[f"{family}-uneven"]
    save_model(load_model(path, AUTO), load_tokenizer(path), tmp_path)
    assert weights_hash(tmp_path) == weights_hash(path)
    assert (tmp_path / MODELING_FILE).is_file()


def test_a_changed_weight_is_found_out(saved: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(load_model(saved["bert-stock"], AUTO), world.tokenizer(), tmp_path)
    expected = logits_of(load_model(tmp_path, AUTO), probe_inputs(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.bias"][0] += 0.01
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReloadError, match="differs from the model in memory"):
        verify(open_artifact(tmp_path), expected, AUTO)


def test_a_modeling_file_that_hfcompress_did_not_write_is_not_run(saved: dict[str, Path], tmp_path: Path) -> None:
    save_model(load_model(saved["bert-uneven"], AUTO), world.tokenizer(), tmp_path / "model")
    witness, file = tmp_path / "witness", tmp_path / "model" / MODELING_FILE
    file.write_text(file.read_text() + f"\nopen({str(witness)!r}, 'w').close()\n")
    artifact = open_artifact(tmp_path / "model")
    probe, expected = (
        probe_inputs(artifact.path),
        logits_of(load_model(artifact.path, AUTO), probe_inputs(artifact.path)),
    )
    with ModelProcess(artifact, AUTO) as process:
        assert np.allclose(process.logits([probe]), expected, atol=1e-5), "it loads through hfcompress's own code"
    with pytest.raises(ReloadError, match="modeling file"):
        verify(artifact, expected, AUTO)
    assert not witness.exists()
