"""Multi-head attention whose heads work together: talking heads, and heads in pairs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.ops.heads import differential_attention, talking_heads_attention


class TalkingHeadsAttention(MultiHeadAttention):
    """Multi-head attention with learned mixtures of heads (arxiv.org/abs/2003.02436).

    `ops.heads.talking_heads_attention` with a matrix [N, N] before the softmax and one after it.
    Both start as the identity, so that it starts as MultiHeadAttention.

    The arguments that are not listed are those of MultiHeadAttention but `op`.

    Args:
      width, num_heads: as in MultiHeadAttention.
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
        super().__init__(
            width, num_heads, op=talking_heads_attention, param_dtype=param_dtype, rngs=rngs,
            **kwargs,
        )  # fmt: skip
        self.mix_logits = nnx.Param(jnp.eye(num_heads, dtype=param_dtype))
        self.mix_weights = nnx.Param(jnp.eye(num_heads, dtype=param_dtype))

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        mixes = {"mix_logits": self.mix_logits[...], "mix_weights": self.mix_weights[...]}
        return self.op(q, k, v, **mixes, **kwargs)


class DifferentialAttention(MultiHeadAttention):
    """Multi-head attention that subtracts what two softmaxes agree on (arxiv.org/abs/2410.05258).

        lam = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init
        pair = (1 - lambda_init) * norm(softmax(q1 k1) v - lam softmax(q2 k2) v)

    `ops.heads.differential_attention`: the N heads make N/2 pairs with values 2 H wide, which the
    paper calls N/2 heads. So the projections are those of MultiHeadAttention of the same width and
    heads; added are four vectors [H], and the scales [2 H] of the RMS norm of each pair's output,
    which the pairs share.

    The arguments that are not listed are those of MultiHeadAttention but `op`.

    Args:
      width, num_heads: as in MultiHeadAttention; N and K are even.
      lambda_init: where lam starts. The paper's is 0.8 - 0.6 exp(-0.3 (layer - 1)) for layers
        1, 2, ...: from 0.2 to 0.8.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        lambda_init: float = 0.8,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        for name, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if heads is not None and heads % 2:
                raise ValueError(
                    f"{name}: heads come in pairs, so wanted an even number, got {heads}"
                )
        super().__init__(
            width, num_heads, num_kv_heads=num_kv_heads, op=differential_attention, dtype=dtype,
            param_dtype=param_dtype, rngs=rngs, **kwargs,
        )  # fmt: skip
        H, init = self.head_dim, nnx.initializers.normal(0.1)
        self.lambda_init = lambda_init
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nnx.Param(init(rngs.params(), (H,), param_dtype)) for _ in range(4)
        )
        self.pair_norm = nnx.RMSNorm(
            2 * H, epsilon=1e-5, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        B, T, N, H = q.shape
        first = jnp.exp(jnp.vdot(self.lambda_q1[...], self.lambda_k1[...]))
        second = jnp.exp(jnp.vdot(self.lambda_q2[...], self.lambda_k2[...]))
        out = self.op(q, k, v, lam=first - second + self.lambda_init, **kwargs)
        pairs = self.pair_norm(out.reshape(B, T, N // 2, 2 * H))
        return (1 - self.lambda_init) * pairs.reshape(B, T, N, H)
