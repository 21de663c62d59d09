"""Batches of sentences in which some words are ambiguous, and the same with hidden words."""

import math

import numpy as np

from qkv_jax.data import draws
from qkv_jax.data.batches import Batch
from qkv_jax.data.grammar import (
    IDS,
    KINDS,
    WORDS,
    Sentence,
    ambiguous_sentence,
    longest_ambiguous,
    picker,
    plain_sentence,
)
from qkv_jax.data.masking import choose

PLAIN = 0.25  # share of sentences that speak of nothing ambiguous
NOWHERE = -1
MASKED, REPLACED = 0.5, 0.4  # shares of the chosen words; the others stay
# Of the kind of each word: how many there are, and the id of the first.
SIZE = np.repeat([len(kind) for kind in KINDS], [len(kind) for kind in KINDS])
FIRST = np.array([IDS[kind[0]] for kind in KINDS for _ in kind])


def farthest(context: int) -> int:
    """How far a word that decides may be from the ambiguous one, for rows of so many tokens.

    Raises:
        ValueError: no sentence fits.
    """
    if context < longest_ambiguous(2):
        raise ValueError(f"context is {context}; wanted at least {longest_ambiguous(2)}")
    return (context - longest_ambiguous(0)) // 2


def sentences(
    *, seed: int, step: int, batch_size: int, context: int, stream: int = draws.TRAINING
) -> Batch:
    """Sentences of `data.grammar`, one a row: half of them have an ambiguous word.

    A pure function of the seed and the step.

    Args:
        seed, step, batch_size, stream: as for `recall`.
        context: tokens of a row, `T`; with it grows how far words may be that decide a sense.

    Returns:
        `tokens`, int32 [B, T], ids of `WORDS`, filled up with id 0; and int32 [B]: `lengths`,
        without what was filled up; `places` of the ambiguous words, -1 where there is none;
        `senses`, indices of `SENSE_NAMES` or -1; `distances` to the nearer word that decides.

    Raises:
        ValueError: the context is too short.
    """
    far = farthest(context)
    uniform = draws.uniform((batch_size, 2 * context), seed=seed, step=step, stream=stream)
    rows = [_sentence(row, far) for row in uniform]

    def numbers(name: str) -> np.ndarray:
        found = (getattr(row, name) for row in rows)
        return np.array([NOWHERE if value is None else value for value in found], np.int32)

    return {
        "tokens": padded([row.words for row in rows], context),
        "lengths": np.array([len(row.words) for row in rows], np.int32),
        "places": numbers("place"),
        "senses": numbers("sense"),
        "distances": numbers("distance"),
    }


def _sentence(uniform: np.ndarray, far: int) -> Sentence:
    pick = picker(uniform[1:])
    return plain_sentence(pick) if uniform[0] < PLAIN else ambiguous_sentence(pick, far)


def padded(rows: list[tuple[str, ...]], context: int) -> np.ndarray:
    """Words as ids, int32 [B, T], rows filled up with id 0."""
    tokens = np.zeros((len(rows), context), np.int32)
    for row, words in zip(tokens, rows, strict=True):
        row[: len(words)] = [IDS[word] for word in words]
    return tokens


def masked_sentences(
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    mask_rate: float = 0.15,
    stream: int = draws.TRAINING,
) -> Batch:
    """The rows of `sentences` with words to be guessed, and nothing that tells a sense.

    Of the chosen words half are hidden, 40 % are replaced by a word that could stand in their place
    and 10 % stay. BERT hides 80 % and replaces by any word, most of which are out of place, so that
    a model may believe what it reads; here it must ask the sentence whether a word fits, as in
    MacBERT (Cui et al. 2020, arxiv.org/abs/2004.13922), which replaces by similar words.

    Args:
        seed, step, batch_size, context, stream: as for `sentences`.
        mask_rate: share of a sentence's words that are to be guessed, as for `masked_windows`; the
            mask's id follows those of the words.

    Returns:
        `inputs` and `targets`, int32 [B, T], `weights`, float32 [B, T], 1 where a word is to be
        guessed, and `lengths`, int32 [B].

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if not 0 < mask_rate < 1:
        raise ValueError(f"mask_rate: wanted a number in (0, 1), got {mask_rate}")
    rows = sentences(seed=seed, step=step, batch_size=batch_size, context=context, stream=stream)
    tokens, lengths = rows["tokens"], rows["lengths"]
    shape = (3, batch_size, context)
    bits = draws.raw_bits(math.prod(shape), seed=seed, step=step, stream=stream, series=1)
    order, fate, other = bits.reshape(shape)
    chosen = choose(order, np.arange(context) < lengths[:, None], mask_rate)
    fate = draws.to_unit(fate)
    replaced = chosen & (fate >= MASKED) & (fate < MASKED + REPLACED)
    like = FIRST[tokens] + (draws.to_unit(other) * SIZE[tokens]).astype(np.int32)
    inputs = np.where(replaced, like, tokens)
    return {
        "inputs": np.where(chosen & (fate < MASKED), len(WORDS), inputs).astype(np.int32),
        "targets": tokens,
        "weights": chosen.astype(np.float32),
        "lengths": lengths,
    }
