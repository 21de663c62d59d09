"""Labels of tokens: a character in parts is named, and nothing is lost or invented."""

import doctest
import itertools

from hypothesis import given
from hypothesis import strategies as st

from qkv_jax.data import labels
from qkv_jax.data.labels import readable


def test_the_example_in_its_docstring_holds():
    assert doctest.testmod(labels, raise_on_error=True).attempted == 1


@given(text=st.text(st.characters(exclude_characters="·<>")), cuts=st.sets(st.integers(0, 40)))
def test_a_label_is_the_text_of_its_bytes_and_a_cut_character_stands_in_all_its_parts(text, cuts):
    whole = text.encode()
    edges = [0, *sorted(cut for cut in cuts if 0 < cut < len(whole)), len(whole)]
    pieces = [whole[a:b] for a, b in itertools.pairwise(edges)]
    called = readable(pieces)
    assert not any("<" in label for label in called)  # no byte is without its character
    for piece, label in zip(pieces, called, strict=True):
        inside = piece.decode("utf-8", "ignore")  # Python's own word on what is whole
        if inside.encode() == piece:
            assert label == inside
        else:
            assert "·" in label and inside in label


@given(pieces=st.lists(st.binary(max_size=4), max_size=9))
def test_any_bytes_have_labels_that_can_be_written(pieces):
    called = readable(pieces)
    assert len(called) == len(pieces)
    assert all(label.encode() for label, piece in zip(called, pieces, strict=True) if piece)


def test_the_parts_of_a_character_count_tokens_not_bytes():
    cat = "猫".encode()
    assert readable([b" " + cat[:2], b"", cat[2:] + b"!"]) == [" 猫·1/2", "", "猫·2/2!"]
    assert readable([cat[:2], b"a"]) == ["<E7><8C>", "a"]
