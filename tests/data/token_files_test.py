"""Token files: never read whole, and whatever is wrong with them is one clear sentence."""

import json
import os
import tracemalloc

import numpy as np
import pytest

from qkv_jax import data
from qkv_jax.data.token_files import DOCUMENTS, HEADER, TOKENIZER, TOKENS, file_facts

TEXT = "The cat sat on the mat.\nIts tail was 猫's.\n" * 173


@pytest.fixture
def folder(tmp_path):
    """Token files of two documents."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXT + name, encoding="utf-8")
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    data.write_token_files(inputs, tmp_path / "out", lambda _: data.ByteTokenizer(), named="byte")
    return tmp_path / "out"


def test_a_folder_has_the_text_in_tokens_and_where_documents_begin(folder):
    files = data.TokenFiles.open(folder)
    assert files.tokenizer.decode(files.tokens) == TEXT + "a\n" + TEXT + "b\n"
    length = len(TEXT.encode()) + 2
    assert np.asarray(files.documents).tolist() == [0, length]
    assert files.characters == 2 * len(TEXT) + 4
    assert files.tokens.dtype == np.uint8 and not np.asarray(files.tokens).flags.writeable
    for (begin, end), expected in {
        (0, length): [0], (0, length + 1): [0, length], (7, 2 * length): [0, length - 7],
        (length, 2 * length): [0],
    }.items():  # fmt: skip
        assert np.asarray(files.documents_within(begin, end)).tolist() == expected
    files.verify()
    np.testing.assert_array_equal(np.load(folder / TOKENS), files.tokens)  # NumPy's own format


def test_windows_of_a_large_file_cost_no_memory_and_read_no_more_than_they_have(tmp_path):
    length, out = 2**25, tmp_path / "out"
    (tmp_path / "small.txt").write_text("abc")
    data.write_token_files(
        [tmp_path / "small.txt"], out, lambda _: data.ByteTokenizer(), named="byte"
    )
    header = json.loads((out / HEADER).read_text())
    with open(out / TOKENS, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (length,)}
        )
        file.truncate(file.tell() + length)  # zeros, of which no block is on the disk
    assert (out / TOKENS).stat().st_blocks * 512 < length // 8
    (out / HEADER).write_text(json.dumps(header | file_facts(out / TOKENS, length, "")))
    tracemalloc.start()
    files = data.TokenFiles.open(out)
    train, _ = data.split(files.tokens, 0.1, context=64)
    for step in range(11):
        batch = data.shuffled_windows(
            train, seed=0, step=step, num_steps=1, batch_size=8, context=64,
            documents=files.documents_within(0, len(train)),
        )  # fmt: skip
        files.checked(batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < length // 8
    assert isinstance(train, data.ArrayFile) and train.path == files.tokens.path


WRONG = [
    (TOKENS, lambda path: os.truncate(path, path.stat().st_size - 1), ["tokens.npy", "truncated?"]),
    (TOKENS, lambda path: path.write_bytes(path.read_bytes() + b"x"), ["bytes, wanted"]),
    (TOKENS, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), ["other content"]),
    (TOKENS, lambda path: path.write_bytes(b"x" * path.stat().st_size), ["NumPy cannot read"]),
    (TOKENS, lambda path: path.unlink(), ["missing"]),
    (DOCUMENTS, lambda path: os.truncate(path, 130), ["documents.npy", "truncated?"]),
    (TOKENIZER, lambda path: data.CharTokenizer("xyz").save(path), ["another tokenizer"]),
    (HEADER, lambda path: path.write_text("{"), ["a header that cannot be read"]),
    (HEADER, lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 0')),
     ["format 0, wanted 1"]),
    (HEADER, lambda path: path.write_text(path.read_text().replace("256", "70000", 1)),
     ["tokens.npy", "uint8[", "wanted int32["]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "words"), WRONG)
def test_files_that_are_not_as_they_were_made_are_named(folder, name, spoil, words):
    spoil(folder / name)
    with pytest.raises(ValueError) as raised:
        data.TokenFiles.open(folder)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_folder_without_a_header_is_not_finished(tmp_path):
    with pytest.raises(ValueError, match=r"holds none \(no tokens.json\)"):
        data.TokenFiles.open(tmp_path)


def test_a_file_that_changes_while_it_is_open_is_named(folder):
    files = data.TokenFiles.open(folder)
    files.check_unchanged()
    os.utime(folder / DOCUMENTS, ns=(0, 0))
    with pytest.raises(ValueError, match=r"documents.npy .* changed since it was opened"):
        files.check_unchanged()
    files = data.TokenFiles.open(folder)
    (folder / TOKENS).unlink()
    with pytest.raises(ValueError, match=r"tokens.npy .* changed since it was opened"):
        files.check_unchanged()


def test_what_no_sample_shows_the_checksums_and_the_vocabulary_do(folder):
    files = data.TokenFiles.open(folder)
    with pytest.raises(ValueError, match="the id 256 for a vocabulary of 256"):
        files.checked({"targets": np.array([3, 256])})
    content = bytearray((folder / TOKENS).read_bytes())
    content[9_000] ^= 1
    (folder / TOKENS).write_bytes(content)
    with pytest.raises(ValueError, match=r"tokens.npy .* another checksum"):
        files.verify()
