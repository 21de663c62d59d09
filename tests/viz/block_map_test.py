"""Block maps: every block in the colour of what the mask says of it, queries down."""

import functools
import importlib

import numpy as np
import pytest

from qkv_jax import viz
from qkv_jax.ops import masks
from qkv_jax.ops.masks import ALL, NONE, SOME
from qkv_jax.viz import style

module = importlib.import_module("qkv_jax.viz.block_map")  # the package has the function


def blocks(fig):
    """What is drawn: [q blocks, kv blocks] of NONE, SOME and ALL."""
    return np.asarray(fig.axes[0].collections[0].get_array())


def legend(fig):
    return [text.get_text() for text in fig.axes[0].get_legend().get_texts()]


def darkened(fig):
    """Opacity of what is drawn over the blocks, by cell."""
    return np.asarray(fig.axes[0].images[0].get_array())[..., 3]


def test_each_block_shows_what_the_mask_allows_in_it():
    fig = viz.block_map(masks.Causal(), 12, 12, block_q=4, block_kv=4)
    expected = [[SOME, NONE, NONE], [ALL, SOME, NONE], [ALL, ALL, SOME]]
    assert (blocks(fig) == expected).all()
    assert legend(fig) == ["full: 3 (33%)", "partial: 3 (33%)", "skipped: 3 (33%)"]
    (ax,) = fig.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ax.get_legend().get_title().get_text() == "blocks of 4 × 4"
    assert ax.get_ylim() == (12, 0) and ax.get_xlim() == (0, 12)


def test_the_three_colours_are_the_legends():
    from matplotlib.colors import to_rgba

    fig = viz.block_map(masks.Causal(), 12, 12, block_q=4, block_kv=4)
    mesh, patches = fig.axes[0].collections[0], fig.axes[0].get_legend().get_patches()
    drawn = [mesh.cmap(mesh.norm(value)) for value in (ALL, SOME, NONE)]
    assert drawn == [patch.get_facecolor() for patch in patches]
    assert drawn == [to_rgba(c) for c in (style.BLUE, style.LIGHT_BLUE, style.HIDDEN)]


def test_inside_partial_blocks_what_is_allowed_is_darker():
    fig = viz.block_map(masks.Causal(), 12, 12, block_q=4, block_kv=4)
    diagonal = np.kron(np.eye(3), np.ones((4, 4)))
    assert ((darkened(fig) > 0) == np.tril(np.ones((12, 12))) * diagonal).all()


def test_a_last_block_ends_where_the_plane_ends():
    fig = viz.block_map(masks.Prefix(100), 10, 21, block_q=4, block_kv=8)
    assert (blocks(fig) == [[ALL, ALL, SOME], [ALL, ALL, SOME], [SOME, SOME, SOME]]).all()
    corners = fig.axes[0].collections[0].get_coordinates()
    assert list(corners[0, :, 0]) == [0, 8, 16, 21] and list(corners[:, 0, 1]) == [0, 4, 8, 10]
    assert darkened(fig).shape == (10, 21)


def test_a_head_and_a_batch_row_are_drawn_by_themselves():
    mask = masks.Lengths(np.array([4, 8, 2])) & masks.SlidingWindow(np.array([0, 100]), None)
    draw = functools.partial(viz.block_map, mask, 8, 8, num_heads=2, block_q=4, block_kv=4)
    assert (blocks(draw(row=0, head=1)) == [[ALL, NONE], [ALL, NONE]]).all()
    assert (blocks(draw(row=1, head=1)) == ALL).all()
    fig = draw(row=2, head=0)
    assert (blocks(fig) == [[SOME, NONE], [NONE, NONE]]).all()
    assert ((darkened(fig) > 0).nonzero()[0] == [0, 0, 1]).all()


def test_positions_move_the_picture():
    fig = viz.block_map(
        masks.Causal(), 4, 12, block_q=4, block_kv=4, q_positions=np.array([[0, 1, 2, 3], [8] * 4]),
        row=1,
    )  # fmt: skip
    assert (blocks(fig) == [[ALL, ALL, SOME]]).all()


def test_a_large_plane_is_drawn_in_cells_and_a_huge_one_in_blocks_alone(monkeypatch):
    monkeypatch.setattr(module, "MOST_CELLS", 4)
    cells = darkened(viz.block_map(masks.Causal(), 11, 11, block_q=11, block_kv=11))
    allowed = np.pad(np.tril(np.ones((11, 11))), ((0, 1), (0, 1)))
    shares = allowed.reshape(4, 3, 4, 3).mean((1, 3))
    np.testing.assert_allclose(cells, module.FAINT * shares, rtol=1e-6)
    monkeypatch.setattr(module, "MOST_ELEMENTS", 120)
    assert not viz.block_map(masks.Causal(), 11, 11, block_q=11, block_kv=11).axes[0].images


def test_the_title_is_the_mask_as_one_writes_it():
    mask = ~(masks.Causal() & masks.Prefix(3)) & (masks.Chunked(5) | ~masks.Dilated(7))
    title = viz.block_map(mask, 16, 16).axes[0].get_title("left")
    assert title.replace("\n", " ") == (
        "~(Causal() & Prefix(length=3)) & (Chunked(size=5) | ~Dilated(stride=7))"
    )
    for _ in range(4):
        mask = mask | mask
    lines = viz.block_map(mask, 16, 16).axes[0].get_title("left").splitlines()
    assert len(lines) == 2 and lines[1].endswith(" …") and max(map(len, lines)) <= 64


def test_the_file_is_the_same_every_time(tmp_path):
    files = [
        viz.save_figure(viz.block_map(masks.Causal(), 40, 40), tmp_path / f"{i}.png")
        for i in range(2)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("mask", "T", "options", "message"),
    [
        (np.ones((8, 8), bool), 8, {}, "mask must be a Mask"),
        (masks.Causal(), 0, {}, "T, S and num_heads must be positive; got 0, 8 and 1"),
        (masks.Causal(), 4, {}, "q_positions: 4 queries, 8 keys"),
        (masks.Causal(), 8, {"head": 2, "num_heads": 2}, r"head must be one of 0 \.\.\. 1; got 2"),
        (masks.Causal(), 8, {"row": 1}, r"row must be one of 0 \.\.\. 0; got 1"),
        (masks.Segments(np.zeros(5, int)), 8, {}, "Segments.q_ids"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(mask, T, options, message):
    with pytest.raises(ValueError, match=message):
        viz.block_map(mask, T, 8, **options)
