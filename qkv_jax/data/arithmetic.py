"""Modular addition: all sums of two numbers, some of which are never shown in training."""

import numpy as np

from qkv_jax.data import draws
from qkv_jax.data.batches import Batch

LENGTH = 3  # tokens of a row


def modular_addition(
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    vocab_size: int,
    validation_fraction: float,
    stream: int = draws.TRAINING,
) -> Batch:
    """Two numbers and an equals sign; at the sign, the sum modulo p is wanted.

        a  b  =        wanted at the "=": (a + b) mod p

    Ids 0 ... p - 1 are the numbers, p = V - 1 is the sign. There are p * p rows in all. A fixed
    choice of them, a function of the seed alone, is held out; training walks the others in a new
    order each epoch. A batch of as many rows as are not held out is all of them: the full batch of
    Power et al. 2022, arxiv.org/abs/2201.02177, and Nanda et al. 2023, arxiv.org/abs/2301.05217.

    Args:
        seed, step: as for `recall`.
        batch_size: rows, `B`; in training at most as many as are not held out.
        context: tokens of a row, `T`: 3.
        vocab_size: ids, `V`, at least 3.
        validation_fraction: share of the p * p rows that is held out, in (0, 1).
        stream: `TRAINING`; any other: the held-out rows, once, `step` by `step`. What comes after
            the last of them has weight 0.

    Returns:
        `inputs` and `targets`, int32 [B, T], and `weights`, float32 [B, T]: 1 at the sign.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    train, held_out = split_pairs(seed, vocab_size, validation_fraction)
    if context != LENGTH:
        raise ValueError(f"context is {context}; wanted {LENGTH}: two numbers and the sign")
    place = step * batch_size + np.arange(batch_size)
    if stream == draws.TRAINING:
        if batch_size > len(train):
            raise ValueError(
                f"batch_size is {batch_size}; wanted at most {len(train)}, the rows that are not "
                "held out"
            )
        pairs, real = train[_by_epoch(place, len(train), seed)], np.ones(batch_size)
    else:
        pairs, real = held_out[np.minimum(place, len(held_out) - 1)], place < len(held_out)
    modulus = vocab_size - 1
    first, second = np.divmod(pairs, modulus)
    inputs = np.stack([first, second, np.full_like(first, modulus)], axis=-1).astype(np.int32)
    targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
    targets[:, -1] = (first + second) % modulus
    weights[:, -1] = real
    return {"inputs": inputs, "targets": targets, "weights": weights}


def split_pairs(
    seed: int, vocab_size: int, validation_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on, and those held out, as numbers `a * p + b`, int64, p = V - 1.

    Raises:
        ValueError: one of the two would be empty.
    """
    if vocab_size < 3:
        raise ValueError(f"vocab_size is {vocab_size}; wanted at least 3: two numbers and the sign")
    number = (vocab_size - 1) ** 2
    shown = round(number * (1 - validation_fraction))
    if not 0 < shown < number:
        raise ValueError(
            f"validation_fraction is {validation_fraction}; wanted one that leaves rows on both "
            f"sides, of {number}"
        )
    bits = draws.raw_bits(number, seed=seed, step=0, stream=draws.TRAINING, series=1)
    order = np.argsort(bits, kind="stable")
    return order[:shown], order[shown:]


def _by_epoch(place: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Which of `number` rows come at the places 0, 1, 2, ... of training: each once an epoch."""
    epoch, within = np.divmod(place, number)
    found = np.empty_like(place)
    for one in np.unique(epoch):
        uniform = draws.uniform((number,), seed=seed, step=int(one), stream=draws.TRAINING)
        order = np.argsort(uniform, kind="stable")
        found[epoch == one] = order[within[epoch == one]]
    return found
