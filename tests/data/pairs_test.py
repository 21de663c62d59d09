"""Pairs of sentences: from two files, from a TSV, generated; and what is wrong with a file."""

import pytest

from qkv_jax import data


def written(folder, **texts):
    paths = []
    for name, text in texts.items():
        paths.append(folder / name)
        paths[-1].write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return paths


def test_two_files_are_read_line_by_line_and_only_newlines_end_lines(tmp_path):
    de = "Ein Hund.\u2028 Noch einer.\r\nEine  Katze. \nZwei\n"
    paths = written(tmp_path, de=de, en="A dog.\nA cat.\nTwo")
    pairs = data.read_pairs(*paths)
    assert pairs.sources == ("Ein Hund.\u2028 Noch einer.", "Eine  Katze.", "Zwei")
    assert pairs.targets == ("A dog.", "A cat.", "Two") and len(pairs) == 3
    assert all(str(path) in pairs.origin for path in paths)


def test_of_a_tsv_the_first_two_columns_are_read(tmp_path):
    (path,) = written(tmp_path, tsv="犬\tdog\n猫\tcat\tby someone\n")
    pairs = data.read_pairs(path)
    assert (pairs.sources, pairs.targets) == (("犬", "猫"), ("dog", "cat"))
    assert pairs.text == "犬\n猫\ndog\ncat"


@pytest.mark.parametrize(
    "texts, words",
    [
        ({"a": "1\n2\n3\n", "b": "1\n2\n"}, ["3 lines", "2; wanted as many"]),
        ({"a": "1\n\n3\n", "b": "1\n2\n3\n"}, ["line 2", "/a'", "lacks a sentence"]),
        ({"a": "1\n2\n", "b": "1\n \n"}, ["line 2", "/b'", "lacks a sentence"]),
        ({"a": "1\n2\n", "b": b"1\n\xff\n"}, ["/b'", "not UTF-8", "byte 2 is 0xff"]),
        ({"a": "", "b": "1\n"}, ["/a'", "is empty"]),
        ({"a": "1\t2\n3 4\n"}, ["line 2", "has no tab"]),
        ({"a": "1\t2\n3\t\n"}, ["line 2", "lacks a sentence"]),
    ],
)
def test_what_is_wrong_with_files_is_named(tmp_path, texts, words):
    with pytest.raises(ValueError) as error:
        data.read_pairs(*written(tmp_path, **texts))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "args, words",
    [
        (("pears",), ["'pears'", "numbers_de"]),
        (("file",), ["need a path"]),
        (("dates", "x.tsv"), ["'dates' take no path", "x.tsv"]),
        (("dates", None, "x.en"), ["take no target_path"]),
    ],
)
def test_pairs_that_cannot_be_loaded_are_refused(args, words):
    with pytest.raises(ValueError) as error:
        data.load_pairs(*args)
    assert all(word in str(error.value) for word in words), error.value


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"pairs: .*none\.tsv' cannot be read"):
        data.load_pairs("file", tmp_path / "none.tsv")


def test_pairs_split_into_the_first_ones_and_the_rest():
    pairs = data.load_pairs("dates", number=20)
    train, validation = pairs.split(0.25)
    assert (len(train), len(validation)) == (15, 5)
    assert train.sources + validation.sources == pairs.sources
    assert len(pairs.split(0.01)[1]) == 1
    with pytest.raises(ValueError, match=r"20 pairs split into 0 .* each needs one"):
        pairs.split(0.99)
    with pytest.raises(ValueError, match="validation_fraction is 1"):
        pairs.split(1)


def test_the_sum_tells_pairs_apart():
    sums = {data.load_pairs("dates", number=5, seed=seed).sha256 for seed in range(3)}
    assert len(sums) == 3 and data.load_pairs("dates", number=5).sha256 in sums
