"""Feature maps and the attention that they make, against the sums of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import features, masks
from tests.tolerances import assert_close

B, T, N, K, H, h = 2, 13, 6, 3, 5, 4


def arrays(seed=0):
    random = np.random.RandomState(seed)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, h)
    return [random.randn(*shape).astype(np.float32) for shape in shapes]


def by_loops(f, q, k, v, allowed):
    """The quotient of sums, as the paper has it, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros((B, T, N, h))
    for b, t, n in np.ndindex(B, T, N):
        weights = np.array(
            [f(q[b, t, n]) @ f(k[b, s, n // 2]) * allowed[b, t, s] for s in range(T)]
        )
        if weights.sum() > 0:
            out[b, t, n] = weights @ v[b, :, n // 2] / weights.sum()
    return out


LENGTHS = np.array([T, 7])
CAUSAL = np.tril(np.ones((B, T, T), bool))
REAL = np.arange(T) < LENGTHS[:, None, None]
CASES = {
    "causal": (masks.Causal(), CAUSAL),
    "bidirectional": (None, np.ones((B, T, T), bool)),
    "causal, lengths": (masks.Causal() & masks.Lengths(LENGTHS), CAUSAL & REAL),
    "lengths": (masks.Lengths(LENGTHS), np.broadcast_to(REAL, (B, T, T))),
}
NUMPY_MAPS = {
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "relu": lambda x: np.maximum(x, 0),
    "taylor": lambda x: np.concatenate([[1], x, np.outer(x, x).ravel() / np.sqrt(2)]),
}


@pytest.mark.parametrize("mask, allowed", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", NUMPY_MAPS)
def test_kernel_attention_is_the_quotient_of_sums(name, mask, allowed):
    op = features.LinearAttention(name, chunk_size=4)
    out = jax.jit(lambda *x: op(*x, mask=mask))(*arrays())
    assert_close(out, by_loops(NUMPY_MAPS[name], *arrays(), allowed), scale=20)


def test_taylor_features_are_the_series_of_the_exponential():
    x, y = np.random.RandomState(0).randn(2, 7)
    assert_close(features.taylor(x) @ features.taylor(y), 1 + x @ y + (x @ y) ** 2 / 2, "float32")


def test_the_mean_over_trigonometric_features_is_the_exponential_kernel():
    q, k = 0.3 * np.random.RandomState(3).randn(2, 7, H).astype(np.float32)
    projection = features.independent_projection(jax.random.key(0), 100_000, H)
    f, g = (features.trigonometric_features(x, projection) for x in (q, k))
    assert f.shape == (7, 200_000)
    np.testing.assert_allclose(f @ g.T, np.exp(q @ k.T), rtol=0.05)


def test_trigonometric_features_err_more_than_positive_ones_where_the_kernel_is_small():
    q = jnp.linspace(0.8, 1.5, 5)[:, None] * jnp.ones(H) / H**0.5  # [5, H], of these lengths
    k = -q  # so that the kernel is exp(-|q|^2)
    projections = jax.random.normal(jax.random.key(0), (400, 16, H))

    def error(f):
        estimates = jax.vmap(lambda w: (f(q, w) * f(k, w)).sum(-1))(projections)
        return np.mean((estimates - jnp.exp((q * k).sum(-1))) ** 2, axis=0)

    def positive(x, w):
        return jnp.exp(x @ w.T - (x * x).sum(-1, keepdims=True) / 2) / len(w) ** 0.5

    assert (error(features.trigonometric_features) > 3 * error(positive)).all()


def test_the_performer_s_error_falls_as_one_over_the_features_and_orthogonal_ones_err_less():
    q, k, v = (c * x[:, :7] for c, x in zip((0.35, 0.35, 1), arrays(), strict=True))
    exact = ops.attention(q, k, v)
    counts, rngs = [32, 64, 128, 256, 512], jax.random.split(jax.random.key(0), 400)

    def error(draw, m):
        def squared(rng):
            out = features.performer_attention(q, k, v, projection=draw(rng, m, H))
            return jnp.mean((out - exact) ** 2)

        return float(jax.jit(lambda rngs: jax.lax.map(squared, rngs, batch_size=50).mean())(rngs))

    orthogonal = [error(features.orthogonal_projection, m) for m in counts]
    independent = [error(features.independent_projection, m) for m in counts]
    for errors in (orthogonal, independent):
        slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert -1.2 < slope < -0.8, errors
    assert np.mean(np.log(np.array(orthogonal) / independent)) < -0.02, (orthogonal, independent)


def test_orthogonal_rows_are_orthogonal_in_blocks_and_as_long_as_independent_ones():
    w = np.asarray(features.orthogonal_projection(jax.random.key(0), 700, H))
    assert w.shape == (700, H)
    block = w[:H] @ w[:H].T
    assert_close(block, np.diag(np.diag(block)), scale=10)
    assert abs((w**2).sum(-1).mean() / H - 1) < 0.1
    assert np.abs(w - features.orthogonal_projection(jax.random.key(1), 700, H)).max() > 1


def test_features_of_large_queries_and_keys_are_finite():
    q, k, v = arrays()
    op = features.Performer(num_features=32)
    out = op(30 * q, 30 * k, v, mask=masks.Causal())
    assert np.isfinite(out).all()
    grads = jax.grad(lambda *x: op(*x, mask=masks.Causal()).sum(), (0, 1, 2))(30 * q, 30 * k, v)
    assert all(np.isfinite(g).all() for g in grads)


def test_a_seed_is_a_draw_and_equal_ops_are_equal():
    q, k, v = arrays()
    first, again, other = (features.Performer(16, seed=seed)(q, k, v) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert features.Performer(16) == features.Performer(16)
    assert hash(features.LinearAttention()) == hash(features.LinearAttention())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"score": ops.scores.Softcap(1.0)}, NotImplementedError, "score: linear attention"),
        ({"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)}, NotImplementedError,
         "dropout_rate: linear"),
        ({"q_positions": np.arange(T)}, NotImplementedError, "q_positions: linear"),
        ({"mask": masks.SlidingWindow(2)}, NotImplementedError, "mask: linear attention"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)  # fmt: skip
def test_what_it_cannot_honour_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        features.LinearAttention()(*arrays(), **changes)


def test_a_wrong_projection_or_feature_map_is_named():
    with pytest.raises(ValueError, match=r"projection: wanted floating \[m, H\] = \[m, 5\]"):
        features.performer_attention(*arrays(), projection=np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"feature_map: wanted one of .* got 'gelu'"):
        features.LinearAttention("gelu")
