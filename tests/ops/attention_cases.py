"""The cases that every implementation of attention is tested on, and NumPy's answer to each.

A case is inputs, the other arguments, and what its score does in NumPy. All numbers are exact in
bfloat16, so that one expected value serves every dtype.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from qkv_jax.ops import masks, positions, scores
from qkv_jax.ops.dropout import keep_mask

B, T, S, N, K, H, h = 2, 5, 7, 6, 3, 11, 13
RANDOM = np.random.RandomState(0)


def rounded(x):
    """The nearest bfloat16 numbers, as float64."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def normal(*shape):
    return rounded(RANDOM.randn(*shape))


def positive(*shape):
    return rounded(RANDOM.rand(*shape) + 0.5)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `attention`. `inputs` are those with gradients: q, k, v, sinks and score."""

    inputs: dict[str, Any]
    others: dict[str, Any]
    numpy_score: Callable[..., np.ndarray] | None  # of (score, logits, q_pos, kv_pos)
    additive: bool  # whether the score only adds to the logits, as jax.nn's bias does


def case(
    *, T=T, S=S, N=N, K=K, H=H, h=h, sinks=False, score=None, numpy_score=None, additive=False,
    **others,
) -> Case:  # fmt: skip
    inputs = {"q": normal(B, T, N, H), "k": normal(B, S, K, H), "v": normal(B, S, K, h)}
    if sinks:
        inputs["sinks"] = normal(N)
    if score is not None:
        inputs["score"] = score
    if T != S:  # the queries are the last tokens
        others.setdefault("q_positions", np.arange(S - T, S))
    return Case(inputs, others, numpy_score, additive or score is None)


LENGTHS = np.array([3, 5])
IDS = np.array([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2, 5]])
LAYOUTS = (RANDOM.rand(N, 3, 3) < 0.7) | np.eye(3, dtype=bool)
EMPTY_ROWS = masks.Causal() & masks.Lengths(np.array([0, 4])) & ~masks.Prefix(3)


def per_head(x):
    return x[None, :, None, None]


def alibi(score, logits, q_pos, kv_pos):
    return logits - per_head(score.slopes) * abs(q_pos - kv_pos)


def relative_bias(score, logits, q_pos, kv_pos):
    buckets = positions.t5_buckets(
        kv_pos - q_pos, num_buckets=8, max_distance=6, bidirectional=score.bidirectional
    )
    return logits + np.moveaxis(score.table[np.asarray(buckets)[:, 0]], -1, 1)


def softcap(score, logits, q_pos, kv_pos):
    return score.cap * np.tanh(logits / score.cap)


def decayed(logits, q_pos, kv_pos, head, rates, gates, power):
    """A user's score: a table [N] of rates, an aligned array of gates, a static number."""
    rates, gates = (x.astype(logits.dtype) for x in (rates, gates))
    return (logits - rates[head] * abs(q_pos - kv_pos)) * gates**power


def numpy_decayed(score, logits, q_pos, kv_pos):
    rates, gates, power = score.operands
    return (logits - per_head(rates) * abs(q_pos - kv_pos)) * gates**power


def within(q_pos, kv_pos, head, widths, factor):
    """A user's mask: a window whose width depends on the head."""
    return (q_pos - kv_pos <= widths[head] * factor) & (kv_pos <= q_pos)


