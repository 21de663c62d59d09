"""Passages: the span answers the question, and nothing but the passage does."""

import numpy as np
import pytest

from qkv_jax import data
from qkv_jax.data.grammar import ENGLISH_HABITS, WORDS

SIZES = {"batch_size": 41, "context": 29}


def read(batch):
    for tokens, length, (start, end) in zip(
        batch["inputs"], batch["lengths"], batch["targets"], strict=True
    ):
        words = [WORDS[token] for token in tokens[:length]]
        yield words, start, end


def test_the_span_is_in_the_sentence_of_what_is_asked_for():
    batch = data.passages(seed=3, step=5, **SIZES)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "inputs": ((41, 29), "int32"), "segments": ((41, 29), "int32"),
        "lengths": ((41,), "int32"), "targets": ((41, 2), "int32"),
    }  # fmt: skip
    asked = set()
    for words, start, end in read(batch):
        question, key, mark, *passage = words
        asked.add(question)
        assert mark == "?" and passage.count(key) == 1 and 3 <= start <= end < len(words)
        stop = "." if question in ("where", "who") else "。"
        assert passage.count(stop) == 3
        sentences = " ".join(passage).split(f" {stop}")
        (right,) = [of for of in sentences if key in of.split()]
        answer = " ".join(words[start : end + 1])
        assert answer in right and key not in answer.split()
        if question == "where":
            assert answer.split()[:2] in [[p, "the"] for p in ("on", "under", "beside")]
        elif question == "どこ":
            assert answer[-1] in "にへ"
        else:
            assert right.split()[: end - start + 1] == answer.split()
    assert asked == {"where", "who", "どこ", "だれ"}


def test_segments_are_the_passage_and_rows_are_filled_up():
    batch = data.passages(seed=3, step=5, **SIZES)
    place = np.arange(29)
    inside = (place >= 3) & (place < batch["lengths"][:, None])
    np.testing.assert_array_equal(batch["segments"], inside)
    assert not batch["inputs"][place >= batch["lengths"][:, None]].any()


def test_who_is_where_is_drawn_anew():
    places = set()
    for step in range(20):
        for words, _, end in read(data.passages(seed=0, step=step, **SIZES)):
            if words[:2] == ["where", "cat"]:
                places.add(words[end])
    assert places == {place for _, of in ENGLISH_HABITS.values() for place in of}


def test_a_batch_is_a_function_of_seed_step_and_stream():
    first = data.passages(seed=3, step=5, **SIZES)["inputs"]
    np.testing.assert_array_equal(data.passages(seed=3, step=5, **SIZES)["inputs"], first)
    for other in ({"seed": 4}, {"step": 6}, {"stream": data.EVALUATION}):
        assert (data.passages(**({"seed": 3, "step": 5} | SIZES | other))["inputs"] != first).any()


def test_the_number_of_sentences_follows_the_context():
    for context, number in ((19, 2), (27, 3), (43, 5), (200, 5)):
        batch = data.passages(seed=0, step=0, batch_size=20, context=context)
        assert all(words[3:].count(".") + words[3:].count("。") == number
                   for words, *_ in read(batch))  # fmt: skip
    with pytest.raises(ValueError, match="context is 18; wanted at least 19"):
        data.passages(seed=0, step=0, batch_size=1, context=18)
