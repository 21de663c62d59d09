"""What may stand in the softmax's place: sigmoid, sparsemax, entmax and the softmax off by one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import arguments, scores
from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.attention import attention, choose, weighted_sum
from qkv_jax.ops.manual import varying_like
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.rows import attend_rows
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


def entmax(
    x: Array, alpha: float = 1.5, *, axis: int = -1, where: Array | None = None
) -> jax.Array:
    """The alpha-entmax of each row: a softmax that gives small logits weight 0.

        weights = max((alpha - 1) x - tau, 0) ** (1 / (alpha - 1)),    tau such that they sum to 1

    It maximises weights . x + H(weights), H the Tsallis entropy of order alpha: alpha -> 1 is the
    softmax, alpha = 2 the sparsemax (Peters et al. 2019, arxiv.org/abs/1905.05702).

    The sum less 1 is a convex, falling function of tau, so Newton's steps from below rise to its
    root and never pass it. About ten of them, each O(S) for a row of S, reach it to the last bit;
    the sort that the papers describe takes O(S log S), twenty times as long on a CPU, and rounds
    worse. Differentiable any number of times in both modes, from the weights alone: with
    s = weights ** (2 - alpha) where they are positive, d weights = s (dx - s . dx / sum(s)).

    Args:
      x: logits, floating, finite where allowed.
      alpha: a Python number in (1, 2]. The rounding error grows as 1 / (alpha - 1).
      axis: along which the weights sum to 1.
      where: bool, broadcastable to x: which logits take part; the others get weight 0.

    Returns:
      Weights, in the shape and dtype of x. A row that nothing takes part in has weights 0.

    Raises:
      ValueError: for an alpha outside (1, 2].
    """
    if not isinstance(alpha, int | float) or not 1 < alpha <= 2:
        raise ValueError(f"alpha: wanted a Python number in (1, 2], got {alpha!r}")
    wide = jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    if where is not None:
        wide = jnp.where(where, wide, -jnp.inf)
    return _entmax(wide, float(alpha), axis).astype(jnp.result_type(x))


def sparsemax(x: Array, *, axis: int = -1, where: Array | None = None) -> jax.Array:
    """Each row's nearest point on the simplex (Martins & Astudillo 2016, arxiv.org/abs/1602.02068).

        weights = max(x - tau, 0),    tau such that they sum to 1

    The arguments are those of `entmax`, of which it is the case alpha = 2.
    """
    return entmax(x, 2.0, axis=axis, where=where)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _entmax(x: jax.Array, alpha: float, axis: int) -> jax.Array:
    """`entmax` of logits that are -inf where they take no part."""
    power = 1 / (alpha - 1)
    peak = jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf)
    peak = jnp.where(peak > -jnp.inf, peak, 0)
    z = (alpha - 1) * (x - peak)  # at most 0, so that tau lies between -1 and 0

    def rise(state: list[jax.Array]) -> list[jax.Array]:
        _, tau = state
        above = jnp.maximum(z - tau, 0)
        slopes = jnp.where(above > 0, above ** (power - 1), 0)
        excess = jnp.sum(above * slopes, axis=axis, keepdims=True) - 1
        # Below the root the slopes sum to 1 at least; where nothing takes part, to 0.
        slope = power * jnp.maximum(jnp.sum(slopes, axis=axis, keepdims=True), 1)
        return [tau, tau + jnp.maximum(excess, 0) / slope]

    def rises(state: list[jax.Array]) -> jax.Array:
        before, tau = state
        return jnp.any(tau > before)

    start = [jnp.full_like(peak, -2), jnp.full_like(peak, -1)]
    _, tau = jax.lax.while_loop(rises, rise, varying_like([x], start))
    return jnp.maximum(z - tau, 0) ** power


@_entmax.defjvp
def _entmax_jvp(
    alpha: float, axis: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    weights = _entmax(x, alpha, axis)
    positive = weights > 0
    s = jnp.where(positive, jnp.where(positive, weights, 1) ** (2 - alpha), 0)
    total = jnp.sum(s, axis=axis, keepdims=True)
    mean = jnp.sum(s * dx, axis=axis, keepdims=True) / jnp.where(total > 0, total, 1)
    return weights, s * (dx - mean)


def entmax_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    alpha: float = 1.5,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention whose weights are the alpha-entmax of the logits (arxiv.org/abs/1905.05702).

        out[b, t, n] = sum over s of entmax(logits[b, n, t] where mask allows)[s] * v[b, s, n // G]

    Exact; most weights are exactly 0. O(T S) time, with about ten passes over the logits where the
    softmax takes two, and memory for the logits of a block of queries at a time.

    The arguments that are not listed are those of `ops.attention`.

    Args:
      alpha: a Python number in (1, 2]: towards 1 the softmax, at 2 the sparsemax.

    Returns:
      [B, T, N, h], in the dtype of `v`. A query that may attend to nothing gets 0.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip

    def weigh(rows: Arguments, logits: jax.Array, allowed: jax.Array) -> jax.Array:
        return entmax(logits, alpha, where=allowed)

    return attend_rows(args, weigh)


def sparsemax_attention(q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
    """Attention whose weights are the sparsemax of the logits (arxiv.org/abs/1602.02068).

    `entmax_attention` with alpha = 2, and with its other arguments.
    """
    return entmax_attention(q, k, v, alpha=2.0, **kwargs)


def off_by_one_attention(q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
    """Attention with a softmax that may sum to less than 1 (Miller 2023, "softmax off by one").

        weights[s] = exp(logits[s]) / (1 + sum over s' of exp(logits[s']))

    It is `ops.attention` with a sink of logit 0 in every head: linear memory, and the arguments of
    `ops.attention` but `sinks`. evanmiller.org/attention-is-off-by-one.html
    """
    return attention(q, k, v, sinks=jnp.zeros(np.shape(q)[2:3]), **kwargs)


def sigmoid_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    bias: float | None = None,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Attention whose weights are sigmoids: no key competes with another.

        out[b, t, n] = sum over s that mask allows of sigmoid(logits[b, n, t, s] + bias) * v[b, s]

    Ramapuram et al. 2024, arxiv.org/abs/2409.04431. Their bias is minus the log of the length of
    the sequence, which makes a row's weights sum to about 1 at first, as a softmax's do. Here it is
    minus the log of how many keys the query may attend to: the same where it may attend to all. So
    neither padding nor the keys after a query change its output, and one-token decoding continues
    what training did. For the paper's causal model pass `bias=-log(training length)`.

    Since a softmax's numerators are exp(logit), sums of sigmoids are the numerators of attention to
    the logits log(sigmoid(.)): O(T S) time and linear memory, by the same implementations. To count
    the keys under a mask takes one forward pass of attention with H = h = 1. The arguments that are
    not listed are those of `ops.attention`.

    Args:
      bias: added to the logits; None: minus the log of the number of keys.

    Returns:
      [B, T, N, h], in the dtype of `v`. A query that may attend to nothing gets 0.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=None, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    if bias is not None and np.shape(bias) != ():
        raise ValueError(f"bias: wanted a number, got an array of shape {list(np.shape(bias))}")
    bias = -_log_counts(args) if bias is None else bias
    return weighted_sum(args, scores.from_function(_log_sigmoid, bias))


def _log_sigmoid(logits: Array, q_pos: Array, kv_pos: Array, head: Array, bias: Array) -> Array:
    return jax.nn.log_sigmoid(logits + jnp.asarray(bias, logits.dtype))


def _log_counts(args: Arguments) -> Array:
    """The log of how many keys each query may attend to, [B, N, T, 1]."""
    B, T, N, _ = args.q.shape
    S = args.k.shape[1]
    if args.mask is None:
        return np.log(np.full((1, 1, 1, 1), max(S, 1), args.dtype))
    nothing = jnp.zeros((B, S, 1, 1), args.dtype)
    counting = dataclasses.replace(
        args,
        q=jnp.zeros((B, T, N, 1), args.dtype),
        k=nothing,
        v=nothing,
        score=(),
        dropout_rate=0.0,
    )
    _, stats = choose(counting, None)(counting, entropy=False)
    return stats.lse[..., None]


@dataclasses.dataclass(frozen=True)
class Entmax:
    """`entmax_attention` of one alpha, as an op for `nn.MultiHeadAttention`."""

    alpha: float = 1.5

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        return entmax_attention(q, k, v, alpha=self.alpha, **kwargs)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """`sigmoid_attention` of one bias, as an op for `nn.MultiHeadAttention`."""

    bias: float | None = None

    def __call__(self, q: Array, k: Array, v: Array, **kwargs: Any) -> jax.Array:
        return sigmoid_attention(q, k, v, bias=self.bias, **kwargs)