CASES = {
    # Shapes and positions
    "full": case(),
    "every_head_its_own_keys": case(K=6, h=H),
    "multi_query": case(K=1),
    "narrow_values": case(h=3),
    "given_scale": case(scale=0.25),
    "no_scale": case(scale=0.0),
    "causal": case(T=7, S=7, mask=masks.Causal()),
    "causal_last_queries": case(mask=masks.Causal()),
    "causal_one_query": case(T=1, mask=masks.Causal()),
    "causal_chunk": case(
        mask=masks.Causal(), q_positions=np.arange(12, 17), kv_positions=np.arange(10, 17)
    ),
    "causal_positions_per_row": case(
        mask=masks.Causal(),
        q_positions=np.array([[6, 2, 9, 4, 5], [3, 3, 8, 0, 1]]),
        kv_positions=np.array([[4, 1, 0, 2, 9, 7, 3], [0, 5, 3, 1, 2, 8, 6]]),
    ),
    # Masks
    "window": case(mask=masks.SlidingWindow(2, 1)),
    "window_per_head": case(mask=masks.SlidingWindow(np.arange(N), None)),
    "chunked": case(mask=masks.Chunked(3)),
    "prefix": case(mask=masks.Causal() | masks.Prefix(LENGTHS)),
    "lengths": case(mask=masks.Lengths(LENGTHS)),
    "global": case(mask=masks.Global((0, 4)) | masks.SlidingWindow(1)),
    "dilated": case(mask=masks.Dilated(2) & masks.Causal()),
    "segments": case(mask=masks.Causal() & masks.Segments(IDS[:, S - T :], IDS)),
    "blocks_per_head": case(mask=masks.Blocks(LAYOUTS, 3)),
    "dense": case(mask=masks.Dense(RANDOM.rand(B, 1, T, S) < 0.6) | masks.Dilated(3)),
    "mask_of_ones_own": case(mask=masks.from_function(within, np.arange(N), 2)),
    "not": case(mask=~masks.SlidingWindow(0) & masks.SlidingWindow(3, 3)),
    # Scores
    "softcap": case(score=scores.Softcap(1.5), numpy_score=softcap),
    "temperature": case(
        score=scores.Temperature(positive(N)),
        numpy_score=lambda s, logits, q, kv: logits / per_head(s.temperature),
    ),
    "alibi": case(score=scores.Alibi(positive(N)), numpy_score=alibi, additive=True),
    "relative_bias": case(
        mask=masks.Causal(), score=scores.RelativeBias(normal(8, N), max_distance=6),
        numpy_score=relative_bias, additive=True,
    ),
    "relative_bias_bidirectional": case(
        score=scores.RelativeBias(normal(8, N), bidirectional=True, max_distance=6),
        numpy_score=relative_bias, additive=True,
    ),
    "bias": case(
        score=scores.Bias(normal(T, S)),
        numpy_score=lambda s, logits, q, kv: logits + s.array, additive=True,
    ),
    "bias_per_head_and_row": case(
        mask=masks.Causal(), score=scores.Bias(normal(B, N, T, S)),
        numpy_score=lambda s, logits, q, kv: logits + s.array, additive=True,
    ),
    "score_of_ones_own": case(
        score=scores.from_function(decayed, positive(N), positive(1, N, T, 1), 2),
        numpy_score=numpy_decayed,
    ),
    "scores_in_order": case(
        mask=masks.Causal(),
        score=(scores.Alibi(positive(N)), scores.Softcap(np.array(2.5)), scores.Temperature(2.0)),
        numpy_score=lambda s, logits, q, kv: softcap(s[1], alibi(s[0], logits, q, kv), q, kv) / 2,
    ),
    "softcap_and_mask": case(
        mask=masks.Causal(), score=scores.Softcap(0.5), numpy_score=softcap
    ),
    # Sinks, dropout, empty rows
    "sinks": case(sinks=True),
    "dropout": case(mask=masks.Causal(), dropout_rate=0.3, dropout_rng=jax.random.key(7)),
    "empty_rows": case(mask=EMPTY_ROWS),
    "empty_rows_and_sinks": case(mask=EMPTY_ROWS, sinks=True),
    "everything_forbidden": case(mask=~masks.SlidingWindow(None, None)),
    "everything_at_once": case(
        mask=EMPTY_ROWS & ~masks.Dilated(3), sinks=True, scale=0.5,
        score=(scores.Softcap(2.0), scores.Alibi(positive(N))),
        numpy_score=lambda s, logits, q, kv: alibi(s[1], softcap(s[0], logits, q, kv), q, kv),
        dropout_rate=0.2, dropout_rng=jax.random.key(11),
    ),
}  # fmt: skip


def allowed(c: Case) -> np.ndarray:
    """What the mask allows, bool [B, N, T, S]."""
    B, T, N, _ = c.inputs["q"].shape
    shape = (B, N, T, c.inputs["k"].shape[1])
    if "mask" not in c.others:
        return np.ones(shape, bool)
    q_pos, kv_pos, head = coordinates(c)
    return np.broadcast_to(np.asarray(c.others["mask"].aligned().mask(q_pos, kv_pos, head)), shape)


def coordinates(c: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions and heads in rank 4."""
    T, N = c.inputs["q"].shape[1:3]
    q_pos = np.atleast_2d(c.others.get("q_positions", np.arange(T)))[:, None, :, None]
    kv_pos = c.others.get("kv_positions", np.arange(c.inputs["k"].shape[1]))
    kv_pos = np.atleast_2d(kv_pos)[:, None, None, :]
    return q_pos.astype(np.int32), kv_pos.astype(np.int32), per_head(np.arange(N))


def numpy_attention(c: Case, q, k, v, sinks=None, score=None) -> dict[str, np.ndarray]:
    """The definitions of `attention_with_stats`, written out; also for complex numbers."""
    B, T, N, H = q.shape
    G = N // k.shape[2]
    k, v = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)
    logits = c.others.get("scale", H**-0.5) * np.einsum("btnh,bsnh->bnts", q, k)
    q_pos, kv_pos, _ = coordinates(c)
    if score is not None:
        logits = c.numpy_score(score, logits, q_pos, kv_pos)
    exps = np.where(allowed(c), np.exp(logits), 0)  # the logits are small
    if sinks is not None:  # one more key, whose value is nothing
        exps = np.concatenate([exps, np.tile(per_head(np.exp(sinks)), (B, 1, T, 1))], axis=-1)
    total = exps.sum(-1)
    empty = total == 0
    total = np.where(empty, 1, total)
    weights = exps / total[..., None]
    entropy = -(weights * np.log(np.where(weights == 0, 1, weights))).sum(-1)
    weights = weights[..., : k.shape[1]]
    if rate := c.others.get("dropout_rate", 0):
        batch, head, query, key = np.ogrid[tuple(map(slice, weights.shape))]
        keep = keep_mask(
            c.others["dropout_rng"], rate, batch=batch, head=head, query=query, key=key
        )
        weights = weights * np.asarray(keep) / (1 - rate)
    return {
        "weights": weights,
        "out": np.einsum("bnts,bsnh->btnh", weights, v),
        "lse": np.where(empty, -np.inf, np.log(total)),
        "entropy": entropy,
        "max_logit": np.where(allowed(c), logits, -np.inf).max(-1).real,  # no derivative
    }
