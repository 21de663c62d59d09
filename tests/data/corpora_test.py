"""The default corpus, and texts of one's own."""

import hashlib
import os
import subprocess
import sys

import pytest

from qkv_jax.data import corpora
from qkv_jax.data.corpora import Corpus, load_corpus, python_docs, text_file

PARAGRAPH = "A sentence about attention that is long enough to be called prose, number {}."


@pytest.fixture(scope="module")
def docs(tmp_path_factory) -> Corpus:
    """The real corpus, parsed once into a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return python_docs()


@pytest.fixture
def small_docs(tmp_path, monkeypatch):
    """A standard library of one module, long enough to pass for one; the test may change it."""
    stdlib, cache = tmp_path / "stdlib", tmp_path / "cache"
    stdlib.mkdir()
    words = " ".join(f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}" for i in range(40_000))
    (stdlib / "module.py").write_text(f'"""{words}"""\n')
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(stdlib))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return stdlib, cache / "qkv_jax"


def write_library(folder, files: dict[str, str]):
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return folder


def docs_text(folder) -> str:
    return corpora._joined(corpora._python_docs_pieces(folder))


# --- python_docs ---------------------------------------------------------------------------------


def test_the_default_corpus_is_a_large_english_text_of_few_characters(docs):
    assert len(docs.text) > 1_500_000
    assert len(set(docs.text)) <= 96
    assert docs.text.isascii()
    assert sum(map(docs.text.count, (" the ", " of ", " is "))) > 20_000


def test_the_default_corpus_holds_the_reference_and_the_docstrings(docs):
    assert "Assert statements are a convenient way to insert debugging" in docs.text  # a topic
    assert "JSON (JavaScript Object Notation)" in docs.text  # a module


def test_the_default_corpus_says_its_version_and_its_digest(docs):
    assert docs.name == "python_docs"
    assert docs.source.startswith(f"Python {sys.version.split()[0]}")
    assert docs.sha256 == hashlib.sha256(docs.text.encode()).hexdigest()


def test_the_default_corpus_is_the_same_when_parsed_again_elsewhere(docs, tmp_path):
    code = "from qkv_jax.data.corpora import python_docs; print(python_docs().sha256)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.strip() == docs.sha256
    assert output.stderr == ""


def test_the_tail_of_the_default_corpus_is_of_the_same_kind_and_repeats_nothing(docs):
    boundary = int(0.9 * len(docs.text))
    head, tail = docs.text[:boundary], docs.text[boundary:]
    for word in (" the ", "Return ", " object", " file", " class "):
        rate_in_head, rate_in_tail = head.count(word) / len(head), tail.count(word) / len(tail)
        assert 0.5 < rate_in_tail / rate_in_head < 2.0, word
    known = set(head.split("\n\n"))
    paragraphs = tail.split("\n\n")[1:]  # the first one is cut
    assert len(paragraphs) > 500
    assert not known.intersection(paragraphs)


def test_the_default_corpus_has_no_tests_no_doctests_and_no_underlines(tmp_path):
    keep = PARAGRAPH.format("one")
    write_library(
        tmp_path,
        {
            "a.py": f'"""Title words\n===========\n\n{keep}\n\n>>> f(1, 2)\n[3, 4.5, (6, 7)]\n"""',
            "test/b.py": '"""A test that must not be there at all."""',
            "pkg/tests/c.py": '"""Another test that must not be there."""',
            "site-packages/d.py": '"""An installed package of somebody else."""',
        },
    )
    text = docs_text(tmp_path)
    assert sorted(text.strip().split("\n\n")) == [keep, "Title words"]


def test_docstrings_are_read_from_definitions_wherever_they_stand(tmp_path):
    source = '''
try:
    if flag:
        class A:
            """Of the class."""
            async def f(self):
                """Of the method."""
                def g():
                    """Of the inner one."""
    else:
        class B:
            """Of the other class."""
except Exception:
    def h():
        """Of the handler."""
finally:
    match flag:
        case 1:
            def i():
                """Of the case."""
x = """No docstring at all."""
'''
    text = docs_text(write_library(tmp_path, {"a.py": source}))
    names = ["class", "method", "inner one", "other class", "handler", "case"]
    assert text.strip().split("\n\n") == [f"Of the {name}." for name in names]


def test_the_references_topics_are_read_without_importing_them(tmp_path):
    source = (
        "raise SystemExit('imported')\ntopics = {'b': 'Of b,\\n' '\\tindented.', 'a': 'Of a.'}\n"
    )
    text = docs_text(write_library(tmp_path, {"pydoc_data/topics.py": source}))
    assert sorted(text.strip().split("\n\n")) == ["Of a.", "Of b,\n        indented."]


def test_a_paragraph_whose_words_were_there_before_is_dropped(tmp_path):
    files = {
        "a.py": '"""Codec cp437 made from \'A.TXT\' by a program."""',
        "b.py": '"""codec cp850 made from \'B.TXT\' by\na program!"""',
        "c.py": '"""Codec made of nothing by a program."""',
    }
    text = docs_text(write_library(tmp_path, files))
    assert "cp437" in text and "cp850" not in text and "of nothing" in text


