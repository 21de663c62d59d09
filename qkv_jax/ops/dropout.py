"""Dropout bits that depend on what they drop, and on nothing else.

A bit is a function of (rng, batch row, head, query index, key index). Block sizes, the
implementation and the order of computation cannot change it.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


def keep_mask(
    rng: Array, rate: float, *, batch: Array, head: Array, query: Array, key: Array
) -> jax.Array:
    """Which weights survive dropout: True with probability 1 - rate.

    An integer hash of the five coordinates, compared with `rate * 2**32`: the row's four are mixed
    into one word, the key's into another, and two rounds of multiplying and shifting (the
    finaliser of MurmurHash3) mix the pair.

    Args:
      rng: a typed key (`jax.random.key`) or a raw one.
      rate: the probability of dropping, in [0, 1).
      batch, head, query, key: integer indices that broadcast against one another.

    Returns:
      bool, of the shape to which the indices broadcast.
    """
    words = key_words(rng)
    first, second = words.reshape(-1)[0], words.reshape(-1)[-1]
    row = _mix(_mix(_mix(first ^ _word(batch)) ^ _word(head)) ^ _word(query))
    column = _mix(second ^ _mix(_word(key) + np.uint32(0x9E3779B9)))
    return _mix(row ^ column) >= np.uint32(min(rate * 2**32, 2**32 - 1))


def dropped(weights: jax.Array, rng: Array, rate: float, **indices: Array) -> jax.Array:
    """The weights that survive, grown by 1 / (1 - rate), and 0; `keep_mask` says which.

    Args:
      weights: floating, of the shape to which the indices broadcast.
      rng, rate: as in `keep_mask`; at rate 0 nothing is dropped and rng may be None.
      **indices: batch, head, query and key, as in `keep_mask`.
    """
    if rate == 0:
        return weights
    return jnp.where(keep_mask(rng, rate, **indices), weights / (1 - rate), 0)


def key_words(rng: Array) -> jax.Array:
    """The words of a key, typed or raw."""
    return rng if jnp.issubdtype(rng.dtype, jnp.uint32) else jax.random.key_data(rng)


def _word(index: Array) -> jax.Array:
    return jnp.asarray(index).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
