"""Attention step by step, as the source texts teach it: one readable function per step.

All mechanisms grow out of one line, `softmax(scores) @ values`: first without weights, then with
learned projections, then with several heads. A causal mask changes one step of it, and so do keys
that come from another sequence. Tokens run along the second-last axis, `[..., T, D]`; leading batch
axes are optional. Weights are `[D_in, D_out]` and multiply from the right, `x @ w` (PyTorch's
`Linear` stores the transpose). Results have the dtype of the inputs; integers become floats.

These functions materialise every `[T, S]` matrix, for looking and for learning; `ops.attention` is
the one to compute with. Beside a matrix form stands its `*_loop`: slow, plain, and its oracle.

Sources: Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762;
Raschka 2024, "Build a Large Language Model (From Scratch)", chapter 3.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

# --- Scores to weights ----------------------------------------------------------------------------


def naive_softmax(scores: ArrayLike, axis: int = -1) -> Array:
    """Softmax as the formula is written: it overflows.

    weights_s = exp(scores_s) / sum_r exp(scores_r)

    In float32, exp(x) is inf from x = 88.8 on, and inf / inf is nan; if every score is below
    about -88 the sum vanishes, and 0 / 0 is nan too. See `softmax`.

    Args:
        scores: [..., S], any real numbers.
        axis: the axis whose weights sum to 1.

    Returns:
        Weights of the shape of `scores`.
    """
    exps = jnp.exp(_floats(scores))
    return exps / exps.sum(axis, keepdims=True)


def softmax(scores: ArrayLike, axis: int = -1) -> Array:
    """Softmax that cannot overflow: the same formula after subtracting the largest score.

    weights_s = exp(scores_s - max_r scores_r) / sum_r exp(scores_r - max_r scores_r)

    The maximum cancels from the fraction, so the value is that of `naive_softmax`; now the largest
    exponent is 0 and the sum at least 1.

    Args:
        scores: [..., S], finite or -inf, with at least one finite score along `axis`.
        axis: the axis whose weights sum to 1.

    Returns:
        Weights of the shape of `scores`; a score of -inf gets weight 0.
    """
    scores = _floats(scores)
    exps = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis, keepdims=True)))
    return exps / exps.sum(axis, keepdims=True)


def sum_normalized(scores: ArrayLike, axis: int = -1) -> Array:
    """Scores divided by their sum: the first idea for turning scores into weights.

    weights_s = scores_s / sum_r scores_r

    The rows sum to 1, but a negative score gives a negative weight, and scores that sum to 0 give
    inf or nan. Softmax has neither fault.

    Args:
        scores: [..., S].
        axis: the axis whose weights sum to 1.

    Returns:
        Weights of the shape of `scores`.
    """
    scores = _floats(scores)
    return scores / scores.sum(axis, keepdims=True)


def softmax_weights(scores: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Attention weights: each query's softmax over the keys it may attend to.

    weights = softmax(scores where mask, else -inf)

    Args:
        scores: [..., T, S].
        mask: bool, broadcastable to `scores`; True where the query may attend to the key.

    Returns:
        [..., T, S]. Rows sum to 1, hidden keys weigh exactly 0, and a query that may attend to
        nothing has a row of zeros.

    Raises:
        ValueError: `mask` is not bool or does not broadcast to `scores`.
    """
    scores = _tokens("scores", scores)
    if mask is None:
        return softmax(scores)
    mask = _mask(mask, scores.shape)
    # The lowest finite number stands in for -inf: a row without any key then gives 0, not 0 / 0.
    weights = softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min))
    return jnp.where(mask, weights, 0)


def causal_mask(num_tokens: int) -> Array:
    """Which keys each query may see in a sequence read from left to right.

    mask[t, s] = s <= t

    Args:
        num_tokens: T.

    Returns:
        bool [T, T].
    """
    return jnp.tril(jnp.ones((num_tokens, num_tokens), bool))


# --- Queries, keys, values, scores, context -------------------------------------------------------


def project_qkv(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, w_value: ArrayLike
) -> tuple[Array, Array, Array]:
    """Queries, keys and values: three learned views of the same tokens.

    q = x @ w_query,  k = x @ w_key,  v = x @ w_value

    Args:
        x: [..., T, D].
        w_query: [D, H].
        w_key: [D, H].
        w_value: [D, h].

    Returns:
        q [..., T, H], k [..., T, H], v [..., T, h].

    Raises:
        ValueError: a weight is not a matrix with D rows.
    """
    return (
        _project("x", x, "w_query", w_query),
        _project("x", x, "w_key", w_key),
        _project("x", x, "w_value", w_value),
    )


def attention_scores(q: ArrayLike, k: ArrayLike, *, scale: float = 1.0) -> Array:
    """How well each query matches each key: all dot products at once.

    scores[t, s] = scale * q[t] . k[s]

    Args:
        q: [..., T, H].
        k: [..., S, H].
        scale: 1 / sqrt(H) keeps the variance of the scores at 1 when q and k have variance 1.

    Returns:
        [..., T, S].

    Raises:
        ValueError: q and k differ in width.
    """
    q, k = _tokens("q", q), _tokens("k", k)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same width; got {q.shape} and {k.shape}")
    return jnp.einsum("...th,...sh->...ts", q, k) * scale


