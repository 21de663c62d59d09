"""Tokenizers of folders give the ids of transformers, on real texts and on odd ones."""

import io
import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from qkv_jax.data import pretrained_tokenizer
from qkv_jax.data.mecab import mecab_tagger

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; `make test-all` installs it"
)
library = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

pytestmark = pytest.mark.oracle

SHARED = Path(__file__).parents[3] / "shared" / "data"
SYMBOLS = ("a <mask> </s>a<|endoftext|> b", "a <extra_id_0> b<extra_id_99>")
ODD = (
    "", "\n", "😀猫😀", "ﾊﾝｶｸ ｶﾅ ｶﾞ", "ＡＢＣ\u3000ｄｅｆ",
    "は" * 100, "は" * 101, "か\u3099 は", "ab\0cd 猫",
    "一\n二\r\n三\t四\u2028五\x85六", "<script>alert(1)</script>", "a [MASK]は[UNK][CLS",
    "［ＭＡＳＫ］", "İstanbul ÀÉ é e\u0301 がか\u3099", "\ufeff猫\u200b犬\ufffd", "㌔㍉①𠮷野家",
    "Hello, World! don't 100%", *SYMBOLS,
)  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def read(name):
    if not (path := SHARED / name).exists():
        pytest.skip(f"{name} is not in {SHARED}")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def japanese():
    """Soseki's cat, and sentences whose words are told apart by spaces."""
    pairs = [read(f"small_parallel_enja/{part}.ja") for part in ("train", "dev", "test")]
    spaced = [line for text in pairs for line in text.splitlines()[::5]]
    return [
        *read("wagahaiwa_nekodearu_sentencepiece.txt").splitlines(),
        *spaced, *(line.replace(" ", "") for line in spaced),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def english():
    text = read("the-verdict.txt")
    return [text, *text.splitlines()]


@pytest.fixture(scope="module")
def vocabulary(japanese):
    """4,000 pieces of MeCab's words in the text."""
    pytest.importorskip("fugashi")
    pytest.importorskip("ipadic")
    pytest.importorskip("unidic_lite")
    tagger, model = mecab_tagger("ipadic"), library.models.WordPiece(unk_token="[UNK]")
    trained = library.Tokenizer(model)
    trained.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    words = (
        " ".join(word.surface for word in tagger(unicodedata.normalize("NFKC", line)))
        for line in japanese[::3]
    )
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=4000, show_progress=False, special_tokens=SPECIAL
    )
    trained.train_from_iterator(words, trainer)
    ids = trained.get_vocab()
    return "".join(f"{piece}\n" for piece in sorted(ids, key=ids.get))


def assert_same_ids(theirs, folder, texts):
    ours = pretrained_tokenizer(folder)
    assert ours.vocab_size == len(theirs)
    for text in texts:
        assert ours.encode_framed(text).tolist() == theirs.encode(text), text
    plain = theirs.encode(texts[0], add_special_tokens=False)
    assert ours.encode(texts[0]).tolist() == plain


@pytest.mark.parametrize("arguments", [
    {"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": "ipadic"}},
    {"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": "unidic_lite"},
     "do_lower_case": True, "never_split": ["World"]},
    {"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": "unidic_lite"},
     "subword_tokenizer_type": "character"},
    {"word_tokenizer_type": "mecab", "do_subword_tokenize": False,
     "mecab_kwargs": {"mecab_dic": "ipadic", "normalize_text": False}},
    {"word_tokenizer_type": "basic", "do_lower_case": True, "never_split": ["World"]},
    {"word_tokenizer_type": "basic", "subword_tokenizer_type": "character"},
    {"do_word_tokenize": False, "mask_token": "<mask>"},
], ids=str)  # fmt: skip
def test_japanese_bert(arguments, vocabulary, japanese, tmp_path):
    (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    theirs = transformers.BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), **arguments)
    theirs.save_pretrained(tmp_path / "saved")
    assert_same_ids(theirs, tmp_path / "saved", [*japanese, *ODD])


