"""Depthwise convolutions over time: short ones as sums of shifted inputs, long ones by FFT.

A kernel is [W, C]: row w weighs the token w places back (in a centred one, w - (W - 1) // 2 places
back), for each of C channels. That is the mathematician's order, `np.convolve`'s; in PyTorch's and
Flax's layers the last row weighs the present token.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.operands import described

Array = jax.Array | np.ndarray


def causal_convolution(x: Array, kernel: Array, *, state: Array | None = None) -> jax.Array:
    """Every channel's weighted sum of the present and the W - 1 last tokens.

        out[b, t, c] = sum over w of kernel[w, c] * x[b, t - w, c]

    O(T W) time and memory. Sums are float32 (float64 for float64 input).

    Args:
      x: floating [B, T, C].
      kernel: floating [W, C].
      state: the W - 1 inputs before `x`, floating [B, W-1, C]; by default zeros. The next call's
        state is the last W - 1 rows of the two joined.

    Returns:
      [B, T, C] in the dtype of `x`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    x, kernel = _checked(x, kernel)
    return _weighted(shifted(x, len(kernel), state=state), kernel)


def centred_convolution(x: Array, kernel: Array) -> jax.Array:
    """Every channel's weighted sum of a token and its neighbours on both sides.

        out[b, t, c] = sum over w of kernel[w, c] * x[b, t + (W - 1) // 2 - w, c]

    Args, complexity and errors are those of `causal_convolution`.

    Returns:
      [B, T, C] in the dtype of `x`.
    """
    x, kernel = _checked(x, kernel)
    return _weighted(shifted(x, len(kernel), causal=False), kernel)


def long_convolution(x: Array, kernel: Array, *, causal: bool = True) -> jax.Array:
    """`causal_convolution` or `centred_convolution` for a kernel about as long as the sequence.

        out = irfft(rfft(x) * rfft(kernel))                    zeros appended: nothing wraps around

    The convolution theorem: exact up to rounding, in O(T log T) time and O(T) memory. Rounding is
    relative to the largest numbers of the channel; so a causal output depends on later tokens, but
    only in its last digits.

    Args:
      x: floating [B, T, C].
      kernel: floating [W, C]. Rows that reach beyond the sequence have no effect: the causal form
        needs at most T of them, the centred form at most 2 T - 1.
      causal: whether row 0 weighs the present token, or row (W - 1) // 2.

    Returns:
      [B, T, C] in the dtype of `x`.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
    """
    x, kernel = _checked(x, kernel)
    T, W = x.shape[1], len(kernel)
    dtype = _sum_dtype(x, kernel)
    present = 0 if causal else (W - 1) // 2  # the row that weighs the present token
    first = max(present - (T - 1), 0)
    kernel, present = kernel[first : present + T], present - first
    size = 1 << (T + len(kernel) - 2).bit_length()  # a power of two, at least T + W - 1
    x_spectrum = jnp.fft.rfft(x.astype(dtype), size, axis=1)
    kernel_spectrum = jnp.fft.rfft(kernel.astype(dtype), size, axis=0)
    out = jnp.fft.irfft(x_spectrum * kernel_spectrum, size, axis=1)
    return out[:, present : present + T].astype(x.dtype)


def shifted(
    x: Array, width: int, *, causal: bool = True, state: Array | None = None
) -> list[jax.Array]:
    """What each of `width` rows of a kernel weighs: `x`, moved by as many places.

    Args:
      x: [B, T, C].
      width: W.
      causal: element w is `x` moved w places towards the end, or w - (W - 1) // 2 places.
      state: the W - 1 inputs before `x`, [B, W-1, C]; by default zeros. Causal only.

    Returns:
      W arrays [B, T, C], with zeros where nothing was moved to.
    """
    B, T, C = x.shape
    after = 0 if causal else (width - 1) // 2
    if state is None:
        state = jnp.zeros((B, width - 1 - after, C), x.dtype)
    if state.shape != (B, width - 1 - after, C):
        raise ValueError(
            f"state: wanted [B, W-1, C] = [{B}, {width - 1 - after}, {C}], got {list(state.shape)}"
        )
    padded = jnp.concatenate([state.astype(x.dtype), x, jnp.zeros((B, after, C), x.dtype)], axis=1)
    return [padded[:, width - 1 - w : width - 1 - w + T] for w in range(width)]


def last_inputs(
    x: Array, width: int, *, state: Array | None = None, lengths: Array | None = None
) -> jax.Array:
    """The next call's `state` of `causal_convolution`: the W - 1 inputs before what follows `x`.

    Args:
      x: [B, T, C].
      width: W.
      state: the W - 1 inputs before `x`, [B, W-1, C]; by default zeros.
      lengths: how many of the T are no padding, integers [B]; None: all.

    Returns:
      [B, W-1, C].
    """
    B, T, C = x.shape
    state = jnp.zeros((B, width - 1, C), x.dtype) if state is None else state
    joined = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    if lengths is None:
        return joined[:, T:]
    rows = jnp.reshape(lengths, (-1, 1)) + jnp.arange(width - 1)
    return jnp.take_along_axis(joined, jnp.broadcast_to(rows, (B, width - 1))[..., None], axis=1)


def _weighted(moved: list[jax.Array], kernel: jax.Array) -> jax.Array:
    dtype = _sum_dtype(moved[0], kernel)
    # Broadcast at once to all axes, so that a row's gradient is one sum over batch and time: of
    # the two that `*` alone would ask for, XLA's on a CPU takes five times as long.
    rows = (jnp.broadcast_to(row, moved[0].shape) for row in kernel.astype(dtype))
    return sum(x.astype(dtype) * row for x, row in zip(moved, rows, strict=True)).astype(
        moved[0].dtype
    )


def _sum_dtype(x: jax.Array, kernel: jax.Array) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(x, kernel), jnp.float32)


def _checked(x: Array, kernel: Array) -> tuple[jax.Array, jax.Array]:
    for name, array, letters in (("x", x, "BTC"), ("kernel", kernel, "WC")):
        if np.ndim(array) != len(letters) or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name}: wanted floating [{', '.join(letters)}], got {described(array)}"
            )
    if len(kernel) == 0 or kernel.shape[1] != x.shape[2]:
        raise ValueError(
            f"kernel: wanted [W, C] = [1 or more, {x.shape[2]}] beside x {list(x.shape)}, "
            f"got {list(kernel.shape)}"
        )
    return jnp.asarray(x), jnp.asarray(kernel)
