"""Transformer blocks and their norms, against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D = 2, 3, 5
X = np.random.RandomState(0).randn(B, T, D).astype("f") * 3


def block(norm="layer", norm_position="pre", dropout_rate=0.0):
    rngs = nnx.Rngs(0)
    return randomised(
        nn.TransformerBlock(
            nn.MultiHeadAttention(D, 1, rngs=rngs),
            nn.FeedForward(D, 7, rngs=rngs),
            norm=functools.partial(nn.make_norm, norm, D, rngs=rngs),
            norm_position=norm_position,
            dropout_rate=dropout_rate,
        )
    )


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", ["layer", "rms", "zero_centered_rms"])
def test_a_norm_is_its_formula(name, use_bias):
    norm = randomised(nn.make_norm(name, D, use_bias=use_bias, rngs=nnx.Rngs(0)))
    scale = np.asarray(norm.scale[...])
    if name.endswith("rms"):
        factor = scale if name == "rms" else 1 + scale
        expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6) * factor
    else:
        centred = X - X.mean(-1, keepdims=True)
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale
        if use_bias:
            expected = expected + np.asarray(norm.bias[...])
        else:
            assert norm.bias is None
    assert_close(norm(X), expected, scale=3)


def test_no_norm_changes_nothing():
    norm = nn.make_norm("none", D, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm(X), X)


@pytest.mark.parametrize("norm", nn.NORMS)
@pytest.mark.parametrize("norm_position", nn.NORM_POSITIONS)
def test_a_block_is_its_formula(norm_position, norm):
    b = block(norm, norm_position)
    mask, positions = masks.Causal(), np.array([0, 2, 1])
    mix = functools.partial(b.mixer, mask=mask, positions=positions)
    if norm_position == "pre":
        x = X + mix(b.mixer_norm(X))
        expected = x + b.feed_forward(b.feed_forward_norm(x))
    elif norm_position == "both":
        x = X + b.mixer_out_norm(mix(b.mixer_norm(X)))
        expected = x + b.feed_forward_out_norm(b.feed_forward(b.feed_forward_norm(x)))
    else:
        x = b.mixer_norm(X + mix(X))
        expected = b.feed_forward_norm(x + b.feed_forward(x))
    assert_close(b(X, mask=mask, positions=positions), expected)
    assert np.abs(np.asarray(b(X)) - expected).max() > 1e-3  # the mask has reached the mixer


def test_dropout_needs_a_key_and_follows_it():
    b = block(dropout_rate=0.5)
    plain = block()(X)
    assert_close(b(X), plain)
    first, again = b(X, rng=jax.random.key(0)), b(X, rng=jax.random.key(0))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 0.1
    assert np.abs(first - b(X, rng=jax.random.key(1))).max() > 0.1


def test_dropout_drops_at_its_rate_and_scales_the_rest():
    x = jnp.arange(1.0, 10_001.0)
    y = np.asarray(nn.dropout(x, 0.3, jax.random.key(0)))
    assert abs((y == 0).mean() - 0.3) < 0.02
    assert_close(y[y != 0], np.asarray(x)[y != 0] / 0.7)
    assert nn.dropout(x, 0.3, None) is x
    assert nn.dropout(x, 0.0, jax.random.key(0)) is x


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match=r"norm: wanted one of \['layer', .*\], got 'batch'"):
        block(norm="batch")
    with pytest.raises(ValueError, match=r"norm_position: wanted .*'both'.*, got 'middle'"):
        block(norm_position="middle")
