"""Reads the sizes in a config.json, and refuses impossible ones; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfcompress.models.architectures import ARCHITECTURES, PRUNED, ConfigKeys, UnsupportedError
from hfcompress.models.bounds import LARGEST, is_count, require_bound, shorten
from hfcompress.utils.errors import HfcompressError


def require_sizes(kind: str, keys: ConfigKeys, sizes: Mapping[str, Any]) -> None:
    """Checks that the sizes of a config are whole numbers that a model may have.

    Args:
        kind: The architecture, for messages.
        keys: The names of the sizes in the config.
        sizes: The config, with defaults.

    Raises:
        HfcompressError: for a size that is missing, not whole, or too large.
    """
    needed = {
        keys.layers: "layers", keys.heads: "heads", keys.hidden: "width", keys.ffn: "width",
        "vocab_size": "vocabulary", "max_position_embeddings": "positions",
    }  # fmt: skip
    further = {
        keys.token_types: "types", keys.embedding: "width", keys.relative: "relative", keys.kv_heads: "heads",
        keys.head_dim: "width", "head_dim": "width", "embedding_rank": "width", "bias_heads": "heads",
    }  # fmt: skip
    missing = [key for key in needed if not is_count(sizes.get(key), 1)]
    if missing:
        raise HfcompressError(
            f"the config of this {kind} model has no number above 0 for {', '.join(missing)}",
            "use a complete config.json",
        )
    given = {key: bound for key, bound in further.items() if key and sizes.get(key) is not None}
    wrong = [key for key in given if not is_count(sizes[key])]
    if wrong:
        raise HfcompressError(
            f"the config of this {kind} model says {wrong[0]}: {shorten(sizes[wrong[0]])}",
            "it takes a whole number of at least 0",
        )
    for key, bound in {**needed, **given}.items():
        require_bound(key, sizes[key], bound)


def read_head_dim(kind: str, keys: ConfigKeys, sizes: Mapping[str, Any]) -> int:
    """Reads the width of a head; a pruned config has it, because its heads may no longer fill the hidden width.

    Raises:
        HfcompressError: for a number of heads that does not divide the hidden width.
    """
    says = keys.head_dim or str(sizes["model_type"]).startswith(PRUNED)
    if says and sizes.get("head_dim"):
        return int(sizes["head_dim"])
    if sizes[keys.hidden] % sizes[keys.heads]:
        raise HfcompressError(
            f"the config of this {kind} model has {sizes[keys.heads]} heads, which do not divide {sizes[keys.hidden]}",
            f"fix {keys.heads} or {keys.hidden} in config.json",
        )
    return int(sizes[keys.hidden] // sizes[keys.heads])


def read_kv_heads(kind: str, keys: ConfigKeys, sizes: Mapping[str, Any]) -> int:
    """Reads the number of key and value heads; without it, each head has its own.

    Raises:
        HfcompressError: for a number that does not divide the number of heads.
    """
    heads = sizes[keys.heads]
    count = sizes.get(keys.kv_heads) or heads
    if heads % count:
        raise HfcompressError(
            f"the config of this {kind} model has {heads} heads, which {count} key and value heads do not divide",
            f"fix {keys.heads} or {keys.kv_heads} in config.json",
        )
    return int(count)


def read_layer_sizes(keys: ConfigKeys, sizes: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Reads `per_layer_config`: the sizes of the layers with sizes of their own, by index.

    Raises:
        HfcompressError: for impossible sizes.
    """
    given = sizes.get("per_layer_config") or {}
    if not isinstance(given, Mapping):
        raise _wrong_layers(shorten(given))
    found = {}
    for index, layer in given.items():
        number = int(index) if str(index).isascii() and str(index).isdigit() and len(str(index)) < 6 else -1
        if not 0 <= number < sizes[keys.layers] or not isinstance(layer, Mapping):
            raise _wrong_layers(f"{shorten(index)}: {shorten(layer)}")
        heads, ffn = (layer.get(key, sizes[key]) for key in (keys.heads, keys.ffn))
        columns = layer.get("kept_heads", [])
        fits = is_count(heads) and is_count(ffn) and heads <= LARGEST["heads"] and ffn <= LARGEST["width"]
        named = isinstance(columns, list) and all(is_count(c) and c <= LARGEST["heads"] for c in columns)
        if not fits or not named or len(columns) > heads:
            raise _wrong_layers(f"{shorten(index)}: {shorten(layer)}")
        found[number] = layer
    return found


def _wrong_layers(found: str) -> HfcompressError:
    return HfcompressError(
        f"the config's per_layer_config says {found}, which is not a size of one of its layers",
        "use the config.json that was saved with the weights",
    )


def refuse_variants(kind: str, sizes: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    """Refuses a config with a value that means other weights than hfcompress expects of the architecture.

    Raises:
        UnsupportedError: for such a value.
    """
    fix = "name another model; this one can be measured, but not changed"
    for key, value in required.items():
        found = sizes.get(key, value)
        if _drop_order(found) != _drop_order(value):
            shown = found[:60] if isinstance(found, str) else shorten(found)
            message = f"this {kind} model has `{key}: {shown}`, and only `{key}: {value}` is supported"
            raise UnsupportedError(message, fix)
    relative = ARCHITECTURES[kind].keys.relative
    if relative and not is_count(sizes.get(relative), 1):
        raise UnsupportedError(f"this {kind} model has no `{relative}`", fix)


def _drop_order(value: Any) -> Any:
    """Sorts the parts of a config value: `p2c|c2p` and `[c2p, p2c]` mean the same to DeBERTa."""
    parts = value.lower().split("|") if isinstance(value, str) else value
    return sorted(str(part).strip() for part in parts) if isinstance(parts, list) else value
