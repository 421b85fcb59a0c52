"""Finds replacements for words: the predictions of a masked-language model, or the nearest word vectors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.task import pad_rows
from hfcompress.models.architectures import ARCHITECTURES, layers_of
from hfcompress.models.artifact import load_model, load_tokenizer
from hfcompress.models.forward import select_inputs
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.logging import err

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Slots = dict[tuple[int, int], tuple[str, ...]]
"""The words of a text that may be replaced, as `(start, end)` in the text, and the candidates for each."""

GLOVE_WORDS = 100_000
"""The lines to read of a file of word vectors; such files list frequent words first."""
TEXTS_AT_ONCE = 4096
WORDS_AT_ONCE = 256

_WORD = re.compile(r"\w+(?:['’](?!s\b)\w+)*")
STOP_WORDS = frozenset(
    """
    a about above after again against all am an and any are as at be because been before being below between both but by
    can cannot could d did do does doing down during each few for from further had has have having he her here hers
    herself him himself his how i if in into is it its itself just ll m me might more most must my myself neither no nor
    not of off on once only or other ought our ours ourselves out over own re s same shall she should so some such t
    than that the their theirs them themselves then there these they this those through to too under until up upon us ve
    very was we were what when where whether which while who whom whose why will with without would you your yours
    yourself yourselves
    """.split()  # noqa: SIM905
)
"""English function words. Negations are among them, because they decide labels."""


def find_words(text: str) -> list[tuple[int, int]]:
    """Finds the places of the words that may be replaced: words of letters only, except stop words.

    A contraction is one word, which is not replaced because of its apostrophe. A word before `'s` is a separate word.
    """
    found = _WORD.finditer(text)
    return [word.span() for word in found if word[0].isalpha() and word[0].lower() not in STOP_WORDS]


def propose(texts: Iterable[str], model: MaskedWords, glove: Path | None, batch_size: int) -> dict[str, Slots]:
    """Finds the replaceable words of each text, with their candidates; equal texts are processed once.

    Args:
        texts: Any number of texts, in any order.
        model: Predicts the words that are one token.
        glove: A file of word vectors, for words of several tokens; without it these are not replaced.
        batch_size: The masked texts in a forward pass.
    """
    from rich.progress import track

    unique = sorted(set(texts), key=lambda text: (len(text), text))
    parts = [unique[start : start + TEXTS_AT_ONCE] for start in range(0, len(unique), TEXTS_AT_ONCE)]
    found: dict[str, Slots] = {}
    for part in track(parts, "augmentation", console=err()):
        found.update(zip(part, model.slots(part, batch_size), strict=True))
    if glove is not None:
        open_slots = [(text, span) for text, slots in found.items() for span, words in slots.items() if not words]
        near = find_neighbours(glove, {text[slice(*span)].lower() for text, span in open_slots}, model.top_k)
        for text, span in open_slots:
            found[text][span] = near.get(text[slice(*span)].lower(), ())
    return found


def require_masks(tokenizer: Any, path: Path) -> None:
    """Checks that words can be masked with a tokenizer.

    Raises:
        HfcompressError: if it has no mask token, or cannot give the characters of a token.
    """
    if tokenizer.mask_token_id is None or not tokenizer.is_fast:
        raise HfcompressError(f"the tokenizer of {path} has no mask token, or is not a fast tokenizer", _ANOTHER)


class MaskedWords:
    """A masked-language model that predicts one masked word of each text, for many texts at once.

    Attributes:
        top_k: The candidates for each word.
    """

    def __init__(self, path: Path, top_k: int, device: str = "cpu", bfloat16: bool = False) -> None:
        import torch

        self.top_k = top_k
        self.tokenizer: Any = load_tokenizer(path)
        require_masks(self.tokenizer, path)
        self.model: Any = _load(path).to(device)
        self.longest = _longest_input(self.model.config, self.tokenizer)
        self.words = list_whole_words(self.tokenizer)
        decoder, base = self.model.get_output_embeddings(), self.model.base_model
        self._allowed = torch.zeros(len(decoder.weight), dtype=torch.bool, device=device)
        self._allowed[list(self.words)] = True
        if bfloat16:
            # The task head stays in float32: logits in bfloat16 are often equal, and chance would choose among them.
            decoder.weight = torch.nn.Parameter(decoder.weight.detach().clone())
            base.to(torch.bfloat16)
        base.register_forward_hook(self._narrow_output)
        # Of the last layer only the masked token is used: in models like BERT its FFN can skip the others.
        spec = ARCHITECTURES.get(str(self.model.config.model_type))
        if spec is not None and (spec.modules.ffn_in, spec.modules.ffn_out) == ("intermediate.dense", "output.dense"):
            last = layers_of(self.model)[-1]
            for part in (last.get_submodule("intermediate"), last.get_submodule("output")):
                part.register_forward_pre_hook(lambda _, states: tuple(map(self._select_masked, states)))
        self._positions: Tensor | None = None

    def _narrow_output(self, _module: Any, _inputs: Any, output: Any) -> None:
        """Gives the task head only the masked token of each row, so that the logits are `(batch, 1, vocab)`."""
        output["last_hidden_state"] = self._select_masked(output[0]).float()

    def _select_masked(self, states: Tensor) -> Tensor:
        """Selects the masked token of each row, `(batch, 1, hidden)`, unless it is selected already."""
        import torch

        if states.shape[1] == 1:
            return states
        return states[torch.arange(len(states), device=states.device), self._positions].unsqueeze(1)

    def slots(self, texts: Sequence[str], batch_size: int) -> list[Slots]:
        """Finds the replaceable words of each text; words of several tokens get no candidates.

        A word is masked in the first half of the pair (text, text), as in TinyBERT's Algorithm 1. Words beyond the
        model's longest input get no candidates either.
        """
        encoded = self.tokenizer(
            list(texts), list(texts), truncation=True, max_length=self.longest, return_offsets_mapping=True
        )
        found: list[Slots] = [dict.fromkeys(find_words(text), ()) for text in texts]
        jobs = [
            (len(encoded["input_ids"][number]), number, span, position)
            for number, text in enumerate(texts)
            for span, position in _match_tokens(text, encoded, number)
            if span in found[number]
        ]
        jobs.sort()
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            numbers, positions = [number for _, number, _, _ in batch], [position for *_, position in batch]
            for (_, number, span, _), top in zip(batch, self._predict_words(encoded, numbers, positions), strict=True):
                found[number][span] = self._drop_word(texts[number][slice(*span)], top)
        return found

    def _predict_words(self, encoded: Mapping[str, Any], numbers: list[int], positions: list[int]) -> list[list[int]]:
        """Predicts the most likely whole words at one position of each text, one more than needed: `(batch, top_k +
        1)`.
        """
        import torch

        length = max(len(encoded["input_ids"][number]) for number in numbers)
        inputs = {
            name: pad_rows([encoded[name][number] for number in numbers], length, fill)
            for name, fill in (("input_ids", self.tokenizer.pad_token_id), ("attention_mask", 0), ("token_type_ids", 0))
            if name in encoded
        }
        inputs["input_ids"][torch.arange(len(numbers)), positions] = self.tokenizer.mask_token_id
        device = self._allowed.device
        self._positions = torch.tensor(positions, device=device)
        with torch.inference_mode():
            tensors = {name: value.to(device) for name, value in inputs.items()}
            logits = self.model(**select_inputs(self.model, tensors)).logits[:, 0]
            top = logits.masked_fill(~self._allowed, -torch.inf).topk(min(self.top_k + 1, len(self.words)))
        return top.indices.tolist()

    def _drop_word(self, word: str, top: list[int]) -> tuple[str, ...]:
        """Removes the word itself from its candidates, and sorts them: the order of near ties depends on the
        machine.
        """
        words = [self.words[index] for index in top]
        return tuple(sorted([other for other in words if other.casefold() != word.casefold()][: self.top_k]))


_ANOTHER = "name a masked-language model, such as google-bert/bert-base-uncased"


def _load(path: Path) -> Any:
    try:
        return load_model(path, "AutoModelForMaskedLM")
    except HfcompressError as error:
        raise HfcompressError(f"augment: {error.problems[0].message}", _ANOTHER) from error


def _longest_input(config: Any, tokenizer: Any) -> int:
    spec = ARCHITECTURES.get(str(config.model_type))
    positions = getattr(config, "max_position_embeddings", None)
    limit = int(tokenizer.model_max_length)
    return limit if positions is None else min(limit, positions - (spec.position_offset if spec else 0))


def list_whole_words(tokenizer: Any) -> dict[int, str]:
    """Lists the tokens that are a whole word of letters: the word by its id."""
    vocabulary = tokenizer.get_vocab()
    pieces = any(token.startswith("##") for token in vocabulary)
    marks = [mark for mark in ("Ġ", "▁") if any(token.startswith(mark) for token in vocabulary)]
    mark = "" if pieces or not marks else marks[0]
    special = set(tokenizer.all_special_ids)
    ids = sorted(
        index
        for token, index in vocabulary.items()
        if token.startswith(mark) and not token.startswith("##") and index not in special
    )
    words = zip(ids, tokenizer.batch_decode([[index] for index in ids]), strict=True)
    return {index: word.strip() for index, word in words if word.strip().isalpha()}


def _match_tokens(text: str, encoded: Any, number: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Yields each token of the first half: its `(start, end)` in the text, and its position in the input."""
    offsets = encoded["offset_mapping"][number]
    for position, (part, (start, end)) in enumerate(zip(encoded.sequence_ids(number), offsets, strict=True)):
        if part == 0:
            # Some tokenizers count the space before a word as a part of it.
            yield (end - len(text[start:end].lstrip()), end), position


