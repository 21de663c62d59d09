"""`MemoryAttention` against its two parts, and what a memory from elsewhere adds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.nn.memory import MemoryAttention
from qkv_jax.ops import masks, scores
from qkv_jax.ops.memory import retrieve
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, N, K, H, M = 2, 13, 12, 6, 3, 4, 7
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RANDOM = np.random.RandomState(0)
X = RANDOM.randn(B, T, D).astype("f")
MEMORY = tuple(RANDOM.randn(B, M, K, H).astype("f") for _ in range(2))


def attention(window=2, num_keys=3, **kwargs):
    settings = {"num_kv_heads": K, "head_dim": H} | kwargs
    return randomised(
        MemoryAttention(D, N, window=window, num_keys=num_keys, rngs=nnx.Rngs(0), **settings)
    )


def run(module, x=X, **kwargs):
    graphdef, params = nn.split(module)
    return compiled(lambda params, x: nn.merge(graphdef, params)(x, **kwargs))(params, x)


def both_parts(module, memory=None):
    """Local and retrieved attention by masks written out, [B, T, N, H] each; causal."""
    q, k, v = module.project(X)
    distance = np.arange(T)[:, None] - np.arange(T)
    near = (distance >= 0) & (distance <= module.window)
    older = np.broadcast_to(distance > module.window, (B, N, T, T))
    local = ops.attention(q, k, v, mask=masks.Dense(near))
    if memory is not None:
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip((k, v), memory, strict=True))
        older = np.concatenate([older, np.ones((B, N, T, M), bool)], axis=-1)
    products = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, axis=2))
    products = np.where(older, products, -np.inf)
    order = np.argsort(np.argsort(-products, axis=-1, kind="stable"), axis=-1)
    mask = masks.Dense(older & (order < module.num_keys))
    return local, ops.attention(q, k, v, mask=mask)


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["sequence", "external"])
def test_it_joins_local_and_retrieved_attention_by_a_gate_per_head(memory):
    module = attention()
    local, retrieved = both_parts(module, memory)
    gate = 1 / (1 + np.exp(-module.gate[...]))[:, None]
    expected = module.out((gate * retrieved + (1 - gate) * local).reshape(B, T, -1))
    assert_close(run(module, mask=masks.Causal(), memory=memory), expected, scale=5)


def test_a_gate_starts_where_it_is_told():
    module = MemoryAttention(D, N, window=2, num_keys=3, gate=-2.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module.gate[...], np.full(N, -2, "f"))
    names = {"query", "key", "value", "out", "gate"}
    assert set(nn.split(module)[1]) == names


def test_a_window_or_a_memory_that_holds_everything_is_plain_attention():
    plain = randomised(nn.MultiHeadAttention(D, N, num_kv_heads=K, head_dim=H, rngs=nnx.Rngs(0)))
    for gate, settings in ((-50.0, {"window": T}), (50.0, {"window": 0, "num_keys": T})):
        module = MemoryAttention(
            D, N, num_kv_heads=K, head_dim=H, rngs=nnx.Rngs(0), **({"num_keys": 1} | settings)
        )
        graphdef, params = nn.split(module)
        params = nn.split(plain)[1] | {"gate": jnp.full(N, gate)}
        out = run(nn.merge(graphdef, params), mask=masks.Causal())
        expected = run(plain, mask=masks.Causal())
        if gate > 0:  # a token is not in its own memory
            strict = masks.Causal() & ~masks.SlidingWindow(0, 0)
            expected = run(plain, mask=strict)
        assert_close(out, expected, scale=5)


def test_no_gradient_reaches_keys_and_values_through_the_memory():
    module = attention()

    def loss(k, v, memory):
        q, _, _ = module.project(X)
        out = module.attend(X, q, k, v, mask=masks.Causal(), memory=memory)
        return (out[:, 12] ** 2).sum()

    _, k, v = module.project(X)
    k_bar, v_bar, memory_bar = compiled(jax.grad(loss, (0, 1, 2)))(k, v, MEMORY)
    for x in (k_bar, v_bar):
        used = np.abs(x).max((0, 2, 3)) > 0
        np.testing.assert_array_equal(used, np.arange(T) >= 10)  # the window alone
    for x in memory_bar:
        np.testing.assert_array_equal(x, 0)


def test_causality_by_gradient_of_every_input():
    module = attention(rotary_base=100.0)
    graphdef, params = nn.split(module)

    def row(x, t):
        return nn.merge(graphdef, params)(x, mask=masks.Causal())[:, t]

    jacobian = compiled(jax.vmap(lambda t: jax.grad(lambda x: (row(x, t) ** 2).sum())(X)))
    used = np.abs(jacobian(np.arange(T))).max((1, 3)) > 0
    assert not np.triu(used, 1).any() and np.diagonal(used).all()


def test_padding_and_shifted_positions_change_nothing():
    module = attention(rotary_base=100.0)
    lengths = np.array([9, T])
    padded = np.where((np.arange(T) < lengths[:, None])[..., None], X, 99.0)
    real = np.arange(T) < lengths[:, None]
    mask = masks.Causal() & masks.Lengths(lengths)
    out = run(module, padded, mask=mask)
    assert_close(out[real], run(module, mask=masks.Causal())[real], scale=5)
    shifted = run(module, mask=masks.Causal(), positions=np.arange(T) + 40)
    assert_close(shifted, run(module, mask=masks.Causal()), scale=50)


def test_the_last_token_alone_with_its_context_is_the_last_row():
    module = attention(context_width=D, rotary_base=100.0)
    whole = run(module, mask=masks.Causal(), memory=MEMORY)
    last = run(
        module, X[:, -1:], context=X, mask=masks.Causal(), positions=np.array([T - 1]),
        context_positions=np.arange(T), memory=MEMORY,
    )  # fmt: skip
    assert_close(last, whole[:, -1:], scale=10)


def test_both_ways_it_retrieves_from_both_sides():
    module = attention(window=1, num_keys=T)
    q, k, v = module.project(X)
    near = abs(np.arange(T)[:, None] - np.arange(T)) <= 1
    local, rest = (ops.attention(q, k, v, mask=masks.Dense(m)) for m in (near, ~near))
    gate = 1 / (1 + np.exp(-module.gate[...]))[:, None]
    expected = module.out((gate * rest + (1 - gate) * local).reshape(B, T, -1))
    assert_close(run(module), expected, scale=5)


def test_a_score_is_for_local_attention_and_dropout_for_both():
    module = attention(dropout_rate=0.5)
    gate = np.asarray(1 / (1 + np.exp(-module.gate[...])))[:, None]
    _, retrieved = both_parts(module)
    out = run(module, mask=masks.Causal(), score=scores.Temperature(1e-6))
    sharp = ops.attention(
        *module.project(X), mask=masks.SlidingWindow(2), score=scores.Temperature(1e-6)
    )
    expected = module.out((gate * retrieved + (1 - gate) * sharp).reshape(B, T, -1))
    assert_close(out, expected, scale=5)
    for parts in (-50.0, 50.0):  # local alone, retrieved alone
        graphdef, params = nn.split(module)
        params["gate"] = jnp.full(N, parts)
        alone = nn.merge(graphdef, params)
        noisy = run(alone, mask=masks.Causal(), rng=jax.random.key(0))
        assert np.abs(noisy - run(alone, mask=masks.Causal())).max() > 0.1


def test_a_search_of_ones_own_and_values_that_compare_equal():
    calls = []

    def search(q, k, **kwargs):
        calls.append(k.shape)
        return retrieve(q, k, **kwargs)

    run(attention(search=search), mask=masks.Causal(), memory=MEMORY)
    assert calls == [(B, T + M, K, H)]
    a, b = (nn.split(attention())[0] for _ in "ab")
    assert a == b and hash(a) == hash(b)


def test_state_size_is_all_keys_and_values():
    assert attention().state_size(1000) == 1000 * 2 * K * H


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: attention(window=-1), "window: wanted at least 0, got -1"),
        (lambda: attention(num_keys=0), "num_keys: wanted at least 1, got 0"),
        (
            lambda: attention()(X, memory=(MEMORY[0][:, :, :2], MEMORY[1])),
            r"memory: wanted keys \[2, M, 3, 4\], got \[2, 7, 2, 4\]",
        ),
        (
            lambda: attention()(X, memory=(MEMORY[0], MEMORY[1][:, :5])),
            r"memory: wanted values \[2, M, 3, 4\], got \[2, 5, 3, 4\]",
        ),
    ],
)
def test_bad_input_is_an_error_that_names_it(build, message):
    with pytest.raises(ValueError, match=message):
        build()
