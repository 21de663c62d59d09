"""Attention whose heads are gated."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.nn.linear import Linear

_default_init = nnx.initializers.lecun_normal()


class GatedAttention(MultiHeadAttention):
    """Multi-head attention with a gate per token and head, which may close.

        gates = sigmoid(x W_gate + b_gate)                            [B, T, N]
        out = concat(gates[n] * head[n]) W_out

    A head may so add nothing, and need not drive its logits apart to do it: Bondarenko et al. 2023,
    arxiv.org/abs/2306.12929, by the gate of theirs that sees all of x; Qiu et al. 2025,
    arxiv.org/abs/2505.06708. Adds N (D + 1) parameters.

    The arguments that are not listed are those of MultiHeadAttention.

    Args:
      width, num_heads: as in MultiHeadAttention.
      gate: of every head before training, in (0, 1), but for `W_gate`. Sets `b_gate`.

    Raises:
      ValueError: for sizes that do not fit, or another gate.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        gate: float = 0.25,
        kernel_init: Initializer = _default_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        if not 0 < gate < 1:
            raise ValueError(f"gate: wanted a number in (0, 1), got {gate}")
        shared = {"kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype}
        super().__init__(width, num_heads, rngs=rngs, **shared, **kwargs)
        self.gate = Linear(width, num_heads, rngs=rngs, **shared)
        self.gate.bias[...] = jnp.full((num_heads,), math.log(gate / (1 - gate)), param_dtype)

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        return self.op(q, k, v, **kwargs) * jax.nn.sigmoid(self.gate(x))[..., None]
