"""Convolutions against NumPy's, the FFT form against the direct one, and their order in time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops.convolution import (
    causal_convolution,
    centred_convolution,
    long_convolution,
    shifted,
)
from tests.tolerances import assert_close

B, T, C = 2, 11, 3
RANDOM = np.random.RandomState(0)
X = RANDOM.randn(B, T, C)
FORMS = {
    "causal": causal_convolution,
    "centred": centred_convolution,
    "long causal": long_convolution,
    "long centred": functools.partial(long_convolution, causal=False),
}


def kernel(width, channels=C):
    return np.random.RandomState(width).randn(width, channels)


def by_numpy(x, kernel, centred):
    """`np.convolve`, channel by channel, in float64."""
    start = (len(kernel) - 1) // 2 if centred else 0
    out = np.zeros(x.shape)
    for b, c in np.ndindex(x.shape[0], x.shape[2]):
        out[b, :, c] = np.convolve(x[b, :, c], kernel[:, c])[start : start + x.shape[1]]
    return out


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 4, 11, 29])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_numpy_s_convolution(form, width, dtype):
    with jax.enable_x64(dtype == "float64"):
        x, w = jnp.asarray(X, dtype), jnp.asarray(kernel(width), dtype)
        out = jax.jit(FORMS[form])(x, w)
        expected = by_numpy(np.asarray(x, float), np.asarray(w, float), "centred" in form)
        assert out.dtype == dtype
        # An FFT's rounding is relative to the largest numbers, here about 10.
        assert_close(out, expected, scale=10 if "long" in form else 1)


@pytest.mark.parametrize("length", [1, 2, 97, 128, 509])
def test_the_fft_agrees_with_the_direct_form_at_any_length(length):
    with jax.enable_x64(True):
        x = RANDOM.randn(B, length, C)
        out = jax.jit(long_convolution)(x, kernel(length))
        assert_close(out, by_numpy(x, kernel(length), centred=False), scale=100)
        centred = jax.jit(FORMS["long centred"])(x, kernel(2 * length - 1))
        assert_close(centred, by_numpy(x, kernel(2 * length - 1), centred=True), scale=100)


@pytest.mark.parametrize("form", ["causal", "centred"])
def test_gradients_of_the_fft_are_those_of_the_direct_form(form):
    with jax.enable_x64(True):
        weights = RANDOM.randn(B, T, C)

        def gradients(form):
            def loss(x, w):
                return (FORMS[form](x, w) ** 2 * weights).sum()

            return jax.jit(jax.grad(loss, argnums=(0, 1)))(X, kernel(7))

        for a, b in zip(gradients(f"long {form}"), gradients(form), strict=True):
            assert_close(a, b, scale=100)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_reads_what_its_kernel_reaches_and_no_more(form):
    with jax.enable_x64(True):
        width = 5
        jacobian = jax.jit(jax.jacobian(lambda x: FORMS[form](x[None, :, :1], kernel(width, 1))))
        influence = np.asarray(jacobian(X[0])[0, :, 0, :, 0])  # [T out, T in]
    back = np.arange(T)[:, None] - np.arange(T)
    low, high = (-2, 2) if "centred" in form else (0, 4)
    reached = (low <= back) & (back <= high)
    assert (np.abs(influence[reached]) > 1e-3).all()
    limit = 1e-14 if "long" in form else 0  # an FFT rounds
    assert (np.abs(influence[~reached]) <= limit).all()


def test_a_state_carries_across_any_split():
    width = 4
    x, w = jnp.asarray(X, "float32"), jnp.asarray(kernel(width), "float32")
    whole = jax.jit(causal_convolution)(x, w)
    for split in (1, 2, 7):
        head, tail = x[:, :split], x[:, split:]
        state = jnp.concatenate([jnp.zeros((B, width - 1, C)), head], axis=1)[:, 1 - width :]
        assert_close(jax.jit(causal_convolution)(head, w), whole[:, :split])
        out = jax.jit(causal_convolution)(tail, w, state=state)
        assert_close(out, whole[:, split:])


def test_shifted_inputs_are_the_columns_of_a_convolution():
    x = np.arange(1.0, 6.0, dtype=np.float32).reshape(1, 5, 1)
    causal = np.stack([y[0, :, 0] for y in shifted(x, 4)])
    assert_close(causal, [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 0, 0, 1, 2]])
    centred = np.stack([y[0, :, 0] for y in shifted(x, 4, causal=False)])
    assert_close(centred, [[2, 3, 4, 5, 0], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]])


def test_sums_of_bfloat16_are_float32():
    x, w = jnp.ones((1, 9, 1), "bfloat16"), np.ones((9, 1))
    w[0] = 256
    for form in (causal_convolution, long_convolution):
        # In bfloat16, 256 + 1 is 256.
        assert form(x, jnp.asarray(w, "bfloat16"))[0, -1, 0] == 264


def test_bad_input_is_named():
    x, w = jnp.zeros((B, T, C)), jnp.zeros((4, C))
    for form in FORMS.values():
        with pytest.raises(ValueError, match=r"x: wanted floating \[B, T, C\], got float32"):
            form(x[0], w)
        with pytest.raises(ValueError, match=r"kernel: wanted floating \[W, C\], got int32"):
            form(x, w.astype(int))
        with pytest.raises(ValueError, match=r"kernel: wanted \[W, C\] = \[1 or more, 3\]"):
            form(x, w[:, :1])
        with pytest.raises(ValueError, match=r"kernel: wanted \[W, C\]"):
            form(x, w[:0])
    with pytest.raises(
        ValueError, match=r"state: wanted \[B, W-1, C\] = \[2, 3, 3\], got \[2, 4, 3\]"
    ):
        causal_convolution(x, w, state=x[:, :4])
