"""Positions: the papers' formulas as loops, printed values, and what rotary embeddings promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import positions
from tests.tolerances import assert_close

B, T, N, H = 2, 5, 3, 14
X = np.random.RandomState(0).randn(B, T, N, H).astype(np.float32)
POSITIONS = np.array([[0, 1, 2, 3, 4], [7, 3, 0, 90, 11]])
LAYOUTS = ["half_split", "interleaved"]
rotary = jax.jit(positions.rotary, static_argnames=("base", "width", "layout"))


def rotated_by_loop(x, position, pairs, frequencies):
    out = x.astype(np.float64)
    for i, (first, second) in enumerate(pairs):
        cos, sin = math.cos(position * frequencies[i]), math.sin(position * frequencies[i])
        a, b = float(x[first]), float(x[second])
        out[first], out[second] = a * cos - b * sin, b * cos + a * sin
    return out


def pairs_of(layout, width):
    half = width // 2
    return [(i, i + half) if layout == "half_split" else (2 * i, 2 * i + 1) for i in range(half)]


@pytest.mark.parametrize("width", [None, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_is_a_loop_over_pairs(layout, width):
    turning = width or H
    frequencies = [50.0 ** (-2 * i / turning) for i in range(turning // 2)]
    out = rotary(X, POSITIONS, base=50.0, width=width, layout=layout)
    expected = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        pairs = pairs_of(layout, turning)
        expected[b, t, n] = rotated_by_loop(X[b, t, n], POSITIONS[b, t], pairs, frequencies)
    assert_close(out, expected, scale=3)
    np.testing.assert_array_equal(out[..., turning:], X[..., turning:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary_keeps_norms_and_position_zero_changes_nothing(layout):
    out = rotary(X, POSITIONS, layout=layout)
    assert_close(jnp.linalg.norm(out, axis=-1), np.linalg.norm(X, axis=-1))
    np.testing.assert_array_equal(out[0, 0], X[0, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_rotated_vectors_depend_on_the_difference_of_positions_only(layout):
    q, k = X[:1, :1], X[1:, 1:2]

    def product(m, n):
        q_rotated, k_rotated = (
            rotary(x, np.array([p]), width=10, layout=layout) for x, p in ((q, m), (k, n))
        )
        return (q_rotated * k_rotated).sum()

    assert_close(product(9, 2), product(107, 100), scale=10)
    assert abs(product(9, 2) - product(9, 3)) > 1e-3


def test_the_layouts_agree_up_to_the_permutation_that_pairs_the_same_coordinates():
    width = 10
    permutation = np.arange(H)
    permutation[:width] = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
    interleaved = rotary(X, POSITIONS, width=width, layout="interleaved")
    half_split = rotary(X[..., permutation], POSITIONS, width=width)
    np.testing.assert_array_equal(interleaved[..., permutation], half_split)


def test_rotary_in_low_precision_is_the_float32_result_rounded():
    x = jnp.asarray(X, jnp.bfloat16)
    out = rotary(x, POSITIONS)
    assert out.dtype == jnp.bfloat16
    exact = rotary(x.astype(jnp.float32), POSITIONS)
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_rotary_of_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        out = rotary(X.astype(np.float64), POSITIONS[1])
        pairs, frequencies = pairs_of("half_split", H), positions.rotary_frequencies(H)
        expected = rotated_by_loop(X[0, 3, 0].astype(np.float64), 90, pairs, frequencies)
        assert_close(out[0, 3, 0], expected)


def test_positions_of_one_row_serve_all_rows_also_with_strict_rank_promotion():
    expected = rotary(X, np.stack([POSITIONS[1]] * B))
    np.testing.assert_array_equal(rotary(X, POSITIONS[1]), expected)
    with jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(rotary(X, POSITIONS[1]), expected)
        positions.t5_buckets(POSITIONS)


def test_linear_interpolation_divides_positions():
    frequencies = positions.linear_interpolation(positions.rotary_frequencies(H), 4.0)
    out = rotary(X, 8 * POSITIONS, frequencies=frequencies)
    assert_close(out, rotary(X, 2 * POSITIONS), scale=10)


def test_frequencies_fix_the_width_that_turns():
    out = rotary(X, POSITIONS, frequencies=positions.rotary_frequencies(6))
    np.testing.assert_array_equal(out, rotary(X, POSITIONS, width=6))


def test_llama3_frequencies_keep_the_fast_pairs_and_slow_the_slow_ones():
    width, base, factor, low, high, length = 64, 500_000.0, 8.0, 1.0, 4.0, 8192
    found = positions.llama3_frequencies(width, base, factor, low, high, length)
    for pair, frequency in enumerate(found):  # Meta's code, a pair at a time
        plain = base ** (-2 * pair / width)
        wavelength = 2 * np.pi / plain
        if wavelength < length / high:
            wanted = plain
        elif wavelength > length / low:
            wanted = plain / factor
        else:
            smooth = (length / wavelength - low) / (high - low)
            wanted = (1 - smooth) * plain / factor + smooth * plain
        assert frequency == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ValueError, match="factor must be at least 1"):
        positions.llama3_frequencies(width, base, 0.5, low, high, length)
    with pytest.raises(ValueError, match="positive and in order"):
        positions.llama3_frequencies(width, base, factor, high, low, length)


def yarn_by_loop(width, base, factor, length, beta_fast, beta_slow, truncate):
    """The blend as the paper words it: by how often each pair turns in the original context."""

    def index(turns):  # solves: turns = length * base^(-2 i / width) / (2 pi)
        return width / 2 * math.log(length / (2 * math.pi * turns), base)

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    out = []
    for i in range(width // 2):
        frequency = base ** (-2 * i / width)
        ramp = min(max((i - low) / (high - low), 0), 1)
        out.append((1 - ramp) * frequency + ramp * frequency / factor)
    return out


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("base, length", [(1e4, 64), (10.0, 10**6), (1e4, 4096)])
def test_yarn_frequencies_are_a_loop_over_pairs_also_where_the_blend_is_cut_off(
    base, length, truncate
):
    out = positions.yarn_frequencies(8, base, factor=4, original_length=length, truncate=truncate)
    assert_close(out, yarn_by_loop(8, base, 4, length, 32, 1, truncate), "float64")


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    "width, base, factor, length", [(128, 1e4, 16, 4096), (64, 1.5e5, 32, 4096)]
)
def test_yarn_frequencies_are_the_papers(width, base, factor, length, truncate):
    out = positions.yarn_frequencies(
        width, base, factor=factor, original_length=length, truncate=truncate
    )
    assert_close(out, yarn_by_loop(width, base, factor, length, 32, 1, truncate), "float64")
    plain = positions.rotary_frequencies(width, base)
    turns = length * plain / (2 * np.pi)
    assert (out[turns > 40] == plain[turns > 40]).all() and (turns > 40).any()
    assert_close(out[turns < 0.8], plain[turns < 0.8] / factor, "float64")
    assert (turns < 0.8).any() and (np.diff(out) < 0).all()


def test_yarn_with_factor_one_changes_nothing():
    plain = positions.rotary_frequencies(H, 500.0)
    yarn = positions.yarn_frequencies(H, 500.0, factor=1.0, original_length=64)
    assert_close(yarn, plain, "float64")
    assert positions.yarn_attention_factor(1.0) == 1.0
    assert positions.yarn_attention_factor(0.5) == 1.0
    assert positions.yarn_attention_factor(math.exp(10)) == pytest.approx(2.0)


@pytest.mark.parametrize("shape", [(), (T,), (B, T)])
def test_sinusoidal_interleaves_sines_and_cosines_of_the_paper(shape):
    ids = np.random.RandomState(0).randint(0, 50, shape)
    out = positions.sinusoidal(ids, 6, base=100.0)
    assert out.shape == (*shape, 6) and out.dtype == jnp.float32
    for index in np.ndindex(*shape):
        for i in range(3):
            angle = ids[index] / 100.0 ** (2 * i / 6)
            assert_close(out[index][2 * i], math.sin(angle), scale=10)
            assert_close(out[index][2 * i + 1], math.cos(angle), scale=10)


def test_alibi_slopes_are_those_of_the_paper():
    assert positions.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert positions.alibi_slopes(1).tolist() == [2.0**-8]
    # 12 heads: the 8 of above, then the first 4 odd-numbered ones of 16 heads, 2^(-1/2) apart.
    between = [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert_close(positions.alibi_slopes(12), [2.0**-i for i in range(1, 9)] + between, scale=0.01)
    assert [len(positions.alibi_slopes(n)) for n in range(1, 40)] == list(range(1, 40))


def bucket_by_loop(relative_position, num_buckets, max_distance, bidirectional):
    """T5's rule in integers: `floor(log_r(d/e) * m) >= j` is `(d/e)^m >= r^j`."""
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if relative_position > 0 else 0
        distance = abs(relative_position)
    else:
        distance = max(-relative_position, 0)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    later = num_buckets - exact
    power, j = distance**later, 0
    while j + 1 < later and power * exact ** (j + 1) >= max_distance ** (j + 1) * exact**later:
        j += 1
    return offset + exact + j


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    "num_buckets, max_distance", [(32, 128), (8, 64), (64, 128), (32, 256), (16, 9)]
)
def test_t5_buckets_are_those_of_exact_arithmetic(num_buckets, max_distance, bidirectional):
    distances = np.arange(-max_distance - 5, max_distance + 6)
    out = positions.t5_buckets(
        distances.reshape(1, -1),
        num_buckets=num_buckets,
        max_distance=max_distance,
        bidirectional=bidirectional,
    )
    loop = [bucket_by_loop(int(d), num_buckets, max_distance, bidirectional) for d in distances]
    assert out.dtype == jnp.int32 and out.tolist() == [loop]


