"""Caches against a plain list of (position, numbers) for each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv_jax.ops.cache import EMPTY, Cache, QuantizedCache, among_all, of_these

# Shapes are fixed: each compiles once.
B, SHAPES = 2, ((3,), (2, 5))
KINDS = {
    "full": {"capacity": 13},
    "rolling": {"capacity": 7, "rolling": True},
    "sinks": {"capacity": 7, "rolling": True, "num_sinks": 2},
}
every_kind = pytest.mark.parametrize("name", KINDS)


def empty(name="full", kind=Cache, **settings):
    settings = KINDS[name] | settings
    return kind.empty(B, settings.pop("capacity"), *SHAPES, **settings)


def tokens(length, seed=0):
    random = np.random.RandomState(seed)
    return tuple(jnp.asarray(random.randn(B, length, *s), jnp.float32) for s in SHAPES)


def numbers(arrays):
    """What a token leaves, as one row: [B, T, all numbers]."""
    return np.concatenate([np.asarray(x).reshape(*x.shape[:2], -1) for x in arrays], axis=-1)


def found(arrays, positions, row, last):
    """What a query at `last` finds in a row: positions in order, and the numbers there."""
    at = np.asarray(positions)[row]
    order = np.argsort(at, kind="stable")[: (at <= last).sum()]
    return at[order].tolist(), numbers(arrays)[row, order]


def kept(name, tokens, last):
    """The same of a list of numbers by position: the first ones, and the last ones up to `last`."""
    settings = {"rolling": False, "num_sinks": 0} | KINDS[name]
    least = last - (settings["capacity"] - settings["num_sinks"]) if settings["rolling"] else -1
    end = last + 1 if settings["rolling"] else min(last + 1, settings["capacity"])
    at = [p for p in range(end) if p < settings["num_sinks"] or p > least]
    return at, np.reshape([tokens[p] for p in at], (len(at), 13))


def assert_same(actual, expected):
    assert actual[0] == expected[0]
    np.testing.assert_array_equal(actual[1], expected[1])


attended = jax.jit(lambda cache, *args: cache.attended(*args))
CALLS = st.lists(
    st.sampled_from([1, 4]).flatmap(
        lambda T: st.tuples(st.just(T), *[st.one_of(st.just(T), st.integers(0, T))] * B)
    ),
    min_size=1,
    max_size=7,
)


@every_kind
@settings(max_examples=60, deadline=None)
@given(calls=CALLS)
def test_whatever_is_appended_each_query_finds_what_a_list_holds(name, calls):
    cache, rows = empty(name), [[] for _ in range(B)]
    rest = cache.capacity - cache.num_sinks
    for seed, (T, *lengths) in enumerate(calls):
        starts = np.array([len(row) for row in rows])
        new = tokens(T, seed)
        shared = (starts == starts[0]).all()
        positions = np.arange(T) + (starts[0] if shared else starts[:, None])
        padded = None if set(lengths) == {T} else np.array(lengths)
        arrays, at, cache = attended(cache, new, positions, padded)
        for b, row in enumerate(rows):
            row.extend(numbers(new)[b, : lengths[b]])
            for last in range(starts[b], len(row)):
                seen, values = found(arrays, at, b, last)
                # A mask may hide what is too old. Nothing may be there twice.
                if cache.rolling:
                    young = [p < cache.num_sinks or p > last - rest for p in seen]
                    seen, values = np.array(seen)[young].tolist(), values[young]
                assert_same((seen, values), kept(name, row, last))
            end = len(row) - 1
            assert_same(found(cache.read(), cache.positions, b, end), kept(name, row, end))
            assert_same(found(cache.read(), cache.positions, b, EMPTY - 1), kept(name, row, end))


@every_kind
def test_many_tokens_leave_what_one_by_one_leave_and_a_scan_too(name):
    cache, new = empty(name), tokens(17)
    at_once = cache.append(new, jnp.arange(17))

    def step(cache, token):
        position, token = token
        return cache.append([x[:, None] for x in token], position[None]), None

    by_time = tuple(jnp.moveaxis(x, 1, 0) for x in new)
    scanned, _ = jax.lax.scan(step, cache, (jnp.arange(17), by_time))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), at_once, scanned))
    assert (np.asarray(cache.positions) == EMPTY).all()  # a cache never changes


@every_kind
def test_a_donated_cache_gives_its_memory_to_the_next(name):
    append = jax.jit(Cache.append, donate_argnums=0)
    cache, new = empty(name), tokens(4)
    wanted = cache.append(new, jnp.arange(4))
    places = [x.unsafe_buffer_pointer() for x in cache.stored]
    after = append(cache, new, jnp.arange(4))
    assert [x.unsafe_buffer_pointer() for x in after.stored] == places
    assert all(x.is_deleted() for x in cache.stored)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after, wanted))


def test_a_cache_says_its_size_and_returns_its_dtype():
    cache = empty(dtype="bfloat16")
    assert cache.capacity == 13
    assert cache.nbytes == 2 * B * 13 * (3 + 10)
    assert [x.dtype for x in cache.append(tokens(4), jnp.arange(4)).read()] == ["bfloat16"] * 2


@pytest.mark.parametrize("settings", [{"capacity": 0}, {"capacity": 2, "num_sinks": 2}], ids=repr)
def test_a_cache_of_nothing_is_refused(settings):
    with pytest.raises(ValueError, match=r"capacity: wanted more than num_sinks = \d slots, got"):
        Cache.empty(B, settings.pop("capacity"), *SHAPES, **settings)


# Int8


@every_kind
def test_int8_is_off_by_at_most_half_a_scale(name):
    new = tokens(17)
    exact, rounded = (
        empty(name, kind).append(new, jnp.arange(17)) for kind in (Cache, QuantizedCache)
    )
    np.testing.assert_array_equal(exact.positions, rounded.positions)
    for x, y in zip(exact.read(), rounded.read(), strict=True):
        half = np.abs(x).max(-1, keepdims=True) / 127 / 2
        error = np.abs(x - y)
        assert (error <= half * (1 + 1e-5)).all() and (error > 0.8 * half).any()


def test_new_tokens_are_seen_as_int8_will_keep_them():
    new = tokens(4)
    for name in KINDS:
        arrays, positions, _ = empty(name, QuantizedCache).attended(new, jnp.arange(4))
        stored = empty("full", QuantizedCache).append(new, jnp.arange(4))
        assert_same(found(arrays, positions, 1, 3), found(stored.read(), stored.positions, 1, 3))


def test_int8_keeps_zeros_and_takes_a_quarter_of_the_bytes():
    exact, rounded = (kind.empty(B, 5, (3, 64), (3, 64)) for kind in (Cache, QuantizedCache))
    assert rounded.nbytes <= 0.27 * exact.nbytes
    zeros = [jnp.zeros((B, 1, 3, 64))] * 2
    with jax.debug_nans(True):
        assert all((x == 0).all() for x in rounded.append(zeros, jnp.arange(1)).read())


def test_int8_returns_the_dtype_that_it_was_given():
    cache = empty("full", QuantizedCache, dtype="bfloat16").append(tokens(4), jnp.arange(4))
    assert [x.dtype for x in cache.read()] == ["bfloat16"] * 2
    assert [x.dtype for x in cache.stored] == ["int8", "float32"] * 2


# All queries of a sequence


@pytest.mark.parametrize(
    "positions",
    [np.arange(5, 9), np.array([[5, 6, 7, 8], [9, 10, 11, 12]])],
    ids=["shared", "rows"],
)
def test_queries_among_zeros_come_back(positions):
    x = tokens(4)[1]
    whole = among_all(x, positions, 17)
    assert whole.shape == (B, 17, 2, 5)
    assert (np.asarray(of_these(whole, positions)) == x).all()
    assert (whole != 0).sum() == x.size


def test_queries_beyond_the_end_are_lost():
    whole = among_all(tokens(4)[1], np.arange(15, 19), 17)
    assert (np.flatnonzero(np.any(np.asarray(whole) != 0, axis=(0, 2, 3))) == [15, 16]).all()
