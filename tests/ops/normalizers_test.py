"""Sigmoid, sparsemax, entmax, softmaxes off by one and clipped: against NumPy, as attention."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import masks, scores
from qkv_jax.ops.clipped import ClippedSoftmax
from qkv_jax.ops.dropout import keep_mask
from qkv_jax.ops.normalizers import (
    Entmax,
    Sigmoid,
    entmax,
    entmax_attention,
    off_by_one_attention,
    sigmoid_attention,
    sparsemax,
    sparsemax_attention,
)
from tests.tolerances import assert_close

B, T, S, N, K, H, h = 2, 5, 7, 6, 3, 11, 13
RANDOM = np.random.RandomState(0)
ROWS = RANDOM.randn(3, 5, S) * 2
ALLOWED = RANDOM.rand(3, 5, S) < 0.6
ALLOWED[0, 0] = False
ALPHAS = [1.2, 1.5, 2.0]
every_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def numpy_entmax(x, alpha):
    """A row's weights by halving an interval around the threshold."""
    weights = lambda tau: np.maximum((alpha - 1) * x - tau, 0) ** (1 / (alpha - 1))  # noqa: E731
    high = (alpha - 1) * x.max()
    low = high - 1
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if weights(middle).sum() > 1 else (low, middle)
    return weights(low)


def in_float64(f, *args, **kwargs):
    with jax.enable_x64(True):
        return np.asarray(jax.jit(lambda *a: f(*a, **kwargs))(*args))


# Rows


@every_alpha
def test_entmax_is_what_halving_an_interval_finds(alpha):
    expected = np.apply_along_axis(numpy_entmax, -1, ROWS, alpha)
    assert_close(in_float64(entmax, ROWS, alpha=alpha), expected)
    assert_close(entmax(ROWS.astype("f"), alpha), expected)
    along_1 = in_float64(entmax, np.moveaxis(ROWS, -1, 1), alpha=alpha, axis=1)
    assert_close(np.moveaxis(along_1, 1, -1), expected)


@every_alpha
def test_entmax_meets_the_conditions_of_its_optimum(alpha):
    """Maximal w . x + (1 - sum w ** alpha) / (alpha (alpha - 1)) on the simplex."""
    weights = in_float64(entmax, ROWS, alpha=alpha)
    assert_close(weights.sum(-1), np.ones((3, 5)))
    assert (weights >= 0).all()
    gradient = ROWS - weights ** (alpha - 1) / (alpha - 1)
    multiplier = gradient.max(-1, keepdims=True)
    # Equal where the weight is positive, and no larger where it is 0.
    assert_close(np.where(weights > 0, gradient, multiplier), multiplier + 0 * ROWS, scale=10)


def test_sparsemax_is_the_projection_onto_the_simplex():
    """Of all sets of positive weights, the one whose solution meets every condition."""

    def project(x):
        for size in range(1, S + 1):
            for support in map(list, itertools.combinations(range(S), size)):
                tau = (x[support].sum() - 1) / size
                if (x[support] > tau).all() and (np.delete(x, support) <= tau).all():
                    weights = np.zeros(S)
                    weights[support] = x[support] - tau
                    return weights

    expected = np.apply_along_axis(project, -1, ROWS)
    assert (expected == 0).any() and (expected.argmax(-1) == ROWS.argmax(-1)).all()
    assert_close(in_float64(sparsemax, ROWS), expected)


@every_alpha
def test_what_takes_no_part_changes_nothing(alpha):
    weights = in_float64(entmax, ROWS, alpha=alpha, where=ALLOWED)
    for index in np.ndindex(3, 5):
        allowed = ALLOWED[index]
        expected = np.zeros(S)
        if allowed.any():
            expected[allowed] = numpy_entmax(ROWS[index][allowed], alpha)
        assert_close(weights[index], expected)


@every_alpha
def test_derivatives_of_both_modes_and_orders_are_those_of_differences(alpha):
    x, direction = ROWS[1], RANDOM.randn(5, S)
    cotangent = RANDOM.randn(5, S)

    @jax.jit
    def derivatives(x):
        loss = lambda x: (entmax(x, alpha) ** 3 * cotangent).sum()  # noqa: E731
        forward = jax.jvp(lambda x: entmax(x, alpha), (x,), (direction,))[1]
        products = (
            jax.jvp(jax.grad(loss), (x,), (direction,))[1],
            jax.grad(lambda x: jax.jvp(loss, (x,), (direction,))[1])(x),
            jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), direction))(x),
        )
        return forward, jax.grad(loss)(x), products

    with jax.enable_x64(True):
        points = (x, x + 1e-6 * direction, x - 1e-6 * direction)
        results = jax.tree.map(np.asarray, [derivatives(point) for point in points])
        (forward, gradient, products), (_, up, _), (_, down, _) = results
    high, low = (np.apply_along_axis(numpy_entmax, -1, point, alpha) for point in points[1:])
    np.testing.assert_allclose(forward, (high - low) / 2e-6, rtol=1e-6, atol=1e-8)
    difference = ((high**3 - low**3) * cotangent).sum() / 2e-6
    np.testing.assert_allclose(np.vdot(gradient, direction), difference, rtol=1e-6)
    np.testing.assert_allclose(products[0], (up - down) / 2e-6, rtol=1e-5, atol=1e-7)
    for product in products[1:]:
        assert_close(product, products[0], scale=10)