def test_t5_buckets_of_the_published_models():
    """Where the logarithm is a whole number (16, 32, 64), rounding must not lose a bucket."""
    past = -np.array(
        [0, 1, 7, 8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 9999]
    )
    both = [0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15]
    causal = [0, 1, 7, 8, 11, 12, 15, 16, 18, 18, 21, 21, 23, 24, 26, 26, 29, 29, 31, 31]
    assert positions.t5_buckets(past).tolist() == both
    assert positions.t5_buckets(-past[1:]).tolist() == [16 + b for b in both[1:]]
    assert positions.t5_buckets(past, bidirectional=False).tolist() == causal
    assert positions.t5_buckets(-past, bidirectional=False).tolist() == [0] * len(past)


def test_t5_buckets_trace():
    distances = np.arange(-40, 40)
    traced = jax.jit(positions.t5_buckets)(distances)
    np.testing.assert_array_equal(traced, positions.t5_buckets(distances))


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: positions.rotary(X[0], POSITIONS),
            r"x must be floating \[B, T, N, H\], got float32",
        ),
        (lambda: positions.rotary(X > 0, POSITIONS), "x must be floating .* got bool"),
        (lambda: positions.rotary(X, POSITIONS[:, :3]), r"positions must .*\[5\].* got \[2, 3\]"),
        (lambda: positions.rotary(X, POSITIONS, layout="neox"), "layout must be one of half_split"),
        (
            lambda: positions.rotary(X, POSITIONS, width=7),
            "width must be an even number >= 2, got 7",
        ),
        (lambda: positions.rotary(X, POSITIONS, width=16), "width must be at most H = 14, got 16"),
        (
            lambda: positions.rotary(X, POSITIONS, width=6, frequencies=np.ones(4)),
            r"frequencies must have shape \[width / 2\] = \[3\], got \[4\]",
        ),
        (
            lambda: positions.rotary(X, POSITIONS, base=10.0, frequencies=np.ones(7)),
            "base and frequencies were both given",
        ),
        (lambda: positions.sinusoidal(POSITIONS, 5), "width must be an even number >= 2, got 5"),
        (lambda: positions.sinusoidal(POSITIONS, 4, base=1.0), "base must be above 1, got 1.0"),
        (lambda: positions.linear_interpolation(np.ones(3), 0), "factor must be positive, got 0"),
        (
            lambda: positions.yarn_frequencies(8, factor=0.5, original_length=9),
            "factor must be >= 1, got 0.5",
        ),
        (
            lambda: positions.yarn_frequencies(8, factor=2, original_length=0),
            "original_length must be positive, got 0",
        ),
        (
            lambda: positions.yarn_frequencies(8, factor=2, original_length=9, beta_fast=1),
            "beta_fast must exceed beta_slow",
        ),
        (lambda: positions.alibi_slopes(0), "num_heads must be a positive integer, got 0"),
        (lambda: positions.t5_buckets(POSITIONS, num_buckets=7), "num_buckets must be even"),
        (
            lambda: positions.t5_buckets(POSITIONS, num_buckets=1, bidirectional=False),
            "num_buckets must be at least 2, got 1",
        ),
        (
            lambda: positions.t5_buckets(POSITIONS, max_distance=8),
            "max_distance must be .* above 8",
        ),
    ],
)
def test_bad_input_is_an_error_that_names_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
