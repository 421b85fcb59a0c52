"""The arithmetic of shapes, held against models that transformers builds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hfcompress.models.architectures import ARCHITECTURES, TASK_HEADS, UnsupportedError, layers_of, task_head_of
from hfcompress.models.shape import Layer, Shape, config_of, shape_of
from hfcompress.utils.errors import HfcompressError
from tests import factories

FAMILIES = sorted(ARCHITECTURES)
OWN_LAYERS = [name for name, spec in ARCHITECTURES.items() if not spec.decoder and not spec.shared_layers]
"""Encoders each of whose layers has weights of its own; ALBERT's has those of one."""
SIZES = [
    {"layers": 1, "hidden": 8, "heads": 1, "ffn": 12, "labels": 2, "vocab_size": 53},
    {"layers": 2, "hidden": 32, "heads": 4, "ffn": 64, "labels": 3},
    {"layers": 3, "hidden": 24, "heads": 6, "ffn": 40, "labels": 1},
]
UNEVEN = [
    (Layer(4, 64), Layer(1, 8)),
    (Layer(2, 16), Layer(2, 16)),
    (Layer(4, 24), Layer(4, 64), Layer(3, 1)),
]


def count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shape_from(model: Any, head: str | None = None) -> Shape:
    """By way of the JSON that a model directory would hold, where some keys are left out."""
    import json

    return shape_of(json.loads(model.config.to_json_string(use_diff=True)), head=head)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("family", "head"), factories.headed())
def test_parameters_are_those_of_the_model(family: str, head: str, size: dict[str, int]) -> None:
    built = factories.model(family, head=head, **size | ({"labels": 2} if head == "span" else {}))
    shape = shape_from(built, head)
    assert shape.stock
    assert shape.parameters == count(built)
    assert shape.encoder_parameters == sum(map(count, layers_of(built)))
    assert shape.parameters == shape.embedding_parameters + shape.encoder_parameters + shape.head_parameters


@pytest.mark.parametrize("hidden", [32, 30])
@pytest.mark.parametrize(
    ("family", "layers"),
    [*((family, layers) for family in OWN_LAYERS for layers in UNEVEN), ("albert", (Layer(3, 5),) * 2)],
    ids=str,
)
def test_parameters_of_an_uneven_shape_are_those_of_the_pruned_model(
    family: str, layers: tuple[Layer, ...], hidden: int
) -> None:
    """Heads of 8 dimensions do not divide a hidden width of 30, and no stock constructor would take four of them."""
    from hfcompress.models.surgery import empty_model

    stock = factories.model(family)
    shape = replace(shape_from(stock), layers=layers, hidden=hidden)
    built = empty_model(type(stock).__name__, shape, stock.config)
    assert not shape.stock
    assert shape.parameters == count(built)
    assert shape.encoder_parameters == sum(map(count, layers_of(built)))
    assert shape_from(built) == shape


@pytest.mark.parametrize("family", OWN_LAYERS)
def test_the_pruned_config_says_what_each_layer_has(family: str) -> None:
    base = factories.model(family).config.to_dict()
    config = config_of(replace(shape_of(base), layers=(Layer(3, 16), Layer(1, 40))), base)
    keys = ARCHITECTURES[family].keys
    assert config["model_type"] == f"pruned_{family}"
    assert config["per_layer_config"] == {"0": {keys.heads: 3, keys.ffn: 16}, "1": {keys.heads: 1, keys.ffn: 40}}
    assert (config[keys.heads], config[keys.ffn], config["head_dim"]) == (4, 40, 8)


def test_a_pruned_config_that_does_not_say_the_width_of_a_head_has_heads_that_fill_the_hidden_width() -> None:
    base = factories.model("bert").config.to_dict() | {"model_type": "pruned_bert"}
    assert shape_of(base).head_dim == 8
    with pytest.raises(HfcompressError, match="has 5 heads, which do not divide 32"):
        shape_of(base | {"num_attention_heads": 5})
    assert shape_of(base | {"num_attention_heads": 5, "head_dim": 7}).head_dim == 7


