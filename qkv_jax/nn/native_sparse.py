"""Multi-head native sparse attention: learned summaries of the past, and gates of its branches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.nn.feed_forward import gelu
from qkv_jax.nn.linear import Linear
from qkv_jax.ops.cache import among_all, of_these
from qkv_jax.ops.masks import Causal
from qkv_jax.ops.native_sparse import Pattern, native_sparse_attention


class Compression(nnx.Module):
    """One vector from the vectors of `size` tokens: `gelu(concat(x) W + b) W' + b'`.

    The first layer has weights for each place, so that order matters; an embedding of the places,
    which the paper adds to its input, would only add a constant to b.

    Args:
      width: H, of a vector.
      size: how many tokens become one.
      hidden: width of the layer between.
      dtype, param_dtype: of the computation and of the parameters.
      rngs: where the initial parameters come from.
    """

    def __init__(
        self,
        width: int,
        size: int,
        hidden: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.up = Linear(size * width, hidden, rngs=rngs, **dtypes)
        self.down = Linear(hidden, width, rngs=rngs, **dtypes)

    def __call__(self, x: jax.Array, last_tokens: np.ndarray) -> jax.Array:
        """Compresses [B, S, K, H] to [B, M, K, H].

        Args:
          x: a vector per token and head; all heads share the parameters.
          last_tokens: the last token of each of the M rows, integers [M].
        """
        B, _, K, H = x.shape
        size = self.up.in_features // H
        tokens = last_tokens[:, None] + np.arange(1 - size, 1)
        x_BMKsH = jnp.moveaxis(x[:, tokens], 3, 2)
        return self.down(gelu(self.up(x_BMKsH.reshape(B, -1, K, size * H))))


class NativeSparseAttention(MultiHeadAttention):
    """Multi-head `ops.native_sparse.native_sparse_attention` (NSA, Yuan et al. 2025).

        gates = sigmoid(x W_g + b_g), three per head
        compressed keys, values = an MLP of the keys, and one of the values, of every row of tokens

    arxiv.org/abs/2502.11089. Causal. The three branches share keys and values, where the paper's
    have their own: its projections are those of MultiHeadAttention. The MLPs read keys after norm
    and rotation.

    The arguments that are not listed are those of MultiHeadAttention but `op`.

    Args:
      width, num_heads: as in MultiHeadAttention.
      pattern: the sizes of blocks and window, and how many are selected.
      hidden: width of the MLPs' hidden layer; by default 4 H.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        pattern: Pattern = Pattern(),  # noqa: B008, frozen
        hidden: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(
            width, num_heads, op=native_sparse_attention, rngs=rngs, **dtypes, **kwargs
        )
        hidden = 4 * self.head_dim if hidden is None else hidden
        self.pattern = pattern
        self.compress_key, self.compress_value = (
            Compression(self.head_dim, pattern.compressed_size, hidden, rngs=rngs, **dtypes)
            for _ in range(2)
        )
        self.gate = Linear(width, 3 * num_heads, rngs=rngs, **dtypes)

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        rows = self.pattern.last_tokens(k.shape[1])
        return self.op(
            q, k, v, compressed_k=self.compress_key(k, rows),
            compressed_v=self.compress_value(v, rows),
            gates=jax.nn.sigmoid(self.gate(x)).reshape(*q.shape[:3], 3), pattern=self.pattern,
            **kwargs,
        )  # fmt: skip

    def attend_cached(
        self,
        x: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: Any,
        *,
        positions: jax.Array,
        lengths: jax.Array | None,
        **kwargs: Any,
    ) -> tuple[jax.Array, Any]:
        """The op wants all queries: those of tokens read before are 0, and their outputs unused."""
        (k, v), _, cache = cache.attended((k, v), positions, lengths)
        x, q = (among_all(y, positions, k.shape[1]) for y in (x, q))
        out = self.attend(x, q, k, v, mask=Causal(), **kwargs)
        return of_these(out, positions), cache

    def state_size(self, length: int) -> int:
        """Keys and values, and the compressed ones."""
        rows = len(self.pattern.last_tokens(length))
        return super().state_size(length) + rows * 2 * self.num_kv_heads * self.head_dim