def test_no_foreign_character_survives(tmp_path):
    source = '"""“Quoted” — it’s a café’s naïve Straße… with a π and a 😀\tand a tab."""'
    text = docs_text(write_library(tmp_path, {"a.py": source}))
    assert "\"Quoted\" -- it's a cafe's naive Strasse... with a ? and a ?" in text
    assert "\t" not in text


def test_sources_that_do_not_parse_are_skipped_and_nothing_is_run(tmp_path):
    files = {
        "a.py": '"""Kept, though it has a bad escape: \\d."""\nraise SystemExit("it was run")',
        "b.py": "print 'Python 2'",
        "c.py": '"""A NUL byte follows."""\0',
    }
    write_library(tmp_path, files)
    (tmp_path / "d.py").write_bytes(b'"""Not UTF-8: \xff."""')
    assert docs_text(tmp_path) == "Kept, though it has a bad escape: \\d.\n"


def test_long_documents_are_cut_between_paragraphs_and_mixed(tmp_path):
    letters = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(211)]
    docs = "\n\n".join(PARAGRAPH.format(name) for name in letters)
    write_library(tmp_path, {"a.py": f'"""{docs}"""', "b.py": '"""Another module altogether."""'})
    paragraphs = docs_text(tmp_path).strip().split("\n\n")
    assert sorted(paragraphs) == sorted([*docs.split("\n\n"), "Another module altogether."])
    assert paragraphs[:-1] != docs.split("\n\n")  # pieces in the order of a hash


def test_a_python_without_sources_is_told_to_use_a_text_file(small_docs):
    stdlib, _ = small_docs
    (stdlib / "module.py").unlink()
    with pytest.raises(ValueError, match="text_file"):
        python_docs()


# --- documents ----------------------------------------------------------------------------------


def test_the_default_corpus_is_made_of_its_documents(monkeypatch):
    pieces = {"topic if:0": "One.", "a/b.py:0": "Two.\n\nThree.", "a/b.py:1": "Four."}
    monkeypatch.setattr(corpora, "_cached_pieces", lambda: pieces)
    assert corpora.documents("python_docs") == {
        "topic if": "One.", "a/b.py": "Two.\n\nThree.\n\nFour.",
    }  # fmt: skip
    assert sorted(python_docs().text.split()) == ["Four.", "One.", "Three.", "Two."]


def test_the_documents_of_files_are_the_files(tmp_path):
    write_library(tmp_path, {"b.txt": "Of b.", "a.txt": "Of a."})
    assert corpora.documents("text_file", tmp_path) == {
        str(tmp_path / "a.txt"): "Of a.", str(tmp_path / "b.txt"): "Of b.",
    }  # fmt: skip
    for name, path, words in (("python_docs", "x", "takes no path"), ("y", None, "unknown")):
        with pytest.raises(ValueError, match=words):
            corpora.documents(name, path)