def test_a_stock_config_tells_nothing_of_columns_that_mpnets_layers_read() -> None:
    """Each head of each layer reads the column of its number, and there are as many as heads."""
    whole = shape_of(factories.model("mpnet").config.to_dict())
    assert whole.stock
    assert whole.bias_heads == 4
    assert replace(whole, layers=(Layer(4, 64, (0, 1, 2, 3)),) * 2) == whole
    three = replace(whole, hidden=24)
    assert replace(three, layers=(Layer(3, 64),) * 2, bias_heads=3).stock
    assert not replace(three, layers=(Layer(3, 64),) * 2).stock
    assert not replace(three, layers=(Layer(3, 64, (0, 1, 3)),) * 2).stock
    assert whole.parameters - replace(whole, bias_heads=3).parameters == 32
    assert whole.with_layers(1, 2, 64).bias_heads == 2


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hidden": 24, "head_dim": 6},
        {"vocab": 50, "positions": 20},
        {"layers": (Layer(4, 16),) * 3},
        {"layers": (Layer(4, 16), Layer(2, 64))},
        {"layers": (Layer(1, 64),) * 2},
        {"layers": (Layer(2, 64, (1, 3)), Layer(2, 64))},
        {"hidden": 30},
        {"types": 3},
        {"embedding": 8},
        {"embedding": 32},
        {"relative": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_survives_its_config(family: str, change: dict[str, Any]) -> None:
    base, keys = factories.model(family, labels=3).config.to_dict(), ARCHITECTURES[family].keys
    has = {"types": keys.token_types, "embedding": keys.embedding, "relative": keys.relative}
    shape = replace(shape_of(base), **{name: size for name, size in change.items() if has.get(name, True)})
    if "layers" in change:
        shape = replace(shape, layers=tuple(replace(x, heads=x.heads * shape.group) for x in shape.layers))
    config = config_of(shape, base)
    assert shape_of(config) == shape
    assert ("per_layer_config" in config) is not shape.stock


@pytest.mark.parametrize(("family", "head"), factories.headed())
def test_a_smaller_model_is_built_from_the_config_of_its_shape(family: str, head: str) -> None:
    """Its origin says twice what some sizes are (layer kinds, pooler width), and both must change."""
    from hfcompress.models.surgery import empty_model

    origin = factories.model(family, layers=5, head=head)
    config = origin.config.to_dict()
    shape = replace(shape_of(config, head=head), hidden=24, head_dim=8, vocab=50, positions=20)
    shape = shape.with_layers(3, 3 * shape.group, 40)
    built = empty_model(type(origin).__name__, shape, origin.config)
    assert (built.num_parameters(), shape_from(built, head)) == (shape.parameters, shape)
    assert [t.shape for t in built.get_input_embeddings().parameters()] == [(50, shape.embedding or 24)]


def test_modernbert_keeps_the_kinds_of_its_first_layers() -> None:
    base = factories.model("modernbert", layers=5).config.to_dict()
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert base["layer_types"] == kinds
    whole = shape_of(base)
    assert config_of(whole.with_layers(2, 4, 64), base)["layer_types"] == kinds[:2]
    assert config_of(whole.with_layers(7, 4, 64), base)["layer_types"] == [*kinds, *kinds[:2]]


def test_a_student_with_fewer_positions_reads_debertas_table_as_its_origin_does() -> None:
    base = factories.model("deberta-v2").config.to_dict()
    assert base["max_relative_positions"] == -1  # that is max_position_embeddings, 40
    fewer = config_of(replace(shape_of(base), positions=20), base)
    assert (fewer["max_position_embeddings"], fewer["max_relative_positions"]) == (20, 40)
    assert config_of(replace(shape_of(fewer), positions=10), fewer)["max_relative_positions"] == 40


def test_a_head_width_that_deberta_spells_follows_the_shape() -> None:
    base = factories.model("deberta-v2").config.to_dict() | {"attention_head_size": 8}
    assert config_of(replace(shape_of(base), head_dim=16).with_layers(1, 2, 64), base)["attention_head_size"] == 16


def test_words_as_wide_as_the_residual_stay_so_in_a_narrower_model() -> None:
    base = factories.model("electra", embedding_size=32).config.to_dict()
    narrow = replace(shape_of(base), hidden=16, head_dim=4)
    assert config_of(narrow, base)["embedding_size"] == 16
    factorised = replace(shape_of(factories.model("electra").config.to_dict()), hidden=16, head_dim=4)
    assert factorised == replace(narrow, embedding=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    import transformers

    from tests.factories import PUBLISHED

    says = PUBLISHED["deberta-v2"] if family == "deberta-v2" else {}
    whole = transformers.AutoConfig.for_model(family, **says).to_dict()
    assert shape_of({"model_type": family, **says}) == shape_of(whole)


def test_the_head_is_that_of_the_class_unless_the_task_decides() -> None:
    base = factories.model("bert").config.to_dict()
    for head in ARCHITECTURES["bert"].task_head_kinds:
        ending = TASK_HEADS[head]
        assert shape_of(base | {"architectures": [f"Bert{ending}"]}).head == head
        assert shape_of(base | {"architectures": [f"PrunedBert{ending}"]}, head="span").head == "span"
        assert task_head_of(f"AutoModel{ending}") == head
    for other in (None, [], ["BertModel"], ["ElectraForPreTraining"], ["BertForCausalLM"]):
        assert shape_of(base | {"architectures": other}).head == "sequence"
    assert task_head_of("BertModel") is None


def test_a_stock_config_that_comes_from_a_pruned_one_keeps_nothing_of_it() -> None:
    base = factories.model("bert").config.to_dict()
    whole = shape_of(base)
    pruned = config_of(replace(whole, layers=(Layer(1, 8), Layer(2, 8))), base) | {"auto_map": {"AutoModel": "x"}}
    config = config_of(whole, pruned)
    assert "per_layer_config" not in config
    assert "auto_map" not in config
    assert config["model_type"] == "bert"


def test_the_number_of_labels_is_the_tasks_where_it_decides() -> None:
    config = factories.model("bert", labels=3).config.to_dict()
    assert shape_of(config).labels == 3
    assert shape_of(config, labels=5).labels == 5


def test_published_counts_of_the_published_models() -> None:
    """The classifiers that transformers builds for BERT-base and for TinyBERT's 4-layer student have these many."""
    bert = {"model_type": "bert", "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768,
            "intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512}  # fmt: skip
    base = shape_of(bert)
    assert base.parameters == 109_483_778
    assert base.encoder_parameters == 12 * 7_087_872
    tiny = replace(base, hidden=312, head_dim=26).with_layers(4, 12, 1200)
    assert tiny.parameters == 14_350_874


@pytest.mark.parametrize(
    ("family", "head", "labels", "sizes", "count"),
    [
        ("roberta", "mask", None, {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
         124_697_433),
        ("distilbert", "sequence", 2, {}, 66_955_010),
        ("albert", "mask", None, {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
         11_221_680),
        ("modernbert", "mask", None, {}, 149_655_232),
        ("deberta-v2", "sequence", 2,
         {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
          "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
          "pos_att_type": "p2c|c2p", "position_biased_input": False}, 184_423_682),
    ],
)  # fmt: skip
def test_published_counts_of_other_families(
    family: str, head: str, labels: int | None, sizes: dict[str, Any], count: int
) -> None:
    """RoBERTa-base, DistilBERT, ALBERT-base and ModernBERT-base (149M, with its words) and DeBERTa-v3-base (184M)."""
    assert shape_of({"model_type": family, **sizes}, labels, head).parameters == count


def test_macs_fall_by_exactly_what_is_cut() -> None:
    s, h, d = 7, 8, 4
    whole = Shape("bert", (Layer(2, 12),), h, d, vocab=9, positions=16, types=2, labels=2)
    cut = replace(whole, layers=(Layer(1, 10),))
    assert whole.macs(s) - cut.macs(s) == (4 * s * h * d + 2 * s * s * d) + 2 * (2 * s * h)


def count_flops(model: Any, length: int) -> int:
    """What torch counts in one forward pass of a row; it counts a multiplication and an addition as two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model.requires_grad_(False).set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.full((1, length), 6), attention_mask=torch.ones(1, length, dtype=torch.long))
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("family", "head"), factories.headed())
def test_macs_are_the_multiplications_that_torch_counts(family: str, head: str) -> None:
    built = factories.model(family, hidden=32, heads=4, ffn=48, layers=2, head=head)
    for length in (9, 30):
        assert 2 * shape_from(built, head).macs(length) == count_flops(built, length)


@pytest.mark.parametrize("family", OWN_LAYERS)
@pytest.mark.parametrize("layers", [(Layer(3, 16), Layer(1, 40)), (Layer(2, 1), Layer(4, 24), Layer(1, 8))], ids=str)
def test_macs_of_pruned_models_are_those_that_torch_counts(family: str, layers: tuple[Layer, ...]) -> None:
    """Uneven heads and neurons, and a hidden width that the heads do not fill."""
    from hfcompress.models.surgery import empty_model

    stock = factories.model(family)
    built = empty_model(type(stock).__name__, replace(shape_from(stock), layers=layers, hidden=30), stock.config)
    assert str(built.config.model_type).startswith("pruned_")
    assert 2 * shape_from(built).macs(9) == count_flops(built, 9)


@pytest.mark.parametrize("family", OWN_LAYERS)
def test_macs_of_students_are_those_that_torch_counts(family: str) -> None:
    """Fewer layers, heads and neurons, and a smaller hidden width, as a `distill` stage builds them."""
    from hfcompress.distillation.student import Student
    from hfcompress.models.surgery import empty_model

    stock = factories.model(family, layers=3)
    shape = Student(layers=1, hidden=16, heads=2, ffn=24).shape(shape_from(stock))
    built = empty_model(type(stock).__name__, shape, stock.config)
    assert 2 * shape.macs(9) == count_flops(built, 9)


def test_bytes_count_each_part_at_its_bits() -> None:
    shape = Shape("bert", (Layer(2, 12),), hidden=8, head_dim=4, vocab=100, positions=16, types=2, labels=2)
    linear, words = 4 * 8 * 8 + 2 * 8 * 12, 100 * 8
    assert shape.bytes == 4 * shape.parameters
    packed = replace(shape, linear_bits=8, embedding_bits=16)
    assert packed.bytes == linear + 2 * words + 4 * (shape.parameters - linear - words)


def test_bytes_of_factorised_words_and_shared_layers_are_counted_once() -> None:
    shape = Shape("albert", (Layer(2, 12),) * 3, 8, 4, vocab=100, positions=16, types=2, labels=2, embedding=4)
    linear, words = 4 * 8 * 8 + 2 * 8 * 12 + 4 * 8, 100 * 4
    packed = replace(shape, linear_bits=8, embedding_bits=16)
    assert packed.bytes == linear + 2 * words + 4 * (shape.parameters - linear - words)


def test_positions_that_no_token_can_use_are_left_out() -> None:
    assert shape_of(factories.model("bert").config.to_dict()).usable_positions == 40
    for family in ("roberta", "xlm-roberta", "mpnet"):
        assert shape_of(factories.model(family).config.to_dict()).usable_positions == 38


@pytest.mark.parametrize(
    ("family", "change", "why"),
    [
        ("albert", {"num_hidden_groups": 2}, "`num_hidden_groups: 2`, and only `num_hidden_groups: 1`"),
        ("albert", {"inner_group_num": 2}, "`inner_group_num: 2`"),
        ("bert", {"position_embedding_type": "relative_key"}, "`position_embedding_type: relative_key`"),
        ("deberta-v2", {"conv_kernel_size": 3}, "`conv_kernel_size: 3`"),
        ("deberta-v2", {"pos_att_type": ["c2p"]}, "`pos_att_type: ['c2p']`"),
        ("deberta-v2", {"share_att_key": False}, "`share_att_key: False`"),
        ("deberta-v2", {"norm_rel_ebd": "none"}, "`norm_rel_ebd: none`"),
        ("deberta-v2", {"position_biased_input": True}, "`position_biased_input: True`"),
        ("deberta-v2", {"relative_attention": False}, "`relative_attention: False`"),
        ("deberta-v2", {"attention_head_size": 16}, "`attention_head_size: 16`, and only `attention_head_size: 8`"),
        ("modernbert", {"norm_bias": True}, "`norm_bias: True`"),
        ("modernbert", {"mlp_bias": True}, "`mlp_bias: True`"),
        ("electra", {"tie_word_embeddings": False, "architectures": ["ElectraForMaskedLM"]}, "`tie_word_embeddings"),
    ],
)
def test_a_variant_that_cannot_be_expressed_is_refused(family: str, change: dict[str, Any], why: str) -> None:
    base = factories.model(family).config.to_dict()
    with pytest.raises(UnsupportedError) as caught:
        shape_of(base | change)
    assert f"this {family} model has {why}" in str(caught.value)
    assert "can be measured" in str(caught.value)


def test_what_deberta_leaves_out_is_a_variant_too_and_its_lists_have_no_order() -> None:
    base = factories.model("deberta-v2").config.to_dict()
    for pairs in ("c2p|p2c", "p2c | C2P", ["c2p", "p2c"], ["p2c", "c2p"]):
        assert shape_of(base | {"pos_att_type": pairs}) == shape_of(base)
    for key in ("relative_attention", "position_biased_input", "share_att_key", "pos_att_type", "norm_rel_ebd"):
        with pytest.raises(UnsupportedError, match=key):
            shape_of({name: value for name, value in base.items() if name != key})
    for buckets in ({}, {"position_buckets": -1}):
        with pytest.raises(UnsupportedError, match="this deberta-v2 model has no `position_buckets`"):
            shape_of({name: value for name, value in base.items() if name != "position_buckets"} | buckets)


def test_untied_words_matter_to_a_mask_head_only() -> None:
    base = factories.model("bert").config.to_dict() | {"tie_word_embeddings": False}
    assert shape_of(base).head == "sequence"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "gpt2"}, "the architecture 'gpt2' is not supported"),
        ({"model_type": "distilbart"}, "did you mean 'distilbert'?"),
        ({"model_type": ""}, "names no model_type"),
        ({"hidden_size": None}, "no number above 0 for hidden_size"),
        ({"num_attention_heads": 0, "vocab_size": "many"}, "for num_attention_heads, vocab_size"),
    ],
)
def test_a_config_without_a_shape_says_what_it_lacks(change: dict[str, Any], why: str) -> None:
    with pytest.raises(HfcompressError) as caught:
        shape_of(factories.model("bert").config.to_dict() | change)
    assert why in str(caught.value)