@every_alpha
def test_a_row_without_logits_gives_0_and_no_derivative_is_nan(alpha):
    with jax.debug_nans(True):
        loss = lambda x: (entmax(x, alpha, where=ALLOWED) ** 3).sum()  # noqa: E731
        x = jnp.asarray(ROWS, "float32")
        gradient, product = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (x,)))(x)
        _, forward = jax.jvp(lambda x: entmax(x, alpha, where=ALLOWED), (x,), (x,))
    np.testing.assert_array_equal(entmax(x, alpha, where=ALLOWED)[0, 0], 0)
    for derivative in (gradient, product, forward):
        assert np.isfinite(derivative).all()
        np.testing.assert_array_equal(derivative[~ALLOWED], 0)


@every_alpha
def test_extreme_rows(alpha):
    far = np.array([-1e30, 0, 1e30]), np.full(3, 1e4), np.array([-np.inf, 3, -np.inf])
    weights = entmax(jnp.asarray(far, "float32"), alpha)
    assert_close(weights, [[0, 0, 1], [1 / 3] * 3, [0, 1, 0]])
    assert entmax(jnp.zeros((2, 0)), alpha).shape == (2, 0)
    assert_close(entmax(jnp.asarray(RANDOM.randn(4096), "float32"), alpha).sum(), 1.0)


def test_near_alpha_1_entmax_is_the_softmax():
    near = in_float64(entmax, ROWS, alpha=1 + 1e-6)
    np.testing.assert_allclose(near, jax.nn.softmax(ROWS), atol=1e-4)


def test_bfloat16_is_computed_in_float32():
    x = jnp.asarray(ROWS, "bfloat16")
    weights = entmax(x, where=ALLOWED)
    assert weights.dtype == "bfloat16"
    np.testing.assert_array_equal(weights, entmax(x.astype("f"), where=ALLOWED).astype("bfloat16"))


@pytest.mark.parametrize("alpha", [1, 2.5, None, np.ones(2)], ids=repr)
def test_another_alpha_is_an_error(alpha):
    with pytest.raises(ValueError, match=r"alpha: wanted a Python number in \(1, 2\], got"):
        entmax(ROWS, alpha)
    with pytest.raises(ValueError, match=r"alpha: wanted"):
        entmax_attention(*inputs(), alpha=alpha)


# Attention


def inputs(dtype="float32"):
    random = np.random.RandomState(1)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, h)
    return [jnp.asarray(random.randn(*shape), dtype) for shape in shapes]


def numpy_sigmoid(row, bias=None):
    bias = -np.log(len(row)) if bias is None else bias
    return 1 / (1 + np.exp(-row - bias))


def numpy_off_by_one(row):
    return np.exp(row) / (1 + np.exp(row).sum())


def numpy_clipped(row, gamma, zeta):
    softmax = np.exp(row) / np.exp(row).sum()
    return np.clip((zeta - gamma) * softmax + gamma, 0, 1)


# The op, and in NumPy the weights of the logits that a row allows.
OPS = {
    "entmax": (entmax_attention, lambda row: numpy_entmax(row, 1.5)),
    "entmax 1.2": (Entmax(1.2), lambda row: numpy_entmax(row, 1.2)),
    "sparsemax": (sparsemax_attention, lambda row: numpy_entmax(row, 2.0)),
    "sigmoid": (sigmoid_attention, numpy_sigmoid),
    "sigmoid -1": (Sigmoid(-1.0), lambda row: numpy_sigmoid(row, -1.0)),
    "off by one": (off_by_one_attention, numpy_off_by_one),
    "clipped": (ClippedSoftmax(-0.1), lambda row: numpy_clipped(row, -0.1, 1.0)),
    "clipped twice": (ClippedSoftmax(-0.1, 1.4), lambda row: numpy_clipped(row, -0.1, 1.4)),
}
every_op = pytest.mark.parametrize("name", OPS)
# Batch row 0 may attend to nothing; in row 1, neither may the first two queries.
MASK = masks.Causal() & masks.Lengths(np.array([0, 6])) & ~masks.Prefix(4)
SLOPES = np.array([0.5, 0.25, 0.125, 1.0, 2.0, 0.75], "f")
EVERYTHING = {
    "mask": MASK,
    "score": (scores.Softcap(3.0), scores.Alibi(SLOPES)),
    "scale": 0.7,
    "dropout_rate": 0.25,
    "dropout_rng": jax.random.key(0),
    "q_positions": np.arange(S - T, S),
}


