"""Cosine attention: what counts is the angle between query and key, not their lengths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments
from qkv_jax.ops.attention import choose
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


def cosine_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    temperature: float | Array,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention to the cosine of the angle between query and key.

        logits[b, n, t, s] = temperature[n] * q . k / (|q| |k|)

    Henry et al. 2020 (arxiv.org/abs/2010.04245) and Swin v2 (Liu et al. 2021,
    arxiv.org/abs/2111.09883), which learn the temperature. Otherwise it is `ops.attention` of unit
    vectors: exact, O(T S) time, linear memory. A query or key of 0 has cosine 0 with all others.

    The arguments that are not listed are those of `ops.attention`.

    Args:
      temperature: factor of the cosine, a number or floating [N]; gradients flow to it.
      scale: a further factor, by default 1.

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=1.0 if scale is None else scale, sinks=None,
        dropout_rate=dropout_rate, dropout_rng=dropout_rng, q_positions=q_positions,
        kv_positions=kv_positions,
    )  # fmt: skip
    N = q.shape[2]
    if np.shape(temperature) not in ((), (N,)):
        raise ValueError(
            f"temperature: wanted a number or floating [N] = [{N}], "
            f"got an array of shape {list(np.shape(temperature))}"
        )
    temperature = jnp.reshape(jnp.asarray(temperature, args.dtype), (-1, 1))
    q, k = (_unit(x.astype(args.dtype)) for x in (args.q, args.k))
    args = dataclasses.replace(args, q=q * temperature, k=k)
    out, _ = choose(args, None, stats=False)(args, entropy=False)
    return out


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1; one shorter than 1e-6 stays shorter than 1."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
