"""Tokenizers: what is encoded decodes to itself, and bad input is named."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qkv_jax.data import tokenizer_json, tokenizers
from qkv_jax.data.mecab import MecabTokenizer
from qkv_jax.data.tokenizer_json import BpeTokenizer
from qkv_jax.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    build_tokenizer,
)
from qkv_jax.data.unigram import UnigramTokenizer

TEXT = (
    "The cat sat on the mat.\n\n  Your journey starts with one step;\tthe cat's too — été 😀\r\n"
    * 7
)
JAPANESE = "私は学校に行く。\n  私は 猫である。\n" * 5
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    pytest.importorskip("tokenizers")
    return BpeTokenizer.train(TEXT, 307)


@pytest.fixture(scope="module")
def unigram() -> UnigramTokenizer:
    pytest.importorskip("sentencepiece")
    return UnigramTokenizer.train(TEXT, 512)


@pytest.fixture(scope="module")
def mecab() -> MecabTokenizer:
    pytest.importorskip("fugashi")
    pytest.importorskip("ipadic")
    return MecabTokenizer.train(TEXT + JAPANESE, 270)


@pytest.fixture(params=["char", "byte", "bpe", "unigram", "mecab"])
def tokenizer(request) -> Tokenizer:
    if request.param in ("char", "byte"):
        return build_tokenizer(request.param, TEXT)
    return request.getfixturevalue(request.param)


# --- all -----------------------------------------------------------------------------------------


def test_decoding_undoes_encoding(tokenizer):
    for text in ("", "\n", TEXT, TEXT[3:91]):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids.tolist()) == text
        assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert type(loaded) is type(tokenizer)
    assert (loaded.name, loaded.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
    np.testing.assert_array_equal(loaded.encode(TEXT), tokenizer.encode(TEXT))
    assert loaded.to_json() == tokenizer.to_json()
    assert os.listdir(tmp_path) == ["tokenizer.json"]


@pytest.mark.parametrize("ids", [[-1], [10_000], [[0, 1]], [0.0], ["a"]])
def test_ids_out_of_range_or_of_another_type_are_refused(tokenizer, ids):
    with pytest.raises(ValueError, match=r"ids .* wanted"):
        tokenizer.decode(np.array(ids))


def test_labels_are_the_texts_of_tokens_and_tell_the_parts_of_a_character(tokenizer):
    ids = tokenizer.encode(TEXT)
    labels = tokenizer.labels(ids)
    for id, label in zip(ids, labels, strict=True):
        alone = tokenizer.decode([id])
        assert label == alone or ("\ufffd" in alone and "·" in label and "\ufffd" not in label)


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_has_bytes(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_has_byte_pairs(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=()), min_size=1))  # lone surrogates too
@example(text="\ud800 alone")
@settings(max_examples=200, deadline=None)
def test_a_text_has_its_own_characters(text):
    tokenizer = Tokenizer.from_json(CharTokenizer(text).to_json())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text))


# --- char ----------------------------------------------------------------------------------------


def test_characters_are_numbered_in_the_order_of_their_code_points():
    tokenizer = CharTokenizer("hello\n😀é")
    assert tokenizer.characters == "\nehloé😀"
    assert tokenizer.encode("hole\n😀").tolist() == [2, 4, 3, 1, 0, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\ncé", r"'é' \(U\+00E9\) at position 4 \(line 2\).* 4 characters"),
        ("!ab", r"'!' \(U\+0021\) at position 0 \(line 1\)"),  # below all of its own
        ("ab\U0010ffff", r"U\+10FFFF\) at position 2"),  # above
        ("abBé", r"'B' \(U\+0042\) at position 2"),  # between; the first is named
    ],
)
def test_an_unknown_character_is_named_with_its_place(text, message):
    with pytest.raises(ValueError, match=message):
        CharTokenizer("abc\n" if "\n" in text else "abc").encode(text)


def test_no_characters_is_an_error():
    with pytest.raises(ValueError, match="characters is empty"):
        build_tokenizer("char", "")


# --- byte ----------------------------------------------------------------------------------------


def test_half_a_character_decodes_to_the_replacement_character():
    ids = ByteTokenizer().encode("é!")
    assert ids.tolist() == [0xC3, 0xA9, 0x21]
    assert ByteTokenizer().decode(ids[1:]) == "\ufffd!"


# --- bpe -----------------------------------------------------------------------------------------


def test_training_merges_frequent_strings_and_is_deterministic(bpe):
    assert bpe.vocab_size == 307
    assert len(bpe.encode(TEXT)) < 0.7 * len(TEXT.encode())
    assert BpeTokenizer.train(TEXT, 307).to_json() == bpe.to_json()


def test_the_bytes_of_a_character_are_labelled_with_it(bpe):
    assert bpe.labels(bpe.encode("a猫")) == ["a", "猫·1/3", "猫·2/3", "猫·3/3"]
    assert bpe.labels(bpe.encode("猫")[1:]) == ["<8C>", "<AB>"]
    assert bpe.labels(bpe.encode(" the")) == [" the"]


def test_a_short_text_trains_a_smaller_vocabulary(bpe):
    assert BpeTokenizer.train("aa", 307).vocab_size == 257


def test_encoding_in_pieces_changes_nothing(bpe, monkeypatch):
    whole = bpe.encode(TEXT)
    monkeypatch.setattr(tokenizer_json, "_CHUNK", 13)
    assert len(list(tokenizer_json._chunks(TEXT))) > 5
    np.testing.assert_array_equal(bpe.encode(TEXT), whole)


def test_a_tokenizer_json_is_loaded_instead_of_training(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe._tokenizer.to_str())
    loaded = build_tokenizer("bpe", "another text", path=path)
    np.testing.assert_array_equal(loaded.encode(TEXT), bpe.encode(TEXT))


def test_a_files_truncation_and_padding_are_its_trainings_alone(bpe):
    inner = bpe._tokenizer.from_str(bpe._tokenizer.to_str())
    inner.enable_truncation(7)
    inner.enable_padding(length=19)
    cut = BpeTokenizer(inner.to_str())
    for text in ("", TEXT):
        np.testing.assert_array_equal(cut.encode(text), bpe.encode(text))
        np.testing.assert_array_equal(cut.encode_framed(text), bpe.encode(text))


def test_gpt2_files_give_the_published_number_of_tokens():
    pytest.importorskip("tokenizers")
    if not (SHARED / "gpt2_bpe").is_dir():
        pytest.skip(f"GPT-2's vocabulary is not in {SHARED}")
    gpt2 = build_tokenizer("bpe", "", path=SHARED / "gpt2_bpe")
    text = (SHARED / "the-verdict.txt").read_text()
    assert gpt2.vocab_size == 50_257
    assert len(gpt2.encode(text)) == 5_145  # "Build a Large Language Model From Scratch", chapter 2
    assert gpt2.encode("Hello, world.").tolist() == [15496, 11, 995, 13]
    assert gpt2.encode("<|endoftext|>").size > 1  # no special token is hidden in a text
    assert gpt2.decode(gpt2.encode(text)) == text


def test_a_vocabulary_without_room_for_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="vocab_size is 255; wanted >= 256"):
        build_tokenizer("bpe", TEXT, vocab_size=255)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1", b"\0", b"\xff", b'{"model": {}}'])
def test_a_bad_tokenizer_file_is_named(tmp_path, content):
    pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json.*wanted a tokenizer\.json"):
        build_tokenizer("bpe", TEXT, path=tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"bad\.json' cannot be loaded"):
        Tokenizer.load(tmp_path / "bad.json")


def test_a_folder_without_gpt2s_files_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"folder with encoder\.json and vocab\.bpe"):
        build_tokenizer("bpe", TEXT, path=tmp_path)


# --- unigram -------------------------------------------------------------------------------------


@given(text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=("Cs",))))
@example(text="  two  spaces\n\n\ttab\r\n ")
@settings(max_examples=200, deadline=None)
def test_any_text_has_pieces(unigram, text):
    assert unigram.decode(unigram.encode(text)) == text


def test_pieces_are_frequent_strings_and_training_is_deterministic(unigram):
    assert len(unigram.encode(TEXT)) < 0.7 * len(TEXT)
    assert UnigramTokenizer.train(TEXT, 512).to_json() == unigram.to_json()
    assert unigram.vocab_size <= 512


def test_a_sentencepiece_model_is_loaded_instead_of_training(unigram, tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(unigram._model)
    loaded = build_tokenizer("unigram", "another text", path=path)
    np.testing.assert_array_equal(loaded.encode(TEXT), unigram.encode(TEXT))


def test_spaces_and_symbols_of_a_sentencepiece_model_are_seen():
    pytest.importorskip("sentencepiece")
    if not (path := SHARED / "t5_32k_sentencepiece.model").exists():
        pytest.skip(f"T5's vocabulary is not in {SHARED}")
    t5 = UnigramTokenizer.from_file(path)
    assert t5.labels(t5.encode("The house")) == [" The", " house"]
    assert t5.labels([1, 3]) == ["</s>", "<unk>"]


def test_t5s_vocabulary_gives_its_ids():
    pytest.importorskip("sentencepiece")
    path = SHARED / "t5_32k_sentencepiece.model"
    if not path.exists():
        pytest.skip(f"T5's vocabulary is not in {SHARED}")
    t5 = UnigramTokenizer.from_file(path)
    text = "The house is wonderful."
    ids = t5.encode(text)
    # T5's ids, as in transformers' documentation; this file has one more symbol before the pieces.
    assert (ids - 1).tolist() == [37, 629, 19, 1627, 5]
    assert t5.decode(ids) == text


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_bad_model_is_named(tmp_path, content):
    pytest.importorskip("sentencepiece")
    if content is not None:
        (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.model.*wanted a SentencePiece"):
        build_tokenizer("unigram", TEXT, path=tmp_path / "bad.model")


@pytest.mark.parametrize(
    ("text", "size", "message"), [(TEXT, 511, "wanted >= 512"), ("", 512, "cannot be learnt from")]
)
def test_what_no_unigram_model_can_be_trained_on_is_named(text, size, message):
    pytest.importorskip("sentencepiece")
    with pytest.raises(ValueError, match=message):
        build_tokenizer("unigram", text, vocab_size=size)


# --- mecab ---------------------------------------------------------------------------------------


@given(text=st.text(st.characters(exclude_categories=("Cs",))))
@example(text="私は\0学校に 行く。\u2028 \r\n そう\n")
@settings(max_examples=200, deadline=None)
def test_any_text_has_words_and_bytes(mecab, text):
    assert mecab.decode(mecab.encode(text)) == text


def test_japanese_is_cut_into_words():
    pytest.importorskip("fugashi")
    pytest.importorskip("ipadic")
    words = MecabTokenizer.train(JAPANESE, 400)
    assert {"私", "は", "学校", "に", "行く", "。", "猫"} <= set(words.words)
    ids = words.encode("私は学校に行く。")
    assert [words.decode(ids[i : i + 1]) for i in range(6)] == [
        "私",
        "は",
        "学校",
        "に",
        "行く",
        "。",
    ]
    assert len(words.encode("犬")) == 3  # its bytes


def test_a_word_vocabulary_needs_room_for_the_bytes():
    pytest.importorskip("fugashi")
    with pytest.raises(ValueError, match="wanted > 256"):
        build_tokenizer("mecab", JAPANESE, vocab_size=256)


# --- from_json, build_tokenizer, imports ---------------------------------------------------------


@pytest.mark.parametrize(
    ("json", "message"),
    [
        ("", "cannot be parsed"),
        ("[" * 100_000, "cannot be parsed"),
        ("[]", "'tokenizer': None; wanted one of: char, byte"),
        ('{"tokenizer": "unigram"}', "no string 'model'"),
        ('{"tokenizer": "mecab", "words": [1]}', "no list of strings 'words'"),
        ('{"tokenizer": "word"}', "'tokenizer': 'word'"),
        ('{"tokenizer": "char"}', "no string 'characters'"),
        ('{"tokenizer": "char", "characters": ["a"]}', "no string 'characters'"),
        ('{"tokenizer": "char", "characters": ""}', "characters is empty"),
    ],
)
def test_bad_json_is_refused(json, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_json(json)


def test_json_of_unreasonable_size_is_not_even_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "MAX_JSON_BYTES", 17)
    ByteTokenizer().save(tmp_path / "a.json")
    with pytest.raises(ValueError, match="wanted <= 17"):
        Tokenizer.load(tmp_path / "a.json")
    with pytest.raises(ValueError, match="wanted <= 17"):
        Tokenizer.from_json(ByteTokenizer().to_json())


def test_build_tokenizer_says_what_it_wants():
    with pytest.raises(ValueError, match="'word' is unknown; wanted one of: char, byte, bpe"):
        build_tokenizer("word", TEXT)
    with pytest.raises(ValueError, match=r"'char' takes no path, got 'a\.json'"):
        build_tokenizer("char", TEXT, path="a.json")


def test_a_missing_library_says_what_to_install(monkeypatch):
    for name, package in (
        ("bpe", "tokenizers"), ("unigram", "sentencepiece"), ("mecab", "ipadic"),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"pip install {package}"):
            build_tokenizer(name, TEXT, vocab_size=512)


def test_data_imports_neither_jax_nor_the_tokenizers_libraries():
    code = (
        "import sys, qkv_jax.data as d; d.build_tokenizer('char', 'abc')\n"
        "names = ('jax', 'flax', 'tokenizers', 'sentencepiece', 'torch')\n"
        "print([name for name in names if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
