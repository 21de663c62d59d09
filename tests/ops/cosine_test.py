"""Cosine attention against a loop over the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks, scores
from qkv_jax.ops.cosine import cosine_attention
from tests.tolerances import assert_close

B, T, S, N, K, H, h = 2, 3, 5, 6, 2, 7, 11
TEMPERATURE = np.array([0.5, 1, 2, 4, 8, 16.0])
KEYWORDS = {"mask": masks.Causal(), "score": scores.Softcap(3.0), "q_positions": np.arange(2, 5)}


def inputs(dtype="float32"):
    random = np.random.RandomState(1)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, h)
    return [jnp.asarray(random.randn(*shape) * 3, dtype) for shape in shapes]


def numpy_cosine(q, k, v, temperature):
    out = np.zeros((B, T, N, h), q.dtype)
    for b, t, n in np.ndindex(B, T, N):
        last = 2 + t + 1
        query, keys = q[b, t, n], k[b, :last, n // (N // K)]
        cosine = keys @ query / np.sqrt((query**2).sum() * (keys**2).sum(-1))
        logits = 3 * np.tanh(temperature[n] * cosine / 3)
        weights = np.exp(logits) / np.exp(logits).sum()
        out[b, t, n] = weights @ v[b, :last, n // (N // K)]
    return out


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_it_is_the_loop_over_cosines(dtype):
    with jax.enable_x64(dtype == "float64"):
        arrays = inputs(dtype)
        out = jax.jit(lambda *x: cosine_attention(*x, temperature=TEMPERATURE, **KEYWORDS))(*arrays)
    assert out.dtype == dtype
    assert_close(out, numpy_cosine(*(np.asarray(x, np.float64) for x in arrays), TEMPERATURE))


def test_gradients_are_those_of_the_loop():
    """Of q, k, v and the temperature, along a random direction each: the complex step."""
    random = np.random.RandomState(2)
    cotangent = random.randn(B, T, N, h)
    with jax.enable_x64(True):
        arrays = [*inputs("float64"), jnp.asarray(TEMPERATURE)]
        call = lambda q, k, v, t: cosine_attention(q, k, v, temperature=t, **KEYWORDS)  # noqa: E731
        loss = lambda *x: (call(*x) * cotangent).sum()  # noqa: E731
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)
    arrays = [np.asarray(x) for x in arrays]
    for i, gradient in enumerate(gradients):
        direction = random.randn(*arrays[i].shape)
        moved = [x + 1e-30j * direction if i == j else x + 0j for j, x in enumerate(arrays)]
        derivative = (np.imag(numpy_cosine(*moved)) / 1e-30 * cotangent).sum()
        assert_close(np.vdot(gradient, direction), derivative, scale=30)


def test_the_lengths_of_queries_and_keys_do_not_matter():
    q, k, v = inputs()
    out = cosine_attention(q, k, v, temperature=5.0)
    assert_close(cosine_attention(q * 100, k / 100, v, temperature=5.0), out)


def test_a_scale_is_a_further_factor():
    q, k, v = inputs()
    half = cosine_attention(q, k, v, temperature=5.0, scale=0.5)
    assert_close(half, cosine_attention(q, k, v, temperature=2.5))


def test_vectors_of_0_attend_evenly_and_have_finite_gradients():
    q, k, v = inputs()
    with jax.debug_nans(True):
        loss = lambda q, k: cosine_attention(q, k, v, temperature=5.0).sum()  # noqa: E731
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(0 * q, 0 * k)
    assert all(np.isfinite(x).all() for x in gradients)
    even = ops.attention(0 * q, k, v)
    assert_close(cosine_attention(0 * q, k, v, temperature=5.0), even)


def test_bad_input_is_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"temperature: wanted a number or floating \[N\] = \[6\]"):
        cosine_attention(q, k, v, temperature=np.ones(K))
    with pytest.raises(ValueError, match=r"k: wanted floating \[B, S, K, H\], got"):
        cosine_attention(q, k[0], v, temperature=1.0)
