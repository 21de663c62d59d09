"""A page of attention: it holds what it was given, as data, and loads nothing."""

import base64
import dataclasses
import re
import zlib

import numpy as np
import pytest

from qkv_jax.viz import AttentionView, PageTable, attention_page
from tests.pages import data_of

L, N, T, S, K, H = 3, 4, 5, 7, 2, 6
RNG = np.random.RandomState(0)
RAW = RNG.rand(L, N, T, S) ** 4
WEIGHTS = (RAW / RAW.sum(-1, keepdims=True)).astype("f")
QUERIES, KEYS = list("abcde"), [f"k{s}" for s in range(S)]
VIEW = AttentionView(
    "cross", WEIGHTS, QUERIES, KEYS, RNG.randn(L, T, N, H), RNG.randn(L, S, K, H),
    {"entropy": RNG.rand(L, N)},
)  # fmt: skip
EVIL = '</script><script>alert("x")</script><!-- $title & "quotes" 私'


def unpacked(text, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def test_weights_are_kept_to_half_a_level():
    (view,) = data_of(attention_page([VIEW], title="t"))["views"]
    levels = view["levels"]
    assert levels == 255 and view["shape"] == [L, N, T, S] and not view["self"]
    kept = unpacked(view["cells"], np.uint8).reshape(L, N, T, S) / levels
    np.testing.assert_allclose(kept, np.sqrt(WEIGHTS), atol=0.5 / levels + 1e-6)
    assert (view["queries"], view["keys"]) == (QUERIES, KEYS)


def kept(vectors, shape):
    """Vectors as the page shows them, and the step that each is rounded to."""
    scales = unpacked(vectors["scales"], np.float32).reshape(*shape[:-1], 1)
    return unpacked(vectors["integers"], np.int8).reshape(shape) * scales, scales


def test_queries_and_keys_are_kept_head_by_head_to_half_a_step():
    wide = RNG.randn(L, T, N, H) * 10.0 ** RNG.randint(-3, 4, (L, T, N, 1))  # of any length
    wide[1, 2, 3] = 0
    page = attention_page([dataclasses.replace(VIEW, q=wide)], title="t")
    (view,) = data_of(page)["views"]
    assert (view["width"], view["key_heads"]) == (H, K)  # shared keys are there once
    for vectors, given in ((view["q"], wide), (view["k"], VIEW.k)):
        given = np.moveaxis(given, 2, 1)
        shown, steps = kept(vectors, given.shape)
        assert (abs(shown - given) <= 0.501 * steps).all()
        np.testing.assert_allclose(steps[..., 0], abs(given).max(-1) / 127, rtol=1e-6)


def test_a_page_that_would_be_too_large_has_fewer_levels():
    short, long = (RNG.dirichlet(np.ones(T), (2, 4, T)).astype("f") for T in (40, 300))
    (view,) = data_of(attention_page([AttentionView("l", long, ["x"] * 300)], title="t"))["views"]
    assert view["levels"] < 255 and len(view["cells"]) <= 340_000
    (view,) = data_of(attention_page([AttentionView("s", short, ["x"] * 40)], title="t"))["views"]
    assert view["levels"] == 255


def of_12_layers_and_heads(length):
    """A view of GPT-2's size with weights as various as a causal model's can be."""
    raw = np.tril(RNG.rand(12, 12, length, length) ** 6) + np.eye(length) * 1e-6
    q, k = RNG.randn(2, 12, length, 12, 64)
    return AttentionView("x", raw / raw.sum(-1, keepdims=True), ["word"] * length, q=q, k=k)


def test_queries_and_keys_of_a_large_model_are_shown_where_one_asks_for_them():
    view = of_12_layers_and_heads(64)
    small = attention_page([view], title="t")
    assert len(small.encode()) < 400_000
    (data,) = data_of(small)["views"]
    assert data["q"] is None
    megabytes = float(re.search(r"take (\S+) MB, more than the 1 MB", data["why_no_product"])[1])
    assert 1.5 < megabytes < 1.8 and f"--vector_mb={megabytes} " in data["why_no_product"]
    large = attention_page([view], title="t", vector_bytes=round(megabytes * 1e6))
    assert data_of(large)["views"][0]["q"]
    assert len(large.encode()) - len(small.encode()) < megabytes * 1e6


def test_what_a_text_says_stays_text():
    table = PageTable(EVIL, EVIL, [EVIL], [[EVIL]], [0])
    view = dataclasses.replace(VIEW, name=EVIL, queries=[EVIL] * T, measures={EVIL: RNG.rand(L, N)})
    page = attention_page([view], title=EVIL, about=EVIL, tables=[table])
    assert page.count("<script") == 2 == page.count("</script>")  # its own
    assert "<!--" not in page and "<title>&lt;/script&gt;" in page
    data = data_of(page)
    assert data["views"][0]["queries"] == [EVIL] * T and data["tables"][0]["rows"] == [[EVIL]]


def test_nothing_is_loaded():
    page = attention_page([VIEW], title="t")
    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert not re.search(r"@import|url\(", page)


def test_a_measure_that_is_not_a_number_is_none():
    measures = {"induction": [[np.nan] * N] * L}
    page = attention_page([dataclasses.replace(VIEW, measures=measures)], title="t")
    assert data_of(page)["views"][0]["measures"] == {"induction": [[None] * N] * L}


@pytest.mark.parametrize(("change", "message"), [
    ({"queries": ["a"]}, r"weights of 'cross': wanted \[L, N, 1, 7\] .* got \[3, 4, 5, 7\]"),
    ({"keys": None}, r"weights of 'cross': wanted \[L, N, 5, 5\]"),
    ({"weights": -WEIGHTS}, r"weights of 'cross': wanted numbers in \[0, 1\], got -0"),
    ({"weights": WEIGHTS * np.nan}, r"weights of 'cross': wanted numbers in \[0, 1\], got nan"),
    ({"measures": {"m": [1.0]}}, r"measures\['m'\] of 'cross': wanted \[L, N\] = \(3, 4\), got"),
])  # fmt: skip
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention_page([dataclasses.replace(VIEW, **change)], title="t")
    with pytest.raises(ValueError, match="views: wanted at least one"):
        attention_page([], title="t")
