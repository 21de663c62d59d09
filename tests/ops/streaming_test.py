"""Attention to sinks and a window, against a cache that evicts, one token after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks
from qkv_jax.ops.positions import rotary
from qkv_jax.ops.streaming import Streaming, streaming_attention
from tests.tolerances import assert_close

B, T, N, K, H, h = 2, 23, 6, 3, 4, 5
RANDOM = np.random.RandomState(0)
Q, KEYS, V = (jnp.asarray(RANDOM.randn(B, T, *s), jnp.float32) for s in ((N, H), (K, H), (K, h)))


LOOKED = [0, 1, 2, 5, 7, 8, 15, 22]  # tokens that are looked at: each has shapes of its own


def from_a_cache(window, num_sinks, base):
    """Xiao et al.: keys unrotated in a cache; positions are places in it, when a token comes."""
    outs = []
    for t in LOOKED:
        kept = [s for s in range(t + 1) if s < num_sinks or s >= t - window]
        places = jnp.arange(len(kept))
        q, k, v = Q[:, t : t + 1], KEYS[:, jnp.array(kept)], V[:, jnp.array(kept)]
        if base is not None:
            q, k = rotary(q, places[-1:], base=base), rotary(k, places, base=base)
        outs.append(ops.attention(q, k, v, implementation="reference"))
    return jnp.concatenate(outs, axis=1)


@pytest.mark.parametrize("base", [None, 100.0])
@pytest.mark.parametrize(("window", "num_sinks"), [(5, 2), (0, 1), (4, 0), (30, 3)])
def test_it_is_attention_to_a_cache_that_evicts(window, num_sinks, base):
    q, k = Q, KEYS
    if base is not None:
        q, k = (rotary(x, jnp.arange(T), base=base) for x in (q, k))
    out = streaming_attention(q, k, V, window=window, num_sinks=num_sinks, rotary_base=base)
    assert_close(out[:, np.array(LOOKED)], from_a_cache(window, num_sinks, base), scale=10)


def test_positions_and_another_mask_are_honoured():
    streaming = Streaming(window=5, num_sinks=2, rotary_base=100.0)
    whole = streaming(Q, KEYS, V)
    at = jnp.arange(9, 14)
    assert_close(streaming(Q[:, 9:14], KEYS, V, q_positions=at), whole[:, 9:14], scale=10)
    ids = jnp.repeat(jnp.arange(2), jnp.array([10, 13]))
    apart = streaming(Q, KEYS, V, mask=masks.Segments(ids))
    changed = streaming(Q, KEYS, V.at[:, :10].add(7), mask=masks.Segments(ids))
    assert_close(apart[:, 10:], changed[:, 10:])
    assert float(jnp.abs(apart - changed)[:, :10].min()) > 1


def test_no_token_is_seen_before_it_comes_nor_after_it_is_evicted():
    streaming = Streaming(window=3, num_sinks=1)
    weight = jax.jacrev(lambda v: streaming(Q[:1], KEYS[:1], v)[0].sum((1, 2)))(V[:1])
    seen = np.abs(np.asarray(weight)).sum((1, 3, 4)) > 0  # [T, S]
    t, s = np.ogrid[:T, :T]
    assert (seen == ((s <= t) & ((s < 1) | (s >= t - 3)))).all()
    assert streaming.cache_length(100) == 4 and streaming.cache_length(2) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"window": -1}, "window"), ({"window": 3, "num_sinks": 1.5}, "num_sinks")],
)
def test_a_wrong_size_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        streaming_attention(Q, KEYS, V, **settings)


def test_learned_sinks_are_refused():
    with pytest.raises(NotImplementedError, match="sinks"):
        streaming_attention(Q, KEYS, V, window=3, sinks=jnp.zeros(N))
