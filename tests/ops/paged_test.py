"""Paged caches against plain ones that are told the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv_jax.models import Decoder, DecoderConfig
from qkv_jax.ops.cache import EMPTY, Cache
from qkv_jax.ops.paged import PagedCache, Pages
from tests.parameters import randomised
from tests.tolerances import assert_close

# Shapes are fixed: each compiles once.
B, CAPACITY, SHAPES = 3, 15, ((3,), (2, 5))


def empty(num_pages=15, page_size=3):
    return Pages(num_pages, page_size).empty(B, CAPACITY, *SHAPES)


def tokens(length, seed=0):
    random = np.random.RandomState(seed)
    return tuple(jnp.asarray(random.randn(B, length, *s), jnp.float32) for s in SHAPES)


def assert_same(paged, plain):
    """Equal positions, and equal arrays wherever there is a token."""
    np.testing.assert_array_equal(paged.positions, plain.positions)
    real = np.asarray(plain.positions) < EMPTY
    for x, y in zip(paged.read(), plain.read(), strict=True):
        np.testing.assert_array_equal(np.asarray(x)[real], np.asarray(y)[real])


def pages_of(paged):
    """The pages that rows have."""
    table = np.asarray(paged.table)
    return table[table < paged.num_pages].tolist()


append = jax.jit(lambda cache, *args: cache.append(*args))
release = jax.jit(PagedCache.release)
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), *[st.integers(0, 4)] * B),
        st.tuples(st.just("release"), *[st.booleans()] * B),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(calls=CALLS)
def test_rows_that_come_and_go_have_what_a_plain_cache_holds(calls):
    paged, plain = empty(), Cache.empty(B, CAPACITY, *SHAPES)
    starts = np.zeros(B, int)
    for seed, (call, *rows) in enumerate(calls):
        rows = np.array(rows)
        if call == "append":
            new = tokens(4, seed), starts[:, None] + np.arange(4), rows
            needed = paged.pages_needed(*new[1:])
            paged, plain, before = append(paged, *new), append(plain, *new), paged
            assert before.free_pages - paged.free_pages == needed
            starts += rows
        else:
            paged = release(paged, rows)
            cleared = np.where(rows[:, None], EMPTY, plain.positions)
            plain = dataclasses.replace(plain, positions=jnp.asarray(cleared))
            starts[rows] = 0
        assert_same(paged, plain)
        pages = pages_of(paged)
        assert len(set(pages)) == len(pages) == paged.num_pages - paged.free_pages
        assert len(pages) == np.ceil(np.minimum(starts, CAPACITY) / 3).sum()


def test_what_new_tokens_see_is_what_they_see_in_a_plain_cache():
    paged, plain = empty(), Cache.empty(B, CAPACITY, *SHAPES)
    for start in (0, 4):
        new = tokens(4, start), jnp.arange(start, start + 4)
        (arrays, at, paged), (wanted, wanted_at, plain) = paged.attended(*new), plain.attended(*new)
        np.testing.assert_array_equal(at, wanted_at)
        for x, y in zip(arrays, wanted, strict=True):
            np.testing.assert_array_equal(x[:, : start + 4], y[:, : start + 4])


def test_an_exhausted_pool_loses_new_tokens_and_overwrites_none():
    paged = empty(num_pages=4).append(tokens(3), jnp.arange(3))  # a page for each row
    assert paged.free_pages == 1
    more = tokens(4, seed=1), jnp.arange(3, 7)
    assert paged.pages_needed(more[1]) == 6
    after = append(paged, *more)
    assert after.free_pages == 0
    assert (np.asarray(after.positions < EMPTY).sum(1) == [6, 3, 3]).all()
    for x, first, second in zip(after.read(), tokens(3), more[0], strict=True):
        np.testing.assert_array_equal(x[:, :3], first)
        np.testing.assert_array_equal(x[0, 3:6], second[0, :3])


def test_of_a_pool_that_is_too_small_from_the_start_each_page_has_one_row():
    paged = append(empty(num_pages=4), tokens(4), jnp.arange(4))
    assert paged.free_pages == 0 and sorted(pages_of(paged)) == [0, 1, 2, 3]
    assert (np.asarray(paged.positions < EMPTY).sum(1) == [4, 4, 0]).all()


def test_a_pool_is_as_large_as_its_pages():
    paged = empty(num_pages=4)
    assert (paged.num_pages, paged.page_size, paged.capacity) == (4, 3, CAPACITY)
    assert paged.nbytes == 4 * 3 * 13 * 4
    assert Pages(4, 4).empty(B, CAPACITY, *SHAPES).capacity == 16  # whole pages


def test_a_donated_pool_stays_where_it_is_and_a_scan_carries_it():
    step = jax.jit(PagedCache.append, donate_argnums=0)
    paged = step(empty(), tokens(4), jnp.arange(4))
    places = [x.unsafe_buffer_pointer() for x in paged.stored]
    after = step(paged, tokens(4), jnp.arange(4, 8))
    assert [x.unsafe_buffer_pointer() for x in after.stored] == places

    def one(cache, position):
        return cache.append(tokens(1), position[None]), None

    scanned, _ = jax.lax.scan(one, empty(), jnp.arange(4))
    assert (np.asarray(scanned.positions[:, :4]) == np.arange(4)).all()


def test_a_rolling_cache_is_not_paged():
    cache = Pages(4, 3).empty(B, 7, *SHAPES, rolling=True, num_sinks=2)
    assert type(cache) is Cache and cache.rolling and cache.num_sinks == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pages": 0}, "num_pages: wanted a positive integer, got 0"),
        ({"page_size": 0}, "page_size: wanted a positive integer, got 0"),
    ],
)
def test_no_pages_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        empty(**settings)


@pytest.mark.parametrize("mixer", ["attention", "latent", "moba"])
def test_a_decoder_reads_from_pages_what_it_reads_from_a_plain_cache(mixer):
    """Rows of different lengths; then a new text in the place of one, on the pages of two."""
    config = DecoderConfig(
        vocab_size=11, context=24, num_layers=2, width=8, num_heads=2, position="rotary",
        mixer=mixer, **({"block_size": 4, "num_blocks": 2} if mixer == "moba" else {}),
    )  # fmt: skip
    model = randomised(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), scale=0.3)
    extend = jax.jit(lambda tokens, cache, **kw: model.extend(tokens, cache, **kw))
    text = np.random.RandomState(0).randint(0, 11, (B, 5))
    lengths = np.array([5, 2, 3])
    plain, paged = (
        model.init_cache(B, 16, **kind) for kind in ({}, {"kind": Pages(num_pages=7, page_size=2)})
    )
    for _ in range(2):
        (x, plain), (y, paged) = (
            extend(text, cache, positions=np.arange(5), lengths=lengths) for cache in (plain, paged)
        )
        real = np.arange(5) < lengths[:, None]
        assert_close(y[real], x[real])
        (x, plain), (y, paged) = (
            extend(text[:, :1], cache, positions=lengths[:, None]) for cache in (plain, paged)
        )
        assert_close(y, x)
        assert [layer.free_pages for layer in paged] == [0, 0]
        paged = [layer.release(np.array([True] * B)) for layer in paged]
        text, lengths = text[::-1], lengths[::-1]
