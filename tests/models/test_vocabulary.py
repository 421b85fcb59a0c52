"""A vocabulary cut down to a corpus: the same tokens, the same answers, fewer rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hfcompress.models.artifact import load_model, save_model
from hfcompress.models.forward import observe
from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.models.vocabulary import prune_vocabulary, select_tokens
from hfcompress.utils.errors import HfcompressError
from tests import factories

CORPUS = [
    "The film was a lovely story, really good!",
    "an awful plot with a dull cast; unbelievably poor",
    "lower lowest newer newest widest wider",
]
OTHER = ["xylophones jumped quickly over 12345 lazy dogs", "films awfully storytelling"]
BERT_SPECIALS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_NAMES = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
                 "mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"}  # fmt: skip
ROBERTA_SPECIALS = list(dict.fromkeys(ROBERTA_NAMES.values()))


def wordpiece() -> Any:
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.train_from_iterator(
        CORPUS + OTHER, trainers.WordPieceTrainer(vocab_size=220, special_tokens=BERT_SPECIALS, show_progress=False)
    )
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def bpe() -> Any:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=ROBERTA_SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(CORPUS + OTHER, trainer)
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **ROBERTA_NAMES)


def unigram() -> Any:
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=110, special_tokens=ROBERTA_SPECIALS, unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(CORPUS + OTHER, trainer)
    template = [("<s>", 0), ("</s>", 2)]
    inner.post_processor = processors.Sequence(
        [processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=template)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, **ROBERTA_NAMES)


MADE = {"wordpiece": wordpiece, "bpe": bpe, "unigram": unigram}


def pieces(tokenizer: Any, *texts: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(*texts)["input_ids"])


def content(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.mark.parametrize("kind", MADE)
def test_the_corpus_is_split_as_before_with_fewer_tokens(kind: str) -> None:
    whole = MADE[kind]()
    before = content(whole)
    small, kept = prune_vocabulary(whole, iter(CORPUS))
    assert len(small) == len(kept) < len(whole)
    assert kept == sorted(kept)
    for text in CORPUS:
        assert pieces(small, text) == pieces(whole, text)
        assert [kept[id_] for id_ in small(text)["input_ids"]] == whole(text)["input_ids"]
    assert pieces(small, CORPUS[0], CORPUS[1]) == pieces(whole, CORPUS[0], CORPUS[1])
    assert small(CORPUS, padding=True)["attention_mask"] == whole(CORPUS, padding=True)["attention_mask"]
    assert content(whole)["model"] == before["model"]


@pytest.mark.parametrize("kind", MADE)
def test_other_texts_fall_into_more_pieces_and_no_unknown_ones(kind: str) -> None:
    whole = MADE[kind]()
    small, _ = prune_vocabulary(whole, CORPUS)
    for text in OTHER:
        ids = small(text)["input_ids"]
        assert small.unk_token_id not in ids
        assert len(ids) >= len(whole(text)["input_ids"])
    assert any(len(small(text)["input_ids"]) > len(whole(text)["input_ids"]) for text in OTHER)


@pytest.mark.parametrize("kind", MADE)
def test_special_tokens_keep_their_meaning(kind: str) -> None:
    whole = MADE[kind]()
    whole.add_tokens(["<extra>"])
    small, kept = prune_vocabulary(whole, CORPUS)
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(small, f"{name}_token") == getattr(whole, f"{name}_token")
        assert kept[getattr(small, f"{name}_token_id")] == getattr(whole, f"{name}_token_id")
    assert pieces(small, "a <extra> film") == pieces(whole, "a <extra> film")
    assert small.convert_tokens_to_ids("<extra>") == len(small) - 1


def test_ids_that_only_a_setting_names_stay_and_follow() -> None:
    words = ["<unused>", "<pad>", "<unk>", "<start>", "xyz", *"abxyz<", *(f"##{letter}" for letter in "unsedpakxyz>rt")]
    inner = Tokenizer(models.WordPiece({word: id_ for id_, word in enumerate(words)}, unk_token="<unk>"))
    inner.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 3)])
    inner.enable_padding(pad_id=1, pad_token="<pad>")
    small, kept = prune_vocabulary(PreTrainedTokenizerFast(tokenizer_object=inner), ["a", "b"])
    changed = content(small)
    assert words[4] not in small.get_vocab()
    assert changed["post_processor"]["special_tokens"]["<start>"]["ids"] == [kept.index(3)]
    assert changed["padding"]["pad_id"] == kept.index(1)
    assert small("a")["input_ids"] == [kept.index(3), kept.index(5)]


def test_a_word_that_was_unknown_stays_so() -> None:
    whole = wordpiece()
    small, _ = prune_vocabulary(whole, ["a film 東京"])
    assert pieces(small, "a film 東京") == pieces(whole, "a film 東京")
    assert "[UNK]" in pieces(small, "a film 東京")


def test_a_piece_that_holds_a_character_without_one_of_its_own_stays() -> None:
    words = [*factories.WORDS[:5], "a", "b", "##a", "ab", "qu", "##zz", "##ab"]
    small, kept = prune_vocabulary(factories.tokenizer(words), ["a"])
    assert {words[id_] for id_ in kept} == {*words[:5], "a", "b", "##a", "ab", "qu", "##zz", "##ab"}
    words += ["##b"]
    small, kept = prune_vocabulary(factories.tokenizer(words), ["a"])
    assert {words[id_] for id_ in kept} == {*words[:5], "a", "b", "##a", "##b", "qu", "##zz"}
    assert pieces(small, "abab") == ["[CLS]", "a", "##b", "##a", "##b", "[SEP]"]


def test_bpe_keeps_what_a_token_is_merged_from_and_no_other_merge() -> None:
    vocab = {piece: id_ for id_, piece in enumerate(["<unk>", *"abcd", "ab", "cd", "abc", "abcd", "bc", "da"])}
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("ab", "c"), ("b", "c"), ("d", "a")]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    whole = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>")
    small, _ = prune_vocabulary(whole, ["abcd"])
    assert set(small.get_vocab()) == {"<unk>", *"abcd", "ab", "cd", "abcd"}
    assert [tuple(pair) for pair in content(small)["model"]["merges"]] == merges[:3]
    assert small.tokenize("abcd") == ["abcd"]
    assert small.tokenize("da") == ["d", "a"]


def test_unigram_keeps_the_cost_of_an_unknown_character() -> None:
    vocab = [("<unk>", 0.0), ("a", -1.0), ("ab", -2.0), ("b", -1.5), ("abab", -20.0), ("ba", -3.0)]
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(vocab, unk_id=0)), unk_token="<unk>")
    small, kept = prune_vocabulary(whole, ["ab"])
    assert content(small)["model"]["vocab"] == [[*entry] for entry in vocab[:5]]
    assert kept == [0, 1, 2, 3, 4]


def test_bytes_stay_where_unknown_characters_fall_back_on_them() -> None:
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: id_ for id_, piece in enumerate(["<unk>", *raw, "a", "b", "ab"])}
    inner = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>", byte_fallback=True))
    small, _ = prune_vocabulary(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"), ["a"])
    assert small.tokenize("é") == ["<0xC3>", "<0xA9>"]
    assert "ab" not in small.get_vocab()


@pytest.mark.parametrize(
    "inner",
    [
        Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
        Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>")),
    ],
    ids=["word level", "affixes"],
)
def test_another_kind_of_tokenizer_is_refused(inner: Tokenizer) -> None:
    with pytest.raises(HfcompressError, match="cannot be cut") as refused:
        prune_vocabulary(PreTrainedTokenizerFast(tokenizer_object=inner), CORPUS)
    assert refused.value.problems[0].fix == "use `vocabulary: keep`"


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "MPNet", "Roberta", "XLMRoberta", "DebertaV2"])
def test_the_library_s_own_tokenizers_load_as_they_were_cut(name: str, tmp_path: Path) -> None:
    whole = _library_tokenizer(name, tmp_path / "whole")
    small, kept = prune_vocabulary(whole, CORPUS)
    small.save_pretrained(tmp_path / "small")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "small", local_files_only=True)
    assert type(loaded) is type(small)
    assert len(loaded) == len(kept) < len(whole)
    for text in CORPUS:
        assert pieces(loaded, text) == pieces(whole, text)
        assert [kept[id_] for id_ in loaded(text)["input_ids"]] == whole(text)["input_ids"]
    assert loaded.mask_token_id == small.mask_token_id


def _library_tokenizer(name: str, path: Path) -> Any:
    """A tokenizer of a family's own class, made as its files would be: from a trained model."""
    made = {"Roberta": bpe, "XLMRoberta": unigram, "DebertaV2": unigram}.get(name, wordpiece)()
    path.mkdir()
    to_roberta = {"[CLS]": "<s>", "[SEP]": "</s>", "[PAD]": "<pad>", "[MASK]": "<mask>"}
    to_bert = {new: old for old, new in to_roberta.items()} | {"<unk>": "[UNK]"}
    renamed = {"DebertaV2": to_bert, "MPNet": to_roberta}.get(name, {})
    text = json.dumps(content(made))
    for old, new in renamed.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    (path / "tokenizer.json").write_text(text, encoding="utf-8")
    specials = {key: renamed.get(value, value) for key, value in made.special_tokens_map.items()}
    config = {"tokenizer_class": f"{name}Tokenizer", **specials}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert name in type(loaded).__name__
    return loaded


