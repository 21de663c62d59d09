"""A text of Aozora Bunko is what a reader reads of it."""

from pathlib import Path

import pytest

from qkv_jax.data import aozora_text, documents, load_corpus

NOVEL = Path(__file__).parents[3] / "shared/data/wagahaiwa_nekodearu_sentencepiece.txt"
RULE = "-" * 55
FILE = f"""表題
作者
{RULE}
【テキスト中に現れる記号について】
《》：ルビ
（例）吾輩《わがはい》は猫である
{RULE}
［＃８字下げ］一［＃「一」は中見出し］
　吾輩《わがはい》は猫である。一番｜獰悪《どうあく》な種族、それは底本：ではない。
{RULE}
殷※［＃「にんべん＋鬼」、第4水準2-1-91］と［＃「※［＃「口＋愛」、第3水準1-15-23］」に傍点］は｜。

底本：「全集1」
　　　1987（昭和62）年
青空文庫作成ファイル：
"""


def test_ruby_notes_legend_and_colophon_are_taken_from_a_text():
    assert aozora_text(FILE).split("\n") == [
        "表題",
        "作者",
        "一",
        "　吾輩は猫である。一番獰悪な種族、それは底本：ではない。",
        RULE,
        "殷〓とは｜。",
        "",
        "",
    ]


@pytest.mark.parametrize(
    "text", ["", "ふつうの文章。\n", "a《b\nc》d｜e", f"a\n{RULE}\nb\n{RULE}\nc"]
)
def test_a_text_without_any_of_it_stays_as_it_is(text):
    assert aozora_text(text) == text


def test_a_corpus_of_its_files_is_stripped_file_by_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(FILE.replace("\n", "\r\n").encode())
    (tmp_path / "b.txt").write_text("終《おわ》り。底本\n", encoding="utf-8")
    corpus = load_corpus("aozora", tmp_path)
    assert corpus.text == aozora_text(FILE) + "\n終り。底本\n"
    assert corpus.name == "aozora" and corpus.source.endswith("(2 files)")
    assert list(documents("aozora", tmp_path).values())[1] == "終り。底本\n"
    (tmp_path / "b.txt").write_text("底本：「全集」")
    with pytest.raises(ValueError, match=r"aozora: .*b\.txt' is empty"):
        load_corpus("aozora", tmp_path)
    with pytest.raises(ValueError, match=r"aozora: .*none\.txt' does not exist"):
        load_corpus("aozora", tmp_path / "none.txt")
    with pytest.raises(ValueError, match="corpus 'aozora' needs a path"):
        load_corpus("aozora")


def test_nothing_but_the_novel_is_left_of_sosekis_cat():
    if not NOVEL.exists():
        pytest.skip(f"the novel is not in {NOVEL.parent}")
    text = load_corpus("aozora", NOVEL).text
    assert text.startswith("吾輩は猫である\n夏目漱石\n一\n　吾輩は猫である。名前はまだ無い。\n")
    assert text.endswith("南無阿弥陀仏南無阿弥陀仏。ありがたいありがたい。\n")
    assert not set("《》｜［］＃※") & set(text)
    assert text.count("〓") == 34
