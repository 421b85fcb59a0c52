"""Makes a model's config and its tokenizer agree on the pad token.

A decoder that classifies texts reads its answer at the last token that is not its config's `pad_token_id`. If texts are
padded with another token, it reads the answer at the padding. An encoder gets an attention mask that marks the real
tokens, so any pad token is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import ARCHITECTURES, architecture_of
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.logging import info_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES_ONE = (
    "set `pad_token` in tokenizer_config.json to a token that no text holds, `pad_token_id` in config.json to its id"
)


def pad_in_config(config: Mapping[str, Any]) -> int | None:
    """Reads the id of the pad token from a config.json, or the default of its class; None for no token."""
    from transformers import CONFIG_MAPPING

    kind = architecture_of(config)
    if "pad_token_id" in config or kind not in CONFIG_MAPPING:
        value = config.get("pad_token_id")
    else:
        value = getattr(CONFIG_MAPPING[kind](), "pad_token_id", None)
    return value if isinstance(value, int) and value >= 0 else None  # old configs of Llama say -1


def reads_last_token(config: Mapping[str, Any]) -> bool:
    """True if a model may find its last real token by the pad token: a decoder, or an unknown architecture."""
    spec = ARCHITECTURES.get(architecture_of(config))
    return spec is None or spec.decoder


def have_same_pad_token(path: Path, config: Mapping[str, Any]) -> bool:
    """True if the files of a model directory clearly name the same pad token; imports no torch."""
    settings, vocabulary = path / "tokenizer_config.json", path / "tokenizer.json"
    if not settings.is_file() or not vocabulary.is_file():
        return False
    from tokenizers import Tokenizer

    try:
        token = json.loads(settings.read_text(encoding="utf-8")).get("pad_token")
        content = token.get("content") if isinstance(token, dict) else token
        own = None if content is None else Tokenizer.from_file(str(vocabulary)).token_to_id(content)
    except Exception:  # `tokenizers` raises plain exceptions; a damaged file is reported when it is loaded
        return False
    return own is not None and own == config.get("pad_token_id")


def settle_padding(tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any], path: Path) -> bool:
    """Gives a tokenizer the pad token of its model's config if it has none, and sets its padding to the right.

    If the config has none, `load_model` gives it the tokenizer's. `Task.batch` pads on the right.

    Args:
        tokenizer: The model's; changed in place.
        config: The config.json beside it.
        path: The directory of both, for messages.

    Returns:
        True if the tokenizer was changed.

    Raises:
        HfcompressError: if neither names a pad token, or if they name different ones and the answers depend on it.
    """
    named, own = pad_in_config(config), tokenizer.pad_token_id
    if own is None and named is None:
        raise HfcompressError(f"neither the config nor the tokenizer of {path} names a pad token", _NAMES_ONE)
    changed = own is None
    if own is None:
        tokenizer.pad_token = token = _find_pad_token(tokenizer, named, path)
        info_once(f"{path}: the tokenizer names no pad token; it pads with {token!r}, as the config says")
    elif reads_last_token(config):
        _require_one_pad_token(tokenizer, named, path)
    if tokenizer.padding_side != "right":
        set_option(tokenizer, "padding_side", "right")
        changed = True
    return changed


def _find_pad_token(tokenizer: PreTrainedTokenizerBase, named: Any, path: Path) -> str:
    """Finds the token of an id, and checks that it can be a pad token: one that no text contains."""
    token = tokenizer.convert_ids_to_tokens(named) if named < len(tokenizer) else None
    if isinstance(token, str) and (token in tokenizer.get_added_vocab() or re.fullmatch(r"[<\[].*[>\]]", token)):
        return token
    raise HfcompressError(
        f"the config of {path} pads with the id {named}, and the tokenizer has "
        f"{'no token of that id' if token is None else f'an ordinary token there, {token!r}'} and no pad token",
        _NAMES_ONE,
    )


def _require_one_pad_token(tokenizer: PreTrainedTokenizerBase, named: int | None, path: Path) -> None:
    own = tokenizer.pad_token_id
    if named is None:
        if tokenizer("a")["input_ids"][-1:] == [own]:
            raise HfcompressError(
                f"the config of {path} names no `pad_token_id`, and the tokenizer's {tokenizer.pad_token!r} is also "
                "the token at the end of its texts, where a classifier's answer is read",
                _NAMES_ONE,
            )
        info_once(f"{path}: the config names no `pad_token_id`; it is {own}, as the tokenizer pads")
    elif named != own:
        theirs = tokenizer.convert_ids_to_tokens(named) if named < len(tokenizer) else None
        raise HfcompressError(
            f"the config of {path} pads with the id {named} ({theirs!r}), its tokenizer with {own} "
            f"({tokenizer.pad_token!r}), and a decoder's answer is read at the last token that is not the config's",
            "set `pad_token_id` in config.json and `pad_token` in tokenizer_config.json to the token that the model "
            "was trained with",
        )


def set_option(tokenizer: PreTrainedTokenizerBase, name: str, value: Any) -> None:
    """Sets an option of a tokenizer, also in what it saves."""
    setattr(tokenizer, name, value)
    tokenizer.init_kwargs[name] = value
