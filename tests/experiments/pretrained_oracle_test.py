"""A Japanese BERT that transformers writes is looked into and converted, its tokenizer with it."""

import pytest

from qkv_jax.data import pretrained_tokenizer
from tests.experiments.runs import assert_one_sentence
from tests.pages import data_of

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-all` installs it")
transformers = pytest.importorskip("transformers")
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
