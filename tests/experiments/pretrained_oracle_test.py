"""Folders that transformers writes are looked into and converted, their tokenizers with them."""

import pytest

from qkv_jax.data import pretrained_tokenizer
from tests.experiments.runs import assert_one_sentence
from tests.pages import data_of

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-all` installs it")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("fugashi")
pytest.importorskip("ipadic")

pytestmark = pytest.mark.oracle

VOCABULARY = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "吾輩", "は", "猫", "で", "ある", "。", "名前",
    "まだ", "##無", "無い",
)  # fmt: skip
TEXT = "吾輩は [MASK]である。名前はまだ無い鬱。"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("japanese") / "bert"
    path.mkdir()
    (path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in VOCABULARY), encoding="utf-8")
    transformers.BertJapaneseTokenizer(
        str(path / "vocab.txt"), word_tokenizer_type="mecab", mecab_kwargs={"mecab_dic": "ipadic"}
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=31, max_position_embeddings=40,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(path)
    return path


def queries_of(scripts, folder, page, *flags):
    done = scripts.run("visualize", f"--checkpoint={folder}", f"--out={page}", *flags)
    assert done.returncode == 0, done.stderr
    return data_of(page.read_text(encoding="utf-8"))["views"][0]["queries"]


def test_a_page_names_its_tokens(scripts, folder, tmp_path):
    theirs = transformers.BertJapaneseTokenizer.from_pretrained(folder)
    queries = queries_of(scripts, folder, tmp_path / "page.html", f"--text={TEXT}")
    assert queries == theirs.convert_ids_to_tokens(theirs.encode(TEXT))
    assert queries[:4] == ["[CLS]", "吾輩", "は", "[MASK]"] and "[UNK]" in queries


def test_a_text_is_cut_where_it_stands(scripts, folder, tmp_path):
    flags = (f"--text={TEXT}", "--num_tokens=3")
    queries = queries_of(scripts, folder, tmp_path / "page.html", *flags)
    assert queries == ["[CLS]", "吾輩", "は", "[MASK]", "[SEP]"]  # spaces are none


def test_a_converted_folder_has_all_files_of_the_tokenizer(scripts, folder, tmp_path):
    done = scripts.run("convert", f"--checkpoint={folder}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "tokenizer_config.json, vocab.txt" in done.stdout
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "BertJapaneseTokenizer"
    ours = pretrained_tokenizer(tmp_path / "out")
    assert ours.encode_framed(TEXT).tolist() == theirs.encode(TEXT)


def test_a_folder_without_its_vocabulary_is_named(scripts, folder, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    done = scripts.run("visualize", f"--checkpoint={tmp_path}", f"--text={TEXT}")
    assert_one_sentence(done, "vocab.txt", "cannot be read")


# T5


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A T5 that knows nothing, and pieces of a few sentences."""
    path = tmp_path_factory.mktemp("t5") / "t5"
    path.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ran to the cat and sat"] * 20),
        model_prefix=str(path / "spiece"), vocab_size=40, model_type="unigram", pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (path / "spiece.vocab").unlink()
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=144, d_model=24, d_kv=5, d_ff=31, num_layers=2, num_heads=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(path)
    return path


def test_a_page_of_t5_shows_what_it_reads_and_writes(scripts, t5, tmp_path):
    text = "the cat sat"
    done = scripts.run(
        "visualize", f"--checkpoint={t5}", f"--text={text}", f"--out={tmp_path / 'page.html'}"
    )
    assert done.returncode == 0, done.stderr
    views = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["views"]
    assert [view["name"] for view in views] == ["decoder to source", "encoder", "decoder"]
    model = transformers.T5ForConditionalGeneration.from_pretrained(t5)
    source = pretrained_tokenizer(t5).encode_framed(text)
    written = model.generate(torch.tensor(source[None]), max_new_tokens=64, do_sample=False)
    labels = pretrained_tokenizer(t5).labels
    assert views[0]["keys"] == labels(source)
    assert views[0]["queries"] == labels(written[0, 1:].numpy())
    assert views[2]["queries"] == labels(written[0, :-1].numpy())


def test_t5_has_no_perplexity_of_a_text(scripts, t5, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat")
    done = scripts.run("evaluate", f"--checkpoint={t5}", f"--text={tmp_path / 'a.txt'}")
    assert_one_sentence(done, "checkpoint", "t5")
