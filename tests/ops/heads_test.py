"""Talking heads and differential attention against loops over the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks, scores
from qkv_jax.ops.dropout import keep_mask
from qkv_jax.ops.heads import differential_attention, talking_heads_attention
from tests.tolerances import assert_close

B, T, S, N, K, H, h = 2, 3, 5, 8, 4, 7, 11
RANDOM = np.random.RandomState(0)
MIX_LOGITS, MIX_WEIGHTS = RANDOM.randn(2, N, N) / 3
LAM = RANDOM.rand(N // 2)
WINDOWS = np.array([0, 1, 2, 3, 1, 2, 0, 5])  # a mask per head
SLOPES = RANDOM.rand(N)
LENGTHS = np.array([0, 4])  # batch row 0 may attend to nothing
RATE, RNG = 0.25, jax.random.key(0)
POSITIONS = np.arange(S - T, S)
MASK = masks.SlidingWindow(WINDOWS) & masks.Lengths(LENGTHS)
every_dtype = pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])


def inputs(dtype="float32"):
    random = np.random.RandomState(1)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, h)
    return [jnp.asarray(random.randn(*shape), dtype) for shape in shapes]


def everything(dtype):
    return {
        "mask": MASK, "score": scores.Alibi(jnp.asarray(SLOPES, dtype)), "scale": 0.7,
        "dropout_rate": RATE, "dropout_rng": RNG, "q_positions": POSITIONS,
    }  # fmt: skip


def kept():
    indices = dict(zip(("batch", "head", "query", "key"), np.ogrid[:B, :N, :T, :S], strict=True))
    return np.asarray(keep_mask(RNG, RATE, **indices)) / (1 - RATE)


def numpy_logits(q, k, n, m, b, t):
    """The logits [S] of query head n with key head m, and what the mask allows query head n."""
    distance = POSITIONS[t] - np.arange(S)
    allowed = (distance >= 0) & (distance <= WINDOWS[n]) & (np.arange(S) < LENGTHS[b])
    return 0.7 * k[b, :, m] @ q[b, t, n] - SLOPES[n] * abs(distance), allowed


def numpy_softmax(logits, allowed):
    exps = np.where(allowed, np.exp(logits), 0)
    return exps / exps.sum() if allowed.any() else exps


def numpy_talking_heads(q, k, v, mix_logits, mix_weights):
    out = np.zeros((B, T, N, h), q.dtype)
    for b, t in np.ndindex(B, T):
        logits, allowed = zip(
            *(numpy_logits(q, k, n, n // (N // K), b, t) for n in range(N)), strict=True
        )
        weights = [
            numpy_softmax(sum(mix_logits[n, m] * logits[n] for n in range(N)), allowed[m])
            for m in range(N)
        ]
        for m in range(N):
            mixed = sum(mix_weights[n, m] * weights[n] for n in range(N))
            out[b, t, m] = (mixed * allowed[m] * kept()[b, m, t]) @ v[b, :, m // (N // K)]
    return out


def numpy_differential(q, k, v, lam):
    """A loop over pairs: of query heads i and i + N/2, of key heads j and j + K/2."""
    out = np.zeros((B, T, N // 2, 2 * h), q.dtype)
    for b, t, i in np.ndindex(B, T, N // 2):
        j = i // (N // K)
        first, second = (
            numpy_softmax(*numpy_logits(q, k, i + half * N // 2, j + half * K // 2, b, t))
            * kept()[b, i + half * N // 2, t]
            for half in (0, 1)
        )
        values = np.concatenate([v[b, :, j], v[b, :, j + K // 2]], axis=-1)
        out[b, t, i] = (first - lam[i] * second) @ values
    return out.reshape(B, T, N, h)


OPS = {
    "talking": (
        lambda q, k, v, a, b, **kwargs: talking_heads_attention(
            q, k, v, mix_logits=a, mix_weights=b, **kwargs
        ),
        numpy_talking_heads,
        (MIX_LOGITS, MIX_WEIGHTS),
    ),
    "differential": (
        lambda q, k, v, lam, **kwargs: differential_attention(q, k, v, lam=lam, **kwargs),
        numpy_differential,
        (LAM,),
    ),
}
every_op = pytest.mark.parametrize("name", OPS)


@every_dtype
@every_op
def test_it_is_the_loop_over_heads(name, dtype):
    op, oracle, own = OPS[name]
    with jax.enable_x64(dtype == "float64"):
        arrays = [*inputs(dtype), *(jnp.asarray(x, dtype) for x in own)]
        out = jax.jit(lambda *x: op(*x, **everything(dtype)))(*arrays)
    assert out.dtype == dtype
    arrays = [np.asarray(x, np.float64) for x in arrays]
    assert_close(out, oracle(*arrays))


@every_op
def test_gradients_are_those_of_the_loop(name):
    """Of q, k, v and what is mixed, along a random direction each: the complex step."""
    op, oracle, own = OPS[name]
    cotangent = RANDOM.randn(B, T, N, h)
    with jax.enable_x64(True), jax.debug_nans(True):
        arrays = [*inputs("float64"), *map(jnp.asarray, own)]
        loss = lambda *x: (op(*x, **everything("float64")) * cotangent).sum()  # noqa: E731
        gradients = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays)))))(*arrays)
    arrays = [np.asarray(x) for x in arrays]
    for i, gradient in enumerate(gradients):
        direction = RANDOM.randn(*arrays[i].shape)
        moved = [x + 1e-30j * direction if i == j else x + 0j for j, x in enumerate(arrays)]
        derivative = (np.imag(oracle(*moved)) / 1e-30 * cotangent).sum()
        assert_close(np.vdot(gradient, direction), derivative, scale=30)
    np.testing.assert_array_equal(gradients[0][0], 0)


def test_talking_heads_with_the_identity_are_plain_attention():
    q, k, v = inputs()
    kwargs = everything("float32")
    out = talking_heads_attention(q, k, v, mix_logits=np.eye(N), mix_weights=np.eye(N), **kwargs)
    assert_close(out, ops.attention(q, k, v, **kwargs))


def test_subtracting_nothing_is_attention_to_values_of_both_heads():
    q, k, v = inputs()
    out = differential_attention(q, k, v, lam=0.0).reshape(B, T, N // 2, 2 * h)
    first, second = jnp.split(v, 2, axis=2)
    q, k = q[:, :, : N // 2], k[:, :, : K // 2]
    assert_close(out, ops.attention(q, k, jnp.concatenate([first, second], axis=-1)))


def test_one_lambda_is_that_of_all_pairs():
    q, k, v = inputs()
    one = differential_attention(q, k, v, lam=jnp.float32(0.3))
    np.testing.assert_array_equal(one, differential_attention(q, k, v, lam=np.full(N // 2, 0.3)))


def test_equal_heads_cancel():
    q, k, v = inputs()
    q, k = (jnp.concatenate([x[:, :, : x.shape[2] // 2]] * 2, axis=2) for x in (q, k))
    assert_close(differential_attention(q, k, v, lam=1.0), np.zeros((B, T, N, h)))


def test_bfloat16_is_rounded_once():
    """After the subtraction, which cancels."""
    arrays = inputs("bfloat16")
    wide = differential_attention(*(x.astype("f") for x in arrays), lam=0.9)
    out = differential_attention(*arrays, lam=0.9)
    np.testing.assert_array_equal(out, wide.astype("bfloat16"))


def test_bad_input_is_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"mix_weights: wanted floating \[N, N\] = \[8, 8\], got"):
        talking_heads_attention(q, k, v, mix_logits=np.eye(N), mix_weights=np.eye(N - 1))
    with pytest.raises(ValueError, match=r"lam: wanted a number or floating \[N/2\] = \[4\], got"):
        differential_attention(q, k, v, lam=np.ones(N))
    with pytest.raises(ValueError, match=r"k: key/value heads come in pairs, .* got K = 1"):
        differential_attention(q, k[:, :, :1], v[:, :, :1], lam=0.5)
    for op, _, own in OPS.values():
        with pytest.raises(ValueError, match=r"q: wanted floating \[B, T, N, H\], got"):
            op(q[0], k, v, *own)
