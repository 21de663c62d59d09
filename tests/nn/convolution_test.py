"""The convolution mixers against the equations as loops, with their order in time and padding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.nn.convolution import GatedConvolution, ImplicitFilter, LongConvolution
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, W = 3, 7, 5, 3
LENGTH = 11
X = np.random.RandomState(0).randn(B, T, D).astype("f")
LENGTHS = np.array([5, 7, 1])
CAUSAL = masks.Causal()
mixers = pytest.mark.parametrize("mixer", [GatedConvolution, LongConvolution])


@functools.cache
def make(mixer, **kwargs):
    if mixer is LongConvolution:
        kwargs = {"length": LENGTH, "filter_hidden": 2, **kwargs}
    return randomised(mixer(D, rngs=nnx.Rngs(0), **kwargs))


@functools.partial(jax.jit, static_argnums=0)
def _apply(graphdef, params, x, mask):
    return nn.merge(graphdef, params)(x, mask=mask)


def apply(module, x, mask):
    return _apply(*nn.split(module), x, mask)


def numbers(module):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), nn.split(module)[1])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("mask", [CAUSAL, None], ids=["causal", "centred"])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_a_gated_convolution_is_the_equation_token_by_token(width, mask):
    module = make(GatedConvolution, conv_width=width, use_bias=True)
    p = numbers(module)
    value, gate = (p[name]["kernel"].reshape(width, D, D) for name in ("value", "gate"))
    ahead = 0 if mask is CAUSAL else (width - 1) // 2
    expected = np.zeros((B, T, D))
    for b, t in np.ndindex(B, T):
        places = [(w, t + ahead - w) for w in range(width) if 0 <= t + ahead - w < T]
        values, gates = (
            sum((X[b, s] @ matrix[w] for w, s in places), p[name]["bias"])
            for name, matrix in (("value", value), ("gate", gate))
        )
        expected[b, t] = values * sigmoid(gates)
    assert_close(apply(module, X, mask), expected, scale=5)


def long_filter(p, num):
    t = np.arange(num)[:, None] / LENGTH
    y = np.concatenate(
        [t]
        + [np.cos(2 * math.pi * b * t) for b in range(1, 9)]
        + [np.sin(2 * math.pi * b * t) for b in range(1, 9)],
        axis=1,
    )
    for i in range(3):
        y = np.sin(10 * (y @ p["layers"][i]["kernel"] + p["layers"][i]["bias"]))
    remains = np.array([0.01 ** (t / span) for span in np.linspace(1.5, 0.3, D)])[..., 0].T
    return y @ p["layers"][3]["kernel"] * remains


def test_a_long_convolution_is_the_equation_token_by_token():
    with jax.enable_x64(True):  # sines of large numbers
        module = make(LongConvolution, use_bias=True, param_dtype="float64")
        p = numbers(module)
        inputs = np.concatenate(
            [X @ p[name]["kernel"] + p[name]["bias"] for name in ("value", "first", "second")], -1
        )
        weights = long_filter(p["filter"], T)
        expected = np.zeros((B, T, D))
        for b in range(B):
            short = np.zeros((T, 3 * D))
            for t in range(T):
                short[t] = sum(inputs[b, t - w] * p["short"][w] for w in range(min(W, t + 1)))
            value, first, second = np.split(short, 3, axis=-1)
            gated = first * value
            for t in range(T):
                mixed = sum(weights[w] * gated[t - w] for w in range(t + 1))
                mixed = second[t] * (mixed + p["skip"] * gated[t])
                expected[b, t] = mixed @ p["out"]["kernel"] + p["out"]["bias"]
        out = apply(module, X.astype(np.float64), CAUSAL)
        assert out.dtype == "float64"
        assert_close(out, expected, scale=100)


def test_an_implicit_filter_is_a_function_of_distance_alone():
    filter = ImplicitFilter(D, LENGTH, rngs=nnx.Rngs(0))
    weights = filter(2 * LENGTH)
    assert weights.shape == (2 * LENGTH, D)
    assert_close(filter(3), weights[:3], scale=10)
    assert np.abs(weights[-1]).max() < 0.1 < np.abs(weights[:3]).max()


@mixers
def test_a_causal_mixer_reads_no_later_token(mixer):
    module = make(mixer)
    jacobian = jax.jit(jax.jacobian(lambda x: module(x[None], mask=CAUSAL)[0].sum(-1)))
    influence = np.abs(jacobian(X[0])).max(-1)  # [T out, T in]
    back = np.arange(T)[:, None] - np.arange(T)
    reached = (back >= 0) & (back < (T if mixer is LongConvolution else W))
    assert (influence[reached] > 1e-3).all()
    limit = 1e-6 * influence.max() if mixer is LongConvolution else 0  # an FFT rounds
    assert (influence[~reached] <= limit).all()


@pytest.mark.parametrize(
    ("mixer", "mask"),
    [(GatedConvolution, CAUSAL), (GatedConvolution, None), (LongConvolution, CAUSAL)],
)
def test_padding_changes_no_real_token(mixer, mask):
    module = make(mixer)
    lengths = masks.Lengths(LENGTHS)
    real = (np.arange(T) < LENGTHS[:, None])[..., None]
    noisy = np.where(real, X, 1e6)  # in an FFT it would drown the rest
    padded = apply(module, noisy, lengths if mask is None else mask & lengths)
    for b, length in enumerate(LENGTHS):
        alone = apply(module, X[b : b + 1, :length], mask)
        assert_close(padded[b, :length], alone[0], scale=10)


@mixers
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_dtype_is_the_layers_dtype(mixer, dtype):
    out = apply(make(mixer, dtype=dtype), X, CAUSAL)
    assert out.dtype == (dtype or "float32")
    if dtype:
        # Rounded in each of five steps, the last two of which multiply.
        exact = np.asarray(apply(make(mixer), X, CAUSAL))
        assert np.abs(out - exact).max() < 0.05 * np.abs(exact).max()


def test_outputs_initialised_with_zeros_are_zero():
    zeros = nnx.initializers.zeros
    for mixer, kwargs in ((GatedConvolution, {}), (LongConvolution, {"length": LENGTH})):
        module = mixer(D, out_init=zeros, rngs=nnx.Rngs(0), **kwargs)
        assert (module(X, mask=CAUSAL) == 0).all()


def test_the_state_that_decoding_needs():
    gated, long = make(GatedConvolution), make(LongConvolution)
    assert gated.state_size(1) == gated.state_size(100) == (W - 1) * D
    assert long.state_size(100) == 100 * D + (W - 1) * 3 * D


@mixers
def test_equal_mixers_have_equal_structures_and_only_parameters(mixer):
    kwargs = {"length": LENGTH} if mixer is LongConvolution else {}
    (a, params), (b, _) = (nn.split(mixer(D, rngs=nnx.Rngs(i), **kwargs)) for i in range(2))
    assert a == b and hash(a) == hash(b)
    assert all(jnp.issubdtype(p.dtype, jnp.floating) for p in jax.tree.leaves(params))


def test_what_cannot_be_honoured_raises():
    gated, long = make(GatedConvolution), make(LongConvolution)
    for module, name in ((gated, "a gated convolution"), (long, "a long convolution")):
        with pytest.raises(NotImplementedError, match=f"mask: {name}.*SlidingWindow"):
            module(X, mask=masks.SlidingWindow(2))
    for mask in (None, masks.Lengths(3)):
        with pytest.raises(NotImplementedError, match="mask: a long convolution is causal"):
            long(X, mask=mask)
    with pytest.raises(ValueError, match="conv_width: wanted a positive integer, got 0"):
        GatedConvolution(D, conv_width=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="length: wanted a positive integer, got 0"):
        LongConvolution(D, length=0, rngs=nnx.Rngs(0))