@pytest.mark.parametrize(("family", "head"), [pair for pair in factories.headed() if pair[1] not in ("token", "span")])
def test_the_same_text_gets_the_same_answer(family: str, head: str) -> None:
    whole = wordpiece()
    model = factories.model(family, head=head, vocab_size=len(whole), seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, kept = prune_vocabulary(whole, CORPUS)
    selected = select_tokens(model, kept, small)
    assert not selected.training
    assert (
        shape_of(selected.config.to_dict(), head=head).vocab
        == len(kept)
        == selected.get_input_embeddings().num_embeddings
    )
    old, new = (
        observe(m, t(CORPUS, padding=True, return_tensors="pt")).logits for m, t in ((model, whole), (selected, small))
    )
    assert torch.allclose(new, old if head == "sequence" else old[..., kept], atol=1e-6)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    if head == "mask":
        assert selected.get_output_embeddings().weight is selected.get_input_embeddings().weight


def test_a_decoder_of_its_own_is_cut_like_the_embeddings() -> None:
    whole = wordpiece()
    model = factories.model("bert", head="mask", vocab_size=len(whole), tie_word_embeddings=False)
    assert not torch.equal(model.cls.predictions.decoder.weight, model.bert.embeddings.word_embeddings.weight)
    small, kept = prune_vocabulary(whole, CORPUS)
    selected = select_tokens(model, kept, small)
    for path in ("cls.predictions.decoder", "bert.embeddings.word_embeddings"):
        assert torch.equal(selected.get_submodule(path).weight, model.get_submodule(path).weight[kept])
    assert torch.equal(selected.cls.predictions.decoder.bias, model.cls.predictions.decoder.bias[kept])


def test_the_config_takes_the_new_ids() -> None:
    words = [*factories.WORDS[:4], "ab", "a", "b", "##b", "[MASK]"]
    whole = factories.tokenizer(words)
    model = factories.model("bert", vocab_size=len(words), cls_token_id=2, mask_token_id=8)
    small, kept = prune_vocabulary(whole, ["a b"])
    config = select_tokens(model, kept, small).config
    assert [words[id_] for id_ in kept] == [*factories.WORDS[:4], "a", "b", "##b", "[MASK]"]
    assert (config.pad_token_id, config.cls_token_id, config.mask_token_id) == (0, 2, 7)
    assert config.vocab_size == 8
    assert (model.config.vocab_size, model.config.mask_token_id) == (9, 8)


def test_a_pruned_model_can_lose_words_too() -> None:
    whole = wordpiece()
    model = cut(
        factories.model(vocab_size=len(whole)), [Keep((1,), tuple(range(32))), Keep((0, 1, 2), tuple(range(48)))]
    )
    small, kept = prune_vocabulary(whole, CORPUS)
    selected = select_tokens(model, kept, small)
    assert type(selected) is type(model)
    old, new = (
        observe(m, t(CORPUS, padding=True, return_tensors="pt")).logits for m, t in ((model, whole), (selected, small))
    )
    assert torch.allclose(new, old, atol=1e-6)


def test_model_and_tokenizer_load_again(tmp_path: Path) -> None:
    whole = wordpiece()
    model = factories.model("bert", head="mask", vocab_size=len(whole))
    small, kept = prune_vocabulary(whole, CORPUS)
    selected = select_tokens(model, kept, small)
    save_model(selected, small, tmp_path)
    batch = small(CORPUS, padding=True, return_tensors="pt")
    assert torch.equal(load_model(tmp_path, "AutoModelForMaskedLM")(**batch).logits, selected(**batch).logits)
    code = (
        "import sys, json, transformers\n"
        "words = transformers.AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "print(json.dumps(words(json.loads(sys.argv[2]), padding=True)['input_ids']))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(CORPUS)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert json.loads(printed) == batch["input_ids"].tolist()
