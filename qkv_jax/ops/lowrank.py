"""Attention whose weights are a product of thin matrices: Linformer and Nystromformer.

Both read all tokens before any weight is known, so they are bidirectional: a mask may say how long
the rows are, and nothing else.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments, masks
from qkv_jax.ops.attention import attention, attention_weights
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.operands import described
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


def linformer_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    key_projection: Array,
    value_projection: Array,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention over r mixtures of the S keys and values (Linformer, arxiv.org/abs/2006.04768).

        out = softmax(scale * q (E k)^T) (F v)                     E and F are [r, S]

    Wang et al. 2020. O(T r) time and memory for the attention, O(S r) for the projections. It
    approximates attention as far as its matrix of weights has rank r. With E = F = 1 it is
    `ops.attention`. Layers share projections by being given the same arrays.

    Args:
      q: queries, floating [B, T, N, H].
      k: keys, floating [B, S, K, H]; K divides N.
      v: values, floating [B, S, K, h].
      key_projection: E, floating [r, S], or [K, r, S] with one matrix per head.
      value_projection: F, likewise.
      mask: `Lengths(...)` or None. Padded keys and values are 0 before the projection, which gives
        the answer of the row without its padding and E and F without those columns.
      score: None: there is no logit of a query and a key.
      scale: factor of q . (E k); by default 1 / sqrt(H).
      dropout_rate: probability in [0, 1) that a weight of a mixture is dropped.
      dropout_rng: the key of the dropout.
      q_positions, kv_positions: unused: column s belongs to token s of the array.

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
      NotImplementedError: for a score, or a mask that says more than lengths.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    lengths = _lengths(mask, score, "Linformer")

    def projected(x: jax.Array, projection: Array, name: str) -> jax.Array:
        _check_projection(projection, name, x)
        if lengths is not None:
            real = jnp.arange(x.shape[1]) < jnp.reshape(lengths, (-1, 1))
            x = jnp.where(real[..., None, None], x, 0)
        letters = "RS" if projection.ndim == 2 else "KRS"
        projection = jnp.asarray(projection, args.dtype)
        return jnp.einsum(f"{letters},BSKH->BRKH", projection, x.astype(args.dtype))

    out = attention(
        args.q,
        projected(args.k, key_projection, "key_projection"),
        projected(args.v, value_projection, "value_projection"),
        scale=args.scale, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
    )  # fmt: skip
    return out.astype(args.v.dtype)


def nystrom_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    num_landmarks: int,
    iterations: int = 6,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention by way of m landmarks (Nystromformer, Xiong et al. 2021, arxiv.org/abs/2102.03902).

        Q, K = means of q and of k over m segments
        out = softmax(q K^T) pinv(softmax(Q K^T)) softmax(Q k^T) v           scale * inside each

    The Nystrom method: where the matrix of weights has rank m, it is the product of its columns at
    the landmarks, the inverse where they cross, and its rows there. So it is exact where every
    token is a landmark, up to what `pseudo_inverse` has left. O(T m + m^3) time, O(T m) memory.

    Segments are of consecutive tokens and as equal as can be: of n tokens, token s is in segment
    s m // n. With fewer tokens than landmarks, each token is one.

    Args:
      q: queries, floating [B, T, N, H].
      k: keys, floating [B, T, K, H]; K divides N.
      v: values, floating [B, T, K, h].
      num_landmarks: m.
      iterations: of the pseudo-inverse.
      mask: `Lengths(...)` or None. The lengths are those of queries and keys: no landmark reads
        a padded token.
      score: None: there is no logit of a query and a key.
      scale: factor of the dot products; by default 1 / sqrt(H).
      dropout_rate: probability in [0, 1) that a query's weight of a landmark is dropped.
      dropout_rng: the key of the dropout.
      q_positions, kv_positions: unused: segments are of the array.

    Returns:
      [B, T, N, h], in the dtype of `v`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
      NotImplementedError: for a score, or a mask that says more than lengths.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    lengths = _lengths(mask, score, "Nystrom attention")
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    if T != S:
        raise ValueError(f"k: Nystrom attention is self-attention, got {T} queries and {S} keys")
    if num_landmarks < 1 or iterations < 1:
        raise ValueError(
            "num_landmarks, iterations: wanted positive integers, "
            f"got {num_landmarks} and {iterations}"
        )
    num_landmarks = min(num_landmarks, T)
    lengths = jnp.broadcast_to(jnp.clip(T if lengths is None else lengths, 0, T), (B,))
    used = jnp.minimum(num_landmarks, lengths)
    landmarks = None if mask is None else masks.Lengths(used)

    means = _segment_means(lengths, used, T, num_landmarks, args.dtype)
    q_mean, k_mean = (jnp.einsum("BMT,BTNH->BMNH", means, x.astype(args.dtype)) for x in (q, k))
    crossing = attention_weights(q_mean, k_mean, mask=landmarks, scale=args.scale)
    is_used = jnp.arange(num_landmarks) < used[:, None]
    inverse = pseudo_inverse(jnp.where(is_used[:, None, :, None], crossing, 0), iterations)
    v_mean = attention(q_mean, k, args.v.astype(args.dtype), mask=mask, scale=args.scale)
    out = attention(
        args.q,
        jnp.repeat(k_mean, N // K, axis=2),
        jnp.einsum("BNML,BLNh->BMNh", inverse, v_mean),
        mask=landmarks, scale=args.scale, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
    )  # fmt: skip
    return out.astype(args.v.dtype)


@dataclasses.dataclass(frozen=True)
class Nystrom:
    """`nystrom_attention` with its settings fixed: an op called as `ops.attention` is."""

    num_landmarks: int
    iterations: int = 6

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        mask: Mask | None = None,
        score: Score | tuple[Score, ...] | None = None,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        dropout_rng: Array | None = None,
        q_positions: Array | None = None,
        kv_positions: Array | None = None,
    ) -> jax.Array:
        return nystrom_attention(
            q, k, v, num_landmarks=self.num_landmarks, iterations=self.iterations,
            mask=mask, score=score, scale=scale, dropout_rate=dropout_rate,
            dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
        )  # fmt: skip


def pseudo_inverse(a: Array, iterations: int) -> jax.Array:
    """The Moore-Penrose inverse, by products alone (Razavi et al. 2014; Xiong et al. 2021, eq. 11).

        z = a^T / (|a|_1 |a|_inf)
        z = z (13 - a z (15 - a z (7 - a z))) / 4                           `iterations` times

    A step cubes the error |1 - a z| once that is small, and until then multiplies what z has of a
    small singular value by 13 / 4. So 6 steps invert singular values down to a twelfth of
    sqrt(|a|_1 |a|_inf) to three digits; of smaller ones they find a part, which keeps z small.

    Args:
      a: floating [..., m, n].
      iterations: how many steps.

    Returns:
      [..., n, m]. 0 for a matrix of zeros.
    """
    size = jnp.abs(a).sum(-2).max(-1) * jnp.abs(a).sum(-1).max(-1)
    z = jnp.swapaxes(a, -1, -2) / jnp.where(size == 0, 1, size)[..., None, None]
    one = jnp.eye(a.shape[-2], dtype=z.dtype)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, precision="highest")

    def step(_: int, z: jax.Array) -> jax.Array:
        az = product(a, z)
        return product(z, 13 * one - product(az, 15 * one - product(az, 7 * one - az))) / 4

    return jax.lax.fori_loop(0, iterations, step, z)


def _segment_means(
    lengths: jax.Array, used: jax.Array, T: int, num_landmarks: int, dtype: jnp.dtype
) -> jax.Array:
    """What takes tokens to the means of their segments, [B, num_landmarks, T].

    Row b has `used[b]` segments of its first `lengths[b]` tokens; the other landmarks are 0.
    """
    token = jnp.arange(T)
    segment = token * used[:, None] // jnp.maximum(lengths, 1)[:, None]
    segment = jnp.where(token < lengths[:, None], segment, num_landmarks)
    member = segment[:, None, :] == jnp.arange(num_landmarks)[:, None]
    return member.astype(dtype) / jnp.maximum(member.sum(-1, keepdims=True), 1).astype(dtype)


def _lengths(
    mask: Mask | None, score: Score | tuple[Score, ...] | None, who: str
) -> int | Array | None:
    """The lengths of the rows, from a mask that says nothing else."""
    if score not in (None, ()):
        raise NotImplementedError(
            f"score: {who} has no logit of a query and a key; wanted None, got {score!r}"
        )
    causal, lengths = masks.order_of(mask, who)
    if causal:
        raise NotImplementedError(
            f"mask: {who} mixes all tokens before the softmax, so it cannot be causal; "
            f"wanted Lengths(...) or None, got {mask!r}"
        )
    return lengths


def _check_projection(projection: Array, name: str, x: jax.Array) -> None:
    S, K = x.shape[1:3]
    shape = np.shape(projection)
    fits = len(shape) in (2, 3) and shape[-1] == S and shape[:-2] in ((), (K,)) and shape[-2] > 0
    if not fits or not jnp.issubdtype(projection.dtype, jnp.floating):
        raise ValueError(
            f"{name}: wanted floating [r, S] = [r, {S}] or [K, r, S] = [{K}, r, {S}], "
            f"got {described(projection)}"
        )