def numpy_attention(normalize, q, k, v, everything):
    out = np.zeros((B, T, N, h))
    keep = np.ones((B, N, T, S))
    if everything:
        indices = np.ogrid[:B, :N, :T, :S]
        names = ("batch", "head", "query", "key")
        kept = keep_mask(EVERYTHING["dropout_rng"], 0.25, **dict(zip(names, indices, strict=True)))
        keep = np.asarray(kept) / (1 - 0.25)
    for b, t, n in np.ndindex(B, T, N):
        logits = k[b, :, n // (N // K)] @ q[b, t, n] * (0.7 if everything else H**-0.5)
        allowed = np.ones(S, bool)
        if everything:
            distance = abs(np.arange(S) - (S - T + t))
            logits = 3 * np.tanh(logits / 3) - SLOPES[n] * distance
            allowed = (np.arange(S) <= S - T + t) & (np.arange(S) < (0, 6)[b])
            allowed &= np.arange(S) >= 4
        if allowed.any():
            weights = normalize(logits[allowed]) * keep[b, n, t][allowed]
            out[b, t, n] = weights @ v[b, allowed, n // (N // K)]
    return out


@pytest.mark.parametrize(
    ("everything", "dtype"), [(False, "float32"), (True, "float64"), (True, "bfloat16")]
)
@every_op
def test_an_attention_is_that_of_numpy(name, everything, dtype):
    op, normalize = OPS[name]
    with jax.enable_x64(dtype == "float64"):
        q, k, v = inputs(dtype)
        out = jax.jit(lambda *qkv: op(*qkv, **(EVERYTHING if everything else {})))(q, k, v)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    assert out.dtype == dtype
    assert_close(out, numpy_attention(normalize, q, k, v, everything))


@every_op
def test_gradients_are_those_of_numpy_and_rows_without_keys_have_none(name):
    op, normalize = OPS[name]
    random = np.random.RandomState(2)
    cotangent = random.randn(B, T, N, h)
    with jax.enable_x64(True), jax.debug_nans(True):
        arrays = inputs("float64")
        loss = lambda *qkv: (op(*qkv, **EVERYTHING) * cotangent).sum()  # noqa: E731
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    arrays = [np.asarray(x) for x in arrays]
    for i, gradient in enumerate(gradients):
        direction = random.randn(*arrays[i].shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = [x + step * direction if i == j else x for j, x in enumerate(arrays)]
            ends.append((numpy_attention(normalize, *moved, True) * cotangent).sum())
        difference = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(np.vdot(gradient, direction), difference, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(gradients[0][0], 0)
    np.testing.assert_array_equal(gradients[0][1, :2], 0)


def test_sigmoids_are_the_same_in_blocks():
    """At this length attention works block by block."""
    random = np.random.RandomState(3)
    q, k, v = (jnp.asarray(random.randn(1, 257, 2, 3), "float32") for _ in range(3))
    mask = masks.SlidingWindow(20) & masks.Causal()

    def dense(q, k, v):
        offset = np.arange(257)[:, None] - np.arange(257)
        allowed = (offset >= 0) & (offset <= 20)
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) * 3**-0.5
        weights = allowed * jax.nn.sigmoid(logits - np.log(allowed.sum(-1, keepdims=True)))
        return jnp.einsum("BNTS,BSNh->BTNh", weights, v)

    def results(f):
        loss = lambda *qkv: (f(*qkv) ** 2).sum()  # noqa: E731
        return jax.jit(lambda *qkv: (f(*qkv), jax.grad(loss, argnums=(0, 1, 2))(*qkv)))(q, k, v)

    blocks = results(lambda *qkv: sigmoid_attention(*qkv, mask=mask))
    jax.tree.map(lambda a, b: assert_close(a, b, scale=5), blocks, results(dense))


def test_sigmoids_in_bfloat16_are_rounded_once():
    arrays = inputs("bfloat16")
    wide = sigmoid_attention(*(x.astype("f") for x in arrays))
    np.testing.assert_array_equal(sigmoid_attention(*arrays), wide.astype("bfloat16"))


def test_the_bias_counts_the_keys_that_a_query_may_attend_to():
    q, k, v = inputs()
    counted = sigmoid_attention(q, k, v, mask=masks.Lengths(np.array([4, S])))
    assert_close(counted[0], sigmoid_attention(q, k, v, bias=-np.log(4), mask=masks.Prefix(4))[0])
    assert_close(counted[1], sigmoid_attention(q, k, v, bias=-np.log(S))[1])


def test_ops_with_settings_are_values():
    assert Entmax(1.5) == Entmax() and hash(Entmax(1.5)) == hash(Entmax())
    assert Entmax(1.2) != Entmax(1.5)
    assert Sigmoid() == Sigmoid(None) != Sigmoid(-1.0)
    hash(Sigmoid())


def test_bad_input_is_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"bias: wanted a number, got an array of shape \[6\]"):
        sigmoid_attention(q, k, v, bias=np.zeros(N))
    for op, _ in OPS.values():
        with pytest.raises(ValueError, match=r"q: wanted floating \[B, T, N, H\], got"):
            op(q[0], k, v)
        with pytest.raises(TypeError, match="sinks"):
            op(q, k, v, sinks=np.zeros(N))
