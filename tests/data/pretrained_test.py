"""Folders of pretrained models: the file that a tokenizer is read from, and what is missing."""

import json

import numpy as np
import pytest

from qkv_jax.data import TOKENIZER_FILES, BpeTokenizer, UnigramTokenizer, pretrained_tokenizer

TEXT = "the cat sat on the mat and looked at its own tail. 猫は外にいる。\n" * 9


def folder_of(path, **files):
    """Files by name, their dots written as __; a dict is JSON."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def test_a_tokenizer_json_comes_first_and_is_not_cut_off(tmp_path):
    pytest.importorskip("tokenizers")
    bpe = BpeTokenizer.train(TEXT, 300)
    said = json.loads(bpe.to_json())["json"]
    said["truncation"] = {
        "max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right",
    }  # fmt: skip
    found = pretrained_tokenizer(folder_of(tmp_path, tokenizer__json=said, vocab__txt="[UNK]"))
    np.testing.assert_array_equal(found.encode_framed(TEXT), bpe.encode(TEXT))
    assert found.labels(found.encode("the 猫")) == bpe.labels(bpe.encode("the 猫"))


def test_sentencepiece_is_framed_as_the_model_was_trained(tmp_path):
    pytest.importorskip("sentencepiece")
    unigram = UnigramTokenizer.train(TEXT, 512)
    (tmp_path / "spiece.model").write_bytes(unigram._model)
    size = unigram.vocab_size
    folder_of(tmp_path, config__json={"model_type": "t5"})
    t5 = pretrained_tokenizer(tmp_path)
    ids = t5.encode_framed("the cat<extra_id_0> sat<extra_id_99>")
    assert t5.labels(ids)[-1] == "</s>" and t5.decode(ids[:-1]).startswith("the cat<extra_id_0>")
    assert ids[ids >= size].tolist() == [size + 99, size, *ids[-1:]]
    assert t5.vocab_size == size + 102  # </s> and <pad> are new: this vocabulary has neither


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json, and its tokenizer is called None; wanted one of: bert"),
        ({"config__json": {"model_type": "xlnet"}}, "'xlnet'; wanted one of"),
        ({"config__json": "[1"}, r"config\.json' cannot be parsed"),
        ({"config__json": "[1]"}, r"config\.json' holds no JSON object"),
        ({"config__json": {"model_type": "bert"}}, r"the vocabulary .*vocab\.txt' cannot be read"),
        ({"config__json": {"model_type": "gpt2"}}, "none of: tokenizer.json, vocab.json"),
        (
            {"config__json": {"model_type": "gpt2"}, "vocab__json": {}, "merges__txt": "a"},
            "cannot be read",
        ),
        ({"config__json": {"model_type": "t5"}}, "none of: tokenizer.json, spiece.model"),
        (
            {"tokenizer_config__json": {"tokenizer_class": "BertJapaneseTokenizer",
             "word_tokenizer_type": "mecab"}, "vocab__txt": "[UNK]"},
            "names no dictionary for MeCab.*ipadic before 4.45",
        ),
        (
            {"tokenizer_config__json": {"tokenizer_class": "BertJapaneseTokenizer",
             "word_tokenizer_type": "jumanpp"}, "vocab__txt": "[UNK]"},
            "words: is 'jumanpp'; wanted one of: mecab, basic",
        ),
        (
            {"tokenizer_config__json": {"tokenizer_class": "BertTokenizer", "added_tokens_decoder":
             {"7": {"content": "[UNK]"}}}, "vocab__txt": "[UNK]\n"},
            r"'\[UNK\]' is 7 for added_tokens_decoder, 0 for the vocabulary",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_missing_or_unknown_is_named(tmp_path, files, message):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=message):
        pretrained_tokenizer(folder_of(tmp_path, **files))


def test_the_files_of_tokenizers_are_known_by_name():
    assert {"tokenizer.json", "vocab.txt", "merges.txt", "spiece.model"} <= set(TOKENIZER_FILES)
    assert len(set(TOKENIZER_FILES)) == len(TOKENIZER_FILES)
