"""Each score against a loop over its definition, its gradients against differences, its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import positions, scores
from tests.tolerances import assert_close

B, N, T, S = 2, 3, 5, 7
RANDOM = np.random.RandomState(0)
LOGITS = RANDOM.randn(B, N, T, S) * 3
Q_POS = np.array([[0, 1, 2, 3, 4], [90, 40, 6, 6, 11]], np.int32).reshape(B, 1, T, 1)
KV_POS = np.arange(S, dtype=np.int32).reshape(1, 1, 1, S) * 5
HEAD = np.arange(N, dtype=np.int32).reshape(1, N, 1, 1)
SLOPES, TABLE = RANDOM.rand(N), RANDOM.randn(32, N)
BIAS_TS, BIAS_NTS, BIAS_BNTS = RANDOM.randn(T, S), RANDOM.randn(N, T, S), RANDOM.randn(B, 1, T, S)
TEMPERATURES = RANDOM.rand(N) + 0.5


def bucket(q, kv, bidirectional):
    return int(positions.t5_buckets(np.int32(kv - q), bidirectional=bidirectional))


# name: (score, its definition for the logit l of row b, head n, query t, key s at q and kv)
CASES = {
    "softcap": (scores.Softcap(2.5), lambda l, b, n, t, s, q, kv: 2.5 * np.tanh(l / 2.5)),
    "softcap_per_head": (
        scores.Softcap(TEMPERATURES),
        lambda l, b, n, t, s, q, kv: TEMPERATURES[n] * np.tanh(l / TEMPERATURES[n]),
    ),
    "temperature": (scores.Temperature(2), lambda l, b, n, t, s, q, kv: l / 2),
    "temperature_scalar": (
        scores.Temperature(np.array(0.7)),
        lambda l, b, n, t, s, q, kv: l / 0.7,
    ),
    "temperature_per_head": (
        scores.Temperature(TEMPERATURES),
        lambda l, b, n, t, s, q, kv: l / TEMPERATURES[n],
    ),
    "alibi": (
        scores.Alibi(SLOPES),
        lambda l, b, n, t, s, q, kv: l - SLOPES[n] * abs(int(q) - int(kv)),
    ),
    "relative_bias": (
        scores.RelativeBias(TABLE),
        lambda l, b, n, t, s, q, kv: l + TABLE[bucket(q, kv, False), n],
    ),
    "relative_bias_bidirectional": (
        scores.RelativeBias(TABLE, bidirectional=True),
        lambda l, b, n, t, s, q, kv: l + TABLE[bucket(q, kv, True), n],
    ),
    "bias_ts": (scores.Bias(BIAS_TS), lambda l, b, n, t, s, q, kv: l + BIAS_TS[t, s]),
    "bias_nts": (scores.Bias(BIAS_NTS), lambda l, b, n, t, s, q, kv: l + BIAS_NTS[n, t, s]),
    "bias_bnts": (scores.Bias(BIAS_BNTS), lambda l, b, n, t, s, q, kv: l + BIAS_BNTS[b, 0, t, s]),
    "function": (
        scores.from_function(
            lambda logits, q, kv, head, slopes, power: logits + slopes * (head + 1) ** power,
            SLOPES.reshape(1, N, 1, 1),
            2,
        ),
        lambda l, b, n, t, s, q, kv: l + SLOPES[n] * (n + 1) ** 2,
    ),
    "in_order": (
        (scores.Temperature(2.0), scores.Softcap(1.5)),
        lambda l, b, n, t, s, q, kv: 1.5 * np.tanh(l / 2 / 1.5),
    ),
    "none": (None, lambda l, b, n, t, s, q, kv: l),
}


@functools.cache
def expected(name):
    out = np.zeros((B, N, T, S))
    for b, n, t, s in np.ndindex(B, N, T, S):
        q, kv = Q_POS[b, 0, t, 0], KV_POS[0, 0, 0, s]
        out[b, n, t, s] = CASES[name][1](LOGITS[b, n, t, s], b, n, t, s, q, kv)
    return out


@jax.jit
def applied(score, logits, head=HEAD):
    return scores.apply(scores.aligned(score), logits, Q_POS, KV_POS, head)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_a_score_is_its_definition_in_the_dtype_of_the_logits(name, dtype):
    with jax.enable_x64(dtype == "float64"), jax.numpy_rank_promotion("raise"):
        out = applied(CASES[name][0], LOGITS.astype(dtype))
        assert out.dtype == dtype
        assert_close(out, expected(name), scale=10)


def test_a_low_precision_operand_is_applied_in_the_dtype_of_the_logits():
    slopes = jnp.asarray(SLOPES, jnp.bfloat16)

    def loss(score):
        return applied(score, LOGITS.astype(np.float32)).sum()

    assert applied(scores.Alibi(slopes), LOGITS.astype(np.float32)).dtype == jnp.float32
    assert jax.grad(loss)(scores.Alibi(slopes)).slopes.dtype == jnp.bfloat16


@pytest.mark.parametrize("n", range(N))
@pytest.mark.parametrize("name", ["relative_bias", "relative_bias_bidirectional", "function"])
def test_a_head_of_its_own_is_right_by_its_index(name, n):
    score = CASES[name][0].aligned()
    cut = jax.tree.map(lambda x: x[:, n : n + 1] if x.ndim == 4 else x, score)
    for head in (HEAD[:, n : n + 1], n):  # a cut of the axis, and one traced index
        out = jax.jit(cut.score)(LOGITS[:, n : n + 1], Q_POS, KV_POS, head)
        assert_close(out, expected(name)[:, n : n + 1], scale=10)


LEARNED = [
    "softcap_per_head", "temperature_scalar", "temperature_per_head", "alibi", "relative_bias",
    "relative_bias_bidirectional", "bias_ts", "bias_nts", "bias_bnts", "function",
]  # fmt: skip


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_have_the_shape_given_and_are_those_of_differences(name):
    score, weights = CASES[name][0], np.random.RandomState(1).randn(B, N, T, S)
    with jax.enable_x64(True):
        score = jax.tree.map(jnp.asarray, score)

        @jax.jit
        def loss(score):
            return (weights * jnp.sin(applied(score, LOGITS))).sum()

        gradient = jax.grad(loss)(score)
        assert jax.tree.structure(gradient) == jax.tree.structure(score)
        (operand,), (gradient,) = jax.tree.leaves(score), jax.tree.leaves(gradient)
        assert gradient.shape == operand.shape and gradient.dtype == jnp.float64
        assert float(jnp.abs(gradient).max()) > 1e-3

        direction = np.random.RandomState(2).randn(*operand.shape)
        ahead, behind = (
            jax.tree.map(lambda x, e=e: x + e * direction, score) for e in (1e-6, -1e-6)
        )
        slope = (loss(ahead) - loss(behind)) / 2e-6
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-7)


def test_a_gradient_of_float32_operands_is_float32():
    slopes = jnp.asarray(SLOPES, jnp.float32)
    gradient = jax.grad(lambda s: applied(s, LOGITS.astype(np.float32)).sum())(scores.Alibi(slopes))
    distance = np.abs(Q_POS.astype(float) - KV_POS).sum()
    assert gradient.slopes.dtype == jnp.float32
    assert_close(gradient.slopes, np.full(N, -distance))


def test_a_score_is_mapped_over_its_operands_by_vmap():
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), scores.Alibi(SLOPES))
    out = jax.vmap(applied, in_axes=(0, None))(stacked, LOGITS)
    assert_close(out[1], applied(scores.Alibi(2 * SLOPES), LOGITS))


def test_positions_are_used_by_those_that_read_them():
    assert not scores.uses_positions(None)
    assert not scores.uses_positions((scores.Softcap(2.0), scores.Bias(BIAS_TS)))
    assert scores.uses_positions((scores.Softcap(2.0), scores.Alibi(SLOPES)))
    assert scores.uses_positions(scores.RelativeBias(TABLE))
    assert scores.uses_positions(scores.from_function(lambda logits, *_: logits))


@pytest.mark.parametrize(
    "f, found",
    [
        (lambda logits, *_: logits[:1], r"got float32 \[1, 3, 5, 7\]"),
        (lambda logits, *_: logits > 0, r"got bool \[2, 3, 5, 7\]"),
        (lambda logits, *_: None, r"got .*NoneType.* \[\]"),
    ],
)
def test_a_function_that_returns_another_shape_or_dtype_is_an_error(f, found):
    with pytest.raises(ValueError, match=r"f must return float32 \[2, 3, 5, 7\].*" + found):
        applied(scores.from_function(f), LOGITS.astype(np.float32))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: scores.Softcap(0), "Softcap: cap must be a positive number .* got 0"),
        (lambda: scores.Softcap(float("inf")), "cap must be a positive number .* got inf"),
        (lambda: scores.Temperature(-1.0), "Temperature: temperature must be .* got -1.0"),
        (lambda: scores.Temperature(np.arange(N)), r"temperature must be .* got int64\[3\]"),
        (lambda: scores.Alibi(0.5), "Alibi: slopes must be a floating array .* got 0.5"),
        (lambda: scores.Alibi(np.ones((N, 2))), r"slopes must be .*\[N\].* got float64\[3,2\]"),
        (lambda: scores.Bias(np.ones((T, S), bool)), r"array must be a floating .* bool\[5,7\]"),
        (lambda: scores.RelativeBias(np.ones(32)), r"RelativeBias: table must be .* float64\[32\]"),
        (lambda: scores.RelativeBias(TABLE, max_distance=16), "max_distance must be .* above 16"),
        (lambda: scores.RelativeBias(TABLE[:3], bidirectional=True), "num_buckets must be even"),
        (lambda: scores.aligned((scores.Softcap(1.0), "alibi")), "score must be .* got 'alibi'"),
        (lambda: scores.apply(np.tanh, LOGITS, Q_POS, KV_POS, HEAD), "score must be a Score"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error_that_names_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
