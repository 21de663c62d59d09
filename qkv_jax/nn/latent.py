"""Multi-head latent attention: the parameters around `ops.latent`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from qkv_jax.nn.linear import Linear, compute_dtype, project
from qkv_jax.ops import positions as rotation
from qkv_jax.ops.cache import Cache, CacheKind
from qkv_jax.ops.latent import absorbed_latent_attention, latent_attention
from qkv_jax.ops.masks import Causal, Mask
from qkv_jax.ops.scores import Score

_default_init = nnx.initializers.lecun_normal()


class LatentAttention(nnx.Module):
    """Attention whose keys and values are expanded from one latent per token (DeepSeek-V2).

        latent, k_rotary = norm(x W_latent), rotary(x W_rotary)         C + R numbers per token
        q = norm(x W_query_latent) W_query, its first R coordinates per head rotated
        out = concat(heads of latent_attention(q, latent, k_rotary, W_key, W_value)) W_out

    With `query_latent_dim=None`, `q = x W_query`. DeepSeek-AI 2024, arxiv.org/abs/2405.04434; the
    rotary layout is that of `MultiHeadAttention`, the rotary coordinates come first.

    Args:
      width: D, of the input and the output.
      num_heads: N.
      head_dim: H = h, without the rotary part; by default width / num_heads.
      latent_dim: C; by default 4 H, as in the paper.
      rotary_dim: R, even; by default about H / 2, as in the paper, and 0 without a `rotary_base`.
      query_latent_dim: width of the queries' own latent; None: they are made from `x` at once.
      rotary_base: base of the rotary position embedding; None: no rotary part.
      use_bias: whether the projections of `x` and the one out have biases. Those of a latent have
        none: that they are matrices alone is what lets them be absorbed.
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
        head_dim: int | None = None,
        latent_dim: int | None = None,
        rotary_dim: int | None = None,
        query_latent_dim: int | None = None,
        rotary_base: float | None = 10_000.0,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        kernel_init: Initializer = _default_init,
        out_init: Initializer = _default_init,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1 or (head_dim is None and width % num_heads):
            raise ValueError(
                f"num_heads: wanted a divisor of width = {width} (or a head_dim), got {num_heads}"
            )
        self.num_heads = num_heads
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.latent_dim = 4 * self.head_dim if latent_dim is None else latent_dim
        if rotary_dim is None:
            rotary_dim = 0 if rotary_base is None else max(2, self.head_dim // 4 * 2)
        if rotary_dim < 0 or rotary_dim % 2 or (rotary_dim and rotary_base is None):
            wanted = "0 without a rotary_base" if rotary_base is None else "an even number >= 0"
            raise ValueError(f"rotary_dim: wanted {wanted}, got {rotary_dim}")
        self.rotary_dim = rotary_dim
        self.rotary_base = rotary_base
        self.dropout_rate = dropout_rate

        def linear(inputs: int, outputs: int, use_bias: bool, init=kernel_init) -> Linear:
            return Linear(
                inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        def norm(features: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        inner, q_inner = num_heads * self.head_dim, num_heads * (rotary_dim + self.head_dim)
        if query_latent_dim is None:
            self.query_latent, self.query_norm = None, None
            self.query = linear(width, q_inner, use_bias)
        else:
            self.query_latent = linear(width, query_latent_dim, use_bias)
            self.query_norm = norm(query_latent_dim)
            self.query = linear(query_latent_dim, q_inner, False)
        self.latent = linear(width, self.latent_dim + rotary_dim, use_bias)
        self.latent_norm = norm(self.latent_dim)
        self.key_up = linear(self.latent_dim, inner, False)
        self.value_up = linear(self.latent_dim, inner, False)
        self.out = linear(inner, width, use_bias, out_init)

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: Mask | None = None,
        score: Score | tuple[Score, ...] | None = None,
        positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from `x` to itself, in the plain form.

        Args:
          x: [B, T, D].
          mask: who may attend to whom; None: everyone to everything.
          score: what happens to the logits before the softmax.
          positions: integers [T] or [B, T], by default 0 ... T-1.
          rng: a key; without it there is no dropout.

        Returns:
          [B, T, D].
        """
        if self.query_latent is None:
            q, latent = project(x, [self.query, self.latent])
        else:
            q, latent = project(x, [self.query_latent, self.latent])
            q = self.query(self.query_norm(q))
        return self._attend(
            latent_attention, self._queries(q, positions), *self._latents(latent, positions),
            mask=mask, score=score, positions=positions, kv_positions=positions, rng=rng,
        )  # fmt: skip

    def compress(
        self, x: jax.Array, positions: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """What is kept of tokens for later ones to attend to: `state_size(S)` numbers per sequence.

        Args:
          x: [B, S, D].
          positions: integers [S] or [B, S], by default 0 ... S-1.

        Returns:
          The latents [B, S, C] and the rotated shared keys [B, S, R].
        """
        return self._latents(self.latent(x), positions)

    def attend_absorbed(
        self,
        x: jax.Array,
        latent: jax.Array,
        k_rotary: jax.Array,
        *,
        mask: Mask | None = None,
        score: Score | tuple[Score, ...] | None = None,
        positions: jax.Array | None = None,
        kv_positions: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from `x` to tokens that were compressed before, without expanding them.

            state = module.compress(x)
            module.attend_absorbed(x, *state, mask=mask) == module(x, mask=mask)

        Args:
          x: [B, T, D], the new tokens.
          latent, k_rotary: what `compress` returned for all tokens that may be attended to, the new
            ones among them.
          mask, score, rng: as in a call.
          positions: of the new tokens, integers [T] or [B, T]. By default 0 ... T-1: say it where
            they are not the first ones.
          kv_positions: integers [S] or [B, S], by default 0 ... S-1.

        Returns:
          [B, T, D].
        """
        q = x if self.query_latent is None else self.query_norm(self.query_latent(x))
        return self._attend(
            absorbed_latent_attention, self._queries(self.query(q), positions), latent, k_rotary,
            mask=mask, score=score, positions=positions, kv_positions=kv_positions, rng=rng,
        )  # fmt: skip

    def init_cache(self, batch: int, length: int, *, kind: CacheKind = Cache) -> Cache:
        """What `extend` begins with: latents and rotated keys for so many tokens; see `extend`."""
        dtype = compute_dtype(self.latent)
        return kind.empty(batch, length, (self.latent_dim,), (self.rotary_dim,), dtype=dtype)

    def extend(
        self,
        x: jax.Array,
        cache: Cache,
        *,
        positions: jax.Array,
        lengths: jax.Array | None = None,
        score: Score | tuple[Score, ...] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """As `MultiHeadAttention.extend`, absorbed: nothing in the cache is expanded."""
        new = self.compress(x, positions)
        state, kv_positions, cache = cache.attended(new, positions, lengths)
        out = self.attend_absorbed(
            x, *state, mask=Causal(), score=score, positions=positions, kv_positions=kv_positions
        )
        return out, cache

    def state_size(self, length: int) -> int:
        """How many numbers `compress` keeps of `length` tokens."""
        return length * (self.latent_dim + self.rotary_dim)

    def _queries(self, flat: jax.Array, positions: jax.Array | None) -> jax.Array:
        """Queries [B, T, N, R + H], rotated, from [B, T, N (R + H)]."""
        q = flat.reshape(*flat.shape[:2], self.num_heads, self.rotary_dim + self.head_dim)
        return self._rotated(q, positions)

    def _latents(
        self, joined: jax.Array, positions: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Latents [B, S, C], normalised, and keys [B, S, R], rotated, from both side by side."""
        latent, k_rotary = jnp.split(joined, [self.latent_dim], axis=-1)
        return self.latent_norm(latent), self._rotated(k_rotary[:, :, None], positions)[:, :, 0]

    def _rotated(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        if self.rotary_dim == 0:
            return x
        positions = jnp.arange(x.shape[1]) if positions is None else positions
        return rotation.rotary(x, positions, base=self.rotary_base, width=self.rotary_dim)

    def _attend(
        self,
        op: Callable[..., jax.Array],
        q: jax.Array,
        latent: jax.Array,
        k_rotary: jax.Array,
        *,
        positions: jax.Array | None,
        rng: jax.Array | None,
        **kwargs,
    ) -> jax.Array:
        matrices = (
            up.kernel[...].reshape(self.latent_dim, self.num_heads, self.head_dim)
            for up in (self.key_up, self.value_up)
        )
        out = op(
            q, latent, k_rotary, *matrices, q_positions=positions,
            dropout_rate=0.0 if rng is None else self.dropout_rate, dropout_rng=rng, **kwargs,
        )  # fmt: skip
        return self.out(out.reshape(*out.shape[:2], -1))
