"""Feature maps for linear attention, and the attention that they make: a kernel's in linear time.

    softmax attention   weights in proportion to exp(scale q . k)
    kernel attention    weights in proportion to f(q) . f(k), positive features f

What the keys and values say to every query is one matrix, the sum of f(k) v; divided by the same
sum with v = 1, the weights of a query sum to 1.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments
from qkv_jax.ops.linear import linear_attention, linear_attention_bidirectional
from qkv_jax.ops.masks import Mask, order_of

Array = jax.Array | np.ndarray


def elu_plus_one(x: Array) -> jax.Array:
    """`elu(x) + 1`, [..., H] (Katharopoulos et al. 2020, arxiv.org/abs/2006.16236)."""
    return jax.nn.elu(x) + 1


def relu(x: Array) -> jax.Array:
    """`max(x, 0)`, [..., H]. A query none of whose features is positive attends to nothing."""
    return jax.nn.relu(x)


def taylor(x: Array) -> jax.Array:
    """Features of `1 + q . k + (q . k)^2 / 2`: [..., H] to [..., 1 + H + H^2].

    The exponential's series to second order, which is positive (Based, Arora et al. 2024,
    arxiv.org/abs/2402.18668; there x is 16 wide and divided by 16^(1/4)).
    """
    squares = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1) / np.sqrt(2)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares.astype(x.dtype)], axis=-1)


FEATURE_MAPS: dict[str, Callable[[Array], jax.Array]] = {
    "elu": elu_plus_one, "relu": relu, "taylor": taylor,
}  # fmt: skip


def random_features(x: Array, projection: Array, *, is_query: bool) -> jax.Array:
    """Positive random features of the exponential kernel (FAVOR+, Performer).

        f(x) = exp(w x - |x|^2 / 2) / sqrt(m),      E[f(q) . f(k)] = exp(q . k)

    for projections w with rows N(0, 1) (Choromanski et al. 2020, arxiv.org/abs/2009.14794). Here
    times a positive factor that cancels in the weights, so that nothing overflows: for a query its
    own largest feature, for keys exp(-max |w|^2 / 4), which is the same for all of them. So no
    token has a say in another's features, and states carry from one call to the next. Keys with
    |x|^2 far beyond 100 vanish in float32.

    Args:
      x: [..., H], times scale ** 0.5.
      projection: w, [m, H].
      is_query: which of the two factors.

    Returns:
      [..., m].
    """
    projection = jnp.asarray(projection, x.dtype)
    exponents = x @ projection.T - jnp.sum(x * x, axis=-1, keepdims=True) / 2
    if is_query:
        peak = jnp.max(exponents, axis=-1, keepdims=True)
    else:
        peak = jnp.max(jnp.sum(projection * projection, axis=-1)) / 4
    return jnp.exp(exponents - jax.lax.stop_gradient(peak)) / projection.shape[0] ** 0.5


def trigonometric_features(x: Array, projection: Array) -> jax.Array:
    """Random features of the exponential kernel that may be negative, for comparison.

        f(x) = exp(|x|^2 / 2) [cos(w x), sin(w x)] / sqrt(m),      E[f(q) . f(k)] = exp(q . k)

    for projections w with rows N(0, 1) (Rahimi and Recht 2007; Choromanski et al. 2020, section
    3.1). They err most where the kernel is small: the variance is that of cos(w (q - k)), times
    exp(|q|^2 + |k|^2), however small exp(q . k) is. So the sum of a query's weights may be 0 or
    below, and no attention is made of them here.

    Args:
      x: [..., H], times scale ** 0.5.
      projection: w, [m, H].

    Returns:
      [..., 2 m].
    """
    projection = jnp.asarray(projection, x.dtype)
    angles = x @ projection.T
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    size = jnp.exp(jnp.sum(x * x, axis=-1, keepdims=True) / 2)
    return size * waves / projection.shape[0] ** 0.5


def independent_projection(rng: Array, num_features: int, width: int) -> jax.Array:
    """`num_features` independent rows N(0, 1), [m, H]."""
    return jax.random.normal(rng, (num_features, width))


def orthogonal_projection(rng: Array, num_features: int, width: int) -> jax.Array:
    """Rows as `independent_projection`'s one by one, but orthogonal within each H of them.

    The estimate of the kernel stays unbiased, and its variance falls (Performer, section 3.2).

    Args:
      rng: a key; another one redraws.
      num_features: m.
      width: H.
    """
    rows, lengths = jax.random.split(rng)
    blocks = jax.random.normal(rows, (-(-num_features // width), width, width))
    q, r = jnp.linalg.qr(blocks)
    # QR leaves the signs to the algorithm; only these make every direction equally likely.
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
    orthogonal = q.reshape(-1, width)[:num_features]
    norms = jnp.linalg.norm(jax.random.normal(lengths, (num_features, width)), axis=-1)
    return orthogonal * norms[:, None]


def kernel_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    feature_map: Callable[[Array], jax.Array] = elu_plus_one,
    chunk_size: int = 64,
    mask: Mask | None = None,
    score: None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: None = None,
    kv_positions: None = None,
) -> jax.Array:
    """Attention with weights in proportion to `f(q) . f(k)`, in linear time.

        out[t] = sum over s of (f(q[t]) . f(k[s])) v[s] / sum over s of f(q[t]) . f(k[s])

    over s <= t under `Causal()`, else over all s. Katharopoulos et al. 2020,
    arxiv.org/abs/2006.16236. O(T) time and memory.

    Args:
      q: queries, floating [B, T, N, H].
      k: keys, floating [B, S, K, H]; K divides N.
      v: values, floating [B, S, K, h].
      feature_map: f, from [..., H] to features [..., any] that are not negative.
      chunk_size: see `linear_attention`.
      mask: None, `Causal()`, `Lengths(...)`, or these joined by `&`.
      score, dropout_rate, dropout_rng, q_positions, kv_positions: None or 0: no weight is computed
        that they could change, and tokens stand in array order.

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
      NotImplementedError: for what it cannot honour.
    """
    causal, lengths = _checked(
        q, k, v, mask=mask, score=score, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
        q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    return _normalised(feature_map(_wide(q)), feature_map(_wide(k)), v, causal, lengths, chunk_size)


def performer_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    projection: Array,
    scale: float | None = None,
    chunk_size: int = 64,
    mask: Mask | None = None,
    score: None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: None = None,
    kv_positions: None = None,
) -> jax.Array:
    """Softmax attention, estimated with random features in linear time (FAVOR+).

    Choromanski et al. 2020, arxiv.org/abs/2009.14794. The mean squared error falls as 1 / m.
    O(T m (H + h)). The arguments that are not listed are those of `kernel_attention`.

    Args:
      projection: floating [m, H], by `orthogonal_projection` or `independent_projection`; draw
        another one now and then while training.
      scale: of q . k; by default 1 / sqrt(H).

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
      NotImplementedError: for what it cannot honour.
    """
    causal, lengths = _checked(
        q, k, v, mask=mask, score=score, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
        q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    H = q.shape[-1]
    if np.ndim(projection) != 2 or projection.shape[1] != H:
        raise ValueError(
            f"projection: wanted floating [m, H] = [m, {H}], got {list(np.shape(projection))}"
        )
    q, k = _random_features(q, k, projection, scale)
    return _normalised(q, k, v, causal, lengths, chunk_size)


def _random_features(q: Array, k: Array, projection: Array, scale: float | None):
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    return (
        random_features(_wide(x) * root, projection, is_query=is_query)
        for x, is_query in ((q, True), (k, False))
    )


@dataclasses.dataclass(frozen=True)
class LinearAttention:
    """`kernel_attention` by a name of `FEATURE_MAPS`, for `nn.MultiHeadAttention(op=...)`."""

    feature_map: str = "elu"
    chunk_size: int = 64

    def __post_init__(self):
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map: wanted one of {sorted(FEATURE_MAPS)}, got {self.feature_map!r}"
            )

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        f = FEATURE_MAPS[self.feature_map]
        return kernel_attention(q, k, v, feature_map=f, chunk_size=self.chunk_size, **kwargs)

    def init_cache(self, batch: int, num_kv_heads: int, head_dim: int) -> jax.Array:
        """The state before any token, [B, K, features, H + 1]."""
        return jnp.zeros((batch, num_kv_heads, self._num_features(head_dim), head_dim + 1))

    def extend(
        self, q: Array, k: Array, v: Array, cache: jax.Array, **kwargs: Any
    ) -> tuple[jax.Array, jax.Array]:
        """New tokens after those of a state: `nn.MultiHeadAttention.attend_cached`."""
        f = FEATURE_MAPS[self.feature_map]
        return _extended(f(_wide(q)), f(_wide(k)), v, cache, self.chunk_size, **kwargs)

    def cache_size(self, num_kv_heads: int, head_dim: int) -> int:
        """The numbers in the state: the sums of f(k) v and of f(k)."""
        return num_kv_heads * self._num_features(head_dim) * (head_dim + 1)

    def _num_features(self, head_dim: int) -> int:
        x = jax.ShapeDtypeStruct((head_dim,), jnp.float32)
        return jax.eval_shape(FEATURE_MAPS[self.feature_map], x).size


@dataclasses.dataclass(frozen=True)
class Performer:
    """`performer_attention` with features of one seed, for `nn.MultiHeadAttention(op=...)`.

    Args:
      num_features: m.
      seed: of the projection; another one redraws it.
      orthogonal: whether the features are orthogonal, else independent.
      chunk_size: see `linear_attention`.
    """

    num_features: int = 128
    seed: int = 0
    orthogonal: bool = True
    chunk_size: int = 64

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        return performer_attention(
            q, k, v, projection=self._projection(q), chunk_size=self.chunk_size, **kwargs
        )

    def _projection(self, q: Array) -> np.ndarray:
        return _drawn(self.num_features, q.shape[-1], self.seed, self.orthogonal)

    def init_cache(self, batch: int, num_kv_heads: int, head_dim: int) -> jax.Array:
        """The state before any token, [B, K, m, H + 1]."""
        return jnp.zeros((batch, num_kv_heads, self.num_features, head_dim + 1))

    def extend(
        self, q: Array, k: Array, v: Array, cache: jax.Array, **kwargs: Any
    ) -> tuple[jax.Array, jax.Array]:
        """New tokens after those of a state: `nn.MultiHeadAttention.attend_cached`."""
        features = _random_features(q, k, self._projection(q), kwargs.pop("scale", None))
        return _extended(*features, v, cache, self.chunk_size, **kwargs)

    def cache_size(self, num_kv_heads: int, head_dim: int) -> int:
        """The numbers in the state: the sums of f(k) v and of f(k)."""
        return num_kv_heads * self.num_features * (head_dim + 1)


@functools.lru_cache(maxsize=64)
def _drawn(num_features: int, width: int, seed: int, orthogonal: bool) -> np.ndarray:
    """The projection as a constant, drawn once and not in every step."""
    draw = orthogonal_projection if orthogonal else independent_projection
    with jax.ensure_compile_time_eval():
        return np.asarray(draw(jax.random.key(seed), num_features, width))


def _wide(x: Array) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _checked(q, k, v, *, mask, score, dropout_rate, **kwargs) -> tuple[bool, Any]:
    """Whether the mask is causal, and the lengths of the rows."""
    for name in ("q_positions", "kv_positions"):
        if kwargs[name] is not None:
            raise NotImplementedError(f"{name}: linear attention takes tokens in array order")
    if score is not None:
        raise NotImplementedError("score: linear attention computes no logits to change")
    if dropout_rate:
        raise NotImplementedError("dropout_rate: linear attention computes no weights to drop")
    causal, lengths = order_of(mask, "linear attention")
    arguments.check(
        q, k, v, mask=mask, score=None, scale=None, sinks=None, dropout_rate=dropout_rate, **kwargs
    )
    return causal, lengths


def _extended(
    q: jax.Array,
    k: jax.Array,
    v: Array,
    state: jax.Array,
    chunk_size: int,
    *,
    positions: Array,
    lengths: Array | None,
    score: None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to features from a state on, and the state after these tokens."""
    del positions
    if score is not None:
        raise NotImplementedError("score: linear attention computes no logits to change")
    out, state = linear_attention(
        q, k, _with_ones(v), state=state, scale=1.0, lengths=lengths, chunk_size=chunk_size
    )
    return _divided(out, v.dtype), state


