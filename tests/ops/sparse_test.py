"""Sparse masks against their papers' definitions, and their ops against dense attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops
from qkv_jax.ops import masks, scores, sparse, sparse_masks
from qkv_jax.ops.dropout import keep_mask
from tests.ops.mask_algebra_test import assert_sound, cover, truth
from tests.tolerances import assert_close

B, T, N, K, H = 2, 13, 6, 3, 4
DILATION = (1, 2, 3, 1, 1, 2)
RANDOM = np.random.RandomState(0)
Q, KEYS, V = (RANDOM.randn(B, T, n, H).astype("f") for n in (N, K, K))
IMPLEMENTATIONS = ["reference", ops.Blockwise(2, 3)]


def in_bigbird(i, j, layout):
    """Blocks of 2; the draws are in the layout, and `bigbird`'s own tests are about them."""
    near, certain = abs(i // 2 - j // 2) <= 1, i < 2 or j < 2
    return near or certain or layout[i // 2, j // 2]


BIGBIRD, BIGBIRD_HEADS = (
    [
        sparse.bigbird(T, block_size=2, num_random_blocks=1, num_heads=heads, causal=causal)
        for causal in (False, True)
    ]
    for heads in (None, N)
)

# name: (mask, op, its paper's definition for head n, query i, key j)
CASES = {
    "local": (
        masks.SlidingWindow(2, 2),
        sparse.Local(2),
        lambda n, i, j, causal: i - 2 <= j <= i + 2,
    ),
    "longformer": (
        sparse.longformer(2, (0, 1)),
        sparse.Longformer(2, num_global=2),
        lambda n, i, j, causal: abs(i - j) <= 2 or i < 2 or j < 2,
    ),
    "longformer_dilated": (
        sparse.longformer(2, 0, dilation=DILATION),
        sparse.Longformer(2, dilation=DILATION),
        lambda n, i, j, causal: (
            i - j in [d * DILATION[n] for d in (-2, -1, 0, 1, 2)] or 0 in (i, j)
        ),
    ),
    "bigbird": (
        BIGBIRD[False],
        sparse.BigBird(2, num_random_blocks=1),
        lambda n, i, j, causal: in_bigbird(i, j, BIGBIRD[causal].layout),
    ),
    "bigbird_per_head": (
        BIGBIRD_HEADS[False],
        sparse.BigBird(2, num_random_blocks=1, per_head=True),
        lambda n, i, j, causal: in_bigbird(i, j, BIGBIRD_HEADS[causal].layout[n]),
    ),
    "strided": (  # A1 and A2 of the paper are for j <= i; here both sides of i
        sparse.strided(3),
        sparse.Strided(3),
        lambda n, i, j, causal: abs(i - j) <= 3 or (i - j) % 3 == 0,
    ),
    "fixed": (
        sparse.fixed(5, summary=2),
        sparse.Fixed(5, summary=2),
        lambda n, i, j, causal: i // 5 == j // 5 or j % 5 in (3, 4),
    ),
    "chunked_local": (
        sparse.chunked_local(3),
        sparse.ChunkedLocal(3),
        lambda n, i, j, causal: j // 3 in (i // 3, i // 3 - 1),
    ),
    "chunked_local_both_ways": (
        sparse.chunked_local(2, lookback=2, lookahead=1),
        sparse.ChunkedLocal(2, lookback=2, lookahead=1),
        lambda n, i, j, causal: i // 2 - 2 <= j // 2 <= i // 2 + 1,
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def dense(name, causal=True):
    """The definition as an array, bool [N, T, T]."""
    definition = CASES[name][2]
    allowed = np.zeros((N, T, T), bool)
    for n, i, j in np.ndindex(N, T, T):
        allowed[n, i, j] = definition(n, i, j, causal) and (j <= i or not causal)
    return allowed


def numpy_attention(allowed, rows=slice(None), soften=lambda logits: logits, kept=1.0):
    """Softmax over what is allowed, in float64; every query here sees itself."""
    q, k, v = Q[:, rows].astype(float), *(np.repeat(x, N // K, 2).astype(float) for x in (KEYS, V))
    logits = soften(np.einsum("btnh,bsnh->bnts", q, k) / H**0.5)
    weights = np.where(allowed, np.exp(logits), 0)
    return np.einsum("bnts,bsnh->btnh", kept * weights / weights.sum(-1, keepdims=True), v)


def grid(n):
    return np.arange(n).reshape(1, 1, n, 1), np.arange(n).reshape(1, 1, 1, n)


@every_case
def test_a_mask_is_its_paper_s_definition(name):
    mask = CASES[name][0].aligned()
    allowed = mask.mask(*grid(T), np.arange(N).reshape(1, N, 1, 1))
    np.testing.assert_array_equal(
        np.broadcast_to(allowed, (1, N, T, T))[0], dense(name, causal=False)
    )


def compiled(f, *arrays):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})(*arrays)


@every_case
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_op_is_dense_attention_under_the_explicit_mask(name, implementation):
    op = functools.partial(CASES[name][1], implementation=implementation)
    causal, full = compiled(lambda *x: (op(*x, mask=masks.Causal()), op(*x)), Q, KEYS, V)
    assert_close(causal, numpy_attention(dense(name)))
    assert_close(full, numpy_attention(dense(name, causal=False)))


@every_case
def test_gradients_are_those_of_dense_attention_and_none_comes_from_what_is_hidden(name):
    cotangent = np.zeros((B, T, N, H), "f")
    cotangent[:, 9] = RANDOM.randn(B, N, H)

    def gradients(op, mask):
        op = functools.partial(op, mask=mask, implementation="reference")
        return compiled(lambda *x: jax.vjp(op, *x)[1](cotangent), Q, KEYS, V)

    found = gradients(CASES[name][1], masks.Causal())
    expected = gradients(ops.attention, masks.Dense(dense(name)))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, scale=2)
    seen = dense(name)[:, 9].reshape(K, N // K, T).any(1).T  # [T, K]: by any head of a group
    for x in found[1:]:
        np.testing.assert_array_equal(np.abs(x).max((0, 3)) > 0, seen)


@every_case
def test_the_last_queries_alone_need_only_their_positions(name):
    op = CASES[name][1]
    positions = {"q_positions": np.arange(T - 4, T)}
    last = compiled(lambda *x: op(*x, mask=masks.Causal(), **positions), Q[:, T - 4 :], KEYS, V)
    assert_close(last, numpy_attention(dense(name)[:, T - 4 :], slice(T - 4, T)))
    with pytest.raises(ValueError, match="q_positions: 4 queries, 13 keys"):
        op(Q[:, T - 4 :], KEYS, V)


@pytest.mark.parametrize("name", ["longformer_dilated", "bigbird"])
def test_shuffled_tokens_with_their_positions_get_the_same_answers(name):
    op, order = CASES[name][1], RANDOM.permutation(T)
    where = {"q_positions": order, "kv_positions": np.stack([order] * B)}
    shuffled = Q[:, order], KEYS[:, order], V[:, order]
    out = compiled(lambda *x: op(*x, mask=masks.Causal(), **where), *shuffled)
    assert_close(out, numpy_attention(dense(name)[:, order], order))


@every_case
def test_scores_scale_and_dropout_reach_attention(name):
    op, rng = CASES[name][1], jax.random.key(3)
    batch, head, query, key = np.ogrid[:B, :N, :T, :T]
    keep = keep_mask(rng, 0.3, batch=batch, head=head, query=query, key=key)
    settings = {"score": scores.Softcap(0.5), "scale": 2 * H**-0.5, "dropout_rate": 0.3}
    out = compiled(lambda *x: op(*x, mask=masks.Causal(), dropout_rng=rng, **settings), Q, KEYS, V)
    expected = numpy_attention(
        dense(name), soften=lambda x: 0.5 * np.tanh(2 * x / 0.5), kept=np.asarray(keep) / 0.7
    )
    assert_close(out, expected)


# Draws of BigBird


def drawn(n, length=64, **kwargs):
    """The layout without the certain blocks, and the number of blocks open to a draw."""
    settings = {"window_blocks": 3, "num_global_blocks": 2} | kwargs
    layout = sparse.bigbird(length, block_size=2, num_random_blocks=n, **settings).layout
    certain = sparse.bigbird(length, block_size=2, num_random_blocks=0, **settings).layout
    assert not (certain & ~layout).any()
    return layout & ~certain, ~certain


def test_each_block_draws_as_many_others_as_asked_for_or_as_there_are():
    layout, others = drawn(3)
    np.testing.assert_array_equal(layout.sum(-1), np.minimum(3, others.sum(-1)))
    assert others.sum(-1)[:2].max() == 0 and (others.sum(-1)[2:] >= 3).all()
    layout, others = drawn(3, causal=True)
    past = others & np.tri(32, k=-1, dtype=bool)
    assert not (layout & ~past).any()
    np.testing.assert_array_equal(layout.sum(-1), np.minimum(3, past.sum(-1)))
    assert {0, 1, 2, 3} == set(layout.sum(-1).tolist())


def test_a_draw_repeats_and_depends_on_the_seed_and_the_head():
    np.testing.assert_array_equal(drawn(2, seed=5)[0], drawn(2, seed=5)[0])
    assert (drawn(2, seed=5)[0] != drawn(2, seed=6)[0]).any()
    heads = drawn(2, num_heads=4)[0]
    assert heads.shape == (4, 32, 32)
    assert len({layout.tobytes() for layout in heads}) == 4
    np.testing.assert_array_equal(heads[0], drawn(2)[0])


def test_draws_are_spread_over_what_is_open():
    layouts = np.stack([drawn(2, length=24, seed=seed)[0] for seed in range(200)])
    rate = layouts.mean(0)[5]  # block 5 may draw 7 of 12, and draws 2
    assert (rate > 0).sum() == 7 and abs(rate[rate > 0] - 2 / 7).max() < 0.1


def test_a_causal_draw_for_a_shorter_length_is_part_of_that_for_a_longer():
    short, long = (drawn(3, length=n, causal=True)[0] for n in (41, 64))
    np.testing.assert_array_equal(short, long[:21, :21])


def test_the_op_draws_from_the_past_wherever_its_mask_is_joined_with_causal():
    def attend(mask):
        return compiled(
            lambda *x: sparse.BigBird(2, num_random_blocks=1)(*x, mask=mask), Q, KEYS, V
        )

    lengths = masks.Lengths(np.full(B, T))
    causal = numpy_attention(dense("bigbird"))
    for mask in (masks.Causal() & lengths, lengths & (masks.Prefix(T) & masks.Causal())):
        assert_close(attend(mask), causal)
    assert_close(attend(lengths), numpy_attention(dense("bigbird", causal=False)))


def test_bigbird_under_traced_positions_must_be_told_its_length():
    @functools.partial(jax.jit, static_argnames="op")
    def attend(op, positions):
        return op(Q, KEYS, V, mask=masks.Causal(), q_positions=positions, kv_positions=positions)

    op = sparse.BigBird(2, num_random_blocks=1, per_head=True)
    with pytest.raises(ValueError, match=r"length: wanted BigBird\(length=...\)"):
        attend(op, np.arange(T))
    with pytest.raises(ValueError, match="length: wanted at least 13 for this call, got 12"):
        dataclasses.replace(op, length=12)(Q, KEYS, V)
    for length in (T, 20):
        out = attend(dataclasses.replace(op, length=length), np.arange(T))
        assert_close(out, numpy_attention(dense("bigbird_per_head")))


# Blocks


LEAVES = {
    "coarse": lambda r: sparse.chunked_local(r.randint(1, 5), r.randint(0, 3), r.randint(0, 2)),
    "chunk_ends": lambda r: sparse_masks.ChunkEnds(size := r.randint(1, 6), r.randint(1, size + 1)),
}


@pytest.mark.parametrize("name", LEAVES)
def test_covers_are_exact_for_contiguous_positions_and_sound_for_others(name):
    # The shapes are those of mask_algebra_test.
    random, said = np.random.RandomState(0), set()
    for _ in range(200):
        mask = LEAVES[name](random).aligned()
        q_pos = (np.arange(11) + random.randint(-9, 9)).reshape(1, 1, 11, 1)
        kv_pos = (np.arange(13) + random.randint(-9, 9)).reshape(1, 1, 1, 13)
        answer = cover(mask, q_pos, kv_pos)
        np.testing.assert_array_equal(answer, truth(mask, q_pos, kv_pos))
        said |= set(answer.ravel().tolist())
        scattered = random.randint(-9, 25, (2, 1, 11, 1)), random.randint(-9, 25, (2, 1, 1, 13))
        assert_sound(cover(mask, *scattered), truth(mask, *scattered))
    assert said == {masks.NONE, masks.SOME, masks.ALL}


@pytest.mark.parametrize(
    "mask",
    [
        lambda n: sparse.longformer(256, 0),
        lambda n: sparse.longformer(64, (0, 1), dilation=(1, 2)),
        lambda n: sparse.bigbird(n, block_size=128, num_random_blocks=1, causal=True),
        lambda n: sparse.chunked_local(256),
    ],
)
def test_computed_blocks_grow_linearly_with_the_length(mask):
    def computed(n):
        x = jax.ShapeDtypeStruct((1, n, 2, 8), "float32")
        plan = ops.explain(x, x, x, mask=masks.Causal() & mask(n), implementation="blockwise")
        return plan.partial + plan.full

    short, long = computed(8192), computed(16384)
    assert 1.8 * short < long < 2.2 * short


def test_long_sequences_are_computed_in_small_blocks_unless_the_keys_are_scattered(monkeypatch):
    calls = []

    def attention(q, k, v, *, implementation, **kwargs):
        calls.append(implementation)

    monkeypatch.setattr(sparse, "attention", attention)
    long = np.zeros((1, 256, 2, 4), "f")
    for op in (sparse.Local(8), sparse.BigBird(32), sparse.BigBird(5), sparse.Strided(8)):
        op(long, long, long)
        op(long[:, :1], long, long, q_positions=np.array([255]))
        op(long, long, long, implementation="reference")
    wanted = [ops.Blockwise(64, 64), ops.Blockwise(32, 32), ops.Blockwise(20, 20), None]
    assert calls == [x for blocks in wanted for x in (blocks, None, "reference")]


# Ops


@pytest.mark.parametrize(
    "op",
    [
        *(sparse.Local(n) for n in (0, 3)),
        *(sparse.Longformer(3, num_global=n) for n in (0, 2)),
        sparse.Longformer(2, dilation=(1, 3)),
        *(sparse.Fixed(5, summary=n) for n in (1, 2, 5)),
        sparse.Strided(4),
        sparse.ChunkedLocal(5, lookback=0),
        sparse.ChunkedLocal(3, lookback=2),
    ],
    ids=repr,
)
def test_cache_length_counts_the_keys_that_a_later_query_may_see(op):
    for length in (0, 1, 2, 5, 11, 30):
        mask = op.mask(None, 2).aligned()
        later = np.arange(length, length + 60).reshape(1, 1, 60, 1)
        past = np.arange(length).reshape(1, 1, 1, length)
        allowed = np.broadcast_to(mask.mask(later, past, None), (1, 2, 60, length))
        seen = allowed[:, : 2 if isinstance(getattr(op, "dilation", 1), tuple) else 1].any(
            (0, 1, 2)
        )
        # `dilated` keys that no head's window hits may be counted: blocks are bounds.
        assert seen.sum() <= op.cache_length(length) <= length
        if not isinstance(getattr(op, "dilation", 1), tuple):
            assert op.cache_length(length) == seen.sum()


def test_cache_length_of_the_ones_that_forget_and_of_the_ones_that_do_not():
    assert sparse.Local(7).cache_length(100) == 7
    assert sparse.Local(7).cache_length(4) == 4
    assert sparse.Longformer(7, num_global=2).cache_length(100) == 9
    assert sparse.Longformer(7, num_global=2, dilation=(1, 2)).cache_length(100) == 16
    assert sparse.ChunkedLocal(10, lookback=1).cache_length(105) == 15
    assert sparse.Fixed(10).cache_length(105) == 15
    assert sparse.Strided(10).cache_length(105) == 105
    assert sparse.BigBird(2).cache_length(105) == 105


@every_case
def test_an_op_is_a_value_that_a_module_carries(name):
    op = CASES[name][1]
    same = dataclasses.replace(op)
    assert op == same and hash(op) == hash(same)
    modules = [nn.MultiHeadAttention(12, N, op=o, rngs=nnx.Rngs(0)) for o in (op, same)]
    a, b = (nn.split(m)[0] for m in modules)
    assert a == b and hash(a) == hash(b)
    x = jnp.asarray(RANDOM.randn(B, T, 12), "float32")
    q, k, v = modules[0].project(x)
    weights = op.weights(q, k, mask=masks.Causal())
    assert_close(weights, ops.attention_weights(q, k, mask=masks.Dense(dense(name))))
    out = ops.attention(q, k, v, mask=masks.Dense(dense(name)))
    assert_close(modules[0](x, mask=masks.Causal()), modules[0].out(out.reshape(B, T, -1)), scale=2)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: sparse.longformer(-1), "window: wanted an integer of at least 0, got -1"),
        (lambda: sparse.longformer(2, dilation=0), "stride must be .* got 0"),
        (lambda: sparse.longformer(2, dilation=(1.0, 2.0)), "stride must be .* got float64"),
        (lambda: sparse.longformer(2, "a"), "Global: positions must be"),
        (lambda: sparse.bigbird(0, block_size=2), "length: wanted .* at least 1, got 0"),
        (lambda: sparse.bigbird(9, block_size=0), "block_size: wanted .* at least 1, got 0"),
        (lambda: sparse.bigbird(9, block_size=2, window_blocks=2), "window_blocks: .* odd"),
        (lambda: sparse.BigBird(2, num_global_blocks=-1), "num_global_blocks: .* at least 0"),
        (lambda: sparse.BigBird(2, num_random_blocks=1.5), "num_random_blocks: .* got 1.5"),
        (lambda: sparse.BigBird(2, seed=-1), "seed: wanted .* got -1"),
        (lambda: sparse.bigbird(9, block_size=2, num_heads=0), "num_heads: wanted .* got 0"),
        (lambda: sparse.Strided(0), "stride: wanted an integer of at least 1, got 0"),
        (lambda: sparse.Fixed(True), "stride: wanted .* got True"),
        (lambda: sparse.Fixed(3, summary=4), "summary: wanted at most stride = 3, got 4"),
        (lambda: sparse.Fixed(3, summary=0), "summary: wanted .* at least 1, got 0"),
        (lambda: sparse.Local(-1), "window: wanted .* at least 0, got -1"),
        (lambda: sparse.Longformer(1, num_global=-1), "num_global: wanted .* got -1"),
        (lambda: sparse.ChunkedLocal(0), "size must be a positive integer, got 0"),
        (lambda: sparse.ChunkedLocal(2, lookback=-1), "left must be .* got -1"),
    ],
)
def test_bad_settings_are_errors_that_name_them(build, message):
    with pytest.raises(ValueError, match=message):
        build()
