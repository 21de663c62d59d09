"""Making token files: any number of workers, and any interruption, leave the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qkv_jax import data
from qkv_jax.data import document_files
from qkv_jax.data.document_files import parts_of, pieces_of
from qkv_jax.data.token_writing import WORK, all_characters, sample_text, tokenizer_for

ROOT = Path(__file__).parents[2]
DOCUMENTS = [f"document {i}:\nünï 猫\u3000\n\n{'x ' * (i % 13)}." for i in range(53)]
READING = data.Reading(part_bytes=101)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def write(inputs, folder, **options):
    return data.write_token_files(
        inputs, folder, lambda _: data.ByteTokenizer(), named="byte",
        **{"reading": READING} | options,
    )  # fmt: skip


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [1, 3, 17, 101, 10**6])
def test_parts_of_any_size_have_the_same_documents(tmp_path, lines, part_bytes, monkeypatch):
    monkeypatch.setattr(document_files, "PIECE_BYTES", 23)

    def read(path, **how):
        return [piece for part in parts_of([path], part_bytes) for piece in pieces_of(part, **how)]

    def whole(pieces):  # the documents, put together of their pieces
        texts, open_document = [], False
        for piece in pieces:
            assert piece.begins != open_document
            texts = [*texts, piece.text] if piece.begins else [*texts[:-1], texts[-1] + piece.text]
            open_document = not piece.ends
        assert not open_document
        return texts

    assert whole(read(lines)) == DOCUMENTS
    text = tmp_path / "text.txt"
    text.write_text("\ufeff" + "\n".join(DOCUMENTS) + "\n", encoding="utf-8", newline="\r\n")
    assert whole(read(text)) == ["\n".join(DOCUMENTS) + "\n"]
    separated = tmp_path / "separated.txt"
    separated.write_text("<|end|>\n" + "\n<|end|>\n".join(DOCUMENTS) + "\n<|end|>\n<|end|>\n")
    assert whole(read(separated, separator="<|end|>")) == DOCUMENTS


def test_a_long_text_has_the_tokens_of_the_whole_whatever_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(document_files, "PIECE_BYTES", 67)
    text = "\n\n".join(DOCUMENTS)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = data.build_tokenizer("bpe", text, vocab_size=300)
    reading = data.Reading(part_bytes=499, end_of_document="")
    files = data.write_token_files(
        [tmp_path / "text.txt"], tmp_path / "out", lambda _: tokenizer, named="", reading=reading
    )
    np.testing.assert_array_equal(files.tokens, tokenizer.encode(text))
    assert np.asarray(files.documents).tolist() == [0]


WRONG = {
    "a.jsonl": [
        (b'{"text": "a"}\n\n{"text": \n', ["a.jsonl", "line 3", "not JSON"]),
        (b'{"text": "a"}\n[1]\n', ["line 2", "a string 'text'", "list"]),
        (b'{"text": "a"}\n{"text": 3}\n', ["line 2", "a string 'text'"]),
        (b'{"body": "a"}\n', ["line 1", "['body']"]),
        (b'{"text": "a\\ud800"}\n', ["line 1", "half a character"]),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2", "not UTF-8", "byte 24"]),
    ],
    "a.txt": [
        (b"abc\ndef\xff\n", ["a.txt", "not UTF-8", "byte 7"]),
        (b"abc\0", ["a.txt", "binary", "byte 3"]),
        (b"", ["a.txt", "is empty"]),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "words"), [(name, *case) for name in WRONG for case in WRONG[name]]
)
@pytest.mark.parametrize("part_bytes", [5, 101])
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, words, part_bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        write([tmp_path / name], tmp_path / "out", reading=data.Reading(part_bytes=part_bytes))
    assert all(word in str(raised.value) for word in words), raised.value


def test_documents_without_text_are_left_out_and_without_any_text_there_is_an_error(tmp_path):
    texts = ["", "a", "", "猫", ""]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = write([path], tmp_path / "out")
    assert np.asarray(files.tokens).tobytes().decode() == "a\n猫\n"
    assert np.asarray(files.documents).tolist() == [0, 2]
    path.write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="every document is empty"):
        write([path], tmp_path / "none")


def test_a_character_that_the_tokenizer_does_not_know_is_named_with_its_file(lines, tmp_path):
    with pytest.raises(ValueError, match=r"lines.jsonl'.*character 'd'"):
        data.write_token_files(
            [lines],
            tmp_path / "out",
            lambda _: data.CharTokenizer("x\n"),
            named="",
            reading=READING,
        )


def test_tokenizers_learn_from_all_parts(lines):
    parts = parts_of([lines], READING.part_bytes)
    assert all_characters(parts, READING) == "".join(sorted(set("".join(DOCUMENTS))))
    sample = sample_text(parts, READING, 2_000)
    assert 500 < len(sample) <= 2_000 + len(parts)
    assert "document 1:" in sample and "document 51:" in sample


def test_every_way_to_name_a_tokenizer_makes_tokens_that_decode(tmp_path, lines):
    text = "\n".join(DOCUMENTS)
    bpe = data.build_tokenizer("bpe", text, vocab_size=300)
    bpe.save(tmp_path / "saved.json")
    (tmp_path / "hub").mkdir()
    hub = tmp_path / "hub" / "tokenizer.json"
    hub.write_text(json.dumps(json.loads(bpe.to_json())["json"]), encoding="utf-8")
    names = {
        "byte": None, "char": None, "bpe": None, str(tmp_path / "saved.json"): None,
        str(tmp_path / "hub"): None,
    }  # fmt: skip
    for name, path in [*names.items(), ("bpe", str(hub))]:
        tokenizer = tokenizer_for(
            parts_of([lines], 500), READING, name, vocab_size=290, path=path, sample_bytes=10**6
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.vocab_size == 290 or name != "bpe" or path
    with pytest.raises(ValueError, match="takes no path"):
        tokenizer_for([], READING, "hub", vocab_size=290, path="a", sample_bytes=1)


def test_parquet_has_a_document_a_row(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": DOCUMENTS, "n": list(range(len(DOCUMENTS)))})
    parquet.write_table(table, path, row_group_size=7)
    parts = parts_of([path], 500)
    assert len(parts) > 2
    assert [piece.text for part in parts for piece in pieces_of(part)] == DOCUMENTS
    with pytest.raises(ValueError, match=r"wanted a column 'body', got \['n', 'text'\]"):
        list(pieces_of(parts[0], field="body"))
    with pytest.raises(ValueError, match="row 1: wanted a string 'n', got int"):
        list(pieces_of(parts[0], field="n"))
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match="row 2: wanted a string 'text', got NoneType"):
        list(pieces_of(parts_of([path], 500)[0]))
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="is not parquet"):
        parts_of([path], 500)


def test_parquet_without_pyarrow_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="pip install pyarrow"):
        parts_of([tmp_path / "a.parquet"], 500)


# --- writing ------------------------------------------------------------------------------------


def test_any_number_of_workers_writes_the_same_bytes(lines, tmp_path):
    seen = []
    files = write([lines], tmp_path / "one")
    ends = np.cumsum([len(f"{text}\n".encode()) for text in DOCUMENTS])
    assert np.asarray(files.documents).tolist() == [0, *ends[:-1]]
    write([lines], tmp_path / "two", workers=2, progress=lambda *now: seen.append(now))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert seen[0] == (0, len(seen) - 1, 0) and seen[-1][0] == len(seen) - 1
    assert seen[-1][2] == len(data.TokenFiles.open(tmp_path / "two").tokens)


def test_what_was_interrupted_goes_on_and_ends_the_same(lines, tmp_path):
    write([lines], tmp_path / "unbroken")

    def interrupt(done, parts, tokens):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write([lines], tmp_path / "out", progress=interrupt)
    assert len(list((tmp_path / "out" / WORK).glob("*.npz"))) == 3
    seen = []
    write([lines], tmp_path / "out", progress=lambda *now: seen.append(now))
    parts = seen[0][1]
    assert [done for done, *_ in seen] == [*range(3, parts + 1)]  # three were not made again
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


KILLED = """
import sys, time
from pathlib import Path
from qkv_jax import data
from qkv_jax.data import token_writing
write_part = token_writing._write_part
def slowly(*args):
    time.sleep(0.05)
    return write_part(*args)
