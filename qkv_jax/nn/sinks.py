"""Attention with a learned sink per head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from qkv_jax.nn.attention import MultiHeadAttention


class SinkAttention(MultiHeadAttention):
    """Multi-head attention whose softmax has one more logit, learned per head, that gives nothing.

        weights[t, s] = exp(logits[t, s]) / (exp(sinks[n]) + sum over s' of exp(logits[t, s']))

    A head may so attend to nothing, and needs no token to put its weight on (Xiao et al. 2024,
    arxiv.org/abs/2309.17453; in this form OpenAI's gpt-oss 2025, arxiv.org/abs/2508.10925). Adds N
    parameters, 0 at first: then it is `ops.off_by_one_attention`.

    The arguments are those of MultiHeadAttention but `op`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(width, num_heads, param_dtype=param_dtype, rngs=rngs, **kwargs)
        self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype))

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        return self.op(q, k, v, sinks=self.sinks[...], **kwargs)
