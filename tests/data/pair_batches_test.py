"""Batches of pairs: padding, what a decoder reads and is asked, every pair once."""

import numpy as np
import pytest

from qkv_jax import data

PAIRS = data.Pairs("file", ("a", "abcd", "ab", "cc"), ("bb", "a", "dcba", "abcdabcd"), "four")
TOKENIZER = data.CharTokenizer("abcd")  # ids 0 ... 3; 4 begins, 5 ends
TOKENS = data.encode_pairs(PAIRS, TOKENIZER, context=5)


def test_sentences_end_are_padded_with_ends_and_too_long_ones_are_left_out():
    assert len(TOKENS) == 3 and TOKENS.left_out == 1 and TOKENS.pairs.sources == ("a", "abcd", "ab")
    assert TOKENS.sources.tolist() == [[0, 5, 5, 5, 5], [0, 1, 2, 3, 5], [0, 1, 5, 5, 5]]
    assert TOKENS.source_lengths.tolist() == [2, 5, 3]
    assert TOKENS.targets.tolist() == [[1, 1, 5, 5, 5], [0, 5, 5, 5, 5], [3, 2, 1, 0, 5]]
    assert TOKENS.target_lengths.tolist() == [3, 2, 5]
    with pytest.raises(ValueError, match="context is 2; wanted more: every pair of four"):
        data.encode_pairs(PAIRS, TOKENIZER, context=2)


def test_a_decoder_reads_what_came_before_and_is_asked_up_to_the_end():
    batch = TOKENS.batch(np.array([2, 0, -1]))
    assert batch["target_in"].tolist() == [[4, 3, 2, 1, 0], [4, 1, 1, 5, 5], [4, 3, 2, 1, 0]]
    assert batch["targets"].tolist() == [[3, 2, 1, 0, 5], [1, 1, 5, 5, 5], [3, 2, 1, 0, 5]]
    assert batch["weights"].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [0] * 5]
    assert batch["source_lengths"].tolist() == [3, 2, 3]
    dtypes = {name: array.dtype for name, array in batch.items()}
    assert dtypes.pop("weights") == np.float32 and set(dtypes.values()) == {np.dtype(np.int32)}


def test_all_pairs_come_once_and_the_last_batch_is_filled_up():
    batches = list(data.sequential_pairs(TOKENS, batch_size=2))
    assert [batch["sources"].shape for batch in batches] == [(2, 5)] * 2
    rows = np.concatenate([batch["sources"] for batch in batches])
    asked = np.concatenate([batch["weights"] for batch in batches]).any(-1)
    assert asked.tolist() == [True] * 3 + [False]
    assert (rows[asked] == TOKENS.sources).all()


def test_random_pairs_are_a_function_of_seed_step_and_stream():
    def drawn(**changes):
        arguments = {"seed": 1, "step": 2, "batch_size": 31} | changes
        return data.random_pairs(TOKENS, **arguments)["source_lengths"].tolist()

    assert drawn() == drawn() and set(drawn()) == {2, 3, 5}
    others = [drawn(seed=2), drawn(step=3), drawn(stream=data.EVALUATION)]
    assert all(other != drawn() for other in others)
