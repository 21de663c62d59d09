"""Cosine attention with a learned temperature per head."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.ops.cosine import cosine_attention

HIGHEST = 100.0


class CosineAttention(MultiHeadAttention):
    """Multi-head attention to angles, `ops.cosine.cosine_attention` (Swin v2).

        logits = min(exp(log_temperature[n]), 100) * cos(q, k)

    Liu et al. 2021, arxiv.org/abs/2111.09883; after Henry et al. 2020, arxiv.org/abs/2010.04245.
    Adds N parameters.

    The arguments that are not listed are those of MultiHeadAttention but `op`.

    Args:
      width, num_heads: as in MultiHeadAttention.
      temperature: with which every head starts, in (0, 100].

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        temperature: float = 10.0,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        if not 0 < temperature <= HIGHEST:
            raise ValueError(f"temperature: wanted a number in (0, {HIGHEST}], got {temperature}")
        super().__init__(
            width, num_heads, op=cosine_attention, param_dtype=param_dtype, rngs=rngs, **kwargs
        )
        start = jnp.full((num_heads,), math.log(temperature), param_dtype)
        self.log_temperature = nnx.Param(start)

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        temperature = jnp.exp(jnp.minimum(self.log_temperature[...], math.log(HIGHEST)))
        return self.op(q, k, v, temperature=temperature, **kwargs)
