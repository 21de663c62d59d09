"""What heads do, as numbers: functions of attention weights, from `attention_maps`.

Weights are not explanations: heads may give other weights and the model the same answer. Jain and
Wallace 2019, arxiv.org/abs/1902.10186; but see Wiegreffe and Pinter 2019, arxiv.org/abs/1908.04626.
"""

import jax
import jax.numpy as jnp
import numpy as np

FLOW_UNITS = 2**20  # of capacity, of which a weight of 1 has so many: flows are of integers


def entropy(maps: jax.Array) -> jax.Array:
    """How widely each head looks: the mean entropy of its weights, in nats.

        mean over queries of -sum_s w log w

    0 where a head looks at one token alone, log(S) where it looks at S alike. Clark et al. 2019,
    arxiv.org/abs/1906.04341.

    Args:
      maps: [L, B, N, T, S], each row's sum 1.

    Returns:
      float32 [L, N].
    """
    return -jnp.sum(jax.scipy.special.xlogy(maps, maps), -1).mean((1, 3))


def mean_distance(maps: jax.Array) -> jax.Array:
    """How far each head looks: the mean distance of what it looks at, in tokens.

        mean over t of sum_s w[t, s] |t - s|

    Vig and Belinkov 2019, arxiv.org/abs/1906.04284.

    Args:
      maps: [L, B, N, T, T].

    Returns:
      float32 [L, N].
    """
    at = jnp.arange(maps.shape[-1])
    return jnp.einsum("lbnts,ts->lbnt", maps, jnp.abs(at[:, None] - at)).mean((1, 3))


def first_token(maps: jax.Array) -> jax.Array:
    """How much each head gives to the first token, a sink if it is much: [L, B, N, T, T] -> [L, N].

    The mean over all queries but the first, which sees nothing else. Xiao et al. 2024,
    arxiv.org/abs/2309.17453.
    """
    return maps[..., 1:, 0].mean((1, 3))


def previous_token(maps: jax.Array) -> jax.Array:
    """The mean weight that each head gives to the token before: [L, B, N, T, T] -> [L, N]."""
    return jnp.diagonal(maps, -1, axis1=-2, axis2=-1).mean((1, 3))


def prefix_matching(maps: jax.Array, tokens: jax.Array) -> jax.Array:
    """How much each head looks at what came after earlier occurrences of the token it is at.

        mean over t of the weight from t to all s with tokens[s - 1] = tokens[t], 0 < s <= t

    over the places t of tokens that occurred before. An induction head's is near 1. Olsson et al.
    2022, arxiv.org/abs/2209.11895.

    Args:
      maps: [L, B, N, T, T], of a decoder.
      tokens: integers [B, T].

    Returns:
      float32 [L, N]; NaN where no token occurs twice.
    """
    T = tokens.shape[1]
    earlier = jnp.tril(tokens[:, :, None] == tokens[:, None, :], -1)  # [B, t, s]
    after = jnp.pad(earlier, ((0, 0), (0, 0), (1, 0)))[..., :T]  # [B, t, s + 1]
    weight = jnp.einsum("lbnts,bts->ln", maps, after.astype(maps.dtype))
    return weight / earlier.any(-1).sum()


def rollout(maps: jax.Array) -> jax.Array:
    """How much of each token's vector came from each token of the input, layer by layer.

        A_l = (mean over heads of w_l + I) / 2;  rollout_l = A_l rollout_{l - 1}

    as though each layer added what it attends to, in equal parts, to what it had. Abnar and Zuidema
    2020, arxiv.org/abs/2005.00928.

    Args:
      maps: [L, B, N, T, T].

    Returns:
      float32 [L, B, T, T], each row's sum 1.
    """
    mixed = _with_residual(maps)
    found = [mixed[0]]
    for layer in mixed[1:]:
        found.append(layer @ found[-1])
    return jnp.stack(found)


def flow(maps: jax.Array, token: int) -> np.ndarray:
    """How much can flow to a token's last vector from each token of the input.

    The maximum flow through the layers, where A_l of `rollout` is each edge's capacity: unlike
    there, two paths that share an edge share its capacity. Abnar and Zuidema 2020,
    arxiv.org/abs/2005.00928. A flow a token of the input, about 0.02 s each for 12 layers of 64
    tokens.

    Args:
      maps: [L, N, T, T], of one text.
      token: its place, 0 ... T-1.

    Returns:
      float64 [T], each at most 1.

    Raises:
      ValueError: there is no such place.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    L, _, T, _ = maps.shape
    if not 0 <= token < T:
        raise ValueError(f"token: wanted a place in [0, {T}), got {token}")
    capacity = np.asarray(jnp.round(_with_residual(maps[:, None])[:, 0] * FLOW_UNITS), np.int32)
    layer, above, below = np.nonzero(capacity)
    edges = (layer + 1) * T + above, layer * T + below  # from a vector to those that it reads
    graph = coo_array((capacity[layer, above, below], edges), shape=((L + 1) * T,) * 2).tocsr()
    values = [maximum_flow(graph, L * T + token, s).flow_value for s in range(T)]
    return np.asarray(values) / FLOW_UNITS


def _with_residual(maps: jax.Array) -> jax.Array:
    """What of each vector comes from each of the layer before: [L, B, T, T]."""
    return (maps.mean(2) + jnp.eye(maps.shape[-1])) / 2
