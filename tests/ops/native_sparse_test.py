"""Native sparse attention against a loop over the paper's equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import block_selection, masks, scores
from qkv_jax.ops.native_sparse import (
    Pattern,
    blocks_by_importance,
    importance_of_blocks,
    native_sparse_attention,
)
from tests.tolerances import assert_close

B, T, N, K, H, h = 2, 23, 6, 3, 5, 4
PATTERN = Pattern(
    compressed_size=4, stride=2, block_size=6, num_selected=3, window=4, num_initial=1, num_local=1
)
M = 10  # rows: the last whole one begins at 18
RANDOM = np.random.RandomState(0)
Q, KEYS, V, CK, CV = (
    RANDOM.randn(B, *shape) for shape in ((T, N, H), (T, K, H), (T, K, h), (M, K, H), (M, K, h))
)  # fmt: skip
Q *= 3  # so that importances differ
GATES = RANDOM.rand(B, T, N, 3)
LENGTHS = np.array([14, 23])
CAUSAL = masks.Causal()
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def attend(q, k, v, ck, cv, gates, mask=CAUSAL, pattern=PATTERN, **kwargs):
    return native_sparse_attention(
        q, k, v, compressed_k=ck, compressed_v=cv, gates=gates, pattern=pattern, mask=mask, **kwargs
    )


def softmax(q, keys, values):
    """One query over a list of keys: weights, and the output, 0 for no keys."""
    if not len(keys):
        return np.zeros(0), np.zeros(h)
    weights = np.exp(keys @ q / H**0.5)
    weights /= weights.sum()
    return weights, weights @ values


def rows_of(t):
    """The compressed rows that t may see: those whose last token is t or earlier."""
    return [i for i in range(M) if i * 2 + 4 - 1 <= t]


ROWS = masks.Dense(np.array([[i in rows_of(t) for i in range(M)] for t in range(T)]))


def row_lse(q, ck):
    return ops.attention_with_stats(q, ck, ck, mask=ROWS)[1].lse


def selected(b, t, kv_head):
    """The first block, its own, and the best of the others by equations 8 to 10."""
    importance = np.zeros(t // 6 + 1)
    for n in range(kv_head * N // K, (kv_head + 1) * N // K):
        rows = rows_of(t)
        weights, _ = softmax(Q[b, t, n], CK[b, rows, kv_head], CV[b, rows, kv_head])
        for j in range(len(importance)):
            # Blocks are 3 strides long and rows 2: stride m of block j is stride n of row j*3+m-n.
            for m in range(3):
                for stride in range(2):
                    if j * 3 + m - stride in rows:
                        importance[j] += weights[rows.index(j * 3 + m - stride)]
    importance[[0, -1]] = np.inf
    return np.argsort(-importance, kind="stable")[:3]


@functools.cache
def loop():
    """The three branches, [B, T, N, 3, h]."""
    out = np.zeros((B, T, N, 3, h))
    for b, t, n in np.ndindex(B, T, N):
        kv_head, rows = n * K // N, rows_of(t)
        blocks = selected(b, t, kv_head)
        key_sets = [
            [s for s in range(t + 1) if s // 6 in blocks],
            [s for s in range(t + 1) if s >= t - 4],
        ]
        sources = [(CK[b, rows, kv_head], CV[b, rows, kv_head])]
        sources += [(KEYS[b, keys, kv_head], V[b, keys, kv_head]) for keys in key_sets]
        for i, source in enumerate(sources):
            out[b, t, n, i] = softmax(Q[b, t, n], *source)[1]
    return out


@pytest.mark.parametrize("short", [0, 1024], ids=["tiles", "mask"])
def test_it_is_the_paper_s_loop(short, monkeypatch):
    monkeypatch.setattr(block_selection, "SHORT", short)
    with jax.enable_x64(True):
        out = compiled(attend)(Q, KEYS, V, CK, CV, GATES)
        assert_close(out, (GATES[..., None] * loop()).sum(3))


def test_each_branch_has_its_gate_and_no_rows_yet_give_0():
    for i in range(3):
        gates = np.broadcast_to(np.eye(3)[i], GATES.shape)
        out = compiled(attend)(*(x.astype("f") for x in (Q, KEYS, V, CK, CV, gates)))
        assert_close(out, loop()[..., i, :], scale=3)
        if i == 0:
            np.testing.assert_array_equal(out[:, :3], 0)


def test_the_selection_is_the_loop_s_also_a_few_rows_at_a_time(monkeypatch):
    def choose(q, ck):
        return blocks_by_importance(q, ck, row_lse(q, ck), pattern=PATTERN, scale=H**-0.5)

    at_once = jax.jit(lambda *x: choose(*x))(Q.astype("f"), CK)
    for b, t, n in np.ndindex(B, T, K):
        blocks = np.asarray(at_once[b, t, n])
        assert sorted(blocks[blocks >= 0]) == sorted(selected(b, t, n))
    monkeypatch.setattr("qkv_jax.ops.native_sparse.SCORES", 7 * B * N * M)
    np.testing.assert_array_equal(jax.jit(lambda *x: choose(*x))(Q.astype("f"), CK), at_once)


@pytest.mark.parametrize(
    ("size", "stride", "block"), [(4, 2, 6), (4, 4, 4), (6, 2, 2), (6, 3, 12), (5, 3, 4), (3, 2, 2)]
)
def test_rows_give_blocks_their_weight_per_shared_token(size, stride, block):
    pattern, num_blocks = Pattern(size, stride, block), -(-T // block)
    rows = [i + size - 1 for i in range(0, T - size + 1, stride)]
    np.testing.assert_array_equal(pattern.last_tokens(T), rows)
    weights = RANDOM.rand(5, len(rows)).astype("f")
    expected = np.zeros((5, num_blocks))
    for i, last in enumerate(rows):
        for token in range(last - size + 1, last + 1):
            expected[:, token // block] += weights[:, i] / stride
    if size % stride == block % stride == 0:  # the paper's equation 9
        by_strides = np.zeros((5, num_blocks))
        for j, m, n in np.ndindex(num_blocks, block // stride, size // stride):
            if 0 <= (i := j * block // stride + m - n) < len(rows):
                by_strides[:, j] += weights[:, i]
        assert_close(by_strides, expected)
    assert_close(importance_of_blocks(weights, num_blocks, pattern), expected)


@pytest.mark.parametrize("short", [0, 1024], ids=["tiles", "mask"])
def test_gradients_reach_every_argument_and_only_from_what_is_seen(short, monkeypatch):
    monkeypatch.setattr(block_selection, "SHORT", short)
    t, b = 13, 1
    cotangent = np.zeros((B, T, N, h))
    cotangent[b, t] = 1

    @compiled
    def gradients(*inputs):
        return jax.vjp(attend, *inputs)[1](jnp.asarray(cotangent))

    with jax.enable_x64(True):
        q, k, v, ck, cv, gates = (np.abs(x) > 0 for x in gradients(Q, KEYS, V, CK, CV, GATES))
        for x in (q, gates):
            np.testing.assert_array_equal(x.any((0, 2, 3)), np.arange(T) == t)
        for x in (ck, cv):
            np.testing.assert_array_equal(x[b].any((1, 2)), np.isin(np.arange(M), rows_of(t)))
        for n in range(K):
            blocks = selected(b, t, n)
            seen = [s <= t and (s // 6 in blocks or s >= t - 4) for s in range(T)]
            for x in (k, v):
                np.testing.assert_array_equal(x[b, :, n].any(-1), seen)


def test_gradients_are_those_of_the_three_attentions():
    def by_hand(q, k, v, ck, cv, gates):
        chosen = blocks_by_importance(q, ck, row_lse(q, ck), pattern=PATTERN, scale=H**-0.5)
        in_blocks = block_selection.selection_mask(chosen, num_heads=N, num_keys=T, block_size=6)
        branches = [
            ops.attention(q, ck, cv, mask=ROWS),
            ops.attention(q, k, v, mask=in_blocks & masks.Causal()),
            ops.attention(q, k, v, mask=masks.SlidingWindow(4)),
        ]
        return jnp.einsum("btni,ibtnh->btnh", gates, jnp.stack(branches))

    cotangent = RANDOM.randn(B, T, N, h)
    with jax.enable_x64(True):
        found, expected = compiled(
            lambda *x: [jax.vjp(f, *x)[1](jnp.asarray(cotangent)) for f in (attend, by_hand)]
        )(Q, KEYS, V, CK, CV, GATES)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)


def test_padding_changes_nothing():
    """What padding holds reaches no output, not even those at padded places."""
    real = (np.arange(T) < LENGTHS[:, None])[..., None, None]
    whole = (PATTERN.last_tokens(T) < LENGTHS[:, None])[..., None, None]
    mask, outs = masks.Causal() & masks.Lengths(LENGTHS), []
    padded = compiled(functools.partial(attend, mask=mask))
    with jax.enable_x64(True):
        for fill in (9.0, -30.0 * RANDOM.randn(H)):
            k, v = (
                np.where(real, KEYS, fill),
                np.where(real, V, fill[:h] if np.ndim(fill) else fill),
            )
            ck, cv = np.where(whole, CK, fill), np.where(whole, CV, 9.0)
            outs.append(padded(Q, k, v, ck, cv, GATES))
        assert_close(outs[0], outs[1])
        rows = real[..., 0, 0]
        assert_close(outs[0][rows], (GATES[..., None] * loop()).sum(3)[rows])


def test_a_row_counts_for_the_query_at_its_last_token():
    pattern = Pattern(4, 2, 2, num_selected=2, num_initial=0, num_local=1)
    q, ck = np.ones((1, 8, 1, 1), "f"), np.array([1, 0, 3], "f").reshape(1, 3, 1, 1)
    lse = np.zeros((1, 1, 8), "f")
    chosen = blocks_by_importance(q, ck, lse, pattern=pattern, scale=1.0)
    # Rows are blocks 0-1, 1-2 and 2-3, and the last token of row 2 is 7.
    np.testing.assert_array_equal(chosen[0, 6:, 0], [[3, 1], [3, 2]])


def test_a_sequence_shorter_than_a_row_has_no_first_branch():
    x = [a[:, :3] for a in (Q, KEYS, V)]
    empty = np.zeros((B, 0, K, H)), np.zeros((B, 0, K, h))
    with jax.enable_x64(True):
        out = compiled(attend)(*x, *empty, GATES[:, :3])
        assert_close(out, (GATES[..., None] * loop()).sum(3)[:, :3])


def test_dropout_falls_on_each_branch_by_itself():
    drop = functools.partial(attend, dropout_rate=0.4, dropout_rng=jax.random.key(0))
    for i in range(3):
        gates = np.broadcast_to(np.eye(3)[i], GATES.shape)
        out = compiled(drop)(*(x.astype("f") for x in (Q, KEYS, V, CK, CV, gates)))
        assert np.abs(out - loop()[..., i, :]).max() > 0.1
    same = [compiled(drop)(Q, KEYS, V, CK, CV, GATES) for _ in range(2)]
    np.testing.assert_array_equal(*same)


def test_the_output_has_the_dtype_of_the_values():
    inputs = [jnp.asarray(x, "bfloat16") for x in (Q, KEYS, V, CK, CV, GATES)]
    out = compiled(attend)(*inputs)
    assert out.dtype == "bfloat16"
    wide = compiled(attend)(*(x.astype("float32") for x in inputs))
    assert_close(out, wide, "bfloat16", scale=2)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"score": scores.Softcap(1.0)}, NotImplementedError, "score: native sparse attention"),
        ({"q_positions": np.arange(T)}, NotImplementedError, "q_positions: native sparse"),
        ({"mask": None}, NotImplementedError, r"mask: .* causal, so wanted Causal\(\)"),
        ({"mask": masks.Prefix(2)}, NotImplementedError, "mask: native sparse .* Prefix"),
        (
            {"ck": CK[:, 1:]},
            ValueError,
            r"compressed_k: wanted \[2, 10, 3, 5\], got \[2, 9, 3, 5\]",
        ),
        ({"cv": CK}, ValueError, r"compressed_v: wanted \[2, 10, 3, 4\], got"),
        ({"gates": GATES[..., :2]}, ValueError, r"gates: wanted \[2, 23, 6, 3\], got"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_names_it(kwargs, error, message):
    inputs = {"q": Q, "k": KEYS, "v": V, "ck": CK, "cv": CV, "gates": GATES}
    with pytest.raises(error, match=message):
        attend(**(inputs | kwargs))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"stride": 0}, "stride: wanted an integer of at least 1, got 0"),
        ({"window": -1}, "window: wanted an integer of at least 0, got -1"),
        ({"block_size": 2.0}, "block_size: wanted an integer .* got 2.0"),
        ({"num_selected": 2}, r"num_selected: wanted at least num_initial \+ num_local = 3, got 2"),
    ],
)
def test_bad_patterns_are_errors_that_name_the_setting(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Pattern(**kwargs)
