"""A linear recurrence, chunk by chunk: what `linear` and `delta` share.

A head keeps a matrix S [H, h]. Every token lets it decay, writes a vector u under its key, and
reads with its query:

    S[t] = diag(exp(log_decay[t])) S[t-1] + k[t] u[t]^T          out[t] = S[t]^T q[t]

`within` computes what the tokens of one chunk do to one another, in products of matrices, and
`scan` walks the chunks with S alone: O(T C) time for chunks of C tokens. Between two tokens lies
the product of the decays after the first. Every exponent here is a sum of log decays and never the
difference of two running sums: nothing overflows, and weak decays keep their digits beside strong
ones.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.manual import varying_like
from qkv_jax.ops.operands import described

Array = jax.Array | np.ndarray

# Its exponential is 0 in every dtype, and the sum of a chunk's is finite, which -inf is not.
LEAST_LOG_DECAY = -1e3


class Tokens(NamedTuple):
    """What tokens bring to a recurrence, in the dtype of its state; padding brings zeros."""

    q: Array  # [B, T, K, G, H], times the scale
    k: Array  # [B, S, K, H]
    v: Array  # [B, S, K, h]
    log_decay: Array | None  # [B, S, K, 1 or H]
    beta: Array | None  # [B, S, K, 1]


class Token(NamedTuple):
    """One of them."""

    q: Array  # [B, K, G, H]
    k: Array  # [B, K, H]
    v: Array  # [B, K, h]
    log_decay: Array | None  # [B, K, 1 or H]
    beta: Array | None  # [B, K, 1]

    def decayed(self, state: jax.Array) -> jax.Array:
        """The state [B, K, H, h] after this token's decay."""
        return state if self.log_decay is None else jnp.exp(self.log_decay)[..., None] * state

    def read(self, state: jax.Array) -> jax.Array:
        """What the queries read, [B, N, h]."""
        out = jnp.einsum("BKGH,BKHh->BKGh", self.q, state)
        return out.reshape(out.shape[0], -1, out.shape[-1])


def prepare(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None = None,
    beta: Array | None = None,
    state: Array | None = None,
    scale: float | None = None,
    lengths: Array | int | None = None,
    same_length: bool = True,
) -> tuple[Tokens, jax.Array]:
    """Checks the arguments of a recurrence and brings them into one form.

    The arguments that are not listed are those of `linear_attention` and `delta_rule`.

    Args:
      same_length: whether there must be as many keys as queries.

    Returns:
      The tokens, and the state before them, [B, K, H, h]; float32, or float64 if q, k or v is.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    B, T, N, H = _checked("q", q, "BTNH").shape
    S = T if same_length else None
    _, S, K, _ = _checked("k", k, "BSKH", B=B, S=S, H=H).shape
    h = _checked("v", v, "BSKh", B=B, S=S, K=K).shape[3]
    if K == 0 or N % K:
        raise ValueError(f"k: {K} key/value heads do not divide q's {N} heads (N % K == 0)")
    if log_decay is not None:
        letters = "BSK" if np.ndim(log_decay) == 3 else "BSKH"
        log_decay = _checked("log_decay", log_decay, letters, B=B, S=S, K=K, H=H)
        log_decay = log_decay.reshape(B, S, K, -1)
    if beta is not None:
        beta = _checked("beta", beta, "BSK", B=B, S=S, K=K)[..., None]
    if state is None:
        state = np.zeros((B, K, H, h), np.float32)
    _checked("state", state, "BKHh", B=B, K=K, H=H, h=h)
    if lengths is not None and (
        np.shape(lengths) not in ((), (1,), (B,))
        or not jnp.issubdtype(jnp.result_type(lengths), jnp.integer)
    ):
        raise ValueError(f"lengths: wanted integers [B] = [{B}], got {described(lengths)}")

    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    q, k, v, log_decay, beta, state = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), (q, k, v, log_decay, beta, state)
    )
    q = q.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5 if scale is None else scale, dtype)
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay, LEAST_LOG_DECAY)
    if lengths is not None:
        real = (jnp.arange(S) < jnp.reshape(jnp.asarray(lengths), (-1, 1)))[..., None, None]
        k, v, log_decay, beta = jax.tree.map(
            lambda x: jnp.where(real, x, 0), (k, v, log_decay, beta)
        )
    return Tokens(q, k, v, log_decay, beta), state


def prepare_step(
    q: Array,
    k: Array,
    v: Array,
    *,
    log_decay: Array | None = None,
    beta: Array | None = None,
    state: Array | None = None,
    scale: float | None = None,
) -> tuple[Token, jax.Array]:
    """`prepare` for one token: no array has the axis of time."""
    for name, x, letters in (("q", q, "BNH"), ("k", k, "BKH"), ("v", v, "BKh")):
        _checked(name, x, letters)
    q, k, v, log_decay, beta = jax.tree.map(lambda x: x[:, None], (q, k, v, log_decay, beta))
    tokens, state = prepare(q, k, v, log_decay=log_decay, beta=beta, state=state, scale=scale)
    return Token(*jax.tree.map(lambda x: x[:, 0], tokens)), state


def decays(tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """The decay between any two tokens, and since before the first, as the formula reads.

    Returns:
      exp(sum of log_decay[l] over s < l <= t) where s <= t, else 0, [B, T, S, K, H]; and
      exp(sum of log_decay[l] over l <= t), [B, T, K, H].
    """
    shape = tokens.k.shape
    log_decay = jnp.zeros(()) if tokens.log_decay is None else tokens.log_decay
    log_decay = jnp.broadcast_to(log_decay, shape).astype(tokens.k.dtype)
    t, s = np.arange(shape[1])[:, None, None, None], np.arange(shape[1])[:, None, None]
    sums = jnp.cumsum(jnp.where(t > s, log_decay[:, :, None], 0), axis=1)
    return jnp.where(t >= s, jnp.exp(sums), 0), jnp.exp(jnp.cumsum(log_decay, axis=1))


def all_at_once(
    tokens: Tokens, u: jax.Array, state: jax.Array, between: jax.Array, since: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The recurrence as its sum reads, all T x T weights at once.

    Args:
      tokens, state: as `prepare` gives them.
      u: what each token writes under its key, [B, T, K, h].
      between, since: as `decays` gives them.

    Returns:
      [B, T, N, h], and the state after the last token.
    """
    weights_BKGTS = jnp.einsum("BTKGH,BSKH,BTSKH->BKGTS", tokens.q, tokens.k, between)
    out = jnp.einsum("BKGTS,BSKh->BTKGh", weights_BKGTS, u)
    out += jnp.einsum("BTKGH,BTKH,BKHh->BTKGh", tokens.q, since, state)
    state = since[:, -1][..., None] * state
    state += jnp.einsum("BSKH,BSKH,BSKh->BKHh", tokens.k, between[:, -1], u)
    return out.reshape(*out.shape[:2], -1, out.shape[-1]), state


