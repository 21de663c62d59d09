"""How far estimates of attention are from it: by features, by size of the kernel, by rank."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax import ops
from qkv_jax.ops import features, lowrank

QKV = tuple[jax.Array, jax.Array, jax.Array]

DRAWS = {"independent": features.independent_projection,
         "orthogonal": features.orthogonal_projection}  # fmt: skip


def relative(estimate: jax.Array, exact: jax.Array) -> jax.Array:
    """The squared error of an estimate, in the square of what is estimated, float []."""
    return jnp.sum((estimate - exact) ** 2) / jnp.sum(exact**2)


def gaussian(length: int, dim: int, *, deviation: float = 1 / 3, seed: int = 0) -> QKV:
    """Queries, keys and values of independent N(0, deviation^2), each [1, length, 1, dim].

    The fewest features for which the error falls as 1 / m grow as exp(|q + k|^2 / sqrt(dim)).
    """
    rngs = jax.random.split(jax.random.key(seed), 3)
    return tuple(deviation * jax.random.normal(rng, (1, length, 1, dim)) for rng in rngs)


def performer_errors(
    qkv: QKV, kind: str, counts: tuple[int, ...], *, redraws: int = 32
) -> dict[int, float]:
    """Of attention by random features, by their number: the mean of `relative` over redraws.

    Args:
      qkv: q, k, v [B, T, N, H], all tokens of which see one another.
      kind: of features, of `DRAWS`.
      counts: numbers of features, m.
      redraws: of the features.
    """
    q, k, v = qkv
    exact = ops.attention(q, k, v)

    @functools.partial(jax.jit, static_argnums=1)
    def error(rngs: jax.Array, m: int) -> jax.Array:
        def of_one(rng: jax.Array) -> jax.Array:
            projection = DRAWS[kind](rng, m, q.shape[-1])
            return relative(features.performer_attention(q, k, v, projection=projection), exact)

        return jax.lax.map(of_one, rngs).mean()

    rngs = jax.random.split(jax.random.key(1), redraws)
    return {m: float(error(rngs, m)) for m in counts}


def kernel_errors(
    *, num_features: int, radius: float, dim: int, redraws: int = 1000, angles: int = 9
) -> dict[str, dict[float, float]]:
    """Of exp(q . k) by positive and by trigonometric features, by the angle of q and k.

    Args:
      num_features: m, independent ones.
      radius: the length of q and of k.
      dim: their width, at least 2.
      redraws: of the features.
      angles: how many, evenly from 0 to 180 degrees, the ends left out.

    Returns:
      Kind -> angle in degrees -> root of the mean squared error, in the kernel.
    """
    degrees = np.linspace(0, 180, angles + 2)[1:-1]
    turn = jnp.asarray(np.radians(degrees))
    q = jnp.zeros((angles, dim)).at[:, 0].set(radius)
    k = jnp.zeros((angles, dim)).at[:, 0].set(radius * jnp.cos(turn))
    k = k.at[:, 1].set(radius * jnp.sin(turn))
    exact = jnp.exp(jnp.sum(q * k, axis=-1))

    def positive(x: jax.Array, projection: jax.Array) -> jax.Array:
        exponents = x @ projection.T - jnp.sum(x * x, axis=-1, keepdims=True) / 2
        return jnp.exp(exponents) / len(projection) ** 0.5

    def error(f: Callable[[jax.Array, jax.Array], jax.Array]) -> np.ndarray:
        def squared(rng: jax.Array) -> jax.Array:
            projection = features.independent_projection(rng, num_features, dim)
            return (jnp.sum(f(q, projection) * f(k, projection), axis=-1) - exact) ** 2

        rngs = jax.random.split(jax.random.key(2), redraws)
        return np.asarray(jnp.sqrt(jax.jit(jax.vmap(squared))(rngs).mean(0)) / exact)

    kinds = {"positive": positive, "trigonometric": features.trigonometric_features}
    return {
        kind: dict(zip(degrees.tolist(), error(f).tolist(), strict=True))
        for kind, f in kinds.items()
    }


def rank_errors(qkv: QKV, ranks: tuple[int, ...]) -> dict[str, dict[int, float]]:
    """Of attention by thin matrices, by their rank: name -> rank -> `relative`.

    "best of the rank" cuts the weights' singular values; "Linformer, segments" projects by means of
    consecutive tokens, "Linformer, Gaussian" is the proof's P R^T R v with N(0, 1 / rank) in R.

    Args:
      qkv: q, k, v [B, T, N, H], as many key heads as query heads.
      ranks: at most T.
    """
    q, k, v = qkv
    length = q.shape[1]
    exact = ops.attention(q, k, v)
    weights = ops.attention_weights(q, k)
    left, sizes, right = jnp.linalg.svd(weights, full_matrices=False)

    def weighted(matrix: jax.Array) -> jax.Array:
        return jnp.einsum("BNTS,BSNh->BTNh", matrix, v)

    def best(rank: int) -> jax.Array:
        return weighted((left[..., :rank] * sizes[..., None, :rank]) @ right[..., :rank, :])

    def segments(rank: int) -> jax.Array:
        means = np.arange(length) * rank // length == np.arange(rank)[:, None]
        means = means / means.sum(-1, keepdims=True)
        return lowrank.linformer_attention(q, k, v, key_projection=means, value_projection=means)

    def gaussian_projection(rank: int) -> jax.Array:
        R = jax.random.normal(jax.random.key(3), (rank, length)) / rank**0.5
        return weighted((weights @ R.T) @ R)

    def nystrom(rank: int) -> jax.Array:
        return lowrank.nystrom_attention(q, k, v, num_landmarks=rank)

    estimates = {
        "best of the rank": best, "Nystrom": nystrom, "Linformer, segments": segments,
        "Linformer, Gaussian": gaussian_projection,
    }  # fmt: skip
    return {
        name: {rank: float(relative(estimate(rank), exact)) for rank in ranks}
        for name, estimate in estimates.items()
    }
