"""Prunes a vocabulary to the tokens that occur in a corpus."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import empty_model
from hfcompress.models.weight_axes import axes_of
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 4096


def prune_vocabulary(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Makes a tokenizer with only the tokens that occur in the texts and those that it needs.

    The texts are split into the same tokens as before. Other texts may be split into more tokens, but into no more
    unknown ones: all single characters stay, and all tokens with a character that is no token of its own. Special and
    added tokens stay, and the ids keep their order.

    Args:
        tokenizer: A fast tokenizer of WordPiece, BPE or Unigram; it is not changed.
        texts: The corpus.

    Returns:
        The tokenizer, and the old id of each new id.

    Raises:
        HfcompressError: for a tokenizer of another kind.
    """
    content = _content(tokenizer)
    model = content["model"]
    ids = _ids(model)
    used = _find_used_ids(tokenizer, texts)
    required = _SELECT_REQUIRED[model["type"]](model, [piece for piece, id_ in ids.items() if id_ in used])
    if model.get("byte_fallback"):
        required |= {piece for piece in ids if re.fullmatch("<0x[0-9A-F]{2}>", piece)}
    old = sorted(used | _find_required_ids(content, tokenizer) | {ids[piece] for piece in required})
    return _reload(tokenizer, content, {id_: new for new, id_ in enumerate(old)}), old