def context_vectors(weights: ArrayLike, v: ArrayLike) -> Array:
    """What each query takes away: the average of the values, weighted by its attention.

    context[t] = sum_s weights[t, s] * v[s]

    Args:
        weights: [..., T, S].
        v: [..., S, h].

    Returns:
        [..., T, h].

    Raises:
        ValueError: there is not one value per column of `weights`.
    """
    weights, v = _tokens("weights", weights), _tokens("v", v)
    if weights.shape[-1] != v.shape[-2]:
        raise ValueError(
            f"v must have one row per key, [..., {weights.shape[-1]}, h]; got {v.shape}"
        )
    return jnp.einsum("...ts,...sh->...th", weights, v)


# --- Whole mechanisms, each with its loop form ----------------------------------------------------


def simple_self_attention(x: ArrayLike) -> Array:
    """Self-attention without any weights: tokens look at each other as they are, unscaled.

    context = softmax(x @ x.T) @ x

    Args:
        x: [..., T, D].

    Returns:
        [..., T, D].
    """
    return context_vectors(softmax_weights(attention_scores(x, x)), x)


def simple_self_attention_loop(x: ArrayLike) -> Array:
    """`simple_self_attention` one number at a time, for x [T, D] (not traceable by JAX)."""
    x = _unbatched("x", x)
    return jnp.asarray(_attend_loop(x.tolist(), x.tolist(), x.tolist(), scale=1.0), x.dtype)


def self_attention(x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, w_value: ArrayLike) -> Array:
    """Self-attention with learned projections, scaled by the width of the keys.

    context = softmax(q @ k.T / sqrt(H)) @ v   with   q, k, v = project_qkv(x, ...)

    Args:
        x: [..., T, D].
        w_query: [D, H].
        w_key: [D, H].
        w_value: [D, h].

    Returns:
        [..., T, h].
    """
    q, k, v = project_qkv(x, w_query, w_key, w_value)
    return _attend(q, k, v)


def self_attention_loop(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, w_value: ArrayLike
) -> Array:
    """`self_attention` one number at a time, for x [T, D] (not traceable by JAX)."""
    x = _unbatched("x", x)
    # The matrix form checks the shapes and gives the dtype; the numbers are computed here.
    dtype = jnp.result_type(*project_qkv(x, w_query, w_key, w_value))
    q, k, v = (_matmul_loop(x.tolist(), _floats(w).tolist()) for w in (w_query, w_key, w_value))
    return jnp.asarray(_attend_loop(q, k, v, scale=1 / math.sqrt(len(k[0]))), dtype)


def causal_self_attention(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, w_value: ArrayLike
) -> Array:
    """Self-attention in which no token sees a later one.

    context = softmax(q @ k.T / sqrt(H) where s <= t, else -inf) @ v

    Args:
        x: [..., T, D].
        w_query: [D, H].
        w_key: [D, H].
        w_value: [D, h].

    Returns:
        [..., T, h]; row t depends on x[..., :t + 1, :] only.
    """
    q, k, v = project_qkv(x, w_query, w_key, w_value)
    return _attend(q, k, v, causal_mask(q.shape[-2]))


def cross_attention(
    x: ArrayLike, context: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, w_value: ArrayLike
) -> Array:
    """Attention from one sequence to another: queries from x, keys and values from context.

    output = softmax((x @ w_query) @ (context @ w_key).T / sqrt(H)) @ (context @ w_value)

    Args:
        x: [..., T, D], the tokens that ask.
        context: [..., S, C], the tokens that answer; their number and width may differ from x's.
        w_query: [D, H].
        w_key: [C, H].
        w_value: [C, h].

    Returns:
        [..., T, h].
    """
    q = _project("x", x, "w_query", w_query)
    k = _project("context", context, "w_key", w_key)
    v = _project("context", context, "w_value", w_value)
    return _attend(q, k, v)


def multi_head_attention(
    x: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    w_value: ArrayLike,
    w_out: ArrayLike,
    b_out: ArrayLike | None = None,
    *,
    num_heads: int,
    mask: ArrayLike | None = None,
) -> Array:
    """Several attentions side by side, each on its own slice of the width, then mixed.

    head_n = softmax(q_n @ k_n.T / sqrt(H)) @ v_n,   output = [head_1 ... head_N] @ w_out + b_out

    All heads are computed at once: one matrix holds the projections of every head, N slices of its
    columns, and the heads become a batch axis. (Vaswani et al. 2017, section 3.2.2.)

    Args:
        x: [..., T, D].
        w_query: [D, N * H]; head n owns columns n * H to (n + 1) * H.
        w_key: [D, N * H].
        w_value: [D, N * h].
        w_out: [N * h, D_out].
        b_out: [D_out].
        num_heads: N.
        mask: bool, broadcastable to [..., N, T, T]; True where the query may attend to the key.

    Returns:
        [..., T, D_out].

    Raises:
        ValueError: shapes that do not fit, or widths that `num_heads` does not divide.
    """
    projections = project_qkv(x, w_query, w_key, w_value)
    q, k, v = (split_heads(projection, num_heads) for projection in projections)
    return _mix_heads(join_heads(_attend(q, k, v, mask)), w_out, b_out)