token_writing._write_part = slowly
data.write_token_files([Path(sys.argv[1])], sys.argv[2], lambda _: data.ByteTokenizer(),
                       named="byte", reading=data.Reading(part_bytes=101))
"""


def test_what_was_killed_goes_on_and_ends_the_same(lines, tmp_path):
    write([lines], tmp_path / "unbroken")
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(lines), str(out)]
    process = subprocess.Popen(command, cwd=ROOT)
    while len(list(out.glob(f"{WORK}/*.npz"))) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (out / WORK / ".000050.npz.0123abcd").write_bytes(b"half a file, as a kill may leave")
    (out / ".tokens.npy").write_bytes(b"half")
    write([lines], out)
    assert contents(out) == contents(tmp_path / "unbroken")


def test_a_finished_folder_is_verified_and_another_input_or_setting_refused(lines, tmp_path):
    out = tmp_path / "out"
    first = write([lines], out)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert write([lines], out).sha256 == first.sha256
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(ValueError, match="another end_of_document"):
        write([lines], out, reading=data.Reading(part_bytes=101, end_of_document=""))
    content = bytearray((out / "tokens.npy").read_bytes())
    whole = bytes(content)
    content[-300] ^= 1
    (out / "tokens.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokens.npy .* not as it was made"):
        write([lines], out)
    (out / "tokens.npy").write_bytes(whole)
    os.utime(lines, ns=(0, 0))
    with pytest.raises(ValueError, match="another input, which may have changed"):
        write([lines], out)
