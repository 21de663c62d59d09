"""Four kinds of attention, each as the matrices that it goes through."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.walkthrough_sentences import Sentence
from qkv_jax.ops import basic


class Step(NamedTuple):
    """One matrix of a mechanism: its name, where it comes from, and whether columns are tokens."""

    name: str
    formula: str
    matrix: jax.Array | np.ndarray
    over_keys: bool = False


def simplified(sentence: Sentence) -> list[Step]:
    """Tokens look at each other as they are: every embedding is query, key and value at once."""
    x = sentence.x
    scores = basic.attention_scores(x, x)
    weights = basic.softmax_weights(scores)
    return [
        Step("x", "embeddings", x),
        Step("scores", "x xᵀ", scores, over_keys=True),
        Step("weights", "softmax(scores), row by row", weights, over_keys=True),
        Step("output", "weights x", basic.context_vectors(weights, x)),
    ]


def trained(sentence: Sentence) -> list[Step]:
    """What a token asks (query), offers (key) and passes on (value) are three projections of it."""
    q, k, v = basic.project_qkv(sentence.x, *sentence.w_trained)
    scaled = basic.attention_scores(q, k, scale=1 / math.sqrt(q.shape[-1]))
    weights = basic.softmax_weights(scaled)
    return [
        *_projections(sentence.x, q, k, v),
        Step("scores", "q kᵀ", basic.attention_scores(q, k), over_keys=True),
        Step("scaled", f"scores / √{q.shape[-1]}", scaled, over_keys=True),
        Step("weights", "softmax(scaled)", weights, over_keys=True),
        Step("output", "weights v", basic.context_vectors(weights, v)),
    ]


def causal(sentence: Sentence) -> list[Step]:
    """A token sees itself and what came before: later scores become -∞, their weights exactly 0."""
    q, k, v = basic.project_qkv(sentence.x, *sentence.w_causal)
    scaled = basic.attention_scores(q, k, scale=1 / math.sqrt(q.shape[-1]))
    mask = basic.causal_mask(len(sentence.tokens))
    weights = basic.softmax_weights(scaled, mask)
    return [
        *_projections(sentence.x, q, k, v),
        Step("scores", "q kᵀ", basic.attention_scores(q, k), over_keys=True),
        Step("scaled", f"scores / √{q.shape[-1]}", scaled, over_keys=True),
        Step("mask", "key is not later", mask, over_keys=True),
        Step("masked", "scaled where mask, else -∞", _hide(scaled, mask), over_keys=True),
        Step("weights", "softmax(masked)", weights, over_keys=True),
        Step("output", "weights v", basic.context_vectors(weights, v)),
    ]


def two_heads(sentence: Sentence) -> list[Step]:
    """Two causal attentions, on the first and on the second half of the columns, mixed by w_out."""
    *w_qkv, w_out, b_out = sentence.w_heads
    q, k, v = basic.project_qkv(sentence.x, *w_qkv)
    q_heads, k_heads, v_heads = (basic.split_heads(a, 2) for a in (q, k, v))  # [2, T, H]
    width = q_heads.shape[-1]
    scores = basic.attention_scores(q_heads, k_heads)
    scaled = basic.attention_scores(q_heads, k_heads, scale=1 / math.sqrt(width))
    mask = basic.causal_mask(len(sentence.tokens))
    weights = basic.softmax_weights(scaled, mask)
    joined = basic.join_heads(basic.context_vectors(weights, v_heads))
    output = basic.multi_head_attention(sentence.x, *w_qkv, w_out, b_out, num_heads=2, mask=mask)
    steps = _projections(sentence.x, q, k, v)
    for n in range(2):
        steps += [
            Step(f"scores {n}", f"q{n} k{n}ᵀ", scores[n], over_keys=True),
            Step(f"scaled {n}", f"scores {n} / √{width}", scaled[n], over_keys=True),
        ]
    steps.append(Step("mask", "key is not later", mask, over_keys=True))
    for n in range(2):
        formula = f"softmax(scaled {n}, mask)"
        steps.append(Step(f"weights {n}", formula, weights[n], over_keys=True))
    return [
        *steps,
        Step("joined", "[weights 0 v0, weights 1 v1]", joined),
        Step("output", "joined w_out + b_out", output),
    ]


def _projections(x, q, k, v) -> list[Step]:
    return [
        Step("x", "embeddings", x),
        Step("q", "x w_query", q),
        Step("k", "x w_key", k),
        Step("v", "x w_value", v),
    ]


def _hide(scores, mask):
    return jnp.where(mask, scores, -jnp.inf)


MECHANISMS = {
    "Self-attention without weights": simplified,
    "Self-attention with trained projections": trained,
    "Causal self-attention": causal,
    "Two-head attention": two_heads,
}