def multi_head_attention_loop(
    x: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    w_value: ArrayLike,
    w_out: ArrayLike,
    b_out: ArrayLike | None = None,
    *,
    num_heads: int,
    mask: ArrayLike | None = None,
) -> Array:
    """`multi_head_attention` one head after another, their outputs concatenated."""
    projections = project_qkv(x, w_query, w_key, w_value)
    q, k, v = (split_heads(projection, num_heads) for projection in projections)
    if mask is not None:
        mask = _mask(mask, (*q.shape[:-1], k.shape[-2]))
    heads = []
    for n in range(num_heads):
        head_mask = None if mask is None else mask[..., n, :, :]
        heads.append(_attend(q[..., n, :, :], k[..., n, :, :], v[..., n, :, :], head_mask))
    return _mix_heads(jnp.concatenate(heads, axis=-1), w_out, b_out)


# --- Parts ----------------------------------------------------------------------------------------


def split_heads(x: ArrayLike, num_heads: int) -> Array:
    """Cut the width into heads: [..., T, N * H] to [..., N, T, H].

    Args:
        x: [..., T, N * H].
        num_heads: N.

    Raises:
        ValueError: `num_heads` does not divide the width.
    """
    x = _tokens("x", x)
    *batch, num_tokens, width = x.shape
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide the projected width {width}; got {num_heads}")
    return jnp.swapaxes(x.reshape(*batch, num_tokens, num_heads, width // num_heads), -3, -2)


def join_heads(heads: ArrayLike) -> Array:
    """Lay the heads side by side again: [..., N, T, h] to [..., T, N * h]."""
    heads = jnp.asarray(heads)
    *batch, num_heads, num_tokens, width = heads.shape
    return jnp.swapaxes(heads, -3, -2).reshape(*batch, num_tokens, num_heads * width)


def _attend(q: Array, k: Array, v: Array, mask: ArrayLike | None = None) -> Array:
    """softmax(q @ k.T / sqrt(H) where mask, else -inf) @ v"""
    scores = attention_scores(q, k, scale=1 / math.sqrt(q.shape[-1]))
    return context_vectors(softmax_weights(scores, mask), v)


def _mix_heads(heads: Array, w_out: ArrayLike, b_out: ArrayLike | None) -> Array:
    """heads @ w_out + b_out"""
    output = _project("the joined heads", heads, "w_out", w_out)
    if b_out is None:
        return output
    b_out = _floats(b_out)
    if b_out.shape != output.shape[-1:]:
        raise ValueError(f"b_out must have shape {output.shape[-1:]}; got {b_out.shape}")
    return output + b_out


def _attend_loop(
    q: list[list[float]], k: list[list[float]], v: list[list[float]], scale: float
) -> list[list[float]]:
    """Attention in plain Python: every sum of the formulas written out."""
    outputs = []
    for query in q:
        scores = []
        for key in k:
            score = 0.0
            for query_i, key_i in zip(query, key, strict=True):
                score += query_i * key_i
            scores.append(score * scale)

        largest = max(scores)
        exps = [math.exp(score - largest) for score in scores]
        total = sum(exps)

        output = [0.0] * len(v[0])
        for exp, value in zip(exps, v, strict=True):
            for i, value_i in enumerate(value):
                output[i] += exp / total * value_i
        outputs.append(output)
    return outputs


def _matmul_loop(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    """out[i][j] = sum_k a[i][k] * b[k][j]"""
    return [
        [sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)]
        for row in a
    ]


# --- Checks ---------------------------------------------------------------------------------------


def _floats(array: ArrayLike) -> Array:
    """The array itself, or as floats if it holds integers or booleans."""
    array = jnp.asarray(array)
    return array.astype(jnp.result_type(array, float))


def _tokens(name: str, array: ArrayLike) -> Array:
    array = _floats(array)
    if array.ndim < 2 or array.shape[-2] == 0 or array.shape[-1] == 0:
        raise ValueError(
            f"{name} must have two axes or more, the last two not empty; got shape {array.shape}"
        )
    return array


def _unbatched(name: str, array: ArrayLike) -> Array:
    array = _tokens(name, array)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [T, D] in the loop form; got {array.shape}")
    return array


def _project(name: str, x: ArrayLike, w_name: str, w: ArrayLike) -> Array:
    x, w = _tokens(name, x), _tokens(w_name, w)
    if w.ndim != 2 or w.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{w_name} must have shape [{x.shape[-1]}, width], as {name} has shape {x.shape}; "
            f"got {w.shape}"
        )
    return x @ w


def _mask(mask: ArrayLike, shape: tuple[int, ...]) -> Array:
    """The mask, checked and broadcast to the shape of the scores."""
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(f"mask must be bool, True where attending is allowed; got {mask.dtype}")
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"mask must broadcast to {shape}; got shape {mask.shape}") from None
