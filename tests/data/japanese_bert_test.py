"""Japanese BERT's tokens: what its parts do, and how mistakes are named."""

import pytest

from qkv_jax.data.japanese_bert import JapaneseBertTokenizer, basic_words
from qkv_jax.data.special_tokens import FramedTokenizer
from qkv_jax.data.tokenizers import Tokenizer

VOCABULARY = [
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "猫",
    "は",
    "東京",
    "##都",
    "a",
    "##b",
    "が",
    "東",
]
SPECIAL = {name: i for i, name in enumerate(VOCABULARY[:4])}

pytest.importorskip("fugashi")


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("ipadic")
    inner = JapaneseBertTokenizer(VOCABULARY, dictionary="ipadic", never_split=tuple(SPECIAL))
    return FramedTokenizer(inner, SPECIAL, before=["[CLS]"], after=["[SEP]"])


def test_a_text_is_words_and_their_pieces_between_special_tokens(tokenizer):
    ids = tokenizer.encode_framed("猫は ab[MASK]犬")
    assert tokenizer.labels(ids) == [
        "[CLS]", "猫", "は", "a", "##b", "[MASK]", "[UNK]", "[SEP]",
    ]  # fmt: skip
    assert ids[1:-1].tolist() == tokenizer.encode("猫は ab[MASK]犬").tolist()
    assert tokenizer.decode(ids) == "[CLS]猫はab[MASK][UNK][SEP]"
    assert tokenizer.encode("").tolist() == []


def test_full_width_letters_are_read_as_plain_ones(tokenizer):
    assert tokenizer.labels(tokenizer.encode("ａｂ")) == ["a", "##b"]


def test_saved_as_json_it_is_the_same_when_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "東京都は猫[SEP]が"
    assert loaded.encode_framed(text).tolist() == tokenizer.encode_framed(text).tolist()
    assert loaded.to_json() == tokenizer.to_json()


def test_a_word_of_more_than_a_hundred_characters_is_unknown():
    tokenizer = JapaneseBertTokenizer(VOCABULARY, words="basic")
    assert len(tokenizer.encode("a" + 99 * "b")) == 100
    assert tokenizer.labels(tokenizer.encode("a" + 100 * "b")) == ["[UNK]"]


def test_basic_words_stand_between_spaces_and_marks():
    words = basic_words("Hé\u0301, [MASK] Tom-猫\0", lowercase=True, never_split=["[MASK]", "Tom"])
    assert list(words) == ["he", ",", "[MASK]", "tom", "-", "猫"]
    assert list(basic_words("か\u3099", lowercase=False, never_split=())) == ["が"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"words": "sudachi"}, "words: is 'sudachi'; wanted one of: mecab, basic, none"),
        ({"pieces": "sentencepiece"}, "pieces: is 'sentencepiece'; wanted one of: wordpiece"),
        ({"dictionary": "unidic"}, "dictionary is 'unidic'; wanted one of: ipadic, unidic_lite"),
        ({"unknown": "<unk>"}, "vocabulary: has no '<unk>'"),
    ],
)
def test_what_it_cannot_do_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        JapaneseBertTokenizer(VOCABULARY, **arguments)


def test_wrong_json_is_named(tokenizer):
    with pytest.raises(ValueError, match="'japanese_bert' is wrong"):
        Tokenizer.from_json('{"tokenizer": "japanese_bert", "vocab": []}')
    with pytest.raises(ValueError, match="'framed' has no 'special'"):
        Tokenizer.from_json('{"tokenizer": "framed", "special": [1]}')


def test_a_frame_of_unknown_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"special: has no '\[BOS\]'"):
        FramedTokenizer(tokenizer.inner, SPECIAL, before=["[BOS]"])
