"""Exact search and attention to what it finds, against a loop that sorts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks, memory, scores
from qkv_jax.ops.memory import memory_attention, retrieve
from qkv_jax.ops.top_k import top_k_attention
from tests.tolerances import assert_close

B, T, S, N, K, H, h = 2, 5, 11, 6, 3, 4, 7
RANDOM = np.random.RandomState(0)
Q, KEYS, V = (RANDOM.randn(B, *shape) for shape in ((T, N, H), (S, K, H), (S, K, h)))
WHERE = {"q_positions": np.array([0, 3, 6, 8, 10])}  # two keys or more are older than 1 ago
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CASES = {  # arguments, and whether query t may find key s in row b
    "all": ({}, lambda b, t, s: True),
    "older": (
        {"mask": masks.Causal() & ~masks.SlidingWindow(1, 1)} | WHERE,
        lambda b, t, s: s < WHERE["q_positions"][t] - 1,
    ),
    "lengths": (
        {"mask": masks.Lengths(np.array([7, 2]))},
        lambda b, t, s: s < (7, 2)[b],
    ),
    "dense": (
        {"mask": masks.Dense(np.arange(T)[:, None] > np.arange(S))},
        lambda b, t, s: t > s,
    ),
}


def nearest(allowed, num_keys, b, t, n):
    products = KEYS[b, :, n * K // N] @ Q[b, t, n]
    keys = [s for s in range(S) if allowed(b, t, s)]
    return sorted(keys, key=lambda s: -products[s])[:num_keys]


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("name", CASES)
def test_the_search_finds_the_nearest_keys_in_order(name, rows, monkeypatch):
    monkeypatch.setattr(memory, "LOGITS", rows * B * N * S)
    kwargs, allowed = CASES[name]
    keys, found = compiled(lambda q, k: retrieve(q, k, num_keys=3, **kwargs))(Q, KEYS)
    assert keys.dtype == "int32" and keys.shape == found.shape == (B, T, N, 3)
    for b, t, n in np.ndindex(B, T, N):
        expected = nearest(allowed, 3, b, t, n)
        np.testing.assert_array_equal(keys[b, t, n][: len(expected)], expected)
        np.testing.assert_array_equal(found[b, t, n], np.arange(3) < len(expected))


def test_more_keys_than_there_are_finds_all():
    keys, found = retrieve(Q, KEYS, num_keys=S + 4)
    assert keys.shape == (B, T, N, S) and np.asarray(found).all()
    np.testing.assert_array_equal(np.sort(keys), np.broadcast_to(np.arange(S), keys.shape))


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_a_softmax_over_the_nearest_keys(name, rows, monkeypatch):
    monkeypatch.setattr(memory, "LOGITS", rows * B * N * 3 * (H + h))
    kwargs, allowed = CASES[name]
    expected = np.zeros((B, T, N, h))
    for b, t, n in np.ndindex(B, T, N):
        keys = nearest(allowed, 3, b, t, n)
        if keys:
            weights = np.exp(0.7 * KEYS[b, keys, n * K // N] @ Q[b, t, n])
            expected[b, t, n] = weights / weights.sum() @ V[b, keys, n * K // N]
    attend = functools.partial(memory_attention, num_keys=3, scale=0.7, **kwargs)
    with jax.enable_x64(True):
        assert_close(compiled(attend)(Q, KEYS, V), expected)


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("num_keys", [3, S])
def test_values_gradients_and_dropout_are_those_of_top_k(rows, num_keys, monkeypatch):
    monkeypatch.setattr(memory, "LOGITS", rows * B * N * num_keys * (H + h))
    kwargs, _ = CASES["older"]
    kwargs = kwargs | {"dropout_rate": 0.3, "dropout_rng": jax.random.key(1), "num_keys": num_keys}

    def values_and_gradients(f, *x):
        out, pullback = jax.vjp(functools.partial(f, **kwargs), *x)
        return out, *pullback(jnp.cos(out))

    with jax.enable_x64(True):
        ours, theirs = compiled(
            lambda *x: [values_and_gradients(f, *x) for f in (memory_attention, top_k_attention)]
        )(Q, KEYS, V)
        for a, b in zip(ours, theirs, strict=True):
            assert np.isfinite(a).all()
            assert_close(a, b)


def test_all_keys_make_it_full_attention():
    with jax.enable_x64(True):
        out = compiled(functools.partial(memory_attention, num_keys=S))(Q, KEYS, V)
        assert_close(out, ops.attention(Q, KEYS, V))


def test_another_search_may_take_the_place_of_the_exact_one():
    calls = []

    def last_two(q, k, **kwargs):
        calls.append(kwargs)
        keys = jnp.broadcast_to(jnp.arange(S - 2, S), (B, T, N, 2))
        return keys, keys < S - 1  # it found one

    mask = masks.Lengths(np.array([7, 2]))
    out = memory_attention(Q, KEYS, V, num_keys=2, search=last_two, mask=mask, **WHERE)
    assert_close(out, np.repeat(V[:, None, S - 2], N // K, axis=2).repeat(T, axis=1))
    assert calls == [{"num_keys": 2, "mask": mask, "kv_positions": None} | WHERE]


def test_bfloat16_is_computed_in_float32():
    x = [jnp.asarray(a, "bfloat16") for a in (Q, KEYS, V)]
    attend = compiled(functools.partial(memory_attention, num_keys=3))
    out = attend(*x)
    assert out.dtype == "bfloat16"
    assert_close(out, attend(*(a.astype("float32") for a in x)), "bfloat16")


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"score": scores.Softcap(1.0)}, NotImplementedError, "score: attention to a memory"),
        ({"num_keys": 0}, ValueError, "num_keys: wanted a positive integer, got 0"),
        ({"mask": masks.Causal()}, ValueError, "q_positions: 5 queries, 11 keys"),
        ({"k": KEYS[:, :, :2]}, ValueError, "v: wanted|k: wanted"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_names_it(kwargs, error, message):
    with pytest.raises(error, match=message):
        memory_attention(**({"q": Q, "k": KEYS, "v": V, "num_keys": 3} | kwargs))
