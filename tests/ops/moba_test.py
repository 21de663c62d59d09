"""MoBA against a loop over the paper's equations, and full attention where it is that."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.ops import block_selection, masks, scores
from qkv_jax.ops.moba import MoBA, blocks_by_mean_key, moba_attention
from tests.tolerances import assert_close

B, T, N, K, H, h, SIZE = 2, 17, 6, 3, 5, 4, 3
RANDOM = np.random.RandomState(0)
Q, KEYS, V = (RANDOM.randn(B, T, *shape) for shape in ((N, H), (K, H), (K, h)))
LENGTHS = np.array([10, 17])
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MASKS = {
    "causal": (masks.Causal(), True, [T, T]),
    "causal and lengths": (masks.Causal() & masks.Lengths(LENGTHS), True, LENGTHS),
    "lengths": (masks.Lengths(LENGTHS), False, LENGTHS),
    "none": (None, False, [T, T]),
}


def chosen_blocks(b, t, n, num_blocks, causal, length):
    """The paper's: its own block, and the best others; before it, where the order is causal."""
    own = t // SIZE
    gates = {}
    for block in range(own if causal else -(-length // SIZE)):
        if block != own:
            keys = KEYS[b, block * SIZE : min((block + 1) * SIZE, length), n * K // N]
            gates[block] = keys.mean(0) @ Q[b, t, n] if len(keys) else 0.0
    return [own, *sorted(gates, key=gates.get, reverse=True)[: num_blocks - 1]]


def loop(num_blocks, causal, lengths):
    out = np.zeros((B, T, N, h))
    for b, t, n in np.ndindex(B, T, N):
        blocks = chosen_blocks(b, t, n, num_blocks, causal, lengths[b])
        keys = [s for s in range(lengths[b]) if s // SIZE in blocks and (s <= t or not causal)]
        if keys:
            weights = np.exp(KEYS[b, keys, n * K // N] @ Q[b, t, n] / H**0.5)
            out[b, t, n] = weights @ V[b, keys, n * K // N] / weights.sum()
    return out


@pytest.mark.parametrize("short", [0, 1024], ids=["tiles", "mask"])
@pytest.mark.parametrize("name", MASKS)
def test_it_is_the_paper_s_loop(name, short, monkeypatch):
    monkeypatch.setattr(block_selection, "SHORT", short)
    mask, causal, lengths = MASKS[name]
    with jax.enable_x64(True):
        out = compiled(lambda *x: MoBA(SIZE, 3)(*x, mask=mask))(Q, KEYS, V)
        real = np.arange(T) < np.asarray(lengths)[:, None]
        assert_close(out[real], loop(3, causal, lengths)[real])
        assert np.isfinite(out).all()


@pytest.mark.parametrize("short", [0, 1024], ids=["tiles", "mask"])
def test_enough_blocks_make_it_full_attention(short, monkeypatch):
    monkeypatch.setattr(block_selection, "SHORT", short)
    with jax.enable_x64(True):
        for mask in (masks.Causal(), masks.Lengths(LENGTHS)):
            settings = {"mask": mask, "scale": 0.3}
            full, moba = compiled(
                lambda *x, settings=settings: (
                    ops.attention(*x, **settings),
                    moba_attention(*x, block_size=SIZE, num_blocks=9, **settings),
                )
            )(Q, KEYS, V)
            assert_close(moba, full)


@pytest.mark.parametrize("short", [0, 1024], ids=["tiles", "mask"])
def test_no_gradient_comes_from_what_a_query_does_not_attend_to(short, monkeypatch):
    monkeypatch.setattr(block_selection, "SHORT", short)
    attend = functools.partial(MoBA(SIZE, 2), mask=masks.Causal())
    t, cotangent = 13, np.zeros((B, T, N, h))
    cotangent[:, t] = 1
    seen = np.zeros((B, T, K), bool)
    for b, n in np.ndindex(B, N):
        for block in chosen_blocks(b, t, n, 2, True, T):
            seen[b, block * SIZE : min((block + 1) * SIZE, t + 1), n * K // N] = True
    with jax.enable_x64(True):
        pulled = compiled(lambda *x: jax.vjp(attend, *x)[1](jnp.asarray(cotangent)))(Q, KEYS, V)
        for x in pulled[1:]:
            np.testing.assert_array_equal(np.abs(x).max(-1) > 0, seen)
        np.testing.assert_array_equal(np.abs(pulled[0]).max((0, 2, 3)) > 0, np.arange(T) == t)


def test_padding_changes_nothing():
    mask = masks.Causal() & masks.Lengths(LENGTHS)
    attend = compiled(lambda *x: MoBA(SIZE, 3)(*x, mask=mask))
    padded = [
        np.where((np.arange(T) < LENGTHS[:, None])[..., None, None], x, 99.0) for x in (Q, KEYS, V)
    ]
    alone = compiled(lambda *x: MoBA(SIZE, 3)(*x, mask=masks.Causal()))(
        *(x[:1, :10].astype("f") for x in (Q, KEYS, V))
    )
    assert_close(attend(*padded)[:1, :10], alone, scale=2)
    both_ways = compiled(lambda *x: MoBA(SIZE, 3)(*x, mask=masks.Lengths(LENGTHS)))
    assert_close(both_ways(*padded)[:1, :10], both_ways(Q, KEYS, V)[:1, :10], scale=2)


def test_the_choice_is_made_a_few_rows_at_a_time(monkeypatch):
    choose = functools.partial(blocks_by_mean_key, block_size=SIZE, num_blocks=3, causal=True)
    q, k = (jnp.asarray(x, "float32") for x in (Q, KEYS))
    at_once = jax.jit(choose)(q, k)
    monkeypatch.setattr("qkv_jax.ops.moba.SCORES", 5 * B * N * 6)  # 5 rows of 17
    np.testing.assert_array_equal(jax.jit(choose)(q, k), at_once)
    for b, t, n in np.ndindex(B, T, N):
        blocks = set(np.asarray(at_once[b, t, n]).tolist()) - {-1}
        assert blocks == set(chosen_blocks(b, t, n, 3, True, T))


def test_dropout_falls_on_the_same_weights_in_both_forms(monkeypatch):
    rng, outs = jax.random.key(1), []
    for short in (0, 1024):
        monkeypatch.setattr(block_selection, "SHORT", short)
        settings = {"mask": masks.Causal(), "dropout_rate": 0.4, "dropout_rng": rng}
        outs.append(compiled(lambda *x, s=settings: MoBA(SIZE, 3)(*x, **s))(Q, KEYS, V))
    assert_close(outs[0], outs[1])
    assert np.abs(outs[0] - loop(3, True, [T, T])).max() > 0.1


def test_an_op_is_a_value_that_a_module_carries():
    op = MoBA(SIZE, 3)
    assert op == dataclasses.replace(op) and hash(op) == hash(MoBA(SIZE, 3))
    modules = [nn.MultiHeadAttention(12, N, op=MoBA(SIZE, 3), rngs=nnx.Rngs(0)) for _ in "ab"]
    a, b = (nn.split(m)[0] for m in modules)
    assert a == b and hash(a) == hash(b)
    x = RANDOM.randn(B, T, 12).astype("f")
    out = op(*modules[0].project(x), mask=masks.Causal())
    assert_close(modules[0](x, mask=masks.Causal()), modules[0].out(out.reshape(B, T, -1)))
    assert modules[0].state_size(100) == 100 * 2 * N * 2


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"score": scores.Softcap(1.0)}, NotImplementedError, "score: MoBA"),
        ({"q_positions": np.arange(T)}, NotImplementedError, "q_positions: MoBA"),
        ({"kv_positions": np.arange(T)}, NotImplementedError, "kv_positions: MoBA"),
        ({"mask": masks.SlidingWindow(2)}, NotImplementedError, "mask: MoBA .* SlidingWindow"),
        ({"q": Q[:, :5]}, ValueError, "k: MoBA is self-attention, so wanted T = 5 keys, got 17"),
        ({"block_size": 0}, ValueError, "block_size: wanted a positive integer, got 0"),
        ({"num_blocks": 0}, ValueError, "num_blocks: wanted a positive integer, got 0"),
        ({"dropout_rate": 0.5}, ValueError, "dropout_rng: wanted a key"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_names_it(kwargs, error, message):
    with pytest.raises(error, match=message):
        moba_attention(**({"q": Q, "k": KEYS, "v": V, "block_size": 3, "num_blocks": 2} | kwargs))