def find_neighbours(path: Path, words: set[str], top_k: int) -> dict[str, tuple[str, ...]]:
    """Finds the `top_k` nearest words of each word, by the cosine of their vectors; words without a vector get none.

    Args:
        path: A text file, with a word and its vector in each line (`word v1 v2 …`).
        words: The words, in lower case.
        top_k: The number of neighbours.
    """
    import torch

    known, vectors = read_vectors(path)
    asked = [index for index, word in enumerate(known) if word in words]
    found: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(asked), WORDS_AT_ONCE):
        some = asked[start : start + WORDS_AT_ONCE]
        cosines = vectors[some] @ vectors.T
        cosines[torch.arange(len(some)), some] = -torch.inf
        nearest = cosines.topk(min(top_k, len(known) - 1)).indices.tolist()
        found |= {known[i]: tuple(sorted(known[j] for j in row)) for i, row in zip(some, nearest, strict=True)}
    return found


def read_vectors(path: Path) -> tuple[list[str], Tensor]:
    """Reads a file of word vectors: words of letters, in lower case, and vectors of norm 1, `(words, width)`.

    Raises:
        HfcompressError: for a file without vectors.
    """
    import numpy as np
    import torch
    from torch.nn import functional as F

    found: dict[str, NDArray[Any]] = {}
    width = 0
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in islice(stream, GLOVE_WORDS):
            word, _, values = line.rstrip().partition(" ")
            if not word.isalpha() or word.lower() in found:
                continue
            try:
                vector = np.array(values.split(), dtype=np.float32)
            except ValueError:
                raise HfcompressError(f"{path}: the line of '{word}' is not a word and numbers", _FORMAT) from None
            width = width or len(vector)
            if len(vector) != width:
                raise HfcompressError(f"{path}: '{word}' has {len(vector)} numbers, others {width}", _FORMAT)
            found[word.lower()] = vector
    if len(found) < 2 or not width:
        raise HfcompressError(f"{path} holds no word vectors", _FORMAT)
    return list(found), F.normalize(torch.from_numpy(np.stack(list(found.values()))), dim=-1)


_FORMAT = "give a text file with a word and its vector in each line, such as glove.6B.300d.txt"