def select_tokens(
    model: PreTrainedModel, kept_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Copies a model with only some tokens of its vocabulary, in the embeddings and in a mask head.

    Args:
        model: An encoder with its task head; it is not changed.
        kept_ids: The old ids in their new order, as `prune_vocabulary` gives them.
        tokenizer: The new tokenizer; the config gets the ids of its special tokens.
    """
    import torch

    config = copy.deepcopy(model.config)
    for key, value in model.config.to_dict().items():
        if key.endswith("_token_id") and value is not None:
            setattr(config, key, getattr(tokenizer, key, None))
    shape = replace(shape_of(model.config.to_dict()), vocab=len(kept_ids))
    small = empty_model(type(model).__name__, shape, config)
    source, axes, index = model.state_dict(), axes_of(small), torch.tensor(kept_ids)
    with torch.no_grad():
        for name, tensor in small.state_dict().items():
            words = ("vocab",) in axes[name]
            tensor.copy_(source[name][index.to(source[name].device)] if words else source[name])
    return small.train(model.training)


def require_cuttable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that `prune_vocabulary` supports a tokenizer.

    Raises:
        HfcompressError: if it does not.
    """
    _content(tokenizer)


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Reads the tokenizer.json, and checks that its kind of vocabulary can be cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model = content["model"]
    affixed = model.get("end_of_word_suffix") or (model.get("type") == "BPE" and model.get("continuing_subword_prefix"))
    if model.get("type") not in _SELECT_REQUIRED or affixed:
        raise HfcompressError(
            f"the vocabulary of this {type(tokenizer).__name__} cannot be cut: it is no fast tokenizer of WordPiece, "
            "Unigram or BPE without affixes",
            "use `vocabulary: keep`",
        )
    return content


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    """Reads the tokens of tokenizer.json's model and their ids."""
    vocab = model["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {piece: id_ for id_, (piece, _) in enumerate(vocab)}


def _find_used_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> set[int]:
    used, rest = set[int](), iter(texts)
    while rows := list(islice(rest, _ROWS)):
        used.update(*tokenizer(rows, add_special_tokens=False, verbose=False)["input_ids"])
    return used


def _find_required_ids(content: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Finds the ids that the tokenizer's settings name."""
    model, found = content["model"], {token["id"] for token in content["added_tokens"]}
    found |= {id_ for piece, id_ in _ids(model).items() if piece == model.get("unk_token")}
    found |= {model["unk_id"]} if model.get("unk_id") is not None else set()
    found |= {content["padding"]["pad_id"]} if content["padding"] is not None else set()
    found |= set(tokenizer.all_special_ids)

    def look(id_: int) -> int:
        found.add(id_)
        return id_

    _change_ids(content["post_processor"], look)
    return found


def _select_wordpiece(model: Mapping[str, Any], used: Sequence[str]) -> set[str]:
    prefix, pieces = model["continuing_subword_prefix"], set(_ids(model))

    def letters(piece: str) -> list[str]:
        inside = piece.startswith(prefix) and piece != prefix
        body = piece.removeprefix(prefix) if inside else piece
        return [prefix * (inside or at > 0) + letter for at, letter in enumerate(body)]

    return {piece for piece in pieces if _is_needed(letters(piece), pieces)}


def _select_unigram(model: Mapping[str, Any], used: Sequence[str]) -> set[str]:
    """Keeps the least likely token too: the score of an unknown character is computed from it."""
    pieces = {piece for piece, _ in model["vocab"]}
    least = min(model["vocab"], key=lambda entry: entry[1])[0]
    return {piece for piece in pieces if _is_needed(list(piece), pieces)} | {least}


def _is_needed(letters: Sequence[str], pieces: set[str]) -> bool:
    """True if a token is a single character, or has a character that is no token of its own."""
    return len(letters) == 1 or not pieces.issuperset(letters)


def _select_bpe(model: Mapping[str, Any], used: Sequence[str]) -> set[str]:
    """Keeps the tokens that the used ones are merged from, step by step."""
    ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
    kept = {piece for piece in model["vocab"] if len(piece) == 1}
    for piece in used:
        parts = list(piece)
        while merges := [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]:
            _, at = min(merges)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            kept.add(parts[at])
    return kept


_SELECT_REQUIRED = {"WordPiece": _select_wordpiece, "Unigram": _select_unigram, "BPE": _select_bpe}


def _reload(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], new_ids: Mapping[int, int]
) -> PreTrainedTokenizerBase:
    """Saves the tokenizer with the new ids, and loads it again."""
    with scratch_directory() as folder:
        tokenizer.save_pretrained(folder)
        settings = folder / "tokenizer_config.json"
        config = json.loads(settings.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in config:
            added = config["added_tokens_decoder"]
            config["added_tokens_decoder"] = {str(new_ids[int(id_)]): token for id_, token in added.items()}
        for file in folder.iterdir():
            if file.name not in ("special_tokens_map.json", "chat_template.jinja"):
                file.unlink()
        settings.write_text(json.dumps(config), encoding="utf-8")
        (folder / "tokenizer.json").write_text(json.dumps(_renumber(content, new_ids)), encoding="utf-8")
        found = type(tokenizer).from_pretrained(folder, local_files_only=True)
    found.name_or_path = tokenizer.name_or_path
    return found


def _renumber(content: dict[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    changed = {
        **content,
        "model": _cut(content["model"], new_ids),
        "added_tokens": [{**token, "id": new_ids[token["id"]]} for token in content["added_tokens"]],
        "post_processor": _change_ids(content["post_processor"], new_ids.__getitem__),
    }
    if content["padding"] is not None:
        changed["padding"] = {**content["padding"], "pad_id": new_ids[content["padding"]["pad_id"]]}
    return changed


def _cut(model: dict[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Cuts tokenizer.json's model to the tokens that stay; for BPE, also to the merges between them."""
    kept = {piece: new_ids[id_] for piece, id_ in _ids(model).items() if id_ in new_ids}
    if model["type"] == "Unigram":
        vocab = [entry for entry in model["vocab"] if entry[0] in kept]
        return {**model, "vocab": vocab, "unk_id": new_ids.get(model["unk_id"])}
    if model["type"] == "BPE":
        merges = [pair for pair in model["merges"] if kept.keys() >= {*pair, "".join(pair)}]
        return {**model, "vocab": kept, "merges": merges}
    return {**model, "vocab": kept}


def _change_ids(processor: Any, change: Callable[[int], int]) -> Any:
    """Copies a post-processor with changed ids; it may be a list of others."""
    if processor is None:
        return None
    changed = dict(processor)
    if "processors" in changed:
        changed["processors"] = [_change_ids(part, change) for part in changed["processors"]]
    if "special_tokens" in changed:
        tokens = changed["special_tokens"].items()
        changed["special_tokens"] = {name: {**token, "ids": [*map(change, token["ids"])]} for name, token in tokens}
    for key in changed.keys() & {"sep", "cls"}:
        name, id_ = changed[key]
        changed[key] = [name, change(id_)]
    return changed