# --- the cache -----------------------------------------------------------------------------------


def test_the_second_call_reads_the_cache(small_docs):
    stdlib, _ = small_docs
    first = python_docs()
    (stdlib / "module.py").unlink()
    assert python_docs() == first


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "not ascii"])
def test_a_damaged_cache_is_made_anew(small_docs, damage):
    _, cache = small_docs
    first = python_docs()
    (file,) = cache.iterdir()
    good = file.read_bytes()
    bad = {
        "flip": good[:1000] + bytes([good[1000] ^ 1]) + good[1001:],
        "truncate": good[: len(good) // 2],
        "empty": b"",
        "not ascii": b"\xff" + good,
    }[damage]
    file.write_bytes(bad)
    assert python_docs() == first
    assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_no_error(small_docs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(python_docs().text) > 100_000


def test_the_cache_is_another_for_another_format(small_docs, monkeypatch):
    _, cache = small_docs
    python_docs()
    monkeypatch.setattr(corpora, "PYTHON_DOCS_FORMAT", corpora.PYTHON_DOCS_FORMAT + 1)
    python_docs()
    assert len(list(cache.iterdir())) == 2


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):  # the XDG specification ignores relative ones
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert corpora._cache_path(tmp_path).parent == tmp_path / ".cache" / "qkv_jax"


# --- text_file -----------------------------------------------------------------------------------


def test_one_file_is_read_as_it_stands(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffZeile eins\r\nund é\r\n".encode())
    corpus = text_file(tmp_path / "a.txt")
    assert corpus.text == "Zeile eins\nund é\n"
    assert corpus.sha256 == hashlib.sha256("Zeile eins\nund é\n".encode()).hexdigest()
    assert corpus.source == f"{tmp_path / 'a.txt'} (1 file)"


def test_a_directory_is_all_its_visible_files_sorted(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden", ".git/config", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    corpus = text_file(tmp_path)
    assert corpus.text == "a/z.md\n\nb.txt\n\nc\n"
    assert corpus.source.endswith("(3 files)")


def test_a_glob_is_what_it_matches_sorted(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/z.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert text_file(f"{tmp_path}/**/*.txt").text == "a/z.txt\nb.txt"


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    assert text_file(tmp_path / "a[1].txt").text == "brackets"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.txt' is empty"),
        (b" \n\t\n", "bad.txt' is empty"),
        (b"\xef\xbb\xbf", "bad.txt' is empty"),
        (b"text\0text", "bad.txt' is binary: byte 4 is NUL"),
        (b"caf\xe9 au lait", "bad.txt' is not UTF-8: byte 3 is 0xe9"),
        ("UTF-16".encode("utf-16"), "bad.txt' is binary"),
    ],
)
@pytest.mark.parametrize("place", ["bad.txt", "*.txt", "."])
def test_a_file_that_is_no_text_is_named(tmp_path, content, message, place):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text_file(tmp_path / place)


@pytest.mark.parametrize("place", ["absent.txt", "*.md", "folder", "x" * 5000, "~no-such-user/x"])
def test_a_path_to_nothing_is_named(tmp_path, monkeypatch, place):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"text_file: .*(absent|md|folder|xxx|no-such-user)"):
        text_file(place)


# --- load_corpus ---------------------------------------------------------------------------------


def test_load_corpus_chooses_by_name(tmp_path, docs, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    assert load_corpus("text_file", tmp_path / "a.txt").text == "text"
    monkeypatch.setattr(corpora, "python_docs", lambda: docs)
    assert load_corpus("python_docs") is docs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shakespeare",), "'shakespeare' is unknown; wanted one of: python_docs, text_file"),
        (("text_file",), "needs a path"),
        (("text_file", ""), "needs a path"),
        (("python_docs", "a.txt"), "takes no path, got 'a.txt'"),
    ],
)
def test_load_corpus_says_what_it_wants(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(*arguments)
