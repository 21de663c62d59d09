"""What `attention` refuses, and that the message names the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks, scores

B, T, S, N, K, H, h = 2, 3, 5, 4, 2, 7, 11
Q, KEYS, V = np.ones((B, T, N, H), "f"), np.ones((B, S, K, H), "f"), np.ones((B, S, K, h), "f")
KEY = jax.random.key(0)

# what is wrong: (the arguments that are wrong, what the message must say)
WRONG = {
    "rank of q": ({"q": Q[0]}, r"q: wanted floating \[B, T, N, H\], got float32 \[3, 4, 7\]"),
    "rank of k": ({"k": KEYS[0]}, r"k: wanted floating \[B, S, K, H\]"),
    "rank of v": ({"v": V[0, 0]}, r"v: wanted floating \[B, S, K, h\]"),
    "integer q": ({"q": Q.astype(int)}, r"q: wanted floating .* got int64 \[2, 3, 4, 7\]"),
    "boolean v": ({"v": V > 0}, r"v: wanted floating .* got bool"),
    "complex k": ({"k": KEYS * 1j}, r"k: wanted floating"),
    "q is a list": ({"q": [[[[1.0]]]]}, r"q: wanted floating"),
    "batch of k": ({"k": KEYS[:1]}, r"k: wanted \[B, S, K, H\] = \[2, S, K, 7\] .* got \[1, 5,"),
    "width of k": ({"k": KEYS[..., :3]}, r"k: wanted .* beside q .*, got \[2, 5, 2, 3\]"),
    "length of v": ({"v": V[:, :4]}, r"v: wanted \[B, S, K, h\] = \[2, 5, 2, h\] .* got \[2, 4, "),
    "heads of v": ({"v": V[:, :, :1]}, r"v: wanted .* beside k \[2, 5, 2, 7\]"),
    "3 heads share 2": ({"q": Q[:, :, :3]}, r"k: 2 key/value heads do not divide q's 3 heads"),
    "no kv heads": ({"k": KEYS[:, :, :0], "v": V[:, :, :0]}, r"k: 0 key/value heads"),
    "mask is an array": ({"mask": np.ones((T, S), bool)}, r"mask: wanted a Mask .*; wrap .*Dense"),
    "mask is a class": ({"mask": masks.Causal}, r"mask: wanted a Mask .* got Causal"),
    "mask is a tuple": ({"mask": (masks.Causal(),)}, r"mask: wanted a Mask"),
    "score is an array": ({"score": np.ones((T, S))}, r"score: wanted a Score .*; wrap .*Bias"),
    "score is a number": ({"score": 30.0}, r"score: wanted a Score .* got 30\.0"),
    "score in a tuple": ({"score": (scores.Softcap(1.0), 2)}, r"score: wanted a Score .* got 2"),
    "score is a list": ({"score": [scores.Softcap(1.0)]}, r"score: wanted a Score"),
    "score is a mask": ({"score": masks.Causal()}, r"score: wanted a Score"),
    "operand of mask": (
        {"mask": masks.Lengths(np.ones(3, int)) & masks.Prefix(1)},
        r"mask: Lengths.kv_lengths has shape \[3, 1, 1, 1\].* \[B, N, T, S\] = \[2, 4, 3, 5\]",
    ),
    "operand of score": (
        {"score": (scores.Softcap(1.0), scores.Temperature(np.ones(3)))},
        r"score: Temperature.temperature has shape \[1, 3, 1, 1\]",
    ),
    "bias": ({"score": scores.Bias(np.ones((T, T)))}, r"score: Bias.array .* \[1, 1, 3, 3\]"),
    "no positions": ({"mask": masks.Causal()}, r"q_positions: 3 queries, 5 keys"),
    "no positions within a combination": (
        {"mask": masks.Lengths(4) | ~masks.SlidingWindow(1)},
        r"q_positions: 3 queries",
    ),
    "no positions for a score": ({"score": scores.Alibi(np.ones(N))}, r"q_positions: 3 queries"),
    "length of q_positions": (
        {"q_positions": np.arange(4)},
        r"q_positions: wanted integers \[T\] = \[3\] or \[B, T\] = \[2, 3\], got int64 \[4\]",
    ),
    "rows of kv_positions": ({"kv_positions": np.ones((3, S), int)}, r"kv_positions: wanted int"),
    "rank of q_positions": ({"q_positions": np.ones((1, 1, 3), int)}, r"q_positions: wanted int"),
    "floating q_positions": ({"q_positions": np.arange(3.0)}, r"q_positions: .* got float64 \[3\]"),
    "a number for positions": ({"q_positions": 4}, r"q_positions: wanted integers"),
    "dropout without a key": ({"dropout_rate": 0.1}, r"dropout_rng: wanted a key .* 0\.1"),
    "drop all": ({"dropout_rate": 1.0, "dropout_rng": KEY}, r"dropout_rate: .* \[0, 1\), got 1\.0"),
    "negative rate": ({"dropout_rate": -0.1, "dropout_rng": KEY}, r"dropout_rate: wanted .* -0\.1"),
    "NaN rate": ({"dropout_rate": np.nan, "dropout_rng": KEY}, r"dropout_rate: wanted .* nan"),
    "array rate": (
        {"dropout_rate": jnp.float32(0.1), "dropout_rng": KEY},
        r"dropout_rate: wanted a Python number",
    ),
    "sinks per kv head": ({"sinks": np.ones(K)}, r"sinks: wanted floating \[N\] = \[4\]"),
    "integer sinks": ({"sinks": np.ones(N, int)}, r"sinks: wanted floating"),
    "scale per head": ({"scale": np.ones(N)}, r"scale: wanted a number, got float64 \[4\]"),
    "implementation": ({"implementation": "fastest"}, r"implementation: .*'reference'.*'fastest'"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("op", [ops.attention, ops.attention_with_stats])
def test_a_wrong_argument_is_named(op, what):
    wrong, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        op(**({"q": Q, "k": KEYS, "v": V} | wrong))


@pytest.mark.parametrize(
    "what", [what for what, (wrong, _) in WRONG.items() if not {"v", "implementation"} & set(wrong)]
)
def test_attention_weights_refuse_the_same(what):
    wrong, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        ops.attention_weights(**({"q": Q, "k": KEYS} | wrong))


def test_a_wrong_argument_is_named_under_jit_too():
    with pytest.raises(ValueError, match=r"v: wanted \[B, S, K, h\]"):
        jax.jit(ops.attention)(Q, KEYS, V[:, :4])


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"mask": masks.Lengths(4)},
        {"mask": masks.Segments(np.zeros(T, int), np.zeros(S, int)) & masks.Prefix(4)},
        {"mask": masks.Dense(np.ones((T, S), bool))},
        {"score": scores.Softcap(2.0)},
        {"score": scores.Bias(np.zeros((T, S)))},
        {"kv_positions": np.arange(S)},
        {"dropout_rate": 0, "dropout_rng": None},
    ],
    ids=repr,
)
def test_positions_are_not_asked_for_where_nothing_compares_them(others):
    assert ops.attention(Q, KEYS, V, **others).shape == (B, T, N, h)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64"])
def test_positions_may_be_integers_of_any_kind(dtype):
    out = ops.attention(Q, KEYS, V, mask=masks.Causal(), q_positions=np.arange(3).astype(dtype))
    listed = ops.attention(Q, KEYS, V, mask=masks.Causal(), q_positions=[0, 1, 2])
    np.testing.assert_array_equal(out, listed)


def test_the_scale_may_be_a_traced_number():
    out = jax.jit(lambda scale: ops.attention(Q, KEYS, V, scale=scale))(0.5)
    np.testing.assert_allclose(out, ops.attention(Q, KEYS, V, scale=0.5), rtol=1e-6)


def test_numpy_arrays_are_computed_in_jax_s_own_precision_without_a_warning():
    out, stats = ops.attention_with_stats(
        *(x.astype(np.float64) for x in (Q, KEYS, V)), sinks=np.ones(N, np.float64)
    )
    assert {x.dtype.name for x in (out, *stats.values())} == {"float32"}
