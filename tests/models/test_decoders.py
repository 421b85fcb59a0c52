"""Llama and Qwen: queries in groups, an explicit width of heads, a gate of its own, a cache."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hfcompress.distillation.losses.minilm_v2 import MiniLMv2
from hfcompress.distillation.student import Student
from hfcompress.distillation.student_weights import build_student
from hfcompress.distillation.width_importance import Importance, rank_dimensions
from hfcompress.models.architectures import ARCHITECTURES, PRUNED, UnsupportedError, unit_counts
from hfcompress.models.artifact import MODELING_FILE, load_model, save_model
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.forward import observe
from hfcompress.models.shape import Layer, config_of, shape_of
from hfcompress.models.surgery import Keep, cut, empty_model
from hfcompress.pruning.gates import apply_gates
from hfcompress.pruning.hidden_dimensions import cut_hidden
from hfcompress.pruning.layer_dropping import drop_layers
from hfcompress.utils.errors import HfcompressError
from tests import factories
from tests.hidden_gates import apply_hidden_gates

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

FAMILIES = [name for name, spec in ARCHITECTURES.items() if spec.decoder]
families = pytest.mark.parametrize("family", FAMILIES)
BOTH, ALL, HALF = (0, 1), tuple(range(64)), tuple(range(1, 64, 2))
LAYOUTS = {
    "stock": [Keep((1,), HALF), Keep((0,), tuple(range(32)))],
    "uneven": [Keep((1,), tuple(range(48))), Keep(BOTH, (5, 6, 60))],
    "no heads in the first layer": [Keep((), HALF), Keep((1,), ALL)],
    "no neurons in a layer": [Keep(BOTH, ()), Keep((0,), HALF)],
    "nothing left of a layer": [Keep(BOTH, ALL), Keep((), ())],
}
"""Of two layers with two head groups and 64 neurons."""


def gates(keep: list[Keep], groups: int = 2) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    def ones(units: tuple[int, ...], count: int) -> torch.Tensor:
        return torch.zeros(count).index_fill(0, torch.tensor(units, dtype=torch.long), 1.0)

    return [ones(k.heads, groups) for k in keep], [ones(k.neurons, 64) for k in keep]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return observe(model, factories.batch()).logits


# Arithmetic


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "head"), [(f, h) for f in FAMILIES for h in ARCHITECTURES[f].task_head_kinds])
def test_heads_in_groups_and_of_a_width_of_their_own_are_counted(family: str, head: str, tied: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = {"head_dim": 10, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    built = factories.model(family, heads=8, head=head, attn_implementation="eager", **config).requires_grad_(False)
    shape = shape_of(built.config.to_dict(), head=head)
    assert (shape.group, shape.head_dim, shape.stock) == (4, 10, True)
    assert shape.parameters == built.num_parameters()
    assert shape.encoder_parameters == sum(p.numel() for layer in built.base_model.layers for p in layer.parameters())
    with FlopCounterMode(display=False) as counter:
        built(input_ids=torch.full((1, 9), 6), attention_mask=torch.ones(1, 9, dtype=torch.long))
    assert 2 * shape.macs(9) == counter.get_total_flops()


def test_published_counts() -> None:
    """Llama 3.2 1B and Qwen3 0.6B, whose words are tied, and Qwen2.5 7B, whose are not."""
    llama = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
             "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128_256,
             "tie_word_embeddings": True}  # fmt: skip
    qwen2 = {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
             "num_key_value_heads": 4, "intermediate_size": 18_944, "vocab_size": 152_064}  # fmt: skip
    qwen3 = {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "intermediate_size": 3072, "tie_word_embeddings": True}  # fmt: skip
    found = [shape_of(config, head="causal").parameters for config in (llama, qwen2, qwen3)]
    assert found == [1_235_814_400, 7_615_616_512, 596_049_920]


@families
def test_a_stock_config_says_what_transformers_takes(family: str) -> None:
    """Fewer heads than fill the hidden width are a stock model's; Llama's have to divide it."""
    model = factories.model(family, heads=8, num_key_value_heads=8)
    whole = shape_of(model.config.to_dict())
    for heads in (4, 3):
        shape = whole.with_layers(2, heads, 40)
        built = empty_model(type(model).__name__, shape, model.config)
        assert shape.stock is (heads == 4 or family != "llama")
        assert str(built.config.model_type).startswith(PRUNED) is not shape.stock
        assert built.num_parameters() == shape.parameters
        assert shape_of(built.config.to_dict()) == shape
        assert built.base_model.layers[0].self_attn.q_proj.out_features == heads * 4
    assert not whole.with_layers(2, 0, 40).stock


def test_a_pruned_config_says_heads_of_both_kinds() -> None:
    base = factories.model("llama").config.to_dict()
    config = config_of(replace(shape_of(base), layers=(Layer(2, 16), Layer(0, 40))), base)
    assert config["per_layer_config"] == {
        "0": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16},
        "1": {"num_attention_heads": 0, "num_key_value_heads": 0, "intermediate_size": 40},
    }
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)


@pytest.mark.parametrize(
    ("family", "change", "kind", "why"),
    [
        ("llama", {"attention_bias": True}, UnsupportedError, "`attention_bias: True`, and only"),
        ("llama", {"mlp_bias": True}, UnsupportedError, "`mlp_bias: True`"),
        ("qwen3", {"attention_bias": True}, UnsupportedError, "`attention_bias: True`"),
        ("qwen2", {"model_type": "qwen2_moe"}, UnsupportedError, "the architecture 'qwen2_moe' is not supported"),
        ("qwen2", {"num_key_value_heads": 3}, HfcompressError, "4 heads, which 3 key and value heads do not divide"),
    ],
)
def test_what_cannot_be_expressed_is_refused(family: str, change: dict[str, Any], kind: type, why: str) -> None:
    with pytest.raises(kind) as caught:
        shape_of(factories.model(family).config.to_dict() | change)
    assert why in str(caught.value)


def test_a_decoder_has_no_mask_head_and_an_encoder_no_causal_one() -> None:
    with pytest.raises(HfcompressError, match="no llama model '…ForMaskedLM'"):
        shape_of(factories.model("llama").config.to_dict(), head="mask")
    with pytest.raises(HfcompressError, match="no bert model '…ForCausalLM'"):
        shape_of(factories.model("bert").config.to_dict(), head="causal")


# Cutting


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@families
def test_cutting_equals_gating(family: str, attention: str, layout: str) -> None:
    model, keep = factories.model(family, attn_implementation=attention, head_dim=10), LAYOUTS[layout]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert unit_counts(model) == ([2, 2], [64, 64])

    small = cut(model, keep)

    with apply_gates(model, *gates(keep)):
        expected = logits(model)
    assert torch.allclose(logits(small), expected, atol=1e-5)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    shape = shape_of(small.config.to_dict())
    assert shape.stock is (layout == "stock")
    assert small.num_parameters() == shape.parameters
    assert unit_counts(small) == ([len(k.heads) for k in keep], [len(k.neurons) for k in keep])


@pytest.mark.parametrize("head", ["token", "span", "causal"])
@families
def test_every_head_is_cut_with_its_model(family: str, head: str) -> None:
    model, keep = factories.model(family, head=head), LAYOUTS["uneven"]
    with apply_gates(model, *gates(keep)):
        assert torch.allclose(logits(cut(model, keep)), logits(model), atol=1e-5)


def test_a_gate_closes_all_queries_of_its_group() -> None:
    """Gate 1 of 2, with three queries each, is query heads 3, 4 and 5: input columns 3 d to 6 d of what mixes them."""
    model = factories.model("llama", layers=1, hidden=48, heads=6, num_key_value_heads=2)
    with apply_gates(model, [torch.tensor([1.0, 0.0])], [torch.ones(64)]):
        expected = logits(model)
    model.base_model.layers[0].self_attn.o_proj.weight.data[:, 24:] = 0
    assert torch.allclose(logits(model), expected, atol=1e-6)


def test_the_order_of_cuts_does_not_matter() -> None:
    model = factories.model("qwen3")
    at_once = cut(model, LAYOUTS["uneven"]).state_dict()
    heads = cut(model, [replace(k, neurons=ALL) for k in LAYOUTS["uneven"]])
    later = cut(heads, [Keep(tuple(range(len(k.heads))), k.neurons) for k in LAYOUTS["uneven"]]).state_dict()
    assert at_once.keys() == later.keys()
    assert all(torch.equal(at_once[name], later[name]) for name in later)


@pytest.mark.parametrize("layout", ["stock", "uneven", "no heads in the first layer"])
@families
def test_a_cut_model_goes_on_with_a_text_as_the_gated_one_does(family: str, layout: str) -> None:
    """Token by token, with the cache of keys and values; the rows differ in length, padded on the left."""
    model, keep = factories.model(family, head="causal", eos_token_id=1, bos_token_id=2), LAYOUTS[layout]
    inputs = {name: tensor.flip(1) for name, tensor in factories.batch().items()}

    def goes_on(written: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made = written.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return made.sequences, torch.stack(made.logits)

    words, scores = goes_on(cut(model, keep))
    with apply_gates(model, *gates(keep)):
        expected, expected_scores = goes_on(model)
    assert words.shape == (4, 12 + 5)
    assert torch.equal(words, expected)
    assert torch.allclose(scores, expected_scores, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
)
def test_rotations_and_windows_go_on_as_they_were(family: str, variant: dict[str, Any]) -> None:
    model = factories.model(family, head="causal", **variant)
    plain = factories.model(family, head="causal")
    assert not torch.allclose(logits(model), logits(plain), atol=1e-4)
    for layout in ("stock", "uneven"):
        with apply_gates(model, *gates(LAYOUTS[layout])):
            assert torch.allclose(logits(cut(model, LAYOUTS[layout])), logits(model), atol=1e-5)


@families
def test_hidden_dimensions_and_layers_are_cut(family: str) -> None:
    model = factories.model(family, layers=3)
    dims = [i for i in range(32) if i % 4]
    small = cut_hidden(model, dims)
    assert shape_of(small.config.to_dict()).stock  # 24 is a multiple of 4 heads, whose width the config says
    with apply_hidden_gates(model, dims):
        assert torch.allclose(logits(small), logits(model), atol=1e-5)
    last = drop_layers(model, [1, 2])
    model.model.layers = nn.ModuleList(list(model.model.layers)[1:])
    assert torch.allclose(logits(last), logits(model), atol=1e-5)


# Looking inside


@families
def test_the_last_hidden_state_is_behind_the_last_norm_and_the_others_are_not(family: str) -> None:
    model, given = factories.model(family), []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: given.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        seen = observe(model, factories.batch(), frozenset({"hidden_states"})).hidden_states
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen[1], given[0])
    assert torch.allclose(seen[2], model.model.norm(given[1]), atol=1e-6)


def test_importance_is_that_of_groups() -> None:
    model = factories.model("llama")
    known = rank_dimensions(model, [factories.batch()])
    with torch.no_grad():
        seen = observe(model, factories.batch(), frozenset({"queries", "keys"}))
    real = factories.batch()["attention_mask"].bool()
    queries, keys = (x[1].transpose(1, 2)[real].abs().mean(0) for x in (seen.queries, seen.keys))
    by_hand = torch.stack([(queries[2 * g] + queries[2 * g + 1]) * keys[g] for g in range(2)])
    assert torch.allclose(known.scores[0], by_hand, atol=1e-6)
    assert [t.shape for t in (known.heads[0], known.scores[0], known.values[0])] == [(2,), (2, 8), (2, 8)]


@families
def test_a_narrower_student_keeps_the_best_groups_whole(family: str) -> None:
    teacher = factories.model(family, layers=1, hidden=48, heads=6, num_key_value_heads=3)
    known = Importance(
        torch.arange(48.0), [torch.tensor([1.0, 0.0, 2.0])], [torch.rand(3, 8)], [torch.rand(3, 8)], [torch.rand(64)]
    )
    student = Student(hidden=32, heads=4).shape(shape_of(teacher.config.to_dict()))
    small, report = build_student(teacher, student, [0], importance=known)
    assert "random" not in report["layer 1"]
    ours, theirs = (m.model.layers[0].self_attn.state_dict() for m in (small, teacher))
    stream = slice(16, 48)  # the best dimensions are the last
    queries = [*range(16), *range(32, 48)]  # those of groups 0 and 2
    pairs = [*range(8), *range(16, 24)]
    assert torch.equal(ours["q_proj.weight"], theirs["q_proj.weight"][queries, stream])
    assert torch.equal(ours["k_proj.weight"], theirs["k_proj.weight"][pairs, stream])
    assert torch.equal(ours["v_proj.weight"], theirs["v_proj.weight"][pairs, stream])
    assert torch.equal(ours["o_proj.weight"], theirs["o_proj.weight"][stream][:, queries])


def test_a_student_keeps_the_width_of_heads_and_the_groups() -> None:
    class Task:
        max_length = 16

    origin = shape_of(factories.model("llama", hidden=48, heads=6, num_key_value_heads=3).config.to_dict())
    made = Student(heads=2).shape(origin)
    assert (made.hidden, made.head_dim, made.group, made.layers[0].heads) == (48, 8, 2, 2)
    assert Student(layers=1).shape(origin).layers == (Layer(6, 64),)
    (found,) = Student(heads=3).problems(origin, Task())
    assert (found.message, found.fix) == (
        "3 heads do not form groups of 2, which share keys and values in this model", "use a multiple of 2"
    )  # fmt: skip
    (found,) = Student(hidden=32).problems(origin, Task())
    assert "6 heads do not divide the hidden width 32" in found.message
    assert Student(hidden=32).problems(replace(origin, architecture="qwen3"), Task()) == []


def test_relation_heads_have_to_divide_the_width_of_keys() -> None:
    teacher = shape_of(factories.model("qwen2", hidden=48, heads=6, num_key_value_heads=2).config.to_dict())
    assert MiniLMv2(relation_heads=8).problems(teacher, teacher) == []
    (found,) = MiniLMv2(relation_heads=12).problems(teacher, teacher)
    assert "12 relation heads do not divide the student's width 16 and the teacher's 16" in found


# Saved models

ELSEWHERE = """
import sys
import numpy as np
import torch
import transformers
with np.load(sys.argv[1]) as probe:
    inputs = {name: torch.from_numpy(value) for name, value in probe.items()}