def scan(
    step: Callable[[jax.Array, Tokens], tuple[jax.Array, jax.Array]],
    tokens: Tokens,
    state: jax.Array,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Walks a sequence chunk by chunk. For the gradient it keeps the state before each chunk.

    Args:
      step: from the state [M, H, h] before a chunk and the chunk's tokens, [M, C, ...] with the
        M = B K heads in front and q [M, C G, H], to the state after it and out [M, C G, h].
      tokens: of the sequence.
      state: [B, K, H, h].
      chunk_size: how many tokens a chunk has; rounded up to C, a power of two.

    Returns:
      [B, T, N, h], and the state after the last token, [B, K, H, h].
    """
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: wanted a positive integer, got {chunk_size!r}")
    B, T, K, G, _ = tokens.q.shape
    C = 1 << (max(min(chunk_size, T), 1) - 1).bit_length()
    h, num = state.shape[-1], -(-T // C)

    def cut(x: jax.Array) -> jax.Array:  # padding writes nothing, as it brings zeros
        x = jnp.pad(x, ((0, 0), (0, num * C - T), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, num, C, *x.shape[2:]), 1, 0)

    # The heads come in front chunk by chunk: what is turned then lies in the processor's cache.
    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 1, 2).reshape(B * K, -1, x.shape[-1])

    def body(state: jax.Array, chunk: Tokens) -> tuple[jax.Array, jax.Array]:
        state, out = step(state, jax.tree.map(heads_first, chunk))
        return state, jnp.swapaxes(out.reshape(B, K, C, G * h), 1, 2)

    [state] = varying_like(jax.tree.leaves(tokens), [state])
    state, out = jax.lax.scan(
        jax.checkpoint(body, prevent_cse=False),
        state.reshape(B * K, *state.shape[2:]),
        jax.tree.map(cut, tokens),
    )
    out = jnp.moveaxis(out, 0, 1).reshape(B, num * C, K * G, h)[:, :T]
    return out, state.reshape(B, K, *state.shape[1:])


class Within(NamedTuple):
    """What `within` returns."""

    products: list[jax.Array]  # [M, R, C] each
    readers: list[jax.Array]  # [M, R, H] each
    k: jax.Array  # [M, C, H]
    kept: jax.Array  # [M or 1, H or 1, 1]


def within(readers: Sequence[jax.Array], k: jax.Array, log_decay: jax.Array | None) -> Within:
    """What the tokens of a chunk do to one another, and to the state, through the decays.

        products[i, j] = sum over d of readers[i, d] k[j, d] exp(sum of log_decay[l, d], j < l <= i)

    for j <= i, else 0.

    Args:
      readers: queries, or whatever else reads the state: each [M, R, H], where R is a multiple of C
        and the R / C rows of a token follow one another.
      k: [M, C, H].
      log_decay: [M, C, 1 or H], or None.

    Returns:
      The products; the readers, and the keys, as decayed since the chunk's begin and until its end;
      and what the chunk keeps of the state.
    """
    C = k.shape[1]
    lower = jnp.tril(jnp.ones((C, C), k.dtype))
    if log_decay is None:
        products = [_products(x, k) * _per_row(lower, x, k) for x in readers]
        return Within(products, list(readers), k, jnp.ones((1, 1, 1), k.dtype))
    if log_decay.shape[-1] > 1:
        return _within_channels(readers, k, log_decay)
    # sums[i, j] = sum of log_decay[l], j < l <= i
    until = jnp.swapaxes(log_decay, 1, 2) * lower
    sums = until @ jnp.tril(jnp.ones((C, C), k.dtype), -1)
    decays, since = jnp.exp(sums) * lower, jnp.exp(until.sum(-1, keepdims=True))
    return Within(
        [_products(x, k) * _per_row(decays, x, k) for x in readers],
        [x * _per_row(since, x, k) for x in readers],
        k * jnp.swapaxes(decays[:, -1:], 1, 2),
        since[:, -1:],
    )


def _within_channels(readers: Sequence[jax.Array], k: jax.Array, log_decay: jax.Array) -> Within:
    """`within`, where each channel decays at its own rate.

    A block of 2 s tokens is two of s, whose products are known, and those of the later one's
    readers with the earlier one's keys. What decays these passes the border between the two:

        exp(sums[i, j]) = exp(sum since the border, up to i) exp(sum after j, up to the border)
    """
    M, C, H = k.shape

    def halves(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        pairs = x.reshape(M, size // 2, 2, -1, x.shape[-1])
        return pairs[:, :, 0], pairs[:, :, 1]

    blocks = [jnp.sum(x.reshape(M, C, -1, H) * k[:, :, None], -1, keepdims=True) for x in readers]
    size = C
    while size > 1:
        before, after = halves(log_decay, size)
        early = halves(k, size)[0] * jnp.exp(_until(before))
        since = jnp.exp(_since(after))
        for i, x in enumerate(readers):
            late = halves(x, size)[1]
            cross = _products(late * _per_row(since, late, early), early)
            first, second = halves(blocks[i], size)
            blocks[i] = lower_triangular(first, cross, second)
        # Without the barrier, XLA makes one loop of all levels, in which every element asks at
        # every level where it came from.
        blocks = jax.lax.optimization_barrier(blocks)
        size //= 2
    since = jnp.exp(_since(log_decay))
    return Within(
        [x[:, 0] for x in blocks],
        [x * _per_row(since, x, k) for x in readers],
        k * jnp.exp(_until(log_decay)),
        jnp.swapaxes(since[:, -1:], 1, 2),
    )


def _products(x: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("...rd,...cd->...rc", x, k)


def _since(log_decay: jax.Array) -> jax.Array:
    """Sums over the tokens [..., C, H] from the first to each."""
    return _sums(jnp.tri(log_decay.shape[-2], dtype=log_decay.dtype), log_decay)


def _until(log_decay: jax.Array) -> jax.Array:
    """Sums over the tokens after each."""
    C = log_decay.shape[-2]
    return _sums(1 - jnp.tri(C, dtype=log_decay.dtype), log_decay)


def _sums(chosen: jax.Array, x: jax.Array) -> jax.Array:
    # A product of matrices: on a CPU it takes a fraction of the time of `cumsum`.
    return jnp.broadcast_to(chosen, (*x.shape[:-2], *chosen.shape)) @ x


def _per_row(x: jax.Array, readers: jax.Array, k: jax.Array) -> jax.Array:
    """Repeats each token's row [..., C, any] for the rows of its readers."""
    rows = readers.shape[-2] // k.shape[-2]
    return x if rows == 1 else jnp.repeat(x, rows, axis=-2)


def lower_triangular(first: jax.Array, cross: jax.Array, second: jax.Array) -> jax.Array:
    """The matrices [[first, 0], [cross, second]]."""
    top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    return jnp.concatenate([top, jnp.concatenate([cross, second], -1)], -2)


def _checked(name: str, x: Any, letters: str, **sizes: int) -> Array:
    """`x`, if it is floating and its axes have these sizes."""
    floating = hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.floating)
    wanted = [sizes.get(letter) for letter in letters]
    if (
        not floating
        or len(x.shape) != len(wanted)
        or any(size not in (None, found) for size, found in zip(wanted, x.shape, strict=True))
    ):
        known = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
        raise ValueError(
            f"{name}: wanted floating [{', '.join(letters)}] = [{known}], got {described(x)}"
        )
    return x