def _with_ones(v: Array) -> jax.Array:
    """Values with one more column, of ones, whose sum is that of the weights."""
    ones = jnp.ones((*v.shape[:-1], 1), jnp.promote_types(v.dtype, jnp.float32))
    return jnp.concatenate([jnp.asarray(v, ones.dtype), ones], axis=-1)


def _normalised(
    q: jax.Array, k: jax.Array, v: Array, causal: bool, lengths: Any, chunk_size: int
) -> jax.Array:
    """Linear attention to features, whose weights sum to 1."""
    joined = _with_ones(v)
    if causal:
        out, _ = linear_attention(q, k, joined, scale=1.0, lengths=lengths, chunk_size=chunk_size)
    else:
        out = linear_attention_bidirectional(q, k, joined, scale=1.0, lengths=lengths)
    return _divided(out, v.dtype)


def _divided(out: jax.Array, dtype: Any) -> jax.Array:
    """Sums [..., h] divided by that of the weights, the last column of `out`."""
    # Divided by its own value first, a small total has no square that vanishes in a derivative.
    own = jax.lax.stop_gradient(out[..., -1:])
    out = out / jnp.where(own > jnp.finfo(own.dtype).tiny, own, 1)
    total = out[..., -1:]
    return (out[..., :-1] / jnp.where(total == 0, 1, total)).astype(dtype)
