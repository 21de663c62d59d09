"""Passages of documents, byte by byte: which document is one from, and are two from the same?

Like all batches, these are pure functions of (seed, step). Ids are bytes, and `CLS` stands first.
"""

from collections.abc import Sequence

import numpy as np

from qkv_jax.data import draws
from qkv_jax.data.batches import Batch

CLS = 256
NUM_IDS = 257


def to_bytes(text: str) -> np.ndarray:
    """The text's UTF-8 bytes, uint8 [length]."""
    return np.frombuffer(text.encode("utf-8"), np.uint8)


def which_document(
    texts: Sequence[np.ndarray],
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    stream: int = draws.TRAINING,
) -> Batch:
    """A passage from anywhere in one of the texts, each as likely: from which?

        CLS  b b b b b      wanted: the text's number

    Args:
        texts: of bytes, uint8 [any number], each at least `context - 1`.
        seed, step, batch_size, stream: as for `recall`.
        context: ids of a row, `T`, at least 2.

    Returns:
        `inputs`, int32 [B, T], and `targets`, int32 [B].

    Raises:
        ValueError: fewer than two texts, a text that is too short, or no place for a passage.
    """
    length = context - 1
    _check(texts, length, length)
    which, place = draws.uniform((2, batch_size), seed=seed, step=step, stream=stream)
    targets = (which * len(texts)).astype(np.int32)
    inputs = np.full((batch_size, context), CLS, np.int32)
    for row, (target, at) in enumerate(zip(targets, place, strict=True)):
        text = texts[target]
        start = int(at * (len(text) - length + 1))
        inputs[row, 1:] = text[start : start + length]
    return {"inputs": inputs, "targets": targets}


def same_document(
    texts: Sequence[np.ndarray],
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    stream: int = draws.TRAINING,
) -> Batch:
    """Two passages, of one text without overlap or of two texts, half of the rows each: the same?

        CLS  a a a a  b b b b      wanted: 1 where both are from one text

    The Long Range Arena's Retrieval (Tay et al. 2020, arxiv.org/abs/2011.04006) asks so of two
    papers, of which one may cite the other.

    Args:
        texts: of bytes, uint8 [any number], each at least `context - 1`, so that it has two.
        seed, step, batch_size, stream: as for `recall`.
        context: ids of a row, `T`, an odd number, at least 3.

    Returns:
        `inputs` and `segments`, int32 [B, T], which are 1 in the second passage, and `targets`,
        int32 [B].

    Raises:
        ValueError: as for `which_document`.
    """
    if context % 2 == 0:
        raise ValueError(f"context is {context}; wanted an odd number: CLS and two equal passages")
    length = context // 2
    _check(texts, length, 2 * length)
    same, which, other, early, late, swap = draws.uniform(
        (6, batch_size), seed=seed, step=step, stream=stream
    )
    targets = (same < 0.5).astype(np.int32)
    firsts = (which * len(texts)).astype(int)
    others = (firsts + 1 + (other * (len(texts) - 1)).astype(int)) % len(texts)
    inputs = np.full((batch_size, context), CLS, np.int32)
    for row, is_same in enumerate(targets):
        a = texts[firsts[row]]
        b = a if is_same else texts[others[row]]
        if is_same:  # two places, in order, with the first passage's length between them
            starts = np.sort(np.array([early[row], late[row]])) * (len(a) - 2 * length + 1)
            starts = starts.astype(int) + np.array([0, length])
            starts = starts[::-1] if swap[row] < 0.5 else starts
        else:
            ends = np.array([len(a), len(b)]) - length + 1
            starts = (np.array([early[row], late[row]]) * ends).astype(int)
        for half, (text, start) in enumerate(zip((a, b), starts, strict=True)):
            at = 1 + half * length
            inputs[row, at : at + length] = text[start : start + length]
    segments = np.zeros_like(inputs)
    segments[:, 1 + length :] = 1
    return {"inputs": inputs, "segments": segments, "targets": targets}


def _check(texts: Sequence[np.ndarray], length: int, least: int) -> None:
    if length < 1:
        raise ValueError(f"context is {length + 1}; wanted at least CLS and a passage")
    if len(texts) < 2:
        raise ValueError(f"texts: wanted at least 2 to tell apart, got {len(texts)}")
    shortest = min(map(len, texts))
    if shortest < least:
        raise ValueError(
            f"texts: the shortest has {shortest} bytes; a row takes {least} of one: wanted longer "
            "texts, or a shorter context"
        )
