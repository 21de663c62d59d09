"""Attention to chosen blocks: both forms against a loop, and the tiles that the fast one makes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import arguments, block_selection, masks
from qkv_jax.ops.block_selection import (
    attend_by_mask,
    attend_by_tiles,
    attend_chosen,
    best_blocks,
    tiles_of,
)
from qkv_jax.ops.dropout import keep_mask
from tests.tolerances import assert_close

B, T, N, K, H, h, SIZE, CHOICES = 2, 17, 12, 3, 5, 4, 3, 4
RANDOM = np.random.RandomState(0)
LENGTHS = np.array([8, 17])
Q, KEYS, V, COTANGENT = (
    RANDOM.randn(B, T, *shape) for shape in ((N, H), (K, H), (K, h), (N, h))
)  # fmt: skip
RNG = jax.random.key(5)
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def choices(R):
    """Different blocks of 6 for every query, and a few that are none."""
    drawn = [RANDOM.permutation([*range(6), -1, -1])[:CHOICES] for _ in range(B * T * R)]
    return np.array(drawn).reshape(B, T, R, CHOICES)


def checked(q, k, v, dropout_rate=0.0):
    others = dict.fromkeys(("mask", "score", "scale", "sinks", "q_positions", "kv_positions"))
    return arguments.check(q, k, v, dropout_rate=dropout_rate, dropout_rng=RNG, **others)


def loop(chosen, causal, lengths, dropout_rate):
    """The definition, a query and a head at a time."""
    out = np.zeros((B, T, N, h))
    batch, head, query, key = np.ogrid[:B, :N, :T, :T]
    keep = np.asarray(keep_mask(RNG, dropout_rate, batch=batch, head=head, query=query, key=key))
    for b, t, n in np.ndindex(B, T, N):
        blocks = chosen[b, t, n * chosen.shape[2] // N]
        keys = [
            s for s in range(T) if s // SIZE in blocks and s < lengths[b] and (s <= t or not causal)
        ]
        if keys:
            weights = np.exp(KEYS[b, keys, n * K // N] @ Q[b, t, n] / H**0.5)
            kept = keep[b, n, t, keys] / (1 - dropout_rate)
            out[b, t, n] = (weights / weights.sum() * kept) @ V[b, keys, n * K // N]
    return out


CASES = {  # R, causal, lengths, dropout_rate
    "each head": (N, True, None, 0.0),
    "groups": (6, True, LENGTHS, 0.0),
    "groups of a key head": (K, False, LENGTHS, 0.3),
    "both ways": (N, False, None, 0.0),
}
FORMS = {"mask": attend_by_mask, "tiles": attend_by_tiles}


@pytest.mark.parametrize("name", CASES)
def test_both_forms_attend_to_the_allowed_keys_and_have_the_same_gradients(name):
    R, causal, lengths, rate = CASES[name]
    settings = {"block_size": SIZE, "causal": causal, "lengths": lengths}

    @compiled
    def values_and_gradients(q, k, v, chosen):
        def result(form):
            attend = functools.partial(form, chosen=chosen, **settings)
            out, pullback = jax.vjp(lambda *x: attend(checked(*x, rate)), q, k, v)
            return out, *pullback(jnp.asarray(COTANGENT))

        return [result(form) for form in FORMS.values()]

    chosen = choices(R)
    with jax.enable_x64(True):
        by_mask, by_tiles = values_and_gradients(Q, KEYS, V, chosen)
        assert_close(by_mask[0], loop(chosen, causal, [T, T] if lengths is None else lengths, rate))
        for a, b in zip(by_tiles, by_mask, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_sums_are_float32_and_the_output_has_the_dtype_of_the_values(form, dtype):
    chosen = choices(K)
    q, k, v = (jnp.asarray(x, dtype) for x in (Q, KEYS, V))
    settings = {"block_size": SIZE, "causal": True, "lengths": LENGTHS}
    attend = compiled(lambda q, k, v, chosen: FORMS[form](checked(q, k, v), chosen, **settings))
    out = attend(q, k, v, chosen)
    assert out.dtype == dtype
    assert_close(out, loop(chosen, True, LENGTHS, 0.0), scale=2)


def test_a_query_without_keys_gets_0_and_no_derivative_is_nan():
    chosen = np.full((B, T, N, 2), -1)
    chosen[:, 9:] = [0, 5]  # block 5 begins at 15: after most queries
    chosen[:, 9:11] = [5, -1]

    @compiled
    def derivatives(q, k, v, chosen):
        def attend(*qkv):
            return attend_by_tiles(checked(*qkv), chosen, block_size=SIZE, causal=True)

        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(jnp.ones_like(out)), jax.jvp(attend, (q, k, v), (q, k, v))

    with jax.enable_x64(True):
        out, (q_bar, k_bar, v_bar), tangents = derivatives(Q, KEYS, V, chosen)
        np.testing.assert_array_equal(out[:, :11], 0)
        assert np.abs(out[:, 11:]).min() > 0
        np.testing.assert_array_equal(q_bar[:, :11], 0)
        for x in (q_bar, k_bar, v_bar, *tangents):
            assert np.isfinite(x).all()


def test_groups_are_taken_together_or_one_by_one(monkeypatch):
    chosen, outs = choices(N), []
    args = checked(*(jnp.asarray(x, "float32") for x in (Q, KEYS, V)))
    for logits in (1, CHOICES * T * SIZE * 7, 2**21):  # 1, 6 (a divisor of 24) and 24 at once
        monkeypatch.setattr(block_selection, "LOGITS", logits)
        attend = functools.partial(attend_by_tiles, args, block_size=SIZE, causal=True)
        outs.append(compiled(attend)(chosen))
    assert_close(outs[1], outs[0])
    assert_close(outs[2], outs[0])


def test_short_sequences_take_the_mask_and_long_ones_the_tiles(monkeypatch):
    args = checked(*(jnp.asarray(x, "float32") for x in (Q, KEYS, V)))
    monkeypatch.setattr(block_selection, "attend_by_mask", lambda *_, **__: "mask")
    monkeypatch.setattr(block_selection, "attend_by_tiles", lambda *_, **__: "tiles")
    settings = {"block_size": SIZE, "causal": True}
    assert attend_chosen(args, choices(N), **settings) == "mask"
    monkeypatch.setattr(block_selection, "SHORT", T - 1)
    assert attend_chosen(args, choices(N), **settings) == "tiles"


@pytest.mark.parametrize("seed", range(5))
def test_every_choice_has_its_place_in_a_tile_of_its_block(seed):
    random = np.random.RandomState(seed)
    n, blocks, size = random.randint(1, 5), random.randint(5, 9), random.randint(1, 7)
    favourites = random.permutation([*range(blocks), -1, -1])  # some blocks are never chosen
    chosen = np.array([random.permutation(favourites[: n + 2])[:n] for _ in range(T)])
    tiles = jax.jit(tiles_of, static_argnums=(1, 2))(chosen, blocks, size)
    block, query, place = (np.asarray(x) for x in (tiles.block, tiles.query, tiles.place))
    assert query.shape == (T * n // size + blocks, size)
    seen = np.zeros(query.size, bool)
    for t, i in np.ndindex(T, n):
        if chosen[t, i] < 0:
            assert place[t, i] == query.size
            continue
        tile, row = divmod(place[t, i], size)
        assert (block[tile], query[tile, row]) == (chosen[t, i], t)
        assert not seen[place[t, i]]
        seen[place[t, i]] = True
    np.testing.assert_array_equal(query.reshape(-1)[~seen], T)


def test_the_best_blocks_are_the_greatest_and_of_equals_the_first():
    importance = np.array([[1.0, 3.0, 3.0, 3.0], [-np.inf, 2.0, -np.inf, -np.inf]], "f")
    np.testing.assert_array_equal(best_blocks(importance, 2), [[1, 2], [1, -1]])
    np.testing.assert_array_equal(
        best_blocks(importance, 6), [[1, 2, 3, 0, -1, -1], [1, -1, -1, -1, -1, -1]]
    )
    assert best_blocks(importance, 2).dtype == "int32"


def test_memory_of_both_passes_is_linear_in_the_length():
    def bytes_of(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), "float32")
        chosen = jax.ShapeDtypeStruct((1, length, 2, 2), "int32")

        def loss(q, k, v, chosen):
            args = dataclasses.replace(checked(q, k, v), mask=masks.Causal())
            return attend_by_tiles(args, chosen, block_size=32, causal=True).sum()

        lowered = compiled(jax.grad(loss, (0, 1, 2))).lower(x, x, x, chosen)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(4096) < 2.1 * bytes_of(2048) < 32 * 2**20
