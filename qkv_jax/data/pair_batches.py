"""Batches of pairs in tokens, padded: pure functions of (seed, step)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qkv_jax.data import draws
from qkv_jax.data.batches import Batch
from qkv_jax.data.pairs import Pairs
from qkv_jax.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class TokenPairs:
    """Pairs in tokens, each sentence with an end, padded with ends.

    Attributes:
        pairs: the P pairs that are short enough.
        sources, targets: int32 [P, S] and [P, T], as wide as the longest.
        source_lengths, target_lengths: int32 [P], their ends counted.
        begin: the id that a decoder reads first.
        left_out: the number of pairs that are too long.
    """

    pairs: Pairs
    sources: np.ndarray
    source_lengths: np.ndarray
    targets: np.ndarray
    target_lengths: np.ndarray
    begin: int
    left_out: int

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, rows: np.ndarray) -> Batch:
        """The pairs with these numbers, integers [B]; -1: a row of weight 0.

        Returns:
            `sources`, int32 [B, S]; `source_lengths`, int32 [B]; `targets`, int32 [B, T], and
            `target_in`, the same moved on by one; `weights`, float32 [B, T]: 1 up to the end.
        """
        targets = self.targets[rows]
        target_in = np.roll(targets, 1, axis=1)
        target_in[:, 0] = self.begin
        wanted = np.arange(targets.shape[1]) < self.target_lengths[rows][:, None]
        return {
            "sources": self.sources[rows],
            "source_lengths": self.source_lengths[rows],
            "target_in": target_in,
            "targets": targets,
            "weights": (wanted & (rows >= 0)[:, None]).astype(np.float32),
        }


def encode_pairs(pairs: Pairs, tokenizer: Tokenizer, *, context: int) -> TokenPairs:
    """Pairs in tokens. The ids V and V + 1, after the tokenizer's, are the beginning and the end.

    Args:
        pairs: sentences.
        tokenizer: of sources and targets alike.
        context: tokens of the longest sentence that is kept, its end counted.

    Raises:
        ValueError: the tokenizer does not know a sentence, or all are too long.
    """
    begin, end = tokenizer.vocab_size, tokenizer.vocab_size + 1
    sources, targets = (
        [tokenizer.encode(sentence) for sentence in sentences]
        for sentences in (pairs.sources, pairs.targets)
    )
    kept = [
        i
        for i, both in enumerate(zip(sources, targets, strict=True))
        if max(map(len, both)) < context
    ]
    if not kept:
        raise ValueError(
            f"context is {context}; wanted more: every pair of {pairs.origin} has as many tokens"
        )
    source_matrix, source_lengths = _padded([sources[i] for i in kept], end)
    target_matrix, target_lengths = _padded([targets[i] for i in kept], end)
    short = Pairs(
        pairs.name,
        tuple(pairs.sources[i] for i in kept),
        tuple(pairs.targets[i] for i in kept),
        pairs.origin,
    )
    return TokenPairs(
        short, source_matrix, source_lengths, target_matrix, target_lengths, begin,
        left_out=len(pairs) - len(kept),
    )  # fmt: skip


def random_pairs(
    pairs: TokenPairs, *, seed: int, step: int, batch_size: int, stream: int = draws.TRAINING
) -> Batch:
    """The batch of one step, drawn with replacement: `TokenPairs.batch` of `batch_size` rows."""
    rows = draws.integers(batch_size, len(pairs), seed=seed, step=step, stream=stream)
    return pairs.batch(rows)


def sequential_pairs(pairs: TokenPairs, *, batch_size: int) -> Iterator[Batch]:
    """Batches that go through all pairs once; the last is filled up with rows of weight 0."""
    for first in range(0, len(pairs), batch_size):
        rows = np.arange(first, first + batch_size)
        yield pairs.batch(np.where(rows < len(pairs), rows, -1))


def _padded(sentences: list[np.ndarray], end: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(sentence) + 1 for sentence in sentences], np.int32)
    matrix = np.full((len(sentences), lengths.max()), end, np.int32)
    for row, sentence in zip(matrix, sentences, strict=True):
        row[: len(sentence)] = sentence
    return matrix, lengths