for path in sys.argv[2:]:
    auto = "AutoModelForCausalLM" if path.endswith("causal") else "AutoModelForSequenceClassification"
    trust = {"trust_remote_code": True} if "uneven" in path else {}
    model = getattr(transformers, auto).from_pretrained(path, **trust).eval()
    with torch.no_grad():
        np.save(path + "/seen.npy", model(**inputs).logits.numpy())
assert "hfcompress" not in sys.modules
"""


def test_saved_models_load_anywhere(tmp_path: Path) -> None:
    """Stock ones with transformers alone, others from their own file; here, with hfcompress imported, with no flag."""
    auto = {"causal": "AutoModelForCausalLM", "sequence": "AutoModelForSequenceClassification"}
    paths = []
    for family in FAMILIES:
        for layout in ("stock", "no heads in the first layer", "uneven"):
            head = "causal" if (family == "qwen2") is (layout == "stock") else "sequence"
            path = tmp_path / f"{family}-{'stock' if layout == 'stock' else 'uneven'}-{len(paths)}-{head}"
            save_model(cut(factories.model(family, head=head), LAYOUTS[layout]), factories.tokenizer(), path)
            assert (path / MODELING_FILE).exists() is (layout != "stock")
            paths.append(path)
    np.savez(tmp_path / "probe.npz", **make_dummy_inputs(paths[0]))  # type: ignore[arg-type]
    command = [sys.executable, "-P", "-c", ELSEWHERE, str(tmp_path / "probe.npz"), *map(str, paths)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in paths:
        here = load_model(path, auto[path.name.rpartition("-")[2]])
        assert np.allclose(np.load(path / "seen.npy"), logits_of(here, make_dummy_inputs(path)), atol=1e-5)


# Recipes


@pytest.mark.slow
def test_a_recipe_trains_prunes_reloads_and_reports(tmp_path: Path) -> None:
    import json

    data = factories.write_data(tmp_path / "data")
    model = factories.save(factories.model("llama"), tmp_path / "model")
    stages = [
        {"kind": "finetune", "train": {"epochs": 6, "batch_size": 16, "learning_rate": 5e-3}},
        {
            "kind": "prune", "heads": 0.5, "ffn": 0.5, "criterion": {"use": "taylor", "rows": 32},
            "recover": {"epochs": 3, "batch_size": 16, "learning_rate": 3e-3,
                        "losses": ["soft_labels", "hidden_states"]},
        },
    ]  # fmt: skip
    recipe = factories.recipe(tmp_path / "r.yaml", model, data, stages=stages)
    assert factories.run_cli("run", recipe, "--output", tmp_path / "out") == 0
    source, pruned = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["rows"]
    assert source["quality"]["accuracy"] > 0.9
    assert pruned["quality"]["accuracy"] > 0.8
    final = load_model(tmp_path / "out" / "final", "AutoModelForSequenceClassification")
    shape = shape_of(final.config.to_dict())
    assert type(final).__name__ == "LlamaForSequenceClassification"
    assert (shape.layers, shape.group) == ((Layer(2, 32),) * 2, 2)
    assert pruned["parameters"] == shape.parameters
    assert pruned["macs"] == shape.macs(16)


def test_a_stage_with_a_task_of_its_own_needs_a_head_that_a_decoder_can_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, corpus = factories.write_data(tmp_path / "data"), factories.write_corpus(tmp_path / "corpus")
    model = factories.save(factories.model("llama"), tmp_path / "model")
    general = {"kind": "distill", "task": {"type": "fill-mask", "dataset": str(corpus), "max_length": 16},
               "losses": ["hidden_states"]}  # fmt: skip
    recipe = factories.recipe(tmp_path / "r.yaml", model, data, stages=[general, {"kind": "finetune"}])
    assert factories.run_cli("check", recipe) != 0
    assert "no llama model has a task head for fill-mask" in " ".join(capsys.readouterr().err.split())
