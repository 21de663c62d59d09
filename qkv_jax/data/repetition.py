"""Noise that repeats itself: nothing but what was seen before tells the next token."""

import numpy as np

from qkv_jax.data import draws
from qkv_jax.data.batches import Batch


def repeats(
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    vocab_size: int,
    stream: int = draws.TRAINING,
) -> Batch:
    """Random tokens, again and again.

        a  c  b  a  c  b  a  c      wanted at every token: the next one

    The period, uniform in T/4 ... T/2, differs between rows, so that no fixed distance leads back
    to what comes next: a model must find where the last token stood before, and look one further.
    Elhage et al. 2021, transformer-circuits.pub/2021/framework, call this induction.

    Args:
        seed, step, batch_size, stream: as for `recall`.
        context: tokens of a row, `T`, at least 8.
        vocab_size: ids, `V`, at least 2.

    Returns:
        `inputs`, `targets` and `distances`, int32 [B, T], and `weights`, float32 [B, T], all 1. The
        distance says how far back the target stands, 0 where it has not come before by repetition.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if context < 8:
        raise ValueError(f"context is {context}; wanted at least 8")
    if vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size}; wanted at least 2")
    shortest, longest = -(-context // 4), context // 2
    uniform = draws.uniform((batch_size, longest + 1), seed=seed, step=step, stream=stream)
    symbols = (uniform[:, :longest] * vocab_size).astype(np.int32)
    period = shortest + (uniform[:, longest:] * (longest - shortest + 1)).astype(np.int32)  # [B, 1]
    place = np.arange(context + 1)
    tokens = np.take_along_axis(symbols, place % period, axis=-1)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((batch_size, context), np.float32),
        "distances": np.where(place[1:] >= period, period - 1, 0).astype(np.int32),
    }
