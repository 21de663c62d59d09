"""Multi-head attention: the parameters around an attention op."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from qkv_jax import ops
from qkv_jax.nn.linear import Linear, compute_dtype, project
from qkv_jax.nn.norms import make_norm
from qkv_jax.nn.sharding import by_heads
from qkv_jax.ops.cache import Cache, CacheKind
from qkv_jax.ops.masks import Causal, Mask
from qkv_jax.ops.scores import Score

_default_init = nnx.initializers.lecun_normal()


class MultiHeadAttention(nnx.Module):
    """Projects to heads, attends, projects back (Vaswani et al. 2017, arxiv.org/abs/1706.03762).

        q, k, v = x W_q, c W_k, c W_v        c is the context: x itself in self-attention
        q, k = rotary(norm(q)), rotary(norm(k))         where asked for
        out = concat(heads of op(q, k, v)) W_out

    Args:
      width: D, of the input and the output.
      num_heads: N.
      num_kv_heads: K, which divides N (grouped-query attention); by default N.
      head_dim: H = h, by default width / num_heads.
      context_width: width of what keys and values are made from, by default `width`.
      use_bias: whether the four projections have biases.
      qkv_bias: whether the three projections in have biases; None: as `use_bias` says.
      qk_norm: normalise each query and key (RMS, with a learned scale [H]) before the rotation
        (Henry et al. 2020, arxiv.org/abs/2010.04245).
      qk_norm_kind: "rms", or another of `NORMS`.
      norm_epsilon: of those norms.
      rotary_base: base of the rotary position embedding on queries and keys; None: no rotation.
      rotary_scaling: what `ops.positions.llama3_frequencies` takes after width and base, or the
        factor alone of `ops.positions.linear_interpolation`; None: the frequencies of the base.
      share_kv: one projection makes keys and values.
      share_qk: one projection makes queries and keys.
      scale: factor of the logits; None: the op's own, which is 1 / sqrt(H) for `ops.attention`.
      op: the attention function, called as `ops.attention` is.
      dropout_rate: of the attention weights, where a call passes `rng`.
      kernel_init, out_init: initialisers of the projections in and of the projection out.
      dtype: of the computation; None: that of the input and the parameters.
      param_dtype: of the parameters.
      rngs: where the initial parameters come from.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_width: int | None = None,
        use_bias: bool = False,
        qkv_bias: bool | None = None,
        qk_norm: bool = False,
        qk_norm_kind: str = "rms",
        norm_epsilon: float | None = None,
        rotary_base: float | None = None,
        rotary_scaling: Sequence[float] | None = None,
        share_kv: bool = False,
        share_qk: bool = False,
        scale: float | None = None,
        op: Callable[..., jax.Array] = ops.attention,
        dropout_rate: float = 0.0,
        kernel_init: Initializer = _default_init,
        out_init: Initializer = _default_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        context_width = width if context_width is None else context_width
        _check_heads(width, num_heads, num_kv_heads, head_dim)
        if share_qk and (num_kv_heads != num_heads or context_width != width):
            raise ValueError(
                "share_qk: queries and keys of one projection need num_kv_heads = num_heads and "
                f"context_width = width, got {num_kv_heads} and {num_heads} heads, "
                f"{context_width} and {width} wide"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.rotary_base = rotary_base
        self.rotary_scaling = None if rotary_scaling is None else tuple(rotary_scaling)
        self.rotary_factor = 1.0  # divides positions: more than 1 for longer texts than trained on
        self.scale = scale
        self.dropout_rate = dropout_rate
        self.op = op

        qkv_bias = use_bias if qkv_bias is None else qkv_bias

        def linear(inputs: int, outputs: int, init: Initializer, use_bias: bool) -> Linear:
            return Linear(
                inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        def norm() -> Callable[[jax.Array], jax.Array] | None:
            if not qk_norm:
                return None
            return make_norm(
                qk_norm_kind, self.head_dim, epsilon=norm_epsilon, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        inner, kv_inner = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.query = linear(width, inner, kernel_init, qkv_bias)
        self.key = None if share_qk else linear(context_width, kv_inner, kernel_init, qkv_bias)
        self.value = None if share_kv else linear(context_width, kv_inner, kernel_init, qkv_bias)
        self.query_norm, self.key_norm = norm(), norm()
        self.out = linear(inner, width, out_init, use_bias)

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        mask: Mask | None = None,
        score: Score | tuple[Score, ...] | None = None,
        positions: jax.Array | None = None,
        context_positions: jax.Array | None = None,
        rng: jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """Attends from `x` to `context`, or to `x` itself.

        Args:
          x: [B, T, D].
          context: [B, S, context_width]; None for self-attention.
          mask: who may attend to whom; None: everyone to everything.
          score: what happens to the logits before the softmax.
          positions: integers [T] or [B, T], by default 0 ... T-1.
          context_positions: integers [S] or [B, S]; by default 0 ... S-1, in self-attention
            `positions`.
          rng: a key; without it there is no dropout.
          **kwargs: what else a subclass's `attend` takes.

        Returns:
          [B, T, D].
        """
        if context is None:
            context_positions = positions
        q, k, v = self._prepared(x, context, positions, context_positions)
        if self.scale is not None:
            kwargs["scale"] = self.scale
        out = self.attend(
            x, q, k, v, mask=mask, score=score,
            q_positions=positions, kv_positions=context_positions,
            dropout_rate=0.0 if rng is None else self.dropout_rate, dropout_rng=rng, **kwargs,
        )  # fmt: skip
        return self.out(out.reshape(*x.shape[:2], -1))

    def init_cache(self, batch: int, length: int, *, kind: CacheKind = Cache) -> Any:
        """What `extend` begins with, before any token.

        Args:
          batch: B.
          length: the most tokens that a row may have. An op that forgets keys keeps fewer, one that
            keeps something else that.
          kind: of the cache of keys and values.
        """
        if hasattr(self.op, "init_cache"):
            return self.op.init_cache(batch, self.num_kv_heads, self.head_dim)
        num_sinks, window = getattr(self.op, "kept", (0, None))
        rolling = window is not None and num_sinks + window < length
        shape = (self.num_kv_heads, self.head_dim)  # of a key, and of a value
        layer = next(y for y in (self.value, self.key, self.query) if y is not None)
        return kind.empty(
            batch, num_sinks + window if rolling else length, shape, shape, rolling=rolling,
            num_sinks=num_sinks if rolling else 0, dtype=compute_dtype(layer),
        )  # fmt: skip

    def extend(
        self,
        x: jax.Array,
        cache: Any,
        *,
        positions: jax.Array,
        lengths: jax.Array | None = None,
        score: Score | tuple[Score, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[jax.Array, Any]:
        """Attends from new tokens to those that were read before, and to one another: causally.

        Any split of a sequence into calls gives what one call with `Causal()` gives.

        Args:
          x: [B, T, D], the new tokens.
          cache: what `init_cache` or the last call returned.
          positions: of the new tokens, integers that follow one another, [T], or [B, T].
          lengths: how many of the T are no padding, integers [B]; None: all of them.
          score: what happens to the logits before the softmax.
          **kwargs: what else a subclass's `attend_cached` takes.

        Returns:
          [B, T, D], where padding means nothing, and the cache after these tokens.
        """
        q, k, v = self._prepared(x, None, positions, positions)
        if self.scale is not None:
            kwargs["scale"] = self.scale
        out, cache = self.attend_cached(
            x, q, k, v, cache, positions=positions, lengths=lengths, score=score, **kwargs
        )
        return self.out(out.reshape(*x.shape[:2], -1)), cache

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
        """`attend` with the keys and values of a cache, after norm and rotation; and the cache."""
        if hasattr(self.op, "extend"):
            return self.op.extend(q, k, v, cache, positions=positions, lengths=lengths, **kwargs)
        (k, v), kv_positions, cache = cache.attended((k, v), positions, lengths)
        out = self.attend(
            x, q, k, v, mask=Causal(), q_positions=positions, kv_positions=kv_positions, **kwargs
        )
        return out, cache

    def context_cache(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of a context, for `extend_context`.

        Args:
          context: [B, S, context_width].
        """
        layers = [layer for layer in (self.key, self.value) if layer is not None]
        made = iter(project(context, layers)) if layers else iter(())
        k = next(made) if self.key is not None else self.query(context)
        v = next(made) if self.value is not None else k
        k, v = (y.reshape(*y.shape[:2], self.num_kv_heads, self.head_dim) for y in (k, v))
        return (k if self.key_norm is None else self.key_norm(k)), v

    def attend_context(
        self, x: jax.Array, cache: tuple[jax.Array, jax.Array], *, mask: Mask | None = None
    ) -> jax.Array:
        """Attends from `x` [B, T, D] to a context whose keys and values are `context_cache`'s."""
        q = self.query(x).reshape(*x.shape[:2], self.num_heads, self.head_dim)
        q = q if self.query_norm is None else self.query_norm(q)
        kwargs = {} if self.scale is None else {"scale": self.scale}
        out = self.attend(x, q, *cache, mask=mask, **kwargs)
        return self.out(out.reshape(*x.shape[:2], -1))

    def _prepared(
        self,
        x: jax.Array,
        context: jax.Array | None,
        positions: jax.Array | None,
        context_positions: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, normed and rotated."""
        q, k, v = self.project(x, context)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary_base is not None:
            q, k = self._rotate(q, positions), self._rotate(k, context_positions)
        return q, k, v

    def _rotate(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        frequencies = ops.positions.rotary_frequencies(self.head_dim, self.rotary_base)
        scaling = self.rotary_scaling or (1.0,)
        if len(scaling) == 1:
            frequencies = ops.positions.linear_interpolation(frequencies, *scaling)
        else:
            frequencies = ops.positions.llama3_frequencies(
                self.head_dim, self.rotary_base, *scaling
            )
        frequencies = ops.positions.linear_interpolation(frequencies, self.rotary_factor)
        return ops.positions.rotary(x, _or_range(positions, x), frequencies=frequencies)

    def attend(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any
    ) -> jax.Array:
        """The op on projected queries, keys and values: what a mechanism of its own overrides.

        Args:
          x: [B, T, D], what the queries were made from.
          q, k, v: [B, T, N, H] and [B, S, K, H], after norm and rotation.
          **kwargs: mask, score, q_positions, kv_positions, dropout_rate and dropout_rng; scale
            where the module has one.

        Returns:
          [B, T, N, H].
        """
        return self.op(q, k, v, **kwargs)

    def state_size(self, length: int) -> int:
        """How many numbers decoding one more token needs, after `length` of them: keys and values.

        An op that forgets keys says so by its `cache_length(length)`; one that keeps something else
        by its `cache_size(num_kv_heads, head_dim)`.
        """
        if hasattr(self.op, "cache_size"):
            return self.op.cache_size(self.num_kv_heads, self.head_dim)
        keys = getattr(self.op, "cache_length", lambda length: length)(length)
        return keys * self.num_kv_heads * self.head_dim * (1 if self.value is None else 2)

    def project(
        self, x: jax.Array, context: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, S, K, H], before norm and rotation.

        Layers that read the same input run as one matrix product.
        """
        names = [n for n in ("query", "key", "value") if getattr(self, n) is not None]
        if context is None:
            flat = dict(zip(names, project(x, [getattr(self, n) for n in names]), strict=True))
        else:
            flat = {"query": self.query(x)}
            rest = [getattr(self, n) for n in names[1:]]
            flat |= zip(names[1:], project(context, rest) if rest else [], strict=True)
            if self.key is None:
                flat["key"] = self.query(context)
        q = flat["query"]
        k = flat.get("key", q)
        v = flat.get("value", k)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = (
            by_heads(y.reshape(*y.shape[:2], n, self.head_dim))
            for y, n in zip((q, k, v), heads, strict=True)
        )
        return q, k, v


def _check_heads(width: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> None:
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: wanted a divisor of num_heads = {num_heads}, got {num_kv_heads}"
        )
    if head_dim is None and width % num_heads:
        raise ValueError(
            f"num_heads: wanted a divisor of width = {width} (or a head_dim), got {num_heads}"
        )


def _or_range(positions: jax.Array | None, x: jax.Array) -> jax.Array:
    return jnp.arange(x.shape[1]) if positions is None else positions
