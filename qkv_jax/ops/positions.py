"""Positions: sinusoidal embeddings, rotary embeddings and their scalings, ALiBi slopes, T5 buckets.

Frequencies and slopes depend on Python numbers alone, so they are NumPy arrays: constants of the
program, or initial values for those who want to train them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

# Where the two coordinates of a pair stand once the width is split in two axes.
_PAIR_AXIS = {"half_split": -2, "interleaved": -1}


def sinusoidal(positions: Array, width: int, *, base: float = 10_000.0) -> jax.Array:
    """Sinusoidal position embeddings.

    `out[..., 2i] = sin(p / base^(2i/width))`, `out[..., 2i+1] = cos(p / base^(2i/width))`.

    Source: Vaswani et al. 2017, section 3.5, arxiv.org/abs/1706.03762.

    Args:
      positions: integer or floating, any shape [...].
      width: D, even.
      base: the wavelengths run from 2 pi to `base * 2 pi`.

    Returns:
      float32 [..., width] (float64 for float64 positions).

    Raises:
      ValueError: for an odd width or a base that is not above 1.
    """
    angles = _angles(positions, rotary_frequencies(width, base), _float_type(positions))
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*angles.shape[:-1], width)


def rotary(
    x: Array,
    positions: Array,
    *,
    base: float | None = None,
    width: int | None = None,
    layout: str = "half_split",
    frequencies: Array | None = None,
) -> jax.Array:
    """Rotary position embedding: pair i of the coordinates turns by `position * frequency[i]`.

    `(a, b) -> (a cos - b sin, b cos + a sin)`, so that the product of a query and a key depends on
    their positions only through the difference.

    Source: Su et al. 2021, arxiv.org/abs/2104.09864.

    Args:
      x: queries or keys, floating [B, T, N, H].
      positions: integer [T] or [B, T].
      base: of the frequencies `base^(-2i/width)`; None for 10,000. Not together with `frequencies`.
      width: how many of the first coordinates turn, even; the rest pass unchanged. None for all H,
        or for as many as `frequencies` turn.
      layout: which coordinates form pair i. "half_split": i and i + width/2 (`rotate_half` of
        GPT-NeoX and of Hugging Face's Llama). "interleaved": 2i and 2i + 1 (the paper, GPT-J,
        Meta's Llama). Equal up to a permutation of the coordinates, so a checkpoint fixes which.
      frequencies: floating [width / 2], such as `yarn_frequencies` gives.

    Returns:
      [B, T, N, H] in x's dtype, computed in float32 (float64 for float64).

    Raises:
      ValueError: naming the argument, for shapes, widths or layouts other than these.
    """
    x = jnp.asarray(x)
    frequencies, width = _checked_rotary(x, positions, base, width, layout, frequencies)
    B, T, N, H = x.shape
    dtype = _float_type(x)
    angles_BTNw = jnp.broadcast_to(
        _angles(positions, frequencies, dtype)[..., None, :], (B, T, 1, width // 2)
    )
    cos, sin = jnp.cos(angles_BTNw), jnp.sin(angles_BTNw)

    axis = _PAIR_AXIS[layout]
    split = (2, width // 2) if layout == "half_split" else (width // 2, 2)
    pairs = x[..., :width].astype(dtype).reshape(B, T, N, *split)
    first, second = jnp.moveaxis(pairs, axis, 0)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
    turned = turned.reshape(B, T, N, width).astype(x.dtype)
    return turned if width == H else jnp.concatenate([turned, x[..., width:]], axis=-1)


def rotary_frequencies(width: int, base: float = 10_000.0) -> np.ndarray:
    """The angles per position of rotary and sinusoidal embeddings: `base^(-2i/width)`.

    Returns:
      NumPy float64 [width / 2].

    Raises:
      ValueError: for an odd width or a base that is not above 1.
    """
    if not isinstance(width, int | np.integer) or width < 2 or width % 2:
        raise ValueError(f"width must be an even number >= 2, got {width!r}")
    if not base > 1:
        raise ValueError(f"base must be above 1, got {base!r}")
    return float(base) ** (-np.arange(0, width, 2) / width)


def linear_interpolation(frequencies: Array, factor: float) -> Array:
    """Frequencies for a context `factor` times longer: as if every position were divided by it.

    Source: Chen et al. 2023, arxiv.org/abs/2306.15595.
    """
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor!r}")
    return frequencies / factor


def llama3_frequencies(
    width: int,
    base: float,
    factor: float,
    low_turns: float,
    high_turns: float,
    original_length: int,
) -> np.ndarray:
    """Llama 3.1's frequencies for a context `factor` times longer than the one trained on.

    A pair that turns more than `high_turns` times within the original context keeps its frequency,
    one that turns less than `low_turns` times has it divided by `factor`; those between are blended
    linearly in their turns. Source: Meta's code, github.com/meta-llama/llama-models,
    `apply_scaling`; transformers' rope type "llama3".

    Args:
      width: H, even.
      base: of the frequencies of the original context.
      factor: at least 1; Llama 3.1's is 8.
      low_turns, high_turns: Llama 3.1's are 1 and 4.
      original_length: tokens of the original context; Llama 3.1's is 8,192.

    Returns:
      NumPy float64 [width / 2].

    Raises:
      ValueError: for a factor below 1, or turns that are not in order.
    """
    if not factor >= 1:
        raise ValueError(f"factor must be at least 1, got {factor!r}")
    if not 0 < low_turns < high_turns:
        raise ValueError(
            f"low_turns and high_turns must be positive and in order, got {low_turns}, {high_turns}"
        )
    frequencies = rotary_frequencies(width, base)
    turns = original_length * frequencies / (2 * math.pi)
    kept = np.clip((turns - low_turns) / (high_turns - low_turns), 0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def yarn_frequencies(
    width: int,
    base: float = 10_000.0,
    *,
    factor: float,
    original_length: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
    truncate: bool = True,
) -> np.ndarray:
    """YaRN: frequencies for a context `factor` times longer than the one trained on.

    A pair that turns more than `beta_fast` times within the original context keeps its frequency,
    one that turns less than `beta_slow` times has it divided by `factor`, and those between are
    blended linearly. YaRN also scales the rotated coordinates by `yarn_attention_factor(factor)`.

    Source: Peng et al. 2023, arxiv.org/abs/2309.00071, and the authors' code,
    github.com/jquesnelle/yarn; the values of transformers' `_compute_yarn_parameters`.

    Args:
      width: how many coordinates turn, even.
      base: as in `rotary_frequencies`.
      factor: new length / original length, >= 1.
      original_length: the context, in tokens, that the model was trained on.
      beta_fast: turns above which a pair is left alone.
      beta_slow: turns below which a pair is interpolated in full.
      truncate: whether the ends of the blend are rounded to whole pairs (gpt-oss does not).

    Returns:
      NumPy float64 [width / 2].

    Raises:
      ValueError: naming the argument.
    """
    frequencies = rotary_frequencies(width, base)
    if not factor >= 1:
        raise ValueError(f"factor must be >= 1, got {factor!r}")
    if not original_length > 0:
        raise ValueError(f"original_length must be positive, got {original_length!r}")
    if not beta_fast > beta_slow > 0:
        raise ValueError(f"beta_fast must exceed beta_slow > 0, got {beta_fast!r}, {beta_slow!r}")

    def pair_with(turns: float) -> float:
        """The index, a fraction in general, of the pair that turns so often in that context."""
        return width * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high  # as in the sources: no division by zero
    interpolated = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
    return frequencies * (1 - interpolated) + frequencies / factor * interpolated


def yarn_attention_factor(factor: float) -> float:
    """What YaRN multiplies rotated coordinates by: `0.1 ln(factor) + 1`, 1 for factors up to 1.

    With all H coordinates of queries and keys rotated, that is its square in attention's `scale`.
    """
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def alibi_slopes(num_heads: int) -> np.ndarray:
    """ALiBi's slopes: `2^(-8i/N)` for i = 1..N where N is a power of two.

    For other N, the slopes of the next lower power of two P, then every other slope of 2P.

    Source: Press et al. 2022, arxiv.org/abs/2108.12409, and the authors' code,
    github.com/ofirpress/attention_with_linear_biases.

    Returns:
      NumPy float32 [num_heads].

    Raises:
      ValueError: if num_heads is not a positive integer.
    """
    if not isinstance(num_heads, int | np.integer) or num_heads < 1:
        raise ValueError(f"num_heads must be a positive integer, got {num_heads!r}")
    power = 1 << (int(num_heads).bit_length() - 1)
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return np.array((slopes + between)[:num_heads], np.float32)


def t5_buckets(
    relative_position: Array,
    *,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> jax.Array:
    """T5's buckets of relative positions: one per distance when near, logarithmic when far.

    With n buckets and e = n / 2: the bucket is d for distances d < e, and
    `min(e + floor(ln(d / e) / ln(max_distance / e) * (n - e)), n - 1)` from there on.

    Source: Raffel et al. 2020, arxiv.org/abs/1910.10683; the values of transformers'
    `_relative_position_bucket`.

    Args:
      relative_position: `kv_pos - q_pos`, integer, any shape.
      num_buckets: in all; even, and at least 4, if bidirectional.
      max_distance: from this distance on, all positions share the last bucket.
      bidirectional: the second half of the buckets is for keys after the query. Otherwise such keys
        share bucket 0 with the query itself.

    Returns:
      int32, the shape of `relative_position`.

    Raises:
      ValueError: naming the argument.
    """
    thresholds = t5_thresholds(num_buckets, max_distance, bidirectional)
    relative_position = jnp.asarray(relative_position)
    offset = 0
    distance = jnp.maximum(-relative_position, 0)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative_position > 0, num_buckets, 0)
        distance = abs(relative_position)
    near = jnp.minimum(distance, num_buckets // 2)
    thresholds = np.expand_dims(thresholds, tuple(range(distance.ndim)))
    far = (distance[..., None] >= thresholds).sum(-1)
    return (offset + near + far).astype(jnp.int32)


def t5_thresholds(num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """The smallest distance of each of T5's logarithmic buckets but the first, NumPy int32.

    The formula is evaluated here, once, in the float32 steps of transformers, and positions are
    compared with the result: no backend's logarithm decides where a bucket ends.

    Raises:
      ValueError: naming the argument.
    """
    if num_buckets < (4 if bidirectional else 2) or (bidirectional and num_buckets % 2):
        wanted = "even and at least 4 if bidirectional" if bidirectional else "at least 2"
        raise ValueError(f"num_buckets must be {wanted}, got {num_buckets!r}")
    num_buckets = num_buckets // 2 if bidirectional else num_buckets
    exact = num_buckets // 2
    if not isinstance(max_distance, int | np.integer) or max_distance <= exact:
        wanted = f"an integer above {exact}, the distances with buckets of their own"
        raise ValueError(f"max_distance must be {wanted}, got {max_distance!r}")
    distances = np.arange(exact, max_distance + 1, dtype=np.float32)
    steps = np.log(distances / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    later = np.searchsorted(steps, np.arange(1, num_buckets - exact))
    return (exact + later).astype(np.int32)


def _float_type(x: Array) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, x.dtype) if _is_floating(x) else jnp.dtype(jnp.float32)


def _is_floating(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _angles(positions: Array, frequencies: Array, dtype: jnp.dtype) -> jax.Array:
    frequencies = jnp.asarray(frequencies, dtype)
    frequencies = jnp.expand_dims(frequencies, tuple(range(np.ndim(positions))))
    return jnp.asarray(positions, dtype)[..., None] * frequencies


def _checked_rotary(x, positions, base, width, layout, frequencies) -> tuple[Array, int]:
    """The frequencies and the width that turns, or an error that names the argument."""
    if x.ndim != 4 or not _is_floating(x):
        raise ValueError(f"x must be floating [B, T, N, H], got {x.dtype} {list(x.shape)}")
    B, T, _, H = x.shape
    if np.shape(positions) not in ((T,), (B, T), (1, T)):
        found = list(np.shape(positions))
        raise ValueError(
            f"positions must have shape [T] = [{T}] or [B, T] = [{B}, {T}], got {found}"
        )
    if layout not in _PAIR_AXIS:
        raise ValueError(f"layout must be one of {', '.join(_PAIR_AXIS)}, got {layout!r}")
    if frequencies is None:
        width = H if width is None else width
        frequencies = rotary_frequencies(width, 10_000.0 if base is None else base)
    elif base is not None:
        raise ValueError(
            "base and frequencies were both given: the frequencies already imply a base"
        )
    if width is None:
        width = 2 * np.size(frequencies)
    if np.shape(frequencies) != (width // 2,) or width % 2:
        found = list(np.shape(frequencies))
        raise ValueError(f"frequencies must have shape [width / 2] = [{width // 2}], got {found}")
    if width > H:
        raise ValueError(f"width must be at most H = {H}, got {width}")
    return frequencies, width
