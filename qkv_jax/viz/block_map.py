"""Which blocks of the T x S plane a mask lets `attention` skip, as a picture."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import jax
import numpy as np

from qkv_jax.ops import arguments, masks, plan
from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.masks import ALL, NONE, SOME, Mask
from qkv_jax.ops.plan import Grid
from qkv_jax.ops.prepared import grid_of
from qkv_jax.viz import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {NONE: style.HIDDEN, SOME: style.LIGHT_BLUE, ALL: style.BLUE}
NAMES = {ALL: "full", SOME: "partial", NONE: "skipped"}  # in the order of the legend
LARGEST_MAP, SMALLEST_MAP = 4.6, 1.2  # in inches
MOST_ELEMENTS = 4096 * 4096  # of a plane whose elements are drawn, in partial blocks
MOST_CELLS = 1024  # along one side; beyond, a cell stands for several elements
FAINT = 0.4  # opacity of what is allowed in a partial block


@style.house_style()
def block_map(
    mask: Mask,
    T: int,
    S: int,
    *,
    num_heads: int = 1,
    block_q: int | None = None,
    block_kv: int | None = None,
    q_positions: np.ndarray | None = None,
    kv_positions: np.ndarray | None = None,
    head: int = 0,
    row: int = 0,
) -> Figure:
    """The plan of an attention: its blocks, and inside the partial ones what the mask allows.

    A skipped block is never computed, a full one needs no mask, and in a partial one the mask
    decides element by element: what it allows there is drawn darker, up to 4096 x 4096 elements.

    Args:
        mask: as `ops.attention` takes it.
        T: number of queries, down.
        S: number of keys, across.
        num_heads: N; only masks that tell heads apart need it.
        block_q, block_kv: queries and keys per block; by default those of `ops.attention`.
        q_positions, kv_positions: integers [T] or [B, T], and [S] or [B, S].
        head: the head to draw.
        row: the batch row to draw.

    Returns:
        A new figure.

    Raises:
        ValueError: an argument that does not fit, as `ops.attention` raises it, or no such head or
            batch row.
    """
    args = _arguments(mask, T, S, num_heads, q_positions, kv_positions)
    B = args.q.shape[0]
    for name, index, length in (("head", head, num_heads), ("row", row, B)):
        if not 0 <= index < length:
            raise ValueError(f"{name} must be one of 0 ... {length - 1}; got {index}")
    grid = grid_of(args, (block_q, block_kv))
    cover = plan.coverage(args.mask, args.q_pos, args.kv_pos, args.head, grid)
    cover = _of(cover, row, head)[0, 0]

    size = LARGEST_MAP / max(T, S)
    width, height = (max(SMALLEST_MAP, size * length) for length in (S, T))
    fig = style.new_figure(width + 2.3, height + 1.0)
    ax = fig.add_subplot()
    _draw_blocks(ax, cover, grid)
    if T * S <= MOST_ELEMENTS:
        _draw_elements(ax, _allowed(args, row, head) & _elements(cover == SOME, grid))
    ax.set_aspect(height / width * S / T)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.set_title(_title(mask), loc="left")
    _legend(ax, cover, grid)
    return fig


def _arguments(mask, T, S, num_heads, q_positions, kv_positions) -> Arguments:
    """The checked arguments of an attention with as many batch rows as mask and positions have."""
    if not isinstance(mask, Mask):
        raise ValueError(f"mask must be a Mask such as masks.Causal(); got {mask!r}")
    if min(T, S, num_heads) < 1:
        raise ValueError(f"T, S and num_heads must be positive; got {T}, {S} and {num_heads}")
    rows = [x.shape[0] for x in jax.tree.leaves(mask.aligned()) if np.ndim(x) == 4]
    rows += [len(x) for x in (q_positions, kv_positions) if np.ndim(x) == 2]
    shape = max(rows, default=1), num_heads
    q, k = (jax.ShapeDtypeStruct((shape[0], n, shape[1], 1), np.float32) for n in (T, S))
    return arguments.check(
        q, k, None, mask=mask, score=None, scale=None, sinks=None, dropout_rate=0.0,
        dropout_rng=None, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip


def _of(x: np.ndarray, row: int, head: int) -> np.ndarray:
    """What an aligned array, or a table as it is, says of one batch row and head."""
    if np.ndim(x) != 4:
        return x
    b, n = (i if length > 1 else 0 for i, length in zip((row, head), x.shape[:2], strict=True))
    return np.asarray(x)[b : b + 1, n : n + 1]


def _allowed(args: Arguments, row: int, head: int) -> np.ndarray:
    """What the mask allows, element by element: bool [T, S]."""
    mask, *where = jax.tree.map(
        lambda x: _of(x, row, head), (args.mask, args.q_pos, args.kv_pos, args.head)
    )
    shape = args.q.shape[1], args.k.shape[1]
    return np.broadcast_to(np.asarray(mask.mask(*where)), (1, 1, *shape))[0, 0]


def _elements(blocks: np.ndarray, grid: Grid) -> np.ndarray:
    """[q blocks, kv blocks] as [T, S]: for each element what is said of its block."""
    return blocks.repeat(grid.block_q, 0).repeat(grid.block_kv, 1)[: grid.T, : grid.S]


def _draw_blocks(ax: Axes, cover: np.ndarray, grid: Grid) -> None:
    from matplotlib.colors import ListedColormap

    edges = (
        np.minimum(np.arange(blocks + 1) * size, length)
        for blocks, size, length in (
            (grid.kv_blocks, grid.block_kv, grid.S),
            (grid.q_blocks, grid.block_q, grid.T),
        )
    )
    colours = ListedColormap([COLOURS[value] for value in (NONE, SOME, ALL)])
    thin = 0.8 if max(cover.shape) <= 64 else 0.0
    ax.pcolormesh(*edges, cover, cmap=colours, vmin=NONE, vmax=ALL, edgecolors="white", lw=thin)
    ax.invert_yaxis()


def _draw_elements(ax: Axes, allowed: np.ndarray) -> None:
    """Darkens what is allowed, bool [T, S], cell by cell."""
    from matplotlib.colors import to_rgb

    T, S = allowed.shape
    step_q, step_kv = (-(-length // MOST_CELLS) for length in (T, S))
    allowed = np.pad(allowed, ((0, -T % step_q), (0, -S % step_kv)))
    cells = allowed.reshape(allowed.shape[0] // step_q, step_q, -1, step_kv).mean((1, 3))
    colours = np.empty((*cells.shape, 4), np.float32)
    colours[..., :3] = to_rgb(style.BLUE)
    colours[..., 3] = FAINT * cells
    extent = (0, cells.shape[1] * step_kv, cells.shape[0] * step_q, 0)
    ax.imshow(colours, extent=extent, aspect="auto", interpolation="nearest", zorder=2)
    ax.set(xlim=(0, S), ylim=(T, 0))


def _legend(ax: Axes, cover: np.ndarray, grid: Grid) -> None:
    from matplotlib.patches import Patch

    counts = {value: int((cover == value).sum()) for value in NAMES}
    handles = [
        Patch(facecolor=COLOURS[value], label=f"{name}: {n:,} ({n / cover.size:.0%})")
        for (value, name), n in zip(NAMES.items(), counts.values(), strict=True)
    ]
    ax.legend(
        handles=handles, title=f"blocks of {grid.block_q} × {grid.block_kv}", frameon=False,
        loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, alignment="left",
    )  # fmt: skip


def _title(mask: Mask) -> str:
    """The mask, on at most two lines."""
    return "\n".join(textwrap.wrap(_name(mask), 62, max_lines=2, placeholder=" …"))


def _name(mask: Mask, within: int = 0) -> str:
    """The mask as one would write it: its repr, with |, & and ~, which bind in this order."""
    match mask:
        case masks.Or():
            name, binds = f"{_name(mask.left)} | {_name(mask.right)}", 0
        case masks.And():
            name, binds = f"{_name(mask.left, 1)} & {_name(mask.right, 1)}", 1
        case masks.Not():
            name, binds = f"~{_name(mask.inner, 2)}", 2
        case _:
            return repr(mask)
    return f"({name})" if binds < within else name
