"""`cover` against the truth: sound always, exact for contiguous positions; Kleene's logic."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkv_jax.ops import masks
from qkv_jax.ops.masks import ALL, NONE, SOME

# Shapes are fixed: jax.numpy compiles each operation once. Both lengths end in a short block.
B, N, T, S = 2, 3, 11, 13
Q_BLOCK, KV_BLOCK = 4, 5
HEAD = np.arange(N, dtype=np.int32).reshape(1, N, 1, 1)


def blocks(x, axis, size):
    return [
        x.take(range(i, min(i + size, x.shape[axis])), axis) for i in range(0, x.shape[axis], size)
    ]


def per_block(reduce, x):
    """`reduce` over each block of [., ., T or 1, S or 1]."""
    rows = [reduce(b, axis=2, keepdims=True) for b in blocks(x, 2, Q_BLOCK)]
    x = np.concatenate(rows, axis=2)
    columns = [reduce(b, axis=3, keepdims=True) for b in blocks(x, 3, KV_BLOCK)]
    return np.concatenate(columns, axis=3)


def bounds(x):
    x = np.asarray(x)
    return per_block(np.min, x), per_block(np.max, x)


def jax_bounds(x):
    low, high = bounds(x)
    return jnp.asarray(low), jnp.asarray(high)


def truth(mask, q_pos, kv_pos):
    """NONE, SOME or ALL of each block, from every element of it."""
    allowed = np.broadcast_to(mask.mask(q_pos, kv_pos, HEAD), (B, N, T, S))
    return SOME - (per_block(np.max, allowed) == 0) + (per_block(np.min, allowed) != 0)


def cover(mask, q_pos, kv_pos):
    answer = mask.cover(bounds(q_pos), bounds(kv_pos), bounds)
    assert type(answer) is np.ndarray and answer.dtype == np.int8
    return np.broadcast_to(answer, (B, N, 3, 3))


def jax_cover(mask, q_pos, kv_pos):
    mask = jax.tree.map(jnp.asarray, mask)
    answer = mask.cover(jax_bounds(q_pos), jax_bounds(kv_pos), jax_bounds)
    assert answer.dtype == np.int8
    return np.broadcast_to(answer, (B, N, 3, 3))


# Random masks and positions.

small = st.integers(0, 20)
size = st.integers(1, 6)


def integers(low, high, *shape):
    count = int(np.prod(shape))
    values = st.lists(st.integers(low, high), min_size=count, max_size=count)
    return values.map(lambda v: np.array(v, np.int32).reshape(shape))


def layouts(*shape):
    """Bool arrays with some allowed rectangles, so that all three answers occur."""

    def build(corners):
        array = np.zeros(shape, bool)
        for top, left, height, width in corners:
            array[..., top : top + height, left : left + width] ^= True
        return array

    corner = st.tuples(small.map(lambda i: i % shape[-2]), small.map(lambda i: i % shape[-1]))
    rectangle = st.builds(
        lambda c, h, w: (*c, h, w), corner, st.integers(1, 12), st.integers(1, 12)
    )
    return st.lists(rectangle, min_size=1, max_size=3).map(build)


def sorted_ids(ids):
    return np.sort(ids, axis=-1)


ends = st.one_of(st.none(), small, integers(0, 20, N))
NAMED = {
    "Causal": st.just(masks.Causal()),
    "SlidingWindow": st.builds(masks.SlidingWindow, ends, ends),
    "Chunked": st.builds(masks.Chunked, size),
    "Prefix": st.builds(masks.Prefix, st.one_of(small, integers(0, 20, B))),
    "Lengths": st.builds(masks.Lengths, integers(0, 20, B)),
    "Global": st.builds(
        masks.Global, st.one_of(st.lists(small, max_size=5).map(tuple), integers(-4, 20, 7))
    ),
    "Dilated": st.builds(masks.Dilated, st.one_of(size, integers(1, 6, N))),
    "Blocks": st.builds(masks.Blocks, st.one_of(layouts(4, 5), layouts(N, 4, 5)), size),
    "Dense": st.builds(
        masks.Dense, st.one_of(layouts(T, S), layouts(N, T, S), layouts(B, 1, T, S))
    ),
}
UNSORTED = {
    "Segments": st.builds(masks.Segments, integers(0, 3, B, T), integers(0, 3, S)),
    "function": st.just(
        masks.from_function(lambda q, kv, head, width: kv + head < q + width, HEAD)
    ),
    "function_with_cover": st.builds(
        lambda n: masks.from_function(
            lambda q, kv, head, n: kv >= n,
            n,
            cover=lambda q, kv, bounds, n: masks.Not(masks.Prefix(n)).cover(q, kv, bounds),
        ),
        small,
    ),
}


def trees(leaf):
    return st.one_of(
        st.builds(lambda a, b: a & b, leaf, leaf),
        st.builds(lambda a, b: a | b, leaf, leaf),
        st.builds(lambda a: ~a, leaf),
    )


leaf = st.one_of(*NAMED.values(), *UNSORTED.values())
level_1 = st.one_of(leaf, trees(leaf))
level_2 = st.one_of(level_1, trees(level_1))
any_tree = trees(level_2)

contiguous = st.tuples(st.integers(-9, 15), st.integers(-9, 15)).map(
    lambda start: tuple(
        np.arange(a, a + n, dtype=np.int32).reshape(shape)
        for a, n, shape in zip(start, (T, S), ((1, 1, T, 1), (1, 1, 1, S)), strict=True)
    )
)
scattered = st.tuples(integers(-9, 25, B, 1, T, 1), integers(-9, 25, B, 1, 1, S))
positions = st.one_of(contiguous, scattered)


def examples(number):
    return settings(
        max_examples=number, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


def assert_sound(answer, true):
    """NONE and ALL are promises."""
    wrong = (answer != SOME) & (answer != true)
    assert not wrong.any(), f"cover\n{answer[wrong]}\ntruth\n{true[wrong]}"


@examples(600)
@given(any_tree, positions)
def test_cover_is_sound_on_random_trees(mask, positions):
    mask = mask.aligned()
    assert_sound(cover(mask, *positions), truth(mask, *positions))


@pytest.mark.parametrize("name", NAMED | UNSORTED)
@examples(100)
@given(data=st.data(), positions=positions)
def test_cover_of_each_mask_and_of_its_negation_is_sound(name, data, positions):
    mask = data.draw((NAMED | UNSORTED)[name]).aligned()
    for either in (mask, ~mask):
        assert_sound(cover(either, *positions), truth(either, *positions))


@examples(30)
@given(any_tree, positions)
def test_cover_gives_the_same_answers_in_jax_numpy(mask, positions):
    mask = mask.aligned()
    np.testing.assert_array_equal(jax_cover(mask, *positions), cover(mask, *positions))


@pytest.mark.parametrize("name", NAMED)
@examples(100)
@given(data=st.data(), positions=contiguous)
def test_cover_is_exact_for_contiguous_positions(name, data, positions):
    mask = data.draw(NAMED[name]).aligned()
    np.testing.assert_array_equal(cover(mask, *positions), truth(mask, *positions))


@examples(200)
@given(integers(0, 4, B, S).map(sorted_ids), contiguous)
def test_cover_of_sorted_segments_is_exact(ids, positions):
    mask = masks.Segments(ids[:, :T], ids).aligned()
    np.testing.assert_array_equal(cover(mask, *positions), truth(mask, *positions))


@pytest.mark.parametrize("name", [*NAMED, "Segments"])
def test_cover_says_none_some_and_all_of_blocks_that_are(name):
    """The tests above would pass for masks that never allow, or always do."""
    cases = {
        "Causal": masks.Causal(),
        "SlidingWindow": masks.SlidingWindow(np.array([0, 6, 8]), 6),
        "Chunked": masks.Chunked(8),
        "Prefix": masks.Prefix(6),
        "Lengths": masks.Lengths(np.array([6, 11])),
        "Global": masks.Global(tuple(range(5))),
        "Dilated": masks.Dilated(9),  # ALL: only a block of one element, or a stride of 1
        "Blocks": masks.Blocks(np.eye(3, 3, dtype=bool), 5),
        "Dense": masks.Dense(np.arange(T)[:, None] // 5 == np.arange(S) // 5),
        "Segments": masks.Segments(np.arange(T) // 5, np.arange(S) // 5),
    }
    q_pos = np.arange(T, dtype=np.int32).reshape(1, 1, T, 1)
    kv_pos = np.arange(S, dtype=np.int32).reshape(1, 1, 1, S)
    wanted = {NONE, SOME} if name == "Dilated" else {NONE, SOME, ALL}
    mask = cases[name].aligned()
    assert set(cover(mask, q_pos, kv_pos).ravel().tolist()) == wanted


def test_kleene_truth_tables():
    def constant(value):
        return masks.from_function(
            lambda q, kv, head: q == q, cover=lambda *_: np.full((1, 1, 1, 1), value, np.int8)
        )

    def answer(mask):
        return mask.cover(None, None, None).item()

    for a, b in itertools.product((NONE, SOME, ALL), repeat=2):
        # What a pair of blocks can be said to be, from all truths that each of them may have.
        possible = {NONE: [0], SOME: [0, 1], ALL: [1]}
        said = {(0,): NONE, (0, 1): SOME, (1,): ALL}
        pairs = list(itertools.product(possible[a], possible[b]))
        assert answer(constant(a) & constant(b)) == said[tuple(sorted({x & y for x, y in pairs}))]
        assert answer(constant(a) | constant(b)) == said[tuple(sorted({x | y for x, y in pairs}))]
        assert answer(~constant(a)) == said[tuple(sorted({1 - x for x in possible[a]}))]


def test_cover_runs_under_jit_with_traced_positions_and_operands():
    mask = masks.Causal() & masks.SlidingWindow(np.array([2, 4, 6])) | masks.Global((1, 2))
    mask = (mask & ~masks.Blocks(np.eye(3, dtype=bool)[None].repeat(N, 0), 4)).aligned()
    q_pos = np.arange(T, dtype=np.int32).reshape(1, 1, T, 1)
    kv_pos = np.arange(S, dtype=np.int32).reshape(1, 1, 1, S)

    @jax.jit
    def run(mask, q_interval, kv_interval):  # each operand here is one value per head
        return mask.cover(q_interval, kv_interval, lambda x: (x, x))

    answer = run(mask, bounds(q_pos), bounds(kv_pos))
    np.testing.assert_array_equal(np.broadcast_to(answer, (B, N, 3, 3)), cover(mask, q_pos, kv_pos))


def test_cover_answers_for_the_heads_of_a_cut():
    mask = (masks.Blocks(np.eye(3, dtype=bool)[None] ^ (HEAD[0] == 1), 4)).aligned()
    q_pos = np.arange(T, dtype=np.int32).reshape(1, 1, T, 1)
    kv_pos = np.arange(S, dtype=np.int32).reshape(1, 1, 1, S)
    cut = jax.tree.map(lambda x: x[:, 1:2] if x.ndim == 4 else x, mask)
    answer = cut.cover(bounds(q_pos), bounds(kv_pos), bounds)
    np.testing.assert_array_equal(answer, cover(mask, q_pos, kv_pos)[:1, 1:2])
    np.testing.assert_array_equal(
        cut.mask(q_pos, kv_pos, HEAD[:, 1:2]), mask.mask(q_pos, kv_pos, HEAD)[:, 1:2]
    )


def test_positions_used_are_those_that_any_child_reads():
    lengths, segments = masks.Lengths(np.arange(B)), masks.Segments(np.zeros(T, int))
    assert not (lengths & ~segments).uses_q_positions
    assert (lengths & ~segments).uses_kv_positions
    assert not (segments | ~masks.Dense(np.ones((T, S), bool))).uses_kv_positions
    assert (segments | ~masks.Causal()).uses_q_positions
    assert not masks.Prefix(3).uses_q_positions
    for mask in (masks.SlidingWindow(2), masks.Chunked(2), masks.Global(0), masks.Dilated(2)):
        assert mask.uses_q_positions and mask.uses_kv_positions


def test_and_or_of_python_are_refused_for_they_would_drop_a_mask():
    with pytest.raises(ValueError, match="combine masks with &"):
        masks.Causal() and masks.Prefix(3)
    with pytest.raises(TypeError):
        masks.Causal() & np.ones((T, S), bool)
