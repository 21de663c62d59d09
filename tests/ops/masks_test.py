"""Each mask against a loop over its definition, and what its constructor refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import masks

B, N, T, S = 2, 3, 5, 7
Q_POS = np.array([[0, 1, 2, 3, 4], [-3, 0, 6, 6, 11]], np.int32).reshape(B, 1, T, 1)
KV_POS = np.array([[0, 1, 2, 3, 4, 5, 6], [-4, -3, 0, 1, 6, 9, 12]], np.int32).reshape(B, 1, 1, S)
HEAD = np.arange(N, dtype=np.int32).reshape(1, N, 1, 1)
LENGTHS = np.array([3, 1])
WINDOWS = np.array([0, 2, 5])
STRIDES = np.array([1, 3, 2])
Q_IDS = np.array([[0, 0, 1, 1, 3], [2, 1, 2, 0, 0]])
KV_IDS = np.array([0, 0, 1, 2, 2, 3, 3])
LAYOUT = np.array([[1, 0, 1], [0, 1, 0]], bool)
LAYOUTS = np.stack([LAYOUT, ~LAYOUT, LAYOUT[::-1]])
DENSE = np.random.RandomState(0).rand(B, 1, T, S) < 0.5


def in_layout(layout, q, kv, size):
    row, column = q // size, kv // size
    rows, columns = layout.shape
    return 0 <= row < rows and 0 <= column < columns and layout[row, column]


# name: (mask, its definition for row b, head n, query t, key s at the positions q and kv)
CASES = {
    "causal": (masks.Causal(), lambda b, n, t, s, q, kv: kv <= q),
    "window_left": (masks.SlidingWindow(2), lambda b, n, t, s, q, kv: q - 2 <= kv <= q),
    "window_both": (masks.SlidingWindow(2, 3), lambda b, n, t, s, q, kv: q - 2 <= kv <= q + 3),
    "window_right": (masks.SlidingWindow(None, 3), lambda b, n, t, s, q, kv: kv <= q + 3),
    "window_open": (masks.SlidingWindow(1, None), lambda b, n, t, s, q, kv: kv >= q - 1),
    "window_none": (masks.SlidingWindow(None, None), lambda b, n, t, s, q, kv: True),
    "window_per_head": (
        masks.SlidingWindow(WINDOWS, WINDOWS[::-1].astype(np.uint8)),
        lambda b, n, t, s, q, kv: q - WINDOWS[n] <= kv <= q + WINDOWS[N - 1 - n],
    ),
    "chunked": (masks.Chunked(3), lambda b, n, t, s, q, kv: q // 3 == kv // 3),
    "prefix": (masks.Prefix(3), lambda b, n, t, s, q, kv: kv < 3),
    "prefix_per_row": (masks.Prefix(LENGTHS), lambda b, n, t, s, q, kv: kv < LENGTHS[b]),
    "prefix_language_model": (
        masks.Causal() | masks.Prefix(3),
        lambda b, n, t, s, q, kv: kv <= q or kv < 3,
    ),
    "lengths": (masks.Lengths(LENGTHS), lambda b, n, t, s, q, kv: kv < LENGTHS[b]),
    "global": (masks.Global((6, 1)), lambda b, n, t, s, q, kv: q in (1, 6) or kv in (1, 6)),
    "global_array": (
        masks.Global(np.array([6, 1, 6])),
        lambda b, n, t, s, q, kv: q in (1, 6) or kv in (1, 6),
    ),
    "global_nobody": (masks.Global(()), lambda b, n, t, s, q, kv: False),
    "dilated": (masks.Dilated(3), lambda b, n, t, s, q, kv: abs(q - kv) % 3 == 0),
    "dilated_per_head": (
        masks.Dilated(STRIDES),
        lambda b, n, t, s, q, kv: abs(q - kv) % STRIDES[n] == 0,
    ),
    "segments": (
        masks.Segments(Q_IDS, KV_IDS),
        lambda b, n, t, s, q, kv: Q_IDS[b, t] == KV_IDS[s],
    ),
    "blocks": (masks.Blocks(LAYOUT, 3), lambda b, n, t, s, q, kv: in_layout(LAYOUT, q, kv, 3)),
    "blocks_per_head": (
        masks.Blocks(LAYOUTS, 2),
        lambda b, n, t, s, q, kv: in_layout(LAYOUTS[n], q, kv, 2),
    ),
    "dense": (masks.Dense(DENSE), lambda b, n, t, s, q, kv: DENSE[b, 0, t, s]),
    "function": (
        masks.from_function(
            lambda q, kv, head, width, n: (kv + width > q) & (head != n),
            WINDOWS.reshape(HEAD.shape),
            1,
        ),
        lambda b, n, t, s, q, kv: kv + WINDOWS[n] > q and n != 1,
    ),
    "tree": (
        ~(masks.Causal() & masks.Chunked(3)) | masks.Global(0),
        lambda b, n, t, s, q, kv: not (kv <= q and q // 3 == kv // 3) or q == 0 or kv == 0,
    ),
}


def expected(definition):
    allowed = np.zeros((B, N, T, S), bool)
    for b, n, t, s in np.ndindex(B, N, T, S):
        allowed[b, n, t, s] = definition(b, n, t, s, Q_POS[b, 0, t, 0], KV_POS[b, 0, 0, s])
    return allowed


@pytest.mark.parametrize("name", CASES)
def test_a_mask_is_its_definition_in_numpy_and_in_jax(name):
    mask, definition = CASES[name]
    allowed = mask.aligned().mask(Q_POS, KV_POS, HEAD)
    assert type(allowed) is np.ndarray and allowed.dtype == bool
    np.testing.assert_array_equal(np.broadcast_to(allowed, (B, N, T, S)), expected(definition))
    jitted = jax.jit(lambda m, *positions: m.aligned().mask(*positions))
    with jax.numpy_rank_promotion("raise"):
        allowed = jitted(mask, Q_POS, KV_POS, HEAD)
    np.testing.assert_array_equal(np.broadcast_to(allowed, (B, N, T, S)), expected(definition))


def test_masks_close_over_nothing_so_numpy_leaves_meet_traced_positions():
    for mask, definition in CASES.values():
        aligned = mask.aligned()
        allowed = jax.jit(aligned.mask)(Q_POS, KV_POS, HEAD)
        np.testing.assert_array_equal(np.broadcast_to(allowed, (B, N, T, S)), expected(definition))


def test_segments_without_kv_ids_compare_the_sequence_with_itself():
    mask = masks.Segments(Q_IDS).aligned().mask(None, None, None)
    np.testing.assert_array_equal(mask[:, 0], Q_IDS[:, :, None] == Q_IDS[:, None, :])
    already_aligned = masks.Segments(Q_IDS[:, None, :, None]).aligned().mask(None, None, None)
    np.testing.assert_array_equal(already_aligned, mask)


def test_a_mask_is_mapped_over_its_operands_by_vmap():
    many = jnp.array([[0, 2, 5], [1, 1, 1]])

    def allowed(windows):
        return masks.SlidingWindow(windows).aligned().mask(Q_POS, KV_POS, HEAD)

    np.testing.assert_array_equal(jax.vmap(allowed)(many), np.stack([allowed(w) for w in many]))


def test_a_function_may_say_true_for_everything():
    assert masks.from_function(lambda q, kv, head: True).mask(Q_POS, KV_POS, HEAD).shape == ()


@pytest.mark.parametrize(
    "f, found",
    [
        (lambda q, kv, head: q - kv, r"got int32 \[2, 1, 5, 7\]"),
        (lambda q, kv, head: None, r"got NoneType \[\]"),
        (lambda q, kv, head: np.ones((3, 1, 5, 7), bool), r"got bool \[3, 1, 5, 7\]"),
        (lambda q, kv, head: np.ones((1, 2, 3, 5, 7), bool), r"got bool \[1, 2, 3, 5, 7\]"),
    ],
)
def test_a_function_that_returns_something_else_is_an_error(f, found):
    message = r"f must return bool, broadcastable to \[2, 3, 5, 7\], " + found
    with pytest.raises(ValueError, match=message):
        masks.from_function(f).mask(Q_POS, KV_POS, HEAD)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: masks.SlidingWindow(-1), "left must be a non-negative integer .* or None, got -1"),
        (lambda: masks.SlidingWindow(1, 2.5), "right must be .* got 2.5"),
        (lambda: masks.SlidingWindow(True), "left must be .* got True"),
        (lambda: masks.SlidingWindow(np.ones(N)), r"left must be .* got float64\[3\]"),
        (lambda: masks.SlidingWindow(np.ones((2, N), int)), r"left must be .* got int64\[2,3\]"),
        (lambda: masks.Chunked(0), "Chunked: size must be a positive integer, got 0"),
        (lambda: masks.Chunked(np.arange(N)), r"size must be a positive integer, got int64\[3\]"),
        (lambda: masks.Dilated(-2), "Dilated: stride must be a positive integer .* got -2"),
        (lambda: masks.Dilated(np.ones(N)), r"stride must be .* got float64\[3\]"),
        (lambda: masks.Prefix(-1), "Prefix: length must be a non-negative integer"),
        (lambda: masks.Lengths("3"), "Lengths: kv_lengths must be .* got '3'"),
        (lambda: masks.Lengths([1.0, 2.0]), r"kv_lengths must be .* got float64\[2\]"),
        (lambda: masks.Segments(np.ones((B, T))), r"q_ids must be an integer .* float64\[2,5\]"),
        (lambda: masks.Segments(None), "q_ids must be an integer array .* got None"),
        (lambda: masks.Segments(Q_IDS, 3), "kv_ids must be an integer array .* got 3"),
        (lambda: masks.Global((1, 2.5)), r"Global: positions must be .* got \(1, 2.5\)"),
        (lambda: masks.Global(np.ones((2, 3), int)), "Global: positions must be"),
        (lambda: masks.Blocks(LAYOUT.astype(int), 3), r"layout must be a bool .* int64\[2,3\]"),
        (lambda: masks.Blocks(LAYOUT[0], 3), r"layout must be .* bool\[3\]"),
        (lambda: masks.Blocks(LAYOUT, 0), "size must be a positive integer, got 0"),
        (lambda: masks.Dense(np.ones((T, S))), r"array must be a bool array .* float64\[5,7\]"),
        (lambda: masks.Dense(np.ones(S, bool)), r"Dense: array must be .* bool\[7\]"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error_that_names_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
