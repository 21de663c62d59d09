"""The block with cross-attention, against its formula."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.nn.cross_block import CrossBlock
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, S, D, C = 2, 3, 7, 5, 11
RANDOM = np.random.RandomState(0)
X, CONTEXT = RANDOM.randn(B, T, D).astype("f"), RANDOM.randn(B, S, C).astype("f")


def block(norm_position="pre", dropout_rate=0.0):
    rngs = nnx.Rngs(0)
    return randomised(
        CrossBlock(
            nn.MultiHeadAttention(D, 1, rngs=rngs),
            nn.MultiHeadAttention(D, 1, context_width=C, rngs=rngs),
            nn.FeedForward(D, 13, rngs=rngs),
            norm=functools.partial(nn.make_norm, "layer", D, rngs=rngs),
            norm_position=norm_position,
            dropout_rate=dropout_rate,
        )
    )


@pytest.mark.parametrize("norm_position", nn.NORM_POSITIONS)
def test_a_block_is_its_formula(norm_position):
    b, lengths = block(norm_position), masks.Lengths(np.array([4, 7]))
    branches = [
        (functools.partial(b.mixer, mask=masks.Causal()), b, "mixer"),
        (lambda x: b.cross.mixer(x, CONTEXT, mask=lengths), b.cross, "mixer"),
        (b.cross.feed_forward, b.cross, "feed_forward"),
    ]
    expected = X
    for branch, holder, name in branches:
        norm, out_norm = (getattr(holder, name + end) for end in ("_norm", "_out_norm"))
        if norm_position == "pre":
            expected = expected + branch(norm(expected))
        elif norm_position == "both":
            expected = expected + out_norm(branch(norm(expected)))
        else:
            expected = norm(expected + branch(expected))
    out = b(X, context=CONTEXT, context_mask=lengths, mask=masks.Causal())
    assert_close(out, expected, scale=10)
    assert np.abs(b(X, context=CONTEXT, context_mask=lengths) - out).max() > 1e-3
    assert np.abs(b(X, context=CONTEXT, mask=masks.Causal()) - out).max() > 1e-3


def test_each_branch_is_dropped_by_a_key_of_its_own():
    b, rate = block(dropout_rate=0.5), 0.5
    np.testing.assert_array_equal(b(X, context=CONTEXT), block()(X, context=CONTEXT))
    out = b(X, context=CONTEXT, rng=jax.random.key(0))
    np.testing.assert_array_equal(out, b(X, context=CONTEXT, rng=jax.random.key(0)))
    assert np.abs(out - b(X, context=CONTEXT, rng=jax.random.key(1))).max() > 0.1
    # Where all of cross-attention and feed-forward is dropped, X or X + mix / (1 - rate) is left.
    mixed = b.mixer(b.mixer_norm(X)) / (1 - rate)
    b.cross.mixer.out.kernel[...] *= 0
    b.cross.feed_forward.down.kernel[...] *= 0
    left = np.asarray(b(X, context=CONTEXT, rng=jax.random.key(0)) - X)
    kept = np.abs(left) > 1e-6
    assert 0 < kept.mean() < 1
    assert_close(left[kept], np.asarray(mixed)[kept], scale=10)


def test_a_wrong_norm_position_is_named():
    with pytest.raises(ValueError, match=r"norm_position: wanted .*'both'.*, got 'mid'"):
        block("mid")