@pytest.mark.parametrize(
    "said",
    [{}, {"do_lower_case": False, "strip_accents": True}, {"tokenize_chinese_chars": False}],
    ids=str,
)
def test_bert_of_a_vocab_txt(said, vocabulary, japanese, english, tmp_path):
    (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer"} | said
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    assert_same_ids(theirs, tmp_path, [*english, *japanese[::7], *ODD])


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
@pytest.mark.parametrize("kind", ["GPT2", "Roberta"])
def test_gpt2_and_roberta_of_a_vocabulary_and_merges(names, kind, japanese, english, tmp_path):
    read("gpt2_bpe/vocab.bpe")
    for name, ours, theirs in zip(
        ("encoder.json", "vocab.bpe"), names, ("vocab.json", "merges.txt"), strict=True
    ):
        shutil.copy(SHARED / "gpt2_bpe" / name, tmp_path / ours)
        (tmp_path / "theirs").mkdir(exist_ok=True)
        shutil.copy(SHARED / "gpt2_bpe" / name, tmp_path / "theirs" / theirs)
    config = {"tokenizer_class": f"{kind}Tokenizer"}
    if kind == "Roberta":  # as roberta-base has it
        config["mask_token"] = {
            "__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": False,
            "rstrip": False, "single_word": False,
        }  # fmt: skip
    for folder in (tmp_path, tmp_path / "theirs"):
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = getattr(transformers, f"{kind}Tokenizer").from_pretrained(tmp_path / "theirs")
    if kind == "GPT2":
        assert len(theirs.encode(english[0])) == 5_145
    assert_same_ids(theirs, tmp_path, [*english, *japanese[::7], *ODD])


def trained_pieces(texts, **settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=5000, num_threads=1,
        hard_vocab_limit=False, minloglevel=2, max_sentence_length=2**16, **settings,
    )  # fmt: skip
    return model.getvalue()


def assert_odd_texts_are_as_in_sentencepiece(folder, pieces):
    """transformers normalises some of them otherwise than the models' own library."""
    ours = pretrained_tokenizer(folder)
    library = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    for text in set(ODD) - set(SYMBOLS):
        assert ours.encode(text).tolist() == library.encode(text), text


def test_t5_of_a_sentencepiece_model(japanese, english, tmp_path):
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    pieces = trained_pieces([*english, *japanese[::9]], model_type="unigram", **special)
    (tmp_path / "spiece.model").write_bytes(pieces)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert_same_ids(theirs, tmp_path, [*english, *japanese[::7], *SYMBOLS])
    assert_odd_texts_are_as_in_sentencepiece(tmp_path, pieces)


def test_t5s_own_vocabulary_reads_english_as_theirs(english, tmp_path):
    read("the-verdict.txt")
    if not (path := SHARED / "t5_32k_sentencepiece.model").exists():
        pytest.skip(f"T5's vocabulary is not in {SHARED}")
    shutil.copy(path, tmp_path / "spiece.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    assert_same_ids(transformers.T5Tokenizer.from_pretrained(tmp_path), tmp_path, english)


@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
def test_llama_and_gemma_of_a_sentencepiece_model(kind, japanese, english, tmp_path):
    settings = {
        "Llama": {},
        "Gemma": {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>",
                  "bos_piece": "<bos>", "add_dummy_prefix": False},
    }[kind]  # fmt: skip
    pieces = trained_pieces(
        [*english, *japanese[::9]], model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, **settings,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    config = {"tokenizer_class": f"{kind}Tokenizer", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = getattr(transformers, f"{kind}Tokenizer").from_pretrained(tmp_path)
    ours = pretrained_tokenizer(tmp_path)
    for text in [*english, *japanese[::7]]:
        if not text.startswith((" ", "\u3000")):  # transformers merges it with the space before
            assert ours.encode_framed(text).tolist() == theirs.encode(text), text
    assert_odd_texts_are_as_in_sentencepiece(tmp_path, pieces)
