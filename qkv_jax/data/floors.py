"""Loss floors: what counting reaches, so that a model's loss has something to stand beside."""

import math

import numpy as np

from qkv_jax.data.batches import check_token_ids


def ngram_floors(train: np.ndarray, validation: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Cross-entropy of three models that only count, in nats per token of `validation`.

    With counts `c` of `train` and add-one (Laplace) smoothing:

        uniform  -log p(b)     = log V
        unigram  -log p(b)     = -log (c(b) + 1) / (length + V)
        bigram   -log p(b | a) = -log (c(ab) + 1) / (c(a·) + V)

    The bigram's mean is over the tokens that have one before them. Memory is linear in the texts.

    Args:
        train: integers `[length]`, where the counts come from.
        validation: integers `[length]`, at least 2.
        vocab_size: `V`.

    Returns:
        `{"uniform": ..., "unigram": ..., "bigram": ...}`, floats.

    Raises:
        ValueError: too few tokens, or ids outside `[0, vocab_size)`.
    """
    train, validation = np.asarray(train), np.asarray(validation)
    for name, tokens in {"train": train, "validation": validation}.items():
        check_token_ids(tokens, vocab_size)
        if len(tokens) < 2:
            raise ValueError(f"{name} has {len(tokens)} tokens; wanted at least 2, a bigram")

    counts = np.bincount(train, minlength=vocab_size)
    unigram = np.log(len(train) + vocab_size) - np.log1p(counts[validation])

    train_pairs, validation_pairs = _pairs(train, vocab_size), _pairs(validation, vocab_size)
    pairs, pair_counts = np.unique(train_pairs, return_counts=True)
    place = np.minimum(np.searchsorted(pairs, validation_pairs), len(pairs) - 1)
    seen = np.where(pairs[place] == validation_pairs, pair_counts[place], 0)
    before = np.bincount(train[:-1], minlength=vocab_size)[validation[:-1]]
    bigram = np.log(before + vocab_size) - np.log1p(seen)

    return {
        "uniform": math.log(vocab_size),
        "unigram": float(unigram.mean()),
        "bigram": float(bigram.mean()),
    }


def bits_per_character(nats_per_token: float, num_tokens: int, num_characters: int) -> float:
    """A loss in a unit that tokenizers share: `nats_per_token * num_tokens / (ln 2 * characters)`.

    Args:
        nats_per_token: mean loss.
        num_tokens: of the text that the mean is over.
        num_characters: of the same text.
    """
    if num_tokens < 1 or num_characters < 1:
        raise ValueError(
            f"num_tokens is {num_tokens} and num_characters {num_characters}; wanted at least 1"
        )
    return nats_per_token * num_tokens / (math.log(2.0) * num_characters)


def _pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """One int64 for each two adjacent tokens."""
    return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
