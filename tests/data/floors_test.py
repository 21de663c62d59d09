"""N-gram floors: against a table counted by hand, and against published numbers."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from qkv_jax.data import CharTokenizer, bits_per_character, ngram_floors, pack_tokens, split

TINYSHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"


def dense_floors(train, validation, vocab_size):
    """The definition, with the whole table of bigrams."""
    unigrams, bigrams = np.ones(vocab_size), np.ones((vocab_size, vocab_size))
    for token in train:
        unigrams[token] += 1
    for a, b in pairwise(train):
        bigrams[a, b] += 1
    unigrams /= unigrams.sum()
    bigrams /= bigrams.sum(axis=1, keepdims=True)
    return {
        "uniform": math.log(vocab_size),
        "unigram": -np.mean([math.log(unigrams[b]) for b in validation]),
        "bigram": -np.mean([math.log(bigrams[a, b]) for a, b in pairwise(validation)]),
    }


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_floors_equal_the_definition(dtype):
    rng = np.random.default_rng(0)
    train = rng.choice(13, 211, p=np.arange(1, 14) / 91).astype(dtype)
    validation = rng.integers(0, 17, 101).astype(dtype)  # with pairs and tokens never seen
    assert ngram_floors(train, validation, 17) == pytest.approx(
        dense_floors(train, validation, 17), rel=1e-12
    )


def test_floors_equal_the_published_ones():
    """Uniform 4.1744, unigram 3.3473, bigram 2.4819 nats a character; nanoGPT's split."""
    if not TINYSHAKESPEARE.is_file():
        pytest.skip(f"tinyshakespeare is not at {TINYSHAKESPEARE}")
    text = TINYSHAKESPEARE.read_text()
    tokenizer = CharTokenizer(text)
    tokens = pack_tokens(tokenizer.encode(text), tokenizer.vocab_size)
    train, validation = split(tokens, 0.1, context=64)
    assert (tokenizer.vocab_size, len(train), len(validation)) == (65, 1_003_854, 111_540)
    floors = ngram_floors(train, validation, tokenizer.vocab_size)
    published = {"uniform": 4.1744, "unigram": 3.3473, "bigram": 2.4819}
    assert floors == pytest.approx(published, abs=5e-5)


def test_a_large_vocabulary_needs_no_table():
    vocab_size = 250_007  # a dense table would have 62e9 entries
    rng = np.random.default_rng(0)
    floors = ngram_floors(rng.integers(0, vocab_size, 1009), np.arange(997), vocab_size)
    assert floors["uniform"] == pytest.approx(math.log(vocab_size))
    assert all(math.isfinite(loss) for loss in floors.values())


def test_bad_tokens_are_named():
    good, bad = np.arange(7), np.array([3, 9])
    with pytest.raises(ValueError, match=r"tokens\[1\] is 9"):
        ngram_floors(good, bad, 7)
    with pytest.raises(ValueError, match="validation has 1 tokens"):
        ngram_floors(good, good[:1], 7)


def test_bits_per_character_is_log2_perplexity_shared_out():
    assert bits_per_character(math.log(2), 7, 7) == pytest.approx(1.0)
    assert bits_per_character(math.log(256), 3, 12) == pytest.approx(2.0)  # 4 characters a token
    with pytest.raises(ValueError, match="num_characters 0"):
        bits_per_character(1.0, 7, 0)
