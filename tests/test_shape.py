"""The arithmetic of shapes, held against models that transformers builds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hfcompress.base.errors import HfcompressError
from hfcompress.base.shape import ARCHITECTURES, Layer, Shape, config_of, shape_of
from tests import world

FAMILIES = sorted(ARCHITECTURES)
SIZES = [
    {"layers": 1, "hidden": 8, "heads": 1, "ffn": 12, "labels": 2},
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


def layer_stack(model: Any) -> list[Any]:
    from hfcompress.model.family import family_of

    return family_of(model).stack(model)


def shape_from(model: Any) -> Shape:
    """By way of the JSON that a model directory would hold, where some keys are left out."""
    import json

    return shape_of(json.loads(model.config.to_json_string(use_diff=True)))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str, size: dict[str, int]) -> None:
    built = world.model(family, **size)
    shape = shape_from(built)
    assert shape.stock
    assert shape.parameters == count(built)
    assert shape.encoder_parameters == sum(map(count, layer_stack(built)))
    assert shape.parameters == shape.embedding_parameters + shape.encoder_parameters + shape.head_parameters


@pytest.mark.parametrize("layers", UNEVEN, ids=lambda layers: " ".join(f"{x.heads}x{x.ffn}" for x in layers))
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_an_uneven_shape_are_those_of_the_pruned_model(family: str, layers: tuple[Layer, ...]) -> None:
    from hfcompress.model.surgery import empty_model

    stock = world.model(family)
    shape = replace(shape_from(stock), layers=layers)
    built = empty_model(type(stock).__name__, shape, stock.config)
    assert not shape.stock
    assert shape.parameters == count(built)
    assert shape.encoder_parameters == sum(map(count, layer_stack(built)))
    assert shape_from(built) == shape


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_config_says_what_each_layer_has(family: str) -> None:
    base = world.model(family).config.to_dict()
    config = config_of(replace(shape_of(base), layers=(Layer(3, 16), Layer(1, 40))), base)
    keys = ARCHITECTURES[family]
    assert config["model_type"] == f"pruned_{family}"
    assert config["per_layer_config"] == {"0": {keys.heads: 3, keys.ffn: 16}, "1": {keys.heads: 1, keys.ffn: 40}}
    assert (config[keys.heads], config[keys.ffn]) == (4, 40)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hidden": 24, "head_dim": 6},
        {"vocab": 50, "positions": 20},
        {"layers": (Layer(4, 16),) * 3},
        {"layers": (Layer(4, 16), Layer(2, 64))},
        {"layers": (Layer(1, 64),) * 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_survives_its_config(family: str, change: dict[str, Any]) -> None:
    base = world.model(family, labels=3).config.to_dict()
    shape = replace(shape_of(base), **change)
    config = config_of(shape, base)
    assert shape_of(config) == shape
    assert ("per_layer_config" in config) is not shape.stock


def test_a_stock_config_that_comes_from_a_pruned_one_keeps_nothing_of_it() -> None:
    base = world.model("bert").config.to_dict()
    whole = shape_of(base)
    pruned = config_of(replace(whole, layers=(Layer(1, 8), Layer(2, 8))), base) | {"auto_map": {"AutoModel": "x"}}
    config = config_of(whole, pruned)
    assert "per_layer_config" not in config
    assert "auto_map" not in config
    assert config["model_type"] == "bert"


def test_the_number_of_labels_is_the_tasks_where_it_decides() -> None:
    config = world.model("bert", labels=3).config.to_dict()
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


def test_macs_are_the_products_written_out() -> None:
    """Every matrix product of a forward pass, entry by entry: Kwon et al. 2022 count 3SHd + 2S²d + SdH a head."""
    s, h, d, heads, ffn, labels = 5, 8, 4, 2, 12, 3
    products = [
        *[(s, h, heads * d)] * 3,
        *[(s, d, s)] * heads,
        *[(s, s, d)] * heads,
        (s, heads * d, h),
        (s, h, ffn),
        (s, ffn, h),
    ]
    layer = sum(rows * inner * columns for rows, inner, columns in products)
    shape = Shape("bert", (Layer(heads, ffn),) * 2, h, d, vocab=99, positions=16, types=2, labels=labels)
    pooler, classifier = h * h, h * labels
    assert shape.macs(s) == 2 * layer + pooler + classifier


def test_macs_fall_by_exactly_what_is_cut() -> None:
    s, h, d = 7, 8, 4
    whole = Shape("bert", (Layer(2, 12),), h, d, vocab=9, positions=16, types=2, labels=2)
    cut = replace(whole, layers=(Layer(1, 10),))
    assert whole.macs(s) - cut.macs(s) == (4 * s * h * d + 2 * s * s * d) + 2 * (2 * s * h)


@pytest.mark.parametrize("family", FAMILIES)
def test_macs_are_the_multiplications_that_torch_counts(family: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    built, length = world.model(family, hidden=32, heads=4, ffn=48, layers=2), 9
    built.set_attn_implementation("eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        built(input_ids=torch.full((1, length), 6), attention_mask=torch.ones(1, length, dtype=torch.long))
    assert 2 * shape_from(built).macs(length) == counter.get_total_flops()


def test_bytes_count_each_part_at_its_bits() -> None:
    shape = Shape("bert", (Layer(2, 12),), hidden=8, head_dim=4, vocab=100, positions=16, types=2, labels=2)
    linear, words = 4 * 8 * 8 + 2 * 8 * 12, 100 * 8
    assert shape.bytes == 4 * shape.parameters
    packed = replace(shape, linear_bits=8, embedding_bits=16)
    assert packed.bytes == linear + 2 * words + 4 * (shape.parameters - linear - words)


def test_positions_that_no_token_can_use_are_left_out() -> None:
    assert shape_of(world.model("bert").config.to_dict()).usable_positions == 40
    assert shape_of(world.model("roberta").config.to_dict()).usable_positions == 38


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
        shape_of(world.model("bert").config.to_dict() | change)
    assert why in str(caught.value)
