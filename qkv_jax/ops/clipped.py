"""Clipped softmax: attention whose weights reach 0, and so a head that does nothing."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments, scores
from qkv_jax.ops.attention import attention_weights, choose, weighted_sum
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray

NOTHING = -1e4  # the log of a weight of 0: finite, as logits must be, and exp of it is 0


def clipped_softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    gamma: float,
    zeta: float = 1.0,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention whose weights are stretched beyond [0, 1] and cut off there.

        weights = clip((zeta - gamma) softmax(logits) + gamma, 0, 1)

    Bondarenko et al. 2023, arxiv.org/abs/2306.12929. A softmax comes near 0 only where logits are
    far apart, and a head that wants to add nothing drives them there, which makes outliers among
    the activations. Here small weights are 0, with gradient 0, and a row need not sum to 1. The
    paper takes zeta = 1 and gamma = -alpha / T, alpha from 2 to 4 for BERT. Where all weights of a
    row are below -gamma / (zeta - gamma), the row is 0.

    It takes two passes, both O(T S) time and linear memory, by the implementations of
    `ops.attention`: the first finds each row's log-sum-exp. With it a weight is a function of its
    own logit, and sums of weights are the numerators of attention to the logits log(weight). The
    arguments that are not listed are those of `ops.attention`.

    Args:
      gamma: a Python number <= 0, to which the weight 0 is stretched.
      zeta: a Python number >= 1, to which the weight 1 is.

    Returns:
      [B, T, N, h], in the dtype of `v`. A query that may attend to nothing gets 0.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    _check(gamma, zeta)
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    nothing = jnp.zeros((*args.k.shape[:3], 1), args.dtype)
    summing = dataclasses.replace(args, v=nothing, dropout_rate=0.0)
    _, softmax = choose(summing, None)(summing, entropy=False)
    lse = jnp.where(softmax.lse > -jnp.inf, softmax.lse, 0)[..., None]
    return weighted_sum(args, scores.from_function(_log_clipped, lse, float(gamma), float(zeta)))


def _log_clipped(
    logits: Array, q_pos: Array, kv_pos: Array, head: Array, lse: Array, gamma: float, zeta: float
) -> Array:
    below = logits < lse  # but for rounding, and for logits that the mask leaves out of the sum
    weights = jnp.exp(jnp.where(below, logits - lse, 0))
    weights = jnp.clip((zeta - gamma) * weights + gamma, 0, 1)
    positive = weights > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, weights, 1)), NOTHING)


def _check(gamma: float, zeta: float) -> None:
    for name, value, right, wanted in (
        ("gamma", gamma, lambda x: x <= 0, "<= 0"),
        ("zeta", zeta, lambda x: x >= 1, ">= 1"),
    ):
        number = isinstance(value, int | float) and math.isfinite(value)
        if not (number and right(value)):
            raise ValueError(f"{name}: wanted a Python number {wanted}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class ClippedSoftmax:
    """`clipped_softmax_attention` of one stretch, as an op for `nn.MultiHeadAttention`."""

    gamma: float
    zeta: float = 1.0

    def __post_init__(self) -> None:
        _check(self.gamma, self.zeta)

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        return clipped_softmax_attention(q, k, v, gamma=self.gamma, zeta=self.zeta, **kwargs)

    def weights(self, q: Array, k: Array, **kwargs: Any) -> jax.Array:
        """The weights of a call without dropout: `ops.attention_weights`, clipped."""
        if kwargs.get("dropout_rate"):
            raise NotImplementedError("dropout_rate: weights are shown as they are without it")
        softmax = attention_weights(q, k, **kwargs)
        return jnp.clip((self.zeta - self.gamma) * softmax + self.gamma, 0, 1)
