"""Multi-head attention with a forget gate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer

from qkv_jax.nn.attention import MultiHeadAttention
from qkv_jax.nn.linear import Linear
from qkv_jax.ops.attention import attention
from qkv_jax.ops.cache import Cache, CacheKind
from qkv_jax.ops.forgetting import forget_score, forgetting_attention, running_sums
from qkv_jax.ops.masks import Causal
from qkv_jax.ops.scores import Score

_default_init = nnx.initializers.lecun_normal()


class ForgettingAttention(MultiHeadAttention):
    """Multi-head self-attention that forgets (FoX, Lin et al. 2025, arxiv.org/abs/2503.02130).

        log_forget = log sigmoid(x W_forget + b_forget)         a gate per token and head
        out = concat(heads of forgetting_attention(q, k, v, log_forget)) W_out

    For causal masks. The gates tell near from far, so the paper recommends `rotary_base=None`.

    The arguments that are not listed are those of `MultiHeadAttention`.

    Args:
      width, num_heads: as in `MultiHeadAttention`.
      decay_times: after how many tokens the first and the last head have forgotten all but 1 / e of
        a key, before training; the heads between are spaced geometrically. Sets `b_forget`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        decay_times: tuple[float, float] = (16.0, 1024.0),
        kernel_init: Initializer = _default_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        shared = {"kernel_init": kernel_init, "dtype": dtype, "param_dtype": param_dtype}
        super().__init__(width, num_heads, op=forgetting_attention, rngs=rngs, **shared, **kwargs)
        if min(decay_times) <= 0:
            raise ValueError(f"decay_times: wanted two positive numbers, got {decay_times!r}")
        self.forget = Linear(width, num_heads, rngs=rngs, **shared)
        # sigmoid(b) ** time = 1 / e
        bias = -np.log(np.expm1(1 / np.geomspace(*decay_times, num_heads)))
        self.forget.bias[...] = jnp.asarray(bias, param_dtype)

    def project(
        self, x: jax.Array, context: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        if context is not None:
            raise ValueError("context: forgetting attention is of a sequence with itself")
        return super().project(x)

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        return self.op(q, k, v, log_forget=self._log_forget(x), **kwargs)

    def _log_forget(self, x: jax.Array) -> jax.Array:
        gates = self.forget(x)
        return jax.nn.log_sigmoid(gates.astype(jnp.promote_types(gates.dtype, jnp.float32)))

    def init_cache(self, batch: int, length: int, *, kind: CacheKind = Cache) -> Any:
        """The cache of keys and values, and the running sums of the gates, in float32."""
        sums = Cache.empty(batch, length, (self.num_heads,), dtype="float32")
        return super().init_cache(batch, length, kind=kind), sums

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
        score: Score | tuple[Score, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[jax.Array, Any]:
        cache, sums = cache
        # Sums only fall, so that the least of what comes before is the last.
        before = (sums.positions < positions[..., :1])[..., None]
        so_far = jnp.min(sums.read()[0], axis=1, keepdims=True, initial=0, where=before)
        new = so_far + running_sums(self._log_forget(x))
        (kv_sums,), _, sums = sums.attended((new,), positions, lengths)
        (k, v), kv_positions, cache = cache.attended((k, v), positions, lengths)
        given = () if score is None else score if isinstance(score, tuple) else (score,)
        out = attention(
            q, k, v, mask=Causal(), score=(*given, forget_score(new, kv_sums)),
            q_positions=positions, kv_positions=kv_positions, **kwargs,
        )  # fmt: skip
        return out, (cache, sums)

    def state_size(self, length: int) -> int:
        """Keys, values and the running sum of each head's gates."""
        return super().state_size(length) + length * self.num_heads
